//! The pass over the layers, one resident at a time.

use tenp_checkpoint::config::{Attention, RopeScaling};
use tenp_checkpoint::{Checkpoint, ModelConfig};
use tenp_kernels::Compute;
use tenp_kernels::cpu::elementwise::all_finite;
use tenp_kernels::cpu::rotary::{RotaryScaling, RotaryTable};

use crate::error::AtLayer;
use crate::head::Head;
use crate::weights::non_finite;
use crate::{ModelError, Observer, Run, Sequences};

/// Expert activations of the blocks of tokens in flight may take this much memory.
const BLOCK_BYTES: usize = 768 << 20;

/// Mean rows of an expert in a block, over which the packing of its weights is spread. The demo model was fastest between
/// 96 and 192 (0.39 to 0.40 s a pass); at 384 the activations of two blocks no longer stay near their cores (0.43 s).
const ROWS_PER_EXPERT: usize = 192;

const EMBEDDING: &str = "model.embed_tokens.weight";

/// A checkpoint that can be run.
#[derive(Clone, Copy, Debug)]
pub struct Model<'c> {
    checkpoint: &'c Checkpoint,
    compute: Compute,
}

impl<'c> Model<'c> {
    /// A model over an opened checkpoint.
    pub fn new(checkpoint: &'c Checkpoint, compute: Compute) -> Self {
        Self {
            checkpoint,
            compute,
        }
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &'c Checkpoint {
        self.checkpoint
    }

    /// Precision of the products.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// The model's shape.
    pub fn config(&self) -> &'c ModelConfig {
        self.checkpoint.config()
    }

    /// The output head.
    ///
    /// # Errors
    /// The head's tensor cannot be read.
    pub fn head(&self) -> Result<Head<'c>, ModelError> {
        Head::new(self.checkpoint, self.compute)
    }

    /// Starts a pass over `sequences`.
    ///
    /// # Errors
    /// A token id outside the vocabulary, a sequence longer than the model's positions, an unreadable embedding.
    pub fn begin<'s>(&self, sequences: &'s Sequences) -> Result<Run<'c, 's>, ModelError> {
        sequences.check(self.config())?;
        let config = self.config();
        let embedding = self
            .checkpoint
            .matrix(EMBEDDING, config.vocab_size, config.hidden_size)?;
        let mut hidden = vec![0.0; sequences.num_tokens() * config.hidden_size];
        for (&id, row) in sequences
            .ids()
            .iter()
            .zip(hidden.chunks_exact_mut(config.hidden_size))
        {
            embedding.dtype.widen(embedding.row(id as usize), row);
        }
        if !all_finite(&hidden) {
            return Err(non_finite(
                self.checkpoint,
                "embedding".to_owned(),
                |name| name == EMBEDDING,
            ));
        }
        let (rotary, softmax_factor) = rotary(config, sequences.max_positions())?;
        Ok(Run::new(*self, sequences, hidden, rotary, softmax_factor))
    }

    /// Runs all layers and returns the normed hidden states `[tokens, H]`.
    ///
    /// # Errors
    /// As [`Self::begin`], [`Run::step`] and [`Run::finish`].
    pub fn hidden_states(
        &self,
        sequences: &Sequences,
        observer: &dyn Observer,
    ) -> Result<Vec<f32>, ModelError> {
        let mut run = self.begin(sequences)?;
        while run.step(observer, None)? {}
        run.finish()
    }

    /// Bytes of hidden states per token.
    pub fn hidden_bytes_per_token(&self) -> usize {
        4 * self.config().hidden_size
    }

    /// Anonymous memory that a calibration pass over `tokens` tokens takes at most, about: hidden states, and one
    /// block's activations and statistics.
    pub fn working_bytes(&self, tokens: usize) -> usize {
        let config = self.config();
        let moe = &config.moe;
        let block = (self.block_tokens() * self.blocks_in_flight()).min(tokens);
        let heads = match &config.attention {
            Attention::Mla {
                num_heads,
                nope_dim,
                rope_dim,
                v_dim,
                ..
            } => num_heads * (3 * (nope_dim + rope_dim) + 3 * v_dim),
            Attention::Gqa {
                num_heads,
                num_kv_heads,
                head_dim,
                ..
            } => (2 * num_heads + 2 * num_kv_heads) * head_dim,
        };
        let routed = moe.top_k * (3 * config.hidden_size + moe.expert_width);
        let shared = 2 * config.hidden_size + moe.shared_width.max(config.dense_width);
        let block_values = block * (4 * config.hidden_size + heads.max(routed).max(shared));
        let statistics = 8 * 9 * (1 + config.moe_layers.len()) * moe.num_experts * moe.expert_width;
        tokens * self.hidden_bytes_per_token() + 4 * block_values + statistics
    }

    /// Tokens of a block: enough rows per expert to pay for packing its weights, few enough that a block's activations
    /// stay near the cores, and never more than [`BLOCK_BYTES`] of them.
    pub(crate) fn block_tokens(&self) -> usize {
        let moe = &self.config().moe;
        let paying = ROWS_PER_EXPERT * moe.num_experts.div_ceil(moe.top_k.max(1));
        let fitting = BLOCK_BYTES / self.block_bytes_per_token();
        paying.min(fitting).max(64)
    }

    /// Blocks that run at once: one on each thread where that many fit in [`BLOCK_BYTES`], else one on all threads.
    pub(crate) fn blocks_in_flight(&self) -> usize {
        let threads = rayon::current_num_threads();
        let bytes = threads * self.block_tokens() * self.block_bytes_per_token();
        if bytes <= BLOCK_BYTES { threads } else { 1 }
    }

    /// Bytes of expert activations per token of a block.
    fn block_bytes_per_token(&self) -> usize {
        let moe = &self.config().moe;
        (4 * moe.top_k * (3 * self.config().hidden_size + moe.expert_width)).max(1)
    }
}

