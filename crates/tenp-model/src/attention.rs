//! The attention block: projections, norms, rotary positions, attention, output projection.

use std::ops::Range;

use rayon::prelude::*;
use tenp_checkpoint::config::{Attention, QkNorm};
use tenp_checkpoint::{Checkpoint, ModelConfig};
use tenp_kernels::Compute;
use tenp_kernels::cpu::attention::{AttentionShape, Sequence, attention};
use tenp_kernels::cpu::linear::{PackedRows, linear_packed};
use tenp_kernels::cpu::norm::rms_norm_strided;
use tenp_kernels::cpu::rotary::RotaryTable;

use crate::cache::CachedSequence;
use crate::error::AtLayer;
use crate::weights::view;
use crate::{ModelError, Sequences};

/// The compressed query and key/value norms of DeepSeek use this whatever `rms_norm_eps` says.
pub(crate) const LORA_NORM_EPS: f64 = 1e-6;

/// What one layer's attention needs besides its input.
pub(crate) struct AttentionBlock<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) compute: Compute,
    pub(crate) layer: usize,
    pub(crate) rotary: &'a RotaryTable,
    /// Factor of YaRN's `mscale_all_dim` on the softmax scale.
    pub(crate) softmax_factor: f64,
}

/// Intermediate results, kept from block to block so that they are allocated once.
#[derive(Default)]
pub(crate) struct AttentionBuffers {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// The query's low-rank form.
    low: Vec<f32>,
    /// Latent keys and values, and the rotary key.
    compressed: Vec<f32>,
    expanded: Vec<f32>,
    heads: Vec<f32>,
    out: Vec<f32>,
    packed: PackedRows,
    packed_low: PackedRows,
}

/// Bytes of [`AttentionBuffers`] for `rows` tokens.
pub(crate) fn buffer_bytes(config: &ModelConfig, compute: Compute, rows: usize) -> usize {
    let hidden = config.hidden_size;
    let (shape, _) = attention_shape(config, 0, 1.0);
    let heads = shape.num_heads * shape.v_dim;
    let keys_and_values = shape.num_kv_heads * (shape.qk_dim + shape.v_dim);
    let mut values = shape.num_heads * shape.qk_dim + keys_and_values + heads + hidden;
    let packed = |inner| PackedRows::bytes(compute, rows, inner);
    let mut packed_rows = packed(hidden.max(heads));
    if let Attention::Mla {
        num_heads,
        q_lora_rank,
        kv_lora_rank,
        nope_dim,
        rope_dim,
        v_dim,
        ..
    } = config.attention
    {
        let low = q_lora_rank.unwrap_or(0);
        values += low + kv_lora_rank + rope_dim + num_heads * (nope_dim + v_dim);
        packed_rows += packed(low.max(kv_lora_rank));
    }
    size_of::<f32>() * rows * values + packed_rows
}

#[cfg(test)]
impl AttentionBuffers {
    pub(crate) fn held_bytes(&self) -> usize {
        let values = [
            &self.queries,
            &self.keys,
            &self.values,
            &self.low,
            &self.compressed,
            &self.expanded,
            &self.heads,
            &self.out,
        ];
        let values: usize = values.iter().map(|buffer| size_of_val(&buffer[..])).sum();
        values + self.packed.held_bytes() + self.packed_low.held_bytes()
    }
}

/// The first `len` elements of a buffer, grown if need be; they hold what was there before.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Queries, keys and values of a block of rows.
struct Projected<'b> {
    queries: &'b [f32],
    keys: &'b [f32],
    values: &'b [f32],
}

