//! What a layer consists of, and where each part is in its arena.

use half::bf16;
use tenp_checkpoint::config::{Attention, QkNorm};
use tenp_checkpoint::{Checkpoint, ExpertTensors, Part, dense};
use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::cpu::router::RouterSpec;
use tenp_kernels::device::PaddedLayout;
use tenp_kernels::{KernelError, MatrixView, RaggedLayout};

use super::arena::{Contents, Experts, Slot};
use crate::ModelError;
use crate::error::AtLayer;
use crate::mlp::MoeWeights;
use crate::weights::{expert, view};

/// A projection: `[outputs, inner]`, and its bias.
pub(super) struct Projection {
    pub(super) weight: Slot<bf16>,
    pub(super) bias: Option<Slot<f32>>,
    pub(super) outputs: usize,
    pub(super) inner: usize,
}

/// The query of multi-head latent attention.
pub(super) enum MlaQuery {
    Plain(Projection),
    /// Down, norm, up.
    LowRank(Projection, Slot<f32>, Projection),
}

/// Where the attention's weights are.
pub(super) enum AttentionWeights {
    Mla {
        query: MlaQuery,
        kv_down: Projection,
        kv_norm: Slot<f32>,
        kv_up: Projection,
    },
    Gqa {
        query: Projection,
        key: Projection,
        value: Projection,
        /// Of queries and keys.
        norms: Option<[Slot<f32>; 2]>,
    },
}

/// A SwiGLU block that every token goes through.
pub(super) struct Mlp {
    pub(super) gate: Projection,
    pub(super) up: Projection,
    pub(super) down: Projection,
}

/// A MoE block.
pub(super) struct Moe {
    /// `[E, H]`.
    pub(super) router: Slot<f32>,
    pub(super) correction_bias: Option<Slot<f32>>,
    pub(super) spec: RouterSpec,
    pub(super) widths: RaggedLayout,
    pub(super) layout: PaddedLayout,
    pub(super) neuron_offsets: Slot<i32>,
    pub(super) expert_widths: Slot<i32>,
    pub(super) gate_up: Slot<bf16>,
    pub(super) down_t: Slot<bf16>,
    pub(super) shared: Option<Mlp>,
    /// `[1, H]`.
    pub(super) shared_gate: Option<Projection>,
}

/// What follows the attention.
pub(super) enum Feed {
    Dense(Mlp),
    Moe(Box<Moe>),
}

/// A layer's weights in its arena.
pub(super) struct LayerWeights {
    pub(super) attention_norm: Slot<f32>,
    pub(super) mlp_norm: Slot<f32>,
    pub(super) attention: AttentionWeights,
    pub(super) output: Projection,
    pub(super) feed: Feed,
}

/// Looks up the tensors of one layer.
struct Reader<'a, 'c> {
    checkpoint: &'c Checkpoint,
    layer: usize,
    replaced: &'a [(usize, ExpertTensors<'c>)],
    contents: &'a mut Contents<'c>,
}

impl LayerWeights {
    /// Finds every tensor of `layer`, with some of its experts replaced; nothing is read yet.
    pub(super) fn find<'c>(
        checkpoint: &'c Checkpoint,
        layer: usize,
        replaced: &[(usize, ExpertTensors<'c>)],
    ) -> Result<(Self, Contents<'c>), ModelError> {
        let mut contents = Contents::default();
        let mut reader = Reader {
            checkpoint,
            layer,
            replaced,
            contents: &mut contents,
        };
        let (attention, output) = reader.attention()?;
        let weights = Self {
            attention_norm: reader.norm("input_layernorm", checkpoint.config().hidden_size)?,
            mlp_norm: reader.norm("post_attention_layernorm", checkpoint.config().hidden_size)?,
            attention,
            output,
            feed: reader.feed()?,
        };
        Ok((weights, contents))
    }
}

impl<'c> Reader<'_, 'c> {
    fn norm(&mut self, name: &str, len: usize) -> Result<Slot<f32>, ModelError> {
        let name = format!("model.layers.{}.{name}.weight", self.layer);
        Ok(self
            .contents
            .floats(self.checkpoint.vector_f32(&name, len)?))
    }

    fn projection(
        &mut self,
        name: &str,
        outputs: usize,
        inner: usize,
        bias: bool,
    ) -> Result<Projection, ModelError> {
        let prefix = format!("model.layers.{}.self_attn.{name}", self.layer);
        let weight = self
            .checkpoint
            .matrix(&format!("{prefix}.weight"), outputs, inner)?;
        let bias = bias
            .then(|| {
                self.checkpoint
                    .vector_f32(&format!("{prefix}.bias"), outputs)
            })
            .transpose()?;
        Ok(Projection {
            weight: self.contents.bf16(view(&weight).at(self.layer)?),
            bias: bias.map(|b| self.contents.floats(b)),
            outputs,
            inner,
        })
    }

