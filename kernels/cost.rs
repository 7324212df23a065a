//! What an operation costs at least: FLOPs and bytes, for tests, benches and reports. One multiply-add is two FLOPs;
//! bytes are those that must cross the memory bus once, however good the caches are.

/// Bytes of a bf16.
const BF16: f64 = 2.0;

/// Bytes of an f32.
const F32: f64 = 4.0;

/// One expert of a layer, and the rows it got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertWork {
    /// Neurons, without padding.
    pub width: usize,
    /// Routed rows.
    pub rows: usize,
}

impl ExpertWork {
    /// Whether there is anything to compute.
    const fn is_hit(&self) -> bool {
        self.width > 0 && self.rows > 0
    }
}

/// The routed work of one MoE layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoeWork {
    /// Hidden size H.
    pub hidden: usize,
    /// Tokens T.
    pub tokens: usize,
    /// Every expert.
    pub experts: Vec<ExpertWork>,
}

/// What a machine can do, in FLOP/s and byte/s: measured, not from a data sheet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Dense bf16 products.
    pub flops: f64,
    /// Bytes read and written by a device copy.
    pub bytes: f64,
}

impl Ceilings {
    /// Of an H200, as measured once: cuBLAS bf16 products of random numbers, and a copy.
    pub const H200: Self = Self {
        flops: 788e12,
        bytes: 4.3e12,
    };
}

/// Which term of a floor is the larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Moving the bytes.
    Bytes,
    /// The arithmetic.
    Flops,
}

impl Bound {
    /// As reports name it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Flops => "flops",
        }
    }
}

/// A time that no implementation can beat.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Floor {
    /// Seconds.
    pub seconds: f64,
    /// What it comes from.
    pub bound: Bound,
}

/// max(flops / rate, bytes / bandwidth).
#[must_use]
pub fn floor(flops: f64, bytes: f64, ceilings: Ceilings) -> Floor {
    let (arithmetic, memory) = (flops / ceilings.flops, bytes / ceilings.bytes);
    if arithmetic > memory {
        Floor {
            seconds: arithmetic,
            bound: Bound::Flops,
        }
    } else {
        Floor {
            seconds: memory,
            bound: Bound::Bytes,
        }
    }
}

/// FLOPs of `out[rows, outputs] = x[rows, inner] · W`.
#[must_use]
pub fn dense_flops(rows: usize, inner: usize, outputs: usize) -> f64 {
    2.0 * rows as f64 * inner as f64 * outputs as f64
}

/// Bytes of the same in bf16: both operands read, the result written.
#[must_use]
pub fn dense_bytes(rows: usize, inner: usize, outputs: usize) -> f64 {
    let (rows, inner, outputs) = (rows as f64, inner as f64, outputs as f64);
    BF16 * (rows * inner + inner * outputs + rows * outputs)
}

/// FLOPs of causal attention: `pairs` (query, key) pairs that see each other, per head.
#[must_use]
pub fn attention_flops(pairs: usize, heads: usize, qk_dim: usize, v_dim: usize) -> f64 {
    2.0 * pairs as f64 * heads as f64 * (qk_dim + v_dim) as f64
}

/// Pairs of a sequence whose last `queries` positions ask `keys` keys, each those up to its own, at most `window`.
#[must_use]
pub fn causal_pairs(queries: usize, keys: usize, window: Option<usize>) -> usize {
    (0..queries)
        .map(|i| (keys + i + 1).saturating_sub(queries))
        .map(|seen| window.map_or(seen, |w| seen.min(w)))
        .sum()
}

/// Bytes of attention in bf16: queries, keys and values read, results written.
#[must_use]
pub fn attention_bytes(
    queries: usize,
    keys: usize,
    heads: (usize, usize),
    (qk_dim, v_dim): (usize, usize),
) -> f64 {
    let of_queries = queries * heads.0 * (qk_dim + v_dim);
    let of_keys = keys * heads.1 * (qk_dim + v_dim);
    BF16 * (of_queries + of_keys) as f64
}

/// FLOPs of comparing every segment of the rows with every one of the columns, in so many of their parts.
#[must_use]
pub fn segment_flops((rows, columns): (usize, usize), parts: usize, hidden: usize) -> f64 {
    parts as f64 * dense_flops(rows, hidden, columns)
}