/// The rotary table for `positions` positions, and the factor that YaRN puts on the softmax scale of MLA.
fn rotary(config: &ModelConfig, positions: usize) -> Result<(RotaryTable, f64), ModelError> {
    let (dim, mla) = match &config.attention {
        Attention::Mla { rope_dim, .. } => (*rope_dim, true),
        Attention::Gqa { head_dim, .. } => (*head_dim, false),
    };
    // arXiv 2309.00071 section 3.4, as DeepSeek-V2 uses it.
    let mscale = |factor: f64, m: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * m * factor.ln() + 1.0
        }
    };
    let (scaling, softmax) = match &config.rope.scaling {
        RopeScaling::None => (RotaryScaling::None, 1.0),
        RopeScaling::Linear { factor } => (RotaryScaling::Linear(*factor), 1.0),
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            mscale: m,
            mscale_all_dim,
            attention_factor,
            original_max_positions,
        } => {
            let both = m
                .filter(|m| *m != 0.0)
                .zip(mscale_all_dim.filter(|m| *m != 0.0));
            let attention_factor = attention_factor.unwrap_or(match both {
                Some((m, all)) => mscale(*factor, m) / mscale(*factor, all),
                None => mscale(*factor, 1.0),
            });
            let softmax = match mscale_all_dim {
                Some(all) if mla && *all != 0.0 => mscale(*factor, *all).powi(2),
                _ => 1.0,
            };
            let scaling = RotaryScaling::Yarn {
                factor: *factor,
                beta_fast: *beta_fast,
                beta_slow: *beta_slow,
                original_max_positions: *original_max_positions,
                attention_factor,
            };
            (scaling, softmax)
        }
    };
    let table = RotaryTable::new(
        dim,
        config.rope.theta,
        &scaling,
        config.rope.interleaved,
        positions,
    )
    .at(0)?;
    Ok((table, softmax))
}