    fn attention(&mut self) -> Result<(AttentionWeights, Projection), ModelError> {
        let config = self.checkpoint.config();
        let hidden = config.hidden_size;
        match &config.attention {
            Attention::Mla {
                num_heads,
                q_lora_rank,
                kv_lora_rank,
                nope_dim,
                rope_dim,
                v_dim,
                bias,
            } => {
                let q_width = num_heads * (nope_dim + rope_dim);
                let query = match *q_lora_rank {
                    None => MlaQuery::Plain(self.projection("q_proj", q_width, hidden, false)?),
                    Some(rank) => MlaQuery::LowRank(
                        self.projection("q_a_proj", rank, hidden, *bias)?,
                        self.norm("self_attn.q_a_layernorm", rank)?,
                        self.projection("q_b_proj", q_width, rank, false)?,
                    ),
                };
                let (rank, pitch) = (*kv_lora_rank, kv_lora_rank + rope_dim);
                let attention = AttentionWeights::Mla {
                    query,
                    kv_down: self.projection("kv_a_proj_with_mqa", pitch, hidden, *bias)?,
                    kv_norm: self.norm("self_attn.kv_a_layernorm", rank)?,
                    kv_up: self.projection(
                        "kv_b_proj",
                        num_heads * (nope_dim + v_dim),
                        rank,
                        false,
                    )?,
                };
                let output = self.projection("o_proj", hidden, num_heads * v_dim, *bias)?;
                Ok((attention, output))
            }
            Attention::Gqa {
                num_heads,
                num_kv_heads,
                head_dim,
                qkv_bias,
                o_bias,
                qk_norm,
                ..
            } => {
                let (q_width, kv_width) = (num_heads * head_dim, num_kv_heads * head_dim);
                let lens = match qk_norm {
                    QkNorm::None => None,
                    QkNorm::PerHead => Some([*head_dim; 2]),
                    QkNorm::WholeProjection => Some([q_width, kv_width]),
                };
                let norms = match lens {
                    None => None,
                    Some([q, k]) => Some([
                        self.norm("self_attn.q_norm", q)?,
                        self.norm("self_attn.k_norm", k)?,
                    ]),
                };
                let attention = AttentionWeights::Gqa {
                    query: self.projection("q_proj", q_width, hidden, *qkv_bias)?,
                    key: self.projection("k_proj", kv_width, hidden, *qkv_bias)?,
                    value: self.projection("v_proj", kv_width, hidden, *qkv_bias)?,
                    norms,
                };
                Ok((
                    attention,
                    self.projection("o_proj", hidden, q_width, *o_bias)?,
                ))
            }
        }
    }

    fn feed(&mut self) -> Result<Feed, ModelError> {
        let config = self.checkpoint.config();
        let (hidden, layer) = (config.hidden_size, self.layer);
        if config.moe_layers.binary_search(&layer).is_err() {
            let width = config.dense_width;
            let mut matrix = |part, rows, cols| {
                let matrix = self.checkpoint.matrix(&dense(layer, part), rows, cols)?;
                Ok::<_, ModelError>(self.plain(view(&matrix).at(layer)?))
            };
            return Ok(Feed::Dense(Mlp {
                gate: matrix(Part::Gate, width, hidden)?,
                up: matrix(Part::Up, width, hidden)?,
                down: matrix(Part::Down, hidden, width)?,
            }));
        }
        let MoeWeights {
            mut experts,
            router,
            spec,
            shared,
            ..
        } = MoeWeights::new(self.checkpoint, layer)?;
        for (id, tensors) in self.replaced {
            experts[*id] = expert(tensors).at(layer)?;
        }
        let widths = experts.iter().map(ExpertWeights::width).collect();
        let widths = RaggedLayout::new(widths).at(layer)?;
        let layout = PaddedLayout::new(&widths).at(layer)?;
        let (gate_up, down_t) = self.contents.experts(Experts {
            hidden,
            layout: layout.clone(),
            weights: experts,
        });
        let (shared, shared_gate) = match shared {
            None => (None, None),
            Some((weights, gate)) => {
                let mlp = Mlp {
                    gate: self.plain(weights.gate),
                    up: self.plain(weights.up),
                    down: self.plain(weights.down),
                };
                (Some(mlp), gate.map(|g| self.plain(g)))
            }
        };
        Ok(Feed::Moe(Box::new(Moe {
            router: self.contents.f32(router),
            correction_bias: spec
                .correction_bias
                .clone()
                .map(|bias| self.contents.floats(bias)),
            spec,
            widths,
            neuron_offsets: self.contents.integers(layout.neuron_offsets().to_vec()),
            expert_widths: self.contents.integers(layout.widths().to_vec()),
            layout,
            gate_up,
            down_t,
            shared,
            shared_gate,
        })))
    }

    /// A projection without bias.
    fn plain(&mut self, weight: MatrixView<'c>) -> Projection {
        Projection {
            outputs: weight.rows(),
            inner: weight.cols(),
            weight: self.contents.bf16(weight),
            bias: None,
        }
    }
}

/// The hidden size that the kernels can take.
pub(super) fn check(checkpoint: &Checkpoint) -> Result<(), KernelError> {
    let config = checkpoint.config();
    let hidden = config.hidden_size;
    if hidden.is_multiple_of(8) {
        return Ok(());
    }
    Err(KernelError::Invalid {
        what: "hidden size",
        why: format!(
            "{hidden} is not a multiple of 8, which the GPU kernels need; use --device cpu"
        ),
    })
}
