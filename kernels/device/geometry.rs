//! Grid, block and shared memory of the kernels, and the choice of tiles: pure functions, the same for the GPU and for
//! the executor.

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Launch {
    /// `blocks` blocks in a row.
    #[must_use]
    pub const fn line(blocks: u32, threads: u32, shared_bytes: u32) -> Self {
        Self {
            grid: [blocks, 1, 1],
            threads,
            shared_bytes,
        }
    }

    /// A block per row whose threads take `items` items each row, at most 256 at a time.
    #[must_use]
    pub(super) fn row_per_block(rows: usize, items: usize) -> Self {
        let threads = items.clamp(1, 256).next_multiple_of(32);
        Self::line(rows as u32, threads as u32, 0)
    }

    /// Whether there is nothing to launch (CUDA refuses a grid with a zero in it).
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.grid[0] == 0 || self.grid[1] == 0 || self.grid[2] == 0
    }
}

/// Rows of a tile of the grouped products; what the entries' names end in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tile {
    /// Two rows without matrix instructions.
    R2,
    /// 16 rows.
    N16,
    /// 64 rows.
    N64,
    /// 128 rows.
    N128,
    /// 8 rows with the warpgroup products of sm_90, as all that follow.
    W8,
    /// 16 rows.
    W16,
    /// 32 rows.
    W32,
    /// 64 rows.
    W64,
    /// 128 rows.
    W128,
    /// 192 rows.
    W192,
    /// 256 rows.
    W256,
}

impl Tile {
    /// The tiles of every GPU, smallest first.
    pub const ALL: [Self; 4] = [Self::R2, Self::N16, Self::N64, Self::N128];

    /// Those of sm_90 besides: every width that wgmma takes and that the products are made for.
    pub const WGMMA: [Self; 7] = [
        Self::W8,
        Self::W16,
        Self::W32,
        Self::W64,
        Self::W128,
        Self::W192,
        Self::W256,
    ];

    /// The tiles of a GPU with, or without, the products of sm_90.
    pub fn of(wgmma: bool) -> impl Iterator<Item = Self> {
        let more: &[Self] = if wgmma { &Self::WGMMA } else { &[] };
        Self::ALL.iter().chain(more).copied()
    }

    /// Rows of a tile.
    #[must_use]
    pub const fn rows(self) -> usize {
        match self {
            Self::R2 => 2,
            Self::W8 => 8,
            Self::N16 | Self::W16 => 16,
            Self::W32 => 32,
            Self::N64 | Self::W64 => 64,
            Self::N128 | Self::W128 => 128,
            Self::W192 => 192,
            Self::W256 => 256,
        }
    }

    /// Whether it needs sm_90.
    #[must_use]
    pub const fn needs_wgmma(self) -> bool {
        matches!(
            self,
            Self::W8 | Self::W16 | Self::W32 | Self::W64 | Self::W128 | Self::W192 | Self::W256
        )
    }

    /// The tile for `num_tokens` tokens that choose `top_k` of `num_experts` experts each. Every tile gives right
    /// results; the choice follows the rows that an expert gets on average, since the real counts are on the GPU only.
    ///
    /// No expert gets more rows than there are tokens. Up to two rows the products are read-once sums; beyond, a tile
    /// twice the average still leaves most experts with one tile, so that their weights are read once. With `wgmma`
    /// (sm_90) the same holds from 8 rows on average, and past 96 a tile is as large as the average, up to 256.
    #[must_use]
    pub fn choose(wgmma: bool, num_tokens: usize, top_k: usize, num_experts: usize) -> Self {
        let average = (num_tokens * top_k).div_ceil(num_experts.max(1));
        match (num_tokens, average) {
            (0..=2, _) => Self::R2,
            (3..=16, _) | (_, 0..=8) => Self::N16,
            (_, 9..=48) if !wgmma => Self::N64,
            _ if !wgmma => Self::N128,
            (_, 9..=16) => Self::W32,
            (_, 17..=40) => Self::W64,
            (_, 41..=128) => Self::W128,
            (_, 129..=192) => Self::W192,
            _ => Self::W256,
        }
    }

    /// The tile for statistics and contributions: those of every GPU have none for few rows.
    #[must_use]
    pub const fn with_sums(self) -> Self {
        match self {
            Self::R2 | Self::N16 => Self::N64,
            tile => tile,
        }
    }
}

/// One entry of a grouped product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Its name.
    pub entry: &'static str,
    /// Rows of its tiles.
    pub tile: Tile,
    /// Weight rows of its tiles: neurons of gate and up, outputs of down.
    pub weight_tile: usize,
    /// Shared memory besides the table of experts.
    pub shared_bytes: u32,
}

