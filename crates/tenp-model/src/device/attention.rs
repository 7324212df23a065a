//! The attention block on a backend: projections, norms, rotary positions, attention, output projection.

use half::bf16;
use tenp_checkpoint::config::{Attention as AttentionConfig, QkNorm};
use tenp_kernels::KernelError;
use tenp_kernels::cpu::attention::AttentionShape;
use tenp_kernels::device::attention::{
    Attention, Pitches, SplitScratch, Splits, attention_decode, attention_prefill,
};
use tenp_kernels::device::mla_keys::{MlaKeys, mla_keys};
use tenp_kernels::device::rms_norm::{RmsNorm, rms_norm};
use tenp_kernels::device::rotary::{Angles, Rotary, rotary};
use tenp_kernels::device::rows::{ConvertRows, Elements, convert_rows};
use tenp_kernels::device::{Backend, DeviceSlice, DeviceSliceMut, InOut, Memory};

use super::DeviceModel;
use super::cache::CachedLayer;
use super::layer::{AttentionWeights, LayerWeights, MlaQuery, Projection};
use super::tables::BlockTables;
use crate::attention::LORA_NORM_EPS;

/// A block of sequences at a layer's attention.
pub(super) struct AttentionInput<'a> {
    pub(super) weights: &'a LayerWeights,
    pub(super) arena: DeviceSlice<'a, u8>,
    /// `[tokens, H]` the normed input.
    pub(super) x: DeviceSlice<'a, bf16>,
    pub(super) angles: Angles<'a>,
    pub(super) shape: AttentionShape,
    pub(super) block: BlockTables<'a>,
}

/// Where a block's keys and values go: rows of their own, or those of the cache.
struct KeyRows<'a> {
    rows: Option<DeviceSlice<'a, i32>>,
    num_rows: usize,
}

impl KeyRows<'_> {
    /// Every token keeps its row.
    const fn own(tokens: usize) -> Self {
        Self {
            rows: None,
            num_rows: tokens,
        }
    }
}