/// Bytes of the same: those parts of both read in bf16; the best matches are small.
#[must_use]
pub fn segment_bytes((rows, columns): (usize, usize), parts: usize, hidden: usize) -> f64 {
    BF16 * parts as f64 * (rows + columns) as f64 * hidden as f64
}

impl MoeWork {
    /// Σ rows · width: (row, neuron) pairs.
    fn pairs(&self) -> f64 {
        let pairs = |e: &ExpertWork| e.rows as f64 * e.width as f64;
        self.experts.iter().map(pairs).sum()
    }

    /// Rows of experts that have neurons.
    #[must_use]
    pub fn rows(&self) -> usize {
        let hit = self.experts.iter().filter(|e| e.is_hit());
        hit.map(|e| e.rows).sum()
    }

    /// Neurons of experts that got rows.
    #[must_use]
    pub fn neurons(&self) -> usize {
        let hit = self.experts.iter().filter(|e| e.is_hit());
        hit.map(|e| e.width).sum()
    }

    /// FLOPs of the gate and up products.
    #[must_use]
    pub fn gate_up_flops(&self) -> f64 {
        4.0 * self.pairs() * self.hidden as f64
    }

    /// FLOPs of the down product, and as many of the contribution's product with y.
    #[must_use]
    pub fn down_flops(&self) -> f64 {
        2.0 * self.pairs() * self.hidden as f64
    }

    /// 6 H Σ rows · width: the three products.
    #[must_use]
    pub fn forward_flops(&self) -> f64 {
        self.gate_up_flops() + self.down_flops()
    }

    /// 8 H Σ rows · width: forward and contribution with y.
    #[must_use]
    pub fn scored_flops(&self) -> f64 {
        self.forward_flops() + self.down_flops()
    }

    /// Bytes of the weights of experts that got rows.
    #[must_use]
    pub fn weight_bytes(&self) -> f64 {
        3.0 * BF16 * self.neurons() as f64 * self.hidden as f64
    }

    /// Weights once, the tokens read and the combined output written, in bf16. What lies between (h, y) could stay on
    /// the chip, so it does not count.
    #[must_use]
    pub fn forward_bytes(&self) -> f64 {
        self.weight_bytes() + 2.0 * BF16 * self.tokens as f64 * self.hidden as f64
    }

    /// Bytes of gate and up as a launch of its own: weights, the rows' tokens once, h written.
    #[must_use]
    pub fn gate_up_bytes(&self) -> f64 {
        let weights = self.weight_bytes() * 2.0 / 3.0;
        weights + BF16 * (self.tokens as f64 * self.hidden as f64 + self.pairs())
    }

    /// Bytes of down as a launch of its own: weights, h read, y written in bf16.
    #[must_use]
    pub fn down_bytes(&self) -> f64 {
        let weights = self.weight_bytes() / 3.0;
        weights + BF16 * (self.pairs() + self.rows() as f64 * self.hidden as f64)
    }

    /// Bytes of the contributions as a launch of its own: weights, h and y read; the sums are small.
    #[must_use]
    pub fn contribution_bytes(&self) -> f64 {
        self.down_bytes()
    }

    /// FLOPs of the contributions in Gram form: h · G for the two parts of G.
    #[must_use]
    pub fn gram_contribution_flops(&self) -> f64 {
        let square = |e: &ExpertWork| e.rows as f64 * (e.width as f64).powi(2);
        4.0 * self.experts.iter().map(square).sum::<f64>()
    }

    /// Bytes of the same as a launch of its own: both parts of G and h read.
    #[must_use]
    pub fn gram_contribution_bytes(&self) -> f64 {
        let hit = self.experts.iter().filter(|e| e.is_hit());
        2.0 * BF16 * hit.map(|e| (e.width as f64).powi(2)).sum::<f64>() + BF16 * self.pairs()
    }

    /// FLOPs of every expert's G, whatever it got.
    #[must_use]
    pub fn gram_flops(&self) -> f64 {
        2.0 * self.hidden as f64 * self.squares()
    }

    /// Bytes of the same: the down projections read, G written and read in f32, and its parts written.
    #[must_use]
    pub fn gram_bytes(&self) -> f64 {
        let neurons: usize = self.experts.iter().map(|e| e.width).sum();
        BF16 * (neurons * self.hidden) as f64 + (2.0 * F32 + 2.0 * BF16) * self.squares()
    }

    /// Σ width².
    fn squares(&self) -> f64 {
        let square = |e: &ExpertWork| (e.width as f64).powi(2);
        self.experts.iter().map(square).sum()
    }

