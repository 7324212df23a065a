//! The pass over the layers, one resident at a time.

use std::ops::Range;

use tenp_checkpoint::config::{Attention, RopeScaling};
use tenp_checkpoint::{Checkpoint, Dtype, ModelConfig};
use tenp_kernels::cpu::elementwise::{add, all_finite};
use tenp_kernels::cpu::linear::PackedRows;
use tenp_kernels::cpu::moe::{ExpertActivations, ExpertWeights};
use tenp_kernels::cpu::norm::rms_norm;
use tenp_kernels::cpu::rotary::{RotaryScaling, RotaryTable};
use tenp_kernels::cpu::router::Routing;
use tenp_kernels::{Compute, ExpertGroups};

use crate::attention::{AttentionBlock, AttentionBuffers};
use crate::error::AtLayer;
use crate::head::Head;
use crate::mlp::{MoeWeights, dense_block};
use crate::weights::find_non_finite;
use crate::{KvCache, ModelError, Sequences};

/// Expert activations of one block of tokens may take this much memory.
const BLOCK_BYTES: usize = 768 << 20;

/// Mean rows of an expert in a block, over which the packing of its weights is spread. Between 96 and 640 the demo model's
/// speed differed by less than the machine's noise.
const ROWS_PER_EXPERT: usize = 384;

/// A checkpoint that can be run.
#[derive(Clone, Copy, Debug)]
pub struct Model<'c> {
    checkpoint: &'c Checkpoint,
    compute: Compute,
}

/// One block of tokens at one MoE layer, as an [`Observer`] sees it.
pub struct MoeBlock<'a> {
    /// The model's own layer index.
    pub layer: usize,
    /// Label of the block's sequences (calibration domain).
    pub label: usize,
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// The routed experts' weights.
    pub experts: &'a [ExpertWeights<'a>],
    /// `[rows, H]` what the experts received.
    pub x: &'a [f32],
    /// `[rows, H]` residual stream before the layer's norm.
    pub residual: &'a [f32],
    /// Chosen experts and weights.
    pub routing: &'a Routing,
    /// The same, grouped by expert.
    pub groups: &'a ExpertGroups,
    /// h and y of every row.
    pub activations: &'a ExpertActivations,
    /// `[rows, H]` Σ g y of the routed experts.
    pub combined: &'a [f32],
}

/// Watches a pass over the layers.
pub trait Observer {
    /// A MoE layer has run its routed experts on a block of tokens.
    ///
    /// # Errors
    /// Ends the pass.
    fn moe(&mut self, _block: &MoeBlock<'_>) -> Result<(), ModelError> {
        Ok(())
    }

    /// A MoE layer's whole output (routed and shared) for a block: `[rows, H]`.
    ///
    /// # Errors
    /// Ends the pass.
    fn moe_output(
        &mut self,
        _layer: usize,
        _rows: Range<usize>,
        _output: &[f32],
    ) -> Result<(), ModelError> {
        Ok(())
    }

    /// Whether [`Self::moe`] accumulates neuron sums, for which the expert outputs are kept in a second form.
    fn scores_neurons(&self) -> bool {
        false
    }

    /// `tokens` more rows have passed `layer`.
    fn progress(&mut self, _layer: usize, _tokens: usize) {}
}

/// Watches nothing.
impl Observer for () {}

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
        let embedding = self.checkpoint.matrix(
            "model.embed_tokens.weight",
            config.vocab_size,
            config.hidden_size,
        )?;
        let mut hidden = vec![0.0; sequences.num_tokens() * config.hidden_size];
        for (&id, row) in sequences
            .ids()
            .iter()
            .zip(hidden.chunks_exact_mut(config.hidden_size))
        {
            embedding.dtype.widen(embedding.row(id as usize), row);
        }
        let (rotary, softmax_factor) = rotary(config, sequences.max_positions())?;
        Ok(Run {
            model: *self,
            sequences,
            positions: sequences.positions(),
            rotary,
            softmax_factor,
            hidden,
            layer: 0,
            buffers: Buffers::default(),
        })
    }

    /// Runs all layers and returns the normed hidden states `[tokens, H]`.
    ///
    /// # Errors
    /// As [`Self::begin`], [`Run::step`] and [`Run::finish`].
    pub fn hidden_states(
        &self,
        sequences: &Sequences,
        observer: &mut dyn Observer,
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
        let block = self.block_tokens().min(tokens);
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
        let per_row = 3 * self.config().hidden_size + moe.expert_width;
        let fitting = BLOCK_BYTES / (4 * moe.top_k * per_row).max(1);
        paying.min(fitting).max(64)
    }
}

/// A pass in progress: hidden states of all tokens after some layers.
pub struct Run<'c, 's> {
    model: Model<'c>,
    sequences: &'s Sequences,
    positions: Vec<u32>,
    rotary: RotaryTable,
    softmax_factor: f64,
    hidden: Vec<f32>,
    layer: usize,
    buffers: Buffers,
}

/// Intermediate results of a block, kept from block to block and layer to layer so that they are allocated once.
#[derive(Default)]
struct Buffers {
    /// Normed input of attention, then of the MLP.
    x: Vec<f32>,
    router_input: PackedRows,
    /// Output of the MoE layer.
    combined: Vec<f32>,
    attention: AttentionBuffers,
    experts: ExpertActivations,
}