impl AttentionBlock<'_> {
    fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    /// `x · Wᵀ + b` of the layer's projection `name`; the bias is read where `bias` says so.
    fn project<'b>(
        &self,
        x: &PackedRows,
        name: &str,
        outputs: usize,
        bias: bool,
        out: &'b mut Vec<f32>,
    ) -> Result<&'b mut [f32], ModelError> {
        let prefix = format!("model.layers.{}.self_attn.{name}", self.layer);
        let weight = self
            .checkpoint
            .matrix(&format!("{prefix}.weight"), outputs, x.inner())?;
        let bias = if bias {
            Some(
                self.checkpoint
                    .vector_f32(&format!("{prefix}.bias"), outputs)?,
            )
        } else {
            None
        };
        let out = sized(out, x.num_rows() * outputs);
        linear_packed(x, &view(&weight).at(self.layer)?, bias.as_deref(), out).at(self.layer)?;
        Ok(out)
    }

    /// Packs the first `inner` elements of every `pitch`.
    fn pack(
        &self,
        x: &[f32],
        inner: usize,
        pitch: usize,
        packed: &mut PackedRows,
    ) -> Result<(), ModelError> {
        packed.pack(self.compute, x, inner, pitch).at(self.layer)
    }

    fn norm_weight(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        Ok(self.checkpoint.vector_f32(
            &format!("model.layers.{}.self_attn.{name}.weight", self.layer),
            len,
        )?)
    }

    /// Attention output of a block of sequences: `x` is the normed input of `block`'s rows, `positions` and `cache` theirs.
    pub(crate) fn run<'b>(
        &self,
        x: &[f32],
        sequences: &Sequences,
        block: &Range<usize>,
        positions: &[u32],
        cache: Option<&mut [CachedSequence]>,
        buffers: &'b mut AttentionBuffers,
    ) -> Result<&'b [f32], ModelError> {
        let hidden = self.config().hidden_size;
        self.pack(x, hidden, hidden, &mut buffers.packed)?;
        let (shape, o_bias) = attention_shape(self.config(), self.layer, self.softmax_factor);
        match &self.config().attention {
            Attention::Mla { .. } => self.project_mla(positions, buffers)?,
            Attention::Gqa { .. } => self.project_gqa(positions, buffers)?,
        }
        let tokens = positions.len();
        let projected = Projected {
            queries: &buffers.queries[..tokens * shape.num_heads * shape.qk_dim],
            keys: &buffers.keys[..tokens * shape.num_kv_heads * shape.qk_dim],
            values: &buffers.values[..tokens * shape.num_kv_heads * shape.v_dim],
        };
        let width = shape.num_heads * shape.v_dim;
        let heads = sized(&mut buffers.heads, tokens * width);
        attend(&shape, &projected, sequences, block, cache, heads).at(self.layer)?;
        self.pack(heads, width, width, &mut buffers.packed)?;
        Ok(self.project(&buffers.packed, "o_proj", hidden, o_bias, &mut buffers.out)?)
    }

    fn project_mla(
        &self,
        positions: &[u32],
        buffers: &mut AttentionBuffers,
    ) -> Result<(), ModelError> {
        let Attention::Mla {
            num_heads,
            q_lora_rank,
            kv_lora_rank,
            nope_dim,
            rope_dim,
            v_dim,
            bias,
        } = self.config().attention
        else {
            unreachable!("called for MLA layers only");
        };
        let qk_dim = nope_dim + rope_dim;
        let AttentionBuffers {
            packed: x,
            packed_low,
            queries,
            ..
        } = buffers;
        let queries = if let Some(rank) = q_lora_rank {
            let low = self.project(x, "q_a_proj", rank, bias, &mut buffers.low)?;
            let norm = self.norm_weight("q_a_layernorm", rank)?;
            rms_norm_strided(low, rank, &norm, LORA_NORM_EPS).at(self.layer)?;
            self.pack(low, rank, rank, packed_low)?;
            self.project(packed_low, "q_b_proj", num_heads * qk_dim, false, queries)?
        } else {
            self.project(x, "q_proj", num_heads * qk_dim, false, queries)?
        };
        self.rotary
            .rotate(queries, qk_dim, positions)
            .at(self.layer)?;

        let pitch = kv_lora_rank + rope_dim;
        let compressed = self.project(
            x,
            "kv_a_proj_with_mqa",
            pitch,
            bias,
            &mut buffers.compressed,
        )?;
        let norm = self.norm_weight("kv_a_layernorm", kv_lora_rank)?;
        rms_norm_strided(compressed, pitch, &norm, LORA_NORM_EPS).at(self.layer)?;
        self.rotary
            .rotate(compressed, pitch, positions)
            .at(self.layer)?;
        self.pack(compressed, kv_lora_rank, pitch, packed_low)?;
        let per_token = num_heads * (nope_dim + v_dim);
        let expanded = self.project(
            packed_low,
            "kv_b_proj",
            per_token,
            false,
            &mut buffers.expanded,
        )?;

        let tokens = positions.len();
        let keys = sized(&mut buffers.keys, tokens * num_heads * qk_dim);
        let values = sized(&mut buffers.values, tokens * num_heads * v_dim);
        keys.par_chunks_exact_mut(num_heads * qk_dim)
            .zip(values.par_chunks_exact_mut(num_heads * v_dim))
            .zip(expanded.par_chunks_exact(per_token))
            .zip(compressed.par_chunks_exact(pitch))
            .with_min_len(64)
            .for_each(|(((keys, values), expanded), compressed)| {
                let heads = expanded.chunks_exact(nope_dim + v_dim);
                let out = keys
                    .chunks_exact_mut(qk_dim)
                    .zip(values.chunks_exact_mut(v_dim));
                for ((key, value), head) in out.zip(heads) {
                    key[..nope_dim].copy_from_slice(&head[..nope_dim]);
                    key[nope_dim..].copy_from_slice(&compressed[kv_lora_rank..]);
                    value.copy_from_slice(&head[nope_dim..]);
                }
            });
        Ok(())
    }

    fn project_gqa(
        &self,
        positions: &[u32],
        buffers: &mut AttentionBuffers,
    ) -> Result<(), ModelError> {
        let Attention::Gqa {
            num_heads,
            num_kv_heads,
            head_dim,
            qkv_bias,
            qk_norm,
            clip_qkv,
            ..
        } = &self.config().attention
        else {
            unreachable!("called for GQA layers only");
        };
        let eps = self.config().rms_norm_eps;
        let (q_width, kv_width) = (num_heads * head_dim, num_kv_heads * head_dim);
        let x = &buffers.packed;
        let queries = self.project(x, "q_proj", q_width, *qkv_bias, &mut buffers.queries)?;
        let keys = self.project(x, "k_proj", kv_width, *qkv_bias, &mut buffers.keys)?;
        let values = self.project(x, "v_proj", kv_width, *qkv_bias, &mut buffers.values)?;
        for (rows, name, width) in [
            (&mut *queries, "q_norm", q_width),
            (&mut *keys, "k_norm", kv_width),
        ] {
            let len = match qk_norm {
                QkNorm::None => continue,
                QkNorm::PerHead => *head_dim,
                QkNorm::WholeProjection => width,
            };
            rms_norm_strided(rows, len, &self.norm_weight(name, len)?, eps).at(self.layer)?;
        }
        if let Some(clip) = clip_qkv {
            let clip = *clip as f32;
            for v in queries.iter_mut().chain(keys.iter_mut()).chain(values) {
                *v = v.clamp(-clip, clip);
            }
        }
        self.rotary
            .rotate(queries, *head_dim, positions)
            .at(self.layer)?;
        self.rotary
            .rotate(keys, *head_dim, positions)
            .at(self.layer)?;
        Ok(())
    }
}