impl Product {
    const fn new(entry: &'static str, tile: Tile, weight_tile: usize, shared_bytes: u32) -> Self {
        Self {
            entry,
            tile,
            weight_tile,
            shared_bytes,
        }
    }

    /// h = silu(gate x) · (up x), without statistics.
    #[must_use]
    pub const fn gate_up(tile: Tile) -> Self {
        match tile {
            Tile::R2 => Self::new("tenp_moe_gate_up_r2", tile, 32, 0),
            Tile::N16 => Self::new("tenp_moe_gate_up_n16", tile, 64, 73_728),
            Tile::N64 => Self::new("tenp_moe_gate_up_n64", tile, 64, 49_152),
            Tile::N128 => Self::new("tenp_moe_gate_up_n128", tile, 64, 65_536),
            Tile::W8 => Self::wide("tenp_moe_gate_up_w8", tile, 64, 8, 0),
            Tile::W16 => Self::wide("tenp_moe_gate_up_w16", tile, 64, 8, 0),
            Tile::W32 => Self::wide("tenp_moe_gate_up_w32", tile, 64, 8, 0),
            Tile::W64 => Self::wide("tenp_moe_gate_up_w64", tile, 64, 8, 0),
            Tile::W128 => Self::wide("tenp_moe_gate_up_w128", tile, 64, 6, 0),
            Tile::W192 => Self::wide("tenp_moe_gate_up_w192", tile, 64, 4, 0),
            Tile::W256 => Self::wide("tenp_moe_gate_up_w256", tile, 64, 4, 0),
        }
    }

    /// An entry for sm_90 (`hopper.cuh`): stages of 128 weight rows and a tile of activations, 64 elements each; the
    /// tile in bf16 on its way, and `extra_bytes`; barriers.
    const fn wide(
        entry: &'static str,
        tile: Tile,
        weight_tile: usize,
        stages: u32,
        extra_bytes: u32,
    ) -> Self {
        let rows = tile.rows() as u32;
        let staged = (2 * rows * weight_tile as u32 + extra_bytes).next_multiple_of(1024);
        let bytes = stages * (16_384 + 128 * rows) + staged + 16 * stages + 16;
        Self::new(entry, tile, weight_tile, bytes)
    }