impl Run<'_, '_> {
    /// The layer that the next step runs.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Runs one layer; false when there is none left. The next layer is read ahead meanwhile.
    ///
    /// # Errors
    /// Unreadable tensors, or activations that are not finite.
    pub fn step(
        &mut self,
        observer: &mut dyn Observer,
        cache: Option<&mut KvCache>,
    ) -> Result<bool, ModelError> {
        let layer = self.layer;
        let checkpoint = self.model.checkpoint;
        if layer == self.model.config().num_layers {
            return Ok(false);
        }
        // Read-ahead on its own thread: on a cold file the call itself can wait for the disk's queue.
        std::thread::scope(|scope| {
            scope.spawn(|| checkpoint.prefetch_layer(layer + 1));
            self.run_layer(layer, observer, cache)
        })?;
        checkpoint.release_layer(layer);
        self.layer += 1;
        Ok(true)
    }

    fn run_layer(
        &mut self,
        layer: usize,
        observer: &mut dyn Observer,
        mut cache: Option<&mut KvCache>,
    ) -> Result<(), ModelError> {
        let checkpoint = self.model.checkpoint;
        let config = checkpoint.config();
        let (width, eps) = (config.hidden_size, config.rms_norm_eps);
        let norm_weight = |name: &str| {
            checkpoint.vector_f32(&format!("model.layers.{layer}.{name}.weight"), width)
        };
        let (attention_norm, mlp_norm) = (
            norm_weight("input_layernorm")?,
            norm_weight("post_attention_layernorm")?,
        );
        let moe = config.moe_layers.binary_search(&layer).is_ok();
        let moe = if moe {
            Some(MoeWeights::new(checkpoint, layer)?)
        } else {
            None
        };
        let attention = AttentionBlock {
            checkpoint,
            compute: self.model.compute,
            layer,
            rotary: &self.rotary,
            softmax_factor: self.softmax_factor,
        };
        let Buffers {
            x,
            router_input,
            combined,
            attention: heads,
            experts,
        } = &mut self.buffers;
        for block in self.sequences.blocks(self.model.block_tokens()) {
            let rows = self.sequences.rows(&block);
            let hidden = &mut self.hidden[rows.start * width..rows.end * width];
            x.resize(hidden.len(), 0.0);
            rms_norm(hidden, &attention_norm, eps, x).at(layer)?;
            let cached = cache.as_deref_mut().map(|c| c.layer(layer));
            let positions = &self.positions[rows.clone()];
            let out = attention.run(x, self.sequences, &block, positions, cached, heads)?;
            add(hidden, out);
            rms_norm(hidden, &mlp_norm, eps, x).at(layer)?;
            if let Some(moe) = &moe {
                combined.resize(hidden.len(), 0.0);
                experts.keep_packed_outputs(observer.scores_neurons());
                let routed = moe.routed(self.model.compute, x, router_input, experts, combined)?;
                observer.moe(&MoeBlock {
                    layer,
                    label: self.sequences.spans()[block.start].label,
                    rows: rows.clone(),
                    experts: &moe.experts,
                    x,
                    residual: hidden,
                    routing: &routed.routing,
                    groups: &routed.groups,
                    activations: experts,
                    combined,
                })?;
                experts.keep_packed_outputs(false);
                moe.add_shared(self.model.compute, x, experts, combined)?;
                observer.moe_output(layer, rows.clone(), combined)?;
                add(hidden, combined);
            } else {
                dense_block(checkpoint, self.model.compute, layer, x, experts)?;
                add(hidden, experts.outputs());
            }
            if !all_finite(hidden) {
                return Err(non_finite(checkpoint, layer));
            }
            observer.progress(layer, rows.len());
        }
        Ok(())
    }

    /// Applies the final norm: `[tokens, H]`.
    ///
    /// # Errors
    /// The norm's tensor cannot be read.
    pub fn finish(self) -> Result<Vec<f32>, ModelError> {
        let config = self.model.config();
        let weight = self
            .model
            .checkpoint
            .vector_f32("model.norm.weight", config.hidden_size)?;
        let mut out = self.hidden;
        tenp_kernels::cpu::norm::rms_norm_strided(
            &mut out,
            config.hidden_size,
            &weight,
            config.rms_norm_eps,
        )
        .at(config.num_layers)?;
        Ok(out)
    }
}

/// Says which tensor of the layer makes the activations NaN or infinite, if one does.
fn non_finite(checkpoint: &Checkpoint, layer: usize) -> ModelError {
    let tensor = find_non_finite(checkpoint, |name| {
        tenp_checkpoint::layer_of(name) == Some(layer)
    });
    let cause = match tensor {
        Some(name) => {
            format!("tensor {name} holds a NaN or an infinity; the checkpoint is damaged")
        }
        None if checkpoint.dtype() == Dtype::F16 => {
            "no weight of the layer is; the sums overflow with these inputs".to_owned()
        }
        None => "no weight of the layer is; an earlier tensor or the embedding may be damaged"
            .to_owned(),
    };
    ModelError::NonFinite {
        layer,
        expert: None,
        cause,
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
