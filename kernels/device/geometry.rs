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
}

impl Tile {
    /// Every tile, smallest first.
    pub const ALL: [Self; 4] = [Self::R2, Self::N16, Self::N64, Self::N128];

    /// Rows of a tile.
    #[must_use]
    pub const fn rows(self) -> usize {
        match self {
            Self::R2 => 2,
            Self::N16 => 16,
            Self::N64 => 64,
            Self::N128 => 128,
        }
    }

    /// The tile for `num_tokens` tokens that choose `top_k` of `num_experts` experts each. Every tile gives right
    /// results; the choice follows the rows that an expert gets on average, since the real counts are on the GPU only.
    ///
    /// No expert gets more rows than there are tokens. Up to two rows the products are read-once sums; beyond, a tile
    /// twice the average still leaves most experts with one tile, so that their weights are read once.
    #[must_use]
    pub fn choose(num_tokens: usize, top_k: usize, num_experts: usize) -> Self {
        let average = (num_tokens * top_k).div_ceil(num_experts.max(1));
        match num_tokens {
            0..=2 => Self::R2,
            3..=16 => Self::N16,
            _ => match average {
                0..=8 => Self::N16,
                9..=48 => Self::N64,
                _ => Self::N128,
            },
        }
    }

    /// The tile where the entry has none for few rows (statistics, contributions).
    #[must_use]
    pub fn at_least_64(self) -> Self {
        self.max(Self::N64)
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
        }
    }

    /// The same with the neurons' sums; tiles below 64 rows become 64.
    #[must_use]
    pub const fn gate_up_stats(tile: Tile) -> Self {
        match tile {
            Tile::N128 => Self::new("tenp_moe_gate_up_stats_n128", tile, 64, 65_536),
            _ => Self::new("tenp_moe_gate_up_stats_n64", Tile::N64, 64, 49_152),
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
        }
    }

    /// Contributions of neurons; tiles below 64 rows become 64.
    #[must_use]
    pub const fn contribution(tile: Tile) -> Self {
        match tile {
            Tile::N128 => Self::new("tenp_moe_contribution_n128", tile, 128, 65_536),
            _ => Self::new("tenp_moe_contribution_n64", Tile::N64, 128, 49_152),
        }
    }

    /// The launch on `multiprocessors` multiprocessors: blocks stay and take tiles in turn, two to a multiprocessor, so
    /// the grid does not depend on the routing.
    #[must_use]
    pub const fn launch(&self, multiprocessors: usize, num_experts: usize) -> Launch {
        let table = 4 * (num_experts as u32 + 1);
        Launch::line(2 * multiprocessors as u32, 256, self.shared_bytes + table)
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
        assert_eq!(Tile::choose(1, 8, 128), Tile::R2);
        assert_eq!(Tile::choose(8, 8, 128), Tile::N16);
        assert_eq!(Tile::choose(64, 8, 128), Tile::N16);
        assert_eq!(Tile::choose(512, 8, 128), Tile::N64);
        assert_eq!(Tile::choose(8192, 8, 128), Tile::N128);
        assert_eq!(Tile::choose(0, 8, 0), Tile::R2);
        for tokens in 1..3000usize {
            assert!(
                Tile::choose(tokens, 6, 64) <= Tile::choose(tokens + 1, 6, 64),
                "{tokens}"
            );
        }
    }

    #[test]
    fn entries_name_their_tile_and_fit_a_block() {
        for tile in Tile::ALL {
            for product in [
                Product::gate_up(tile),
                Product::gate_up_stats(tile),
                Product::down(tile),
                Product::contribution(tile),
            ] {
                let suffix = format!(
                    "{}{}",
                    if product.tile == Tile::R2 { "r" } else { "n" },
                    product.tile.rows()
                );
                assert!(product.entry.ends_with(&suffix), "{product:?}");
                // 99 KiB: what a block may have on the smallest of the supported chips (8.6, 8.9).
                assert!(product.launch(132, 1023).shared_bytes <= 99 * 1024);
            }
            assert!(tile.at_least_64() >= Tile::N64);
        }
        assert_eq!(
            Product::down(Tile::N64).launch(132, 64),
            Launch::line(264, 256, 49_152 + 260)
        );
        assert!(Launch::line(0, 32, 0).is_empty());
    }

    proptest! {
        #[test]
        fn partials_always_fit(
            experts in proptest::collection::vec((0usize..300, 0usize..20), 1..40),
            tile in 0usize..4,
        ) {
            let tile = Tile::ALL[tile];
            let pitch = experts.iter().map(|e| 16 * e.1).max().unwrap_or(0);
            let rows: usize = experts.iter().map(|e| e.0).sum();
            let neurons: usize = experts.iter().map(|e| 16 * e.1).sum();
            let needed: usize = experts.iter().map(|e| e.0.div_ceil(tile.rows()) * 16 * e.1).sum();
            prop_assert!(needed <= partial_stride(rows, tile, pitch, neurons));
        }
    }
}