    /// The entry that gathers its rows by `token_of_row` itself, where that is another: those for sm_90.
    #[must_use]
    pub(super) fn gathering(&self) -> &'static str {
        match self.entry {
            "tenp_moe_gate_up_w8" => "tenp_moe_gate_up_gather_w8",
            "tenp_moe_gate_up_w16" => "tenp_moe_gate_up_gather_w16",
            "tenp_moe_gate_up_w32" => "tenp_moe_gate_up_gather_w32",
            "tenp_moe_gate_up_w64" => "tenp_moe_gate_up_gather_w64",
            "tenp_moe_gate_up_w128" => "tenp_moe_gate_up_gather_w128",
            "tenp_moe_gate_up_w192" => "tenp_moe_gate_up_gather_w192",
            "tenp_moe_gate_up_w256" => "tenp_moe_gate_up_gather_w256",
            "tenp_moe_gate_up_stats_w8" => "tenp_moe_gate_up_stats_gather_w8",
            "tenp_moe_gate_up_stats_w16" => "tenp_moe_gate_up_stats_gather_w16",
            "tenp_moe_gate_up_stats_w32" => "tenp_moe_gate_up_stats_gather_w32",
            "tenp_moe_gate_up_stats_w64" => "tenp_moe_gate_up_stats_gather_w64",
            "tenp_moe_gate_up_stats_w128" => "tenp_moe_gate_up_stats_gather_w128",
            "tenp_moe_gate_up_stats_w192" => "tenp_moe_gate_up_stats_gather_w192",
            "tenp_moe_gate_up_stats_w256" => "tenp_moe_gate_up_stats_gather_w256",
            entry => entry,
        }
    }

    /// The same with the neurons' sums, with a tile [`Tile::with_sums`].
    #[must_use]
    pub const fn gate_up_stats(tile: Tile) -> Self {
        let tile = tile.with_sums();
        match tile {
            Tile::W8 => Self::wide("tenp_moe_gate_up_stats_w8", tile, 64, 8, 0),
            Tile::W16 => Self::wide("tenp_moe_gate_up_stats_w16", tile, 64, 8, 0),
            Tile::W32 => Self::wide("tenp_moe_gate_up_stats_w32", tile, 64, 8, 0),
            Tile::W64 => Self::wide("tenp_moe_gate_up_stats_w64", tile, 64, 8, 0),
            Tile::W128 => Self::wide("tenp_moe_gate_up_stats_w128", tile, 64, 6, 0),
            Tile::W192 => Self::wide("tenp_moe_gate_up_stats_w192", tile, 64, 4, 0),
            Tile::W256 => Self::wide("tenp_moe_gate_up_stats_w256", tile, 64, 4, 0),
            Tile::N128 => Self::new("tenp_moe_gate_up_stats_n128", tile, 64, 65_536),
            _ => Self::new("tenp_moe_gate_up_stats_n64", tile, 64, 49_152),
        }
    }

    /// y = down h.
    #[must_use]
    pub const fn down(tile: Tile) -> Self {
        match tile {
            Tile::R2 => Self::new("tenp_moe_down_r2", tile, 64, 4096),
            Tile::N16 => Self::new("tenp_moe_down_n16", tile, 128, 73_728),
            Tile::N64 => Self::new("tenp_moe_down_n64", tile, 128, 49_152),
            Tile::N128 => Self::new("tenp_moe_down_n128", tile, 128, 65_536),
            Tile::W8 => Self::wide_down("tenp_moe_down_w8", tile, 8),
            Tile::W16 => Self::wide_down("tenp_moe_down_w16", tile, 8),
            Tile::W32 => Self::wide_down("tenp_moe_down_w32", tile, 8),
            Tile::W64 => Self::wide_down("tenp_moe_down_w64", tile, 8),
            Tile::W128 => Self::wide_down("tenp_moe_down_w128", tile, 5),
            Tile::W192 => Self::wide_down("tenp_moe_down_w192", tile, 3),
            Tile::W256 => Self::wide_down("tenp_moe_down_w256", tile, 3),
        }
    }

    /// A sum of squares per row and warp comes on top.
    const fn wide_down(entry: &'static str, tile: Tile, stages: u32) -> Self {
        Self::wide(entry, tile, 128, stages, 4 * 8 * tile.rows() as u32)
    }

    /// Contributions of neurons, with a tile [`Tile::with_sums`].
    #[must_use]
    pub const fn contribution(tile: Tile) -> Self {
        let tile = tile.with_sums();
        match tile {
            Tile::W8 => Self::wide("tenp_moe_contribution_w8", tile, 128, 8, 1024),
            Tile::W16 => Self::wide("tenp_moe_contribution_w16", tile, 128, 8, 1024),
            Tile::W32 => Self::wide("tenp_moe_contribution_w32", tile, 128, 8, 1024),
            Tile::W64 => Self::wide("tenp_moe_contribution_w64", tile, 128, 8, 1024),
            Tile::W128 => Self::wide("tenp_moe_contribution_w128", tile, 128, 5, 1024),
            Tile::W192 => Self::wide("tenp_moe_contribution_w192", tile, 128, 4, 1024),
            Tile::W256 => Self::wide("tenp_moe_contribution_w256", tile, 128, 3, 1024),
            Tile::N128 => Self::new("tenp_moe_contribution_n128", tile, 128, 65_536),
            _ => Self::new("tenp_moe_contribution_n64", tile, 128, 49_152),
        }
    }

    /// The entry of [`Self::contribution`] that takes Gram matrices in place of y.
    #[must_use]
    pub(super) fn in_gram_form(&self) -> &'static str {
        match self.entry {
            "tenp_moe_contribution_n64" => "tenp_moe_contribution_gram_n64",
            "tenp_moe_contribution_n128" => "tenp_moe_contribution_gram_n128",
            "tenp_moe_contribution_w8" => "tenp_moe_contribution_gram_w8",
            "tenp_moe_contribution_w16" => "tenp_moe_contribution_gram_w16",
            "tenp_moe_contribution_w32" => "tenp_moe_contribution_gram_w32",
            "tenp_moe_contribution_w64" => "tenp_moe_contribution_gram_w64",
            "tenp_moe_contribution_w128" => "tenp_moe_contribution_gram_w128",
            "tenp_moe_contribution_w192" => "tenp_moe_contribution_gram_w192",
            "tenp_moe_contribution_w256" => "tenp_moe_contribution_gram_w256",
            entry => entry,
        }
    }

    /// The launch on `multiprocessors` multiprocessors: blocks stay and take tiles in turn, two to a multiprocessor (one
    /// of those for sm_90, which fill it), so the grid does not depend on the routing.
    #[must_use]
    pub const fn launch(&self, multiprocessors: usize, num_experts: usize) -> Launch {
        let shared = self.shared_bytes + 4 * (num_experts as u32 + 1);
        if self.tile.needs_wgmma() {
            Launch::line(multiprocessors as u32, 384, shared)
        } else {
            Launch::line(2 * multiprocessors as u32, 256, shared)
        }
    }
}