    /// Whether the contributions of a pass, whose tokens come in `blocks` blocks, take less time in Gram form: ⟨w, y⟩ as
    /// `h · G` (G = `W_downᵀ · W_down`, made once for the pass) instead of `y · W_down`.
    ///
    /// Every launch is taken to take its floor. With y that is 2 H flops a neuron and row, and y is written and read in
    /// bf16 for it; in Gram form 4 · width flops, since G has two parts, and 2 H · width a neuron once. So where arithmetic
    /// decides it wins only below a width of H/2, with more than H · width / (H − 2 · width) rows an expert.
    #[must_use]
    pub fn gram_wins(&self, blocks: usize, ceilings: Ceilings) -> bool {
        let again = blocks.max(1) as f64 - 1.0;
        let seconds = |flops, bytes| floor(flops, bytes, ceilings).seconds;
        let y = BF16 * self.rows() as f64 * self.hidden as f64;
        let weights = self.weight_bytes() / 3.0;
        let plain = seconds(
            self.down_flops(),
            self.contribution_bytes() + y + again * weights,
        );
        let parts = self.gram_contribution_bytes() - BF16 * self.pairs();
        let gram = seconds(
            self.gram_contribution_flops(),
            self.gram_contribution_bytes() + again * parts,
        );
        gram + seconds(self.gram_flops(), self.gram_bytes()) < plain
    }

    /// Bytes of the direction scoring: y in f32 read once, x and the residual stream read, the combined output written.
    #[must_use]
    pub fn direction_bytes(&self) -> f64 {
        F32 * self.hidden as f64 * (self.rows() as f64 + 3.0 * self.tokens as f64)
    }

    /// Bytes of a layer with all scores: what the forward pass, the contributions and the directions move.
    #[must_use]
    pub fn scored_bytes(&self) -> f64 {
        self.forward_bytes() + self.contribution_bytes() + self.direction_bytes()
    }