impl<B: Backend> DeviceModel<'_, B> {
    /// Output of the attention block, `[tokens, H]`.
    pub(super) fn attention(
        &self,
        input: &AttentionInput<'_>,
        cached: Option<(&mut CachedLayer<B>, usize)>,
    ) -> Result<B::Buffer<f32>, KernelError> {
        let (backend, shape) = (&self.backend, &input.shape);
        let tokens = input.block.num_tokens;
        let pitches = Pitches::dense(shape);
        let queries = self.queries(input)?;
        let mut own;
        let (cache, to) = if let Some((layer, num_rows)) = cached {
            let rows = input.block.cache_rows;
            (layer, KeyRows { rows, num_rows })
        } else {
            own = CachedLayer {
                keys: backend.alloc("keys", tokens * pitches.k)?,
                values: backend.alloc("values", tokens * pitches.v)?,
            };
            (&mut own, KeyRows::own(tokens))
        };
        self.keys(input, cache, &to)?;
        let mut out = backend.alloc::<bf16>("attention output", tokens * pitches.out)?;
        let block = &input.block;
        let args = Attention {
            shape,
            queries: queries.view(),
            keys: cache.keys.view(),
            values: cache.values.view(),
            out: out.view_mut(),
            query_offsets: block.query_offsets,
            prefix: block.prefixes,
            key_rows: block.key_rows,
            key_lens: block.key_lens,
            num_sequences: block.num_sequences,
            num_tokens: tokens,
            num_key_rows: to.num_rows,
            pitches,
        };
        self.attend(args, block)?;
        let projected = self.project(&input.weights.output, input.arena, out.view())?;
        self.biased(&input.weights.output, input.arena, projected, tokens)
    }

    fn attend(&self, args: Attention<'_>, block: &BlockTables<'_>) -> Result<(), KernelError> {
        let (backend, shape) = (&self.backend, args.shape);
        // Decoding takes one query of every sequence; one that has ended beside others has none.
        if block.longest_query > 1 || block.num_tokens < block.num_sequences {
            // SAFETY: `Tables` made the offsets and rows from spans that follow one another, with the lengths that the
            // matrices were allocated for.
            return backend.run(&unsafe { attention_prefill(args) }?);
        }
        let sequences = block.num_sequences;
        let multiprocessors = backend.multiprocessors();
        let splits = Splits::choose(shape, sequences, block.longest_keys, multiprocessors);
        let parts = splits.scratch_len(shape, sequences);
        let mut largest = backend.alloc("split maxima", parts)?;
        let mut sums = backend.alloc("split sums", parts)?;
        let mut out = backend.alloc("split outputs", parts * shape.v_dim)?;
        let scratch = SplitScratch {
            largest: largest.view_mut(),
            sums: sums.view_mut(),
            out: out.view_mut(),
        };
        // SAFETY: as above, and every sequence has one query: none has more, and there are as many as sequences.
        let calls = unsafe { attention_decode(args, scratch, splits) }?;
        calls.iter().try_for_each(|call| backend.run(call))
    }

    /// The product with a projection's bias added, where it has one.
    fn biased(
        &self,
        projection: &Projection,
        arena: DeviceSlice<'_, u8>,
        product: B::Buffer<f32>,
        tokens: usize,
    ) -> Result<B::Buffer<f32>, KernelError> {
        let Some(bias) = &projection.bias else {
            return Ok(product);
        };
        let mut out = self
            .backend
            .alloc("projection with bias", tokens * projection.outputs)?;
        let to = (Some(out.view_mut()), None);
        let whole = KeyRows::own(tokens);
        let bias = Some(bias.of(arena)?);
        self.convert(product.view(), bias, to, projection.outputs, &whole, None)?;
        Ok(out)
    }

    /// `clamp(x + bias)` in either form.
    fn convert(
        &self,
        x: DeviceSlice<'_, f32>,
        bias: Option<DeviceSlice<'_, f32>>,
        (out_f32, out_bf16): (
            Option<DeviceSliceMut<'_, f32>>,
            Option<DeviceSliceMut<'_, bf16>>,
        ),
        cols: usize,
        to: &KeyRows<'_>,
        clip: Option<f32>,
    ) -> Result<(), KernelError> {
        let args = ConvertRows {
            input: Elements::F32(x),
            bias,
            out_rows: to.rows,
            out_f32,
            out_bf16,
            rows: x.len() / cols,
            cols,
            in_pitch: cols,
            num_out_rows: to.num_rows,
            out_pitch: cols,
            clip,
        };
        // SAFETY: rows of the cache are those of different positions of different sequences, made by `Tables` for a
        // cache of `num_rows` rows.
        self.backend.run(&unsafe { convert_rows(args) }?)
    }

    /// `[tokens, heads · size]` queries, rotated.
    fn queries(&self, input: &AttentionInput<'_>) -> Result<B::Buffer<bf16>, KernelError> {
        let (shape, tokens) = (&input.shape, input.block.num_tokens);
        let (projected, clip) = match &input.weights.attention {
            AttentionWeights::Mla { query, .. } => (self.mla_query(input, query)?, None),
            AttentionWeights::Gqa { query, norms, .. } => {
                let norm = norms.as_ref().map(|[q, _]| q.of(input.arena)).transpose()?;
                (self.gqa_heads(input, query, norm)?, self.clip())
            }
        };
        let width = shape.num_heads * shape.qk_dim;
        let mut out = self.backend.alloc("queries", tokens * width)?;
        let to = KeyRows::own(tokens);
        self.rotate(
            input,
            projected.view(),
            out.view_mut(),
            shape.num_heads,
            &to,
            clip,
        )?;
        Ok(out)
    }

    /// Rotates heads of the queries' size.
    fn rotate(
        &self,
        input: &AttentionInput<'_>,
        x: DeviceSlice<'_, f32>,
        out: DeviceSliceMut<'_, bf16>,
        num_heads: usize,
        to: &KeyRows<'_>,
        clip: Option<f32>,
    ) -> Result<(), KernelError> {
        let head_dim = input.shape.qk_dim;
        let args = Rotary {
            x: InOut::Apart(x, None),
            angles: input.angles,
            positions: input.block.positions,
            out_rows: to.rows,
            out_bf16: Some(out),
            num_tokens: input.block.num_tokens,
            num_heads,
            head_dim,
            x_pitch: num_heads * head_dim,
            num_out_rows: to.num_rows,
            out_pitch: num_heads * head_dim,
            clip,
        };
        // SAFETY: as in `convert`.
        self.backend.run(&unsafe { rotary(args) }?)
    }

    fn clip(&self) -> Option<f32> {
        match self.checkpoint.config().attention {
            AttentionConfig::Gqa { clip_qkv, .. } => clip_qkv.map(|c| c as f32),
            AttentionConfig::Mla { .. } => None,
        }
    }

    fn mla_query(
        &self,
        input: &AttentionInput<'_>,
        query: &MlaQuery,
    ) -> Result<B::Buffer<f32>, KernelError> {
        let (arena, tokens) = (input.arena, input.block.num_tokens);
        match query {
            MlaQuery::Plain(projection) => self.project(projection, arena, input.x),
            MlaQuery::LowRank(down, norm, up) => {
                let low = self.project(down, arena, input.x)?;
                let low = self.biased(down, arena, low, tokens)?;
                let norm = norm.of(arena)?;
                let low = self.low_rank_norm(low.view(), norm, down.outputs, down.outputs)?;
                self.project(up, arena, low.view())
            }
        }
    }

    /// The norm of the first `rank` elements of every `pitch`.
    fn low_rank_norm(
        &self,
        x: DeviceSlice<'_, f32>,
        weight: DeviceSlice<'_, f32>,
        rank: usize,
        pitch: usize,
    ) -> Result<B::Buffer<bf16>, KernelError> {
        let rows = x.len() / pitch;
        let mut out = self.backend.alloc("compressed form", rows * rank)?;
        self.backend.run(&rms_norm(RmsNorm {
            x: InOut::Apart(x, None),
            addend: None,
            weight,
            out_f32: None,
            out_bf16: Some(out.view_mut()),
            eps: LORA_NORM_EPS,
            rows,
            width: rank,
            x_pitch: pitch,
            out_pitch: rank,
        })?)?;
        Ok(out)
    }

    /// A projection to heads, with its bias and its norm.
    fn gqa_heads(
        &self,
        input: &AttentionInput<'_>,
        projection: &Projection,
        norm: Option<DeviceSlice<'_, f32>>,
    ) -> Result<B::Buffer<f32>, KernelError> {
        let (arena, tokens) = (input.arena, input.block.num_tokens);
        let heads = self.project(projection, arena, input.x)?;
        let heads = self.biased(projection, arena, heads, tokens)?;
        let Some(weight) = norm else {
            return Ok(heads);
        };
        let config = self.checkpoint.config();
        let width = match &config.attention {
            AttentionConfig::Gqa {
                qk_norm: QkNorm::PerHead,
                head_dim,
                ..
            } => *head_dim,
            _ => projection.outputs,
        };
        let len = tokens * projection.outputs;
        let mut out = self.backend.alloc("normed heads", len)?;
        self.backend.run(&rms_norm(RmsNorm {
            x: InOut::Apart(heads.view(), None),
            addend: None,
            weight,
            out_f32: Some(out.view_mut()),
            out_bf16: None,
            eps: config.rms_norm_eps,
            rows: len / width,
            width,
            x_pitch: width,
            out_pitch: width,
        })?)?;
        Ok(out)
    }

    /// Writes keys and values.
    fn keys(
        &self,
        input: &AttentionInput<'_>,
        out: &mut CachedLayer<B>,
        to: &KeyRows<'_>,
    ) -> Result<(), KernelError> {
        let arena = input.arena;
        match &input.weights.attention {
            AttentionWeights::Mla {
                kv_down,
                kv_norm,
                kv_up,
                ..
            } => {
                let compressed = self.project(kv_down, arena, input.x)?;
                let tokens = input.block.num_tokens;
                let compressed = self.biased(kv_down, arena, compressed, tokens)?;
                let (rank, pitch) = (kv_up.inner, kv_down.outputs);
                let norm = kv_norm.of(arena)?;
                let low = self.low_rank_norm(compressed.view(), norm, rank, pitch)?;
                let expanded = self.project(kv_up, arena, low.view())?;
                self.mla_keys(input, compressed, expanded.view(), pitch, out, to)
            }
            AttentionWeights::Gqa {
                key, value, norms, ..
            } => {
                let norm = norms.as_ref().map(|[_, k]| k.of(arena)).transpose()?;
                let keys = self.gqa_heads(input, key, norm)?;
                let kv_heads = input.shape.num_kv_heads;
                let out_keys = out.keys.view_mut();
                self.rotate(input, keys.view(), out_keys, kv_heads, to, self.clip())?;
                let values = self.project(value, arena, input.x)?;
                let bias = value.bias.as_ref().map(|b| b.of(arena)).transpose()?;
                let out_values = (None, Some(out.values.view_mut()));
                let cols = value.outputs;
                self.convert(values.view(), bias, out_values, cols, to, self.clip())
            }
        }
    }

    /// Rotates the shared part of the compressed form in place, and puts keys and values together.
    fn mla_keys(
        &self,
        input: &AttentionInput<'_>,
        mut compressed: B::Buffer<f32>,
        expanded: DeviceSlice<'_, f32>,
        pitch: usize,
        out: &mut CachedLayer<B>,
        to: &KeyRows<'_>,
    ) -> Result<(), KernelError> {
        let AttentionConfig::Mla {
            num_heads,
            nope_dim,
            rope_dim,
            v_dim,
            ..
        } = self.checkpoint.config().attention
        else {
            unreachable!("weights of MLA come with its configuration");
        };
        let tokens = input.block.num_tokens;
        let args = Rotary {
            x: InOut::Over(compressed.view_mut()),
            angles: input.angles,
            positions: input.block.positions,
            out_rows: None,
            out_bf16: None,
            num_tokens: tokens,
            num_heads: 1,
            head_dim: pitch,
            x_pitch: pitch,
            num_out_rows: tokens,
            out_pitch: pitch,
            clip: None,
        };
        // SAFETY: there are no rows to be given.
        self.backend.run(&unsafe { rotary(args) }?)?;
        let args = MlaKeys {
            expanded,
            compressed: compressed.view(),
            out_rows: to.rows,
            keys: out.keys.view_mut(),
            values: out.values.view_mut(),
            num_tokens: tokens,
            num_out_rows: to.num_rows,
            num_heads,
            nope_dim,
            rope_dim,
            v_dim,
            compressed_pitch: pitch,
        };
        // SAFETY: as in `convert`.
        self.backend.run(&unsafe { mla_keys(args) }?)
    }
}