/// Heads and scale of a layer's attention, and whether its output projection has a bias. `softmax_factor` is YaRN's.
pub(crate) fn attention_shape(
    config: &ModelConfig,
    layer: usize,
    softmax_factor: f64,
) -> (AttentionShape, bool) {
    match &config.attention {
        Attention::Mla {
            num_heads,
            nope_dim,
            rope_dim,
            v_dim,
            bias,
            ..
        } => {
            let qk_dim = nope_dim + rope_dim;
            let shape = AttentionShape {
                num_heads: *num_heads,
                num_kv_heads: *num_heads,
                qk_dim,
                v_dim: *v_dim,
                scale: (softmax_factor / (qk_dim as f64).sqrt()) as f32,
                window: None,
            };
            (shape, *bias)
        }
        Attention::Gqa {
            num_heads,
            num_kv_heads,
            head_dim,
            o_bias,
            sliding_window,
            ..
        } => {
            let shape = AttentionShape {
                num_heads: *num_heads,
                num_kv_heads: *num_kv_heads,
                qk_dim: *head_dim,
                v_dim: *head_dim,
                scale: (1.0 / (*head_dim as f64).sqrt()) as f32,
                window: sliding_window.get(layer).copied().flatten(),
            };
            (shape, *o_bias)
        }
    }
}

/// Runs attention with each sequence's own past: cached, its stem's, or none.
fn attend(
    shape: &AttentionShape,
    projected: &Projected<'_>,
    sequences: &Sequences,
    block: &Range<usize>,
    cache: Option<&mut [CachedSequence]>,
    out: &mut [f32],
) -> Result<(), tenp_kernels::KernelError> {
    let spans = &sequences.spans()[block.clone()];
    let first = sequences.rows(block).start;
    let (key_pitch, value_pitch) = (
        shape.num_kv_heads * shape.qk_dim,
        shape.num_kv_heads * shape.v_dim,
    );
    let rows = |span: &crate::sequences::Span| span.rows.start - first..span.rows.end - first;
    let own = |span| {
        let r = rows(span);
        let keys = &projected.keys[r.start * key_pitch..r.end * key_pitch];
        (
            keys,
            &projected.values[r.start * value_pitch..r.end * value_pitch],
        )
    };

    // Keys and values that are not one contiguous run of this block's rows.
    let mut joined: Vec<(Vec<f32>, Vec<f32>)> = Vec::new();
    if cache.is_none() {
        for span in spans.iter().filter(|s| s.parent.is_some()) {
            let stem = &sequences.spans()[span.parent.expect("filtered")];
            let ((stem_keys, stem_values), (keys, values)) = (own(stem), own(span));
            joined.push(([stem_keys, keys].concat(), [stem_values, values].concat()));
        }
    }
    let cached: Option<&[CachedSequence]> = match cache {
        None => None,
        Some(cached) => {
            for (sequence, span) in cached.iter_mut().zip(spans) {
                let (keys, values) = own(span);
                sequence.keys.extend_from_slice(keys);
                sequence.values.extend_from_slice(values);
            }
            Some(&*cached)
        }
    };
    let mut next_joined = joined.iter();
    let batch: Vec<Sequence<'_>> = spans
        .iter()
        .enumerate()
        .map(|(i, span)| {
            let (keys, values) = match (cached, span.parent) {
                (Some(cached), _) => {
                    let sequence = &cached[i];
                    (&sequence.keys[..], &sequence.values[..])
                }
                (None, None) => own(span),
                (None, Some(_)) => {
                    let (keys, values) = next_joined.next().expect("one entry per branch");
                    (&keys[..], &values[..])
                }
            };
            Sequence {
                queries: rows(span),
                keys,
                values,
            }
        })
        .collect();
    attention(shape, &batch, projected.queries, out)
}