    /// The floor of the forward pass of the layer's experts.
    #[must_use]
    pub fn forward_floor(&self, ceilings: Ceilings) -> Floor {
        floor(self.forward_flops(), self.forward_bytes(), ceilings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qwen3(rows: usize, hit: usize, tokens: usize) -> MoeWork {
        let of = |e| ExpertWork {
            width: 768,
            rows: if e < hit { rows } else { 0 },
        };
        MoeWork {
            hidden: 2048,
            tokens,
            experts: (0..128).map(of).collect(),
        }
    }

    #[test]
    fn a_decoded_token_of_qwen3_is_bound_by_its_experts_weights() {
        let work = qwen3(1, 8, 1);
        assert_eq!(work.weight_bytes(), 8.0 * 3.0 * 2.0 * 768.0 * 2048.0);
        let floor = work.forward_floor(Ceilings::H200);
        assert_eq!(floor.bound, Bound::Bytes);
        // 8 experts of 9.44 MB at 4.3 TB/s.
        assert!((floor.seconds * 1e6 - 17.6).abs() < 0.1, "{floor:?}");
    }

    #[test]
    fn a_long_prefill_is_bound_by_arithmetic() {
        // 65,536 tokens, eight experts each.
        let work = qwen3(4096, 128, 65_536);
        let floor = work.forward_floor(Ceilings::H200);
        assert_eq!(floor.bound, Bound::Flops);
        assert!((floor.seconds * 1e6 - 6279.0).abs() < 1.0, "{floor:?}");
        assert_eq!(work.scored_flops() * 3.0, work.forward_flops() * 4.0);
    }

    #[test]
    fn experts_without_rows_or_neurons_cost_nothing() {
        let mut work = qwen3(10, 3, 15);
        let before = (work.forward_flops(), work.forward_bytes(), work.rows());
        work.experts.push(ExpertWork { width: 0, rows: 7 });
        work.experts.push(ExpertWork { width: 50, rows: 0 });
        assert_eq!(
            (work.forward_flops(), work.forward_bytes(), work.rows()),
            before
        );
        assert_eq!((work.rows(), work.neurons()), (30, 3 * 768));
    }

    #[test]
    fn pruning_scales_flops_and_weights_alike() {
        let (whole, mut half) = (qwen3(64, 128, 1024), qwen3(64, 128, 1024));
        for expert in &mut half.experts {
            expert.width /= 2;
        }
        assert_eq!(half.forward_flops() * 2.0, whole.forward_flops());
        assert_eq!(half.weight_bytes() * 2.0, whole.weight_bytes());
        for (of, flops) in [
            (
                MoeWork::gate_up_bytes as fn(&MoeWork) -> f64,
                MoeWork::gate_up_flops(&whole),
            ),
            (MoeWork::down_bytes, whole.down_flops()),
            (MoeWork::contribution_bytes, whole.down_flops()),
        ] {
            assert!(of(&half) < of(&whole) && flops > 0.0);
        }
    }

    #[test]
    fn dense_and_attention_count_their_terms() {
        assert_eq!(dense_flops(8192, 8192, 8192), 2.0 * 8192f64.powi(3));
        assert_eq!(dense_bytes(2, 3, 5), 2.0 * (6.0 + 15.0 + 10.0));
        assert_eq!(causal_pairs(4, 4, None), 10);
        assert_eq!(causal_pairs(4, 4, Some(2)), 7);
        assert_eq!(causal_pairs(1, 100, None), 100);
        // More queries than keys: the first see none.
        assert_eq!(causal_pairs(3, 1, None), 1);
        assert_eq!(attention_flops(10, 2, 16, 8), 2.0 * 10.0 * 2.0 * 24.0);
        assert_eq!(
            attention_bytes(3, 5, (4, 2), (16, 8)),
            2.0 * (3.0 * 96.0 + 5.0 * 48.0)
        );
    }

    #[test]
    fn segments_count_the_parts_that_are_compared() {
        assert_eq!(segment_flops((2, 3), 2, 8), 2.0 * 2.0 * 2.0 * 3.0 * 8.0);
        assert_eq!(segment_bytes((2, 3), 2, 8), 2.0 * 2.0 * 5.0 * 8.0);
    }

    #[test]
    fn direction_reads_every_row_once() {
        let work = qwen3(4096, 128, 65_536);
        let want = 4.0 * 2048.0 * (524_288.0 + 3.0 * 65_536.0);
        assert_eq!(work.direction_bytes(), want);
    }

    /// A layer of one width, whose experts share `tokens` tokens evenly.
    fn even(
        hidden: usize,
        width: usize,
        (experts, top_k): (usize, usize),
        tokens: usize,
    ) -> MoeWork {
        let rows = tokens * top_k / experts;
        MoeWork {
            hidden,
            tokens,
            experts: vec![ExpertWork { width, rows }; experts],
        }
    }

    #[test]
    fn the_gram_form_wins_where_experts_are_narrow_and_rows_are_many() {
        let wins = |work: MoeWork| work.gram_wins(work.tokens.div_ceil(16_384), Ceilings::H200);
        let (v2_lite, v3) = ((64, 6), (256, 8));
        for tokens in [1, 512, 16_384, 262_144, 1 << 24] {
            assert!(!wins(even(2048, 1408, v2_lite, tokens)));
            assert!(!wins(even(2048, 1024, v2_lite, tokens)));
        }
        // H w / (H − 2 w) rows an expert: 2253 of DeepSeek-V2-Lite at half its width, 4779 of V3.
        for (hidden, width, shape, rows) in [(2048, 704, v2_lite, 2253), (7168, 2048, v3, 4779)] {
            let tokens = |rows: usize| (rows * shape.0).div_ceil(shape.1);
            assert!(!wins(even(hidden, width, shape, tokens(rows * 95 / 100))));
            assert!(wins(even(hidden, width, shape, tokens(rows * 101 / 100))));
        }
        // G's own operations are in vain where it gets no rows.
        let mut one = even(7168, 2048, v3, 200_000);
        assert!(wins(one.clone()));
        for expert in &mut one.experts[64..] {
            expert.rows = 0;
        }
        assert!(!wins(one));
        assert!(!wins(even(7168, 0, v3, 200_000)));
    }

    #[test]
    fn the_gram_form_counts_its_terms() {
        let mut work = even(64, 16, (2, 1), 20);
        work.experts.push(ExpertWork { width: 8, rows: 0 });
        assert_eq!(work.gram_contribution_flops(), 4.0 * 20.0 * 256.0);
        assert_eq!(
            work.gram_contribution_bytes(),
            4.0 * 2.0 * 256.0 + 2.0 * 20.0 * 16.0
        );
        assert_eq!(work.gram_flops(), 2.0 * 64.0 * (512.0 + 64.0));
        assert_eq!(work.gram_bytes(), 2.0 * 64.0 * 40.0 + 12.0 * (512.0 + 64.0));
    }
}