/// Elements per table that the partials of a product over `num_rows` rows can need, whatever the routing.
///
/// Expert e needs ⌈rows_e / t⌉ · width_e ≤ ⌊rows_e / t⌋ · pitch + width_e, and the floors add up to at most
/// ⌊num_rows / t⌋.
#[must_use]
pub const fn partial_stride(
    num_rows: usize,
    tile: Tile,
    hidden_pitch: usize,
    num_neurons: usize,
) -> usize {
    num_rows / tile.rows() * hidden_pitch + num_neurons
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tiles_grow_with_the_rows_of_an_expert() {
        for (tokens, portable, wgmma) in [
            (1, Tile::R2, Tile::R2),
            (8, Tile::N16, Tile::N16),
            (64, Tile::N16, Tile::N16),
            (256, Tile::N64, Tile::W32),
            (512, Tile::N64, Tile::W64),
            (1024, Tile::N128, Tile::W128),
            (3000, Tile::N128, Tile::W192),
            (8192, Tile::N128, Tile::W256),
        ] {
            assert_eq!(Tile::choose(false, tokens, 8, 128), portable, "{tokens}");
            assert_eq!(Tile::choose(true, tokens, 8, 128), wgmma, "{tokens}");
        }
        assert_eq!(Tile::choose(true, 0, 8, 0), Tile::R2);
        for wgmma in [false, true] {
            for tokens in 1..6000usize {
                assert!(
                    Tile::choose(wgmma, tokens, 6, 64) <= Tile::choose(wgmma, tokens + 1, 6, 64),
                    "{tokens}"
                );
            }
        }
    }

    #[test]
    fn entries_name_their_tile_and_fit_a_block() {
        for tile in Tile::of(true) {
            for product in [
                Product::gate_up(tile),
                Product::gate_up_stats(tile),
                Product::down(tile),
                Product::contribution(tile),
            ] {
                let kind = match product.tile {
                    Tile::R2 => "r",
                    tile if tile.needs_wgmma() => "w",
                    _ => "n",
                };
                let suffix = format!("_{kind}{}", product.tile.rows());
                assert!(product.entry.ends_with(&suffix), "{product:?}");
                assert_eq!(product.tile.needs_wgmma(), tile.needs_wgmma());
                // What a block may have: 99 KiB on the smallest of the supported chips (8.6, 8.9), 227 KiB on sm_90.
                let (experts, room) = if tile.needs_wgmma() {
                    (512, 227)
                } else {
                    (1023, 99)
                };
                assert!(
                    product.launch(132, experts).shared_bytes <= room * 1024,
                    "{product:?}"
                );
            }
            assert_eq!(tile.with_sums().with_sums(), tile.with_sums());
        }
        assert_eq!(
            Product::down(Tile::N64).launch(132, 64),
            Launch::line(264, 256, 49_152 + 260)
        );
        assert_eq!(
            Product::gate_up(Tile::W256).launch(132, 64),
            Launch::line(132, 384, 4 * 49_152 + 32_768 + 80 + 260)
        );
        assert_eq!(
            Product::gate_up(Tile::W64).gathering(),
            "tenp_moe_gate_up_gather_w64"
        );
        for tile in Tile::of(true) {
            let product = Product::contribution(tile);
            let gram = product.entry.replace("contribution", "contribution_gram");
            assert_eq!(product.in_gram_form(), gram);
        }
        assert!(Launch::line(0, 32, 0).is_empty());
    }

    proptest! {
        #[test]
        fn partials_always_fit(
            experts in proptest::collection::vec((0usize..300, 0usize..20), 1..40),
            tile in 0usize..11,
        ) {
            let tile = Tile::of(true).nth(tile).unwrap();
            let pitch = experts.iter().map(|e| 16 * e.1).max().unwrap_or(0);
            let rows: usize = experts.iter().map(|e| e.0).sum();
            let neurons: usize = experts.iter().map(|e| 16 * e.1).sum();
            let needed: usize = experts.iter().map(|e| e.0.div_ceil(tile.rows()) * 16 * e.1).sum();
            prop_assert!(needed <= partial_stride(rows, tile, pitch, neurons));
        }
    }
}
