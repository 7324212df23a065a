//! Wrappers of `attention_prefill.cu` and `attention_decode.cu`: causal attention in bf16.

use half::bf16;

use super::call::Call;
use super::check::{check_multiple, to_i32};
use super::geometry::Launch;
use super::rows::{check_pitch, extent};
use super::view::{DeviceSlice, DeviceSliceMut};
use crate::KernelError;
use crate::cpu::attention::AttentionShape;
use crate::params::TenpAttentionParams;

/// Head sizes that the kernels are compiled for; smaller heads are filled up with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadSize {
    /// Up to 64.
    D64,
    /// Up to 128.
    D128,
    /// Queries and keys up to 192, values up to 128.
    D192,
    /// Up to 256.
    D256,
}

impl HeadSize {
    /// The smallest that holds the heads; none past 256.
    #[must_use]
    pub const fn choose(qk_dim: usize, v_dim: usize) -> Option<Self> {
        match (qk_dim, v_dim) {
            (0..=64, 0..=64) => Some(Self::D64),
            (0..=128, 0..=128) => Some(Self::D128),
            (0..=192, 0..=128) => Some(Self::D192),
            (0..=256, 0..=256) => Some(Self::D256),
            _ => None,
        }
    }

    /// Entry, queries of a tile, shared memory.
    const fn prefill(self) -> (&'static str, usize, u32) {
        match self {
            Self::D64 => ("tenp_attention_prefill_64", 128, 49_168),
            Self::D128 => ("tenp_attention_prefill_128", 128, 65_552),
            Self::D192 => ("tenp_attention_prefill_192", 128, 90_128),
            Self::D256 => ("tenp_attention_prefill_256", 64, 98_320),
        }
    }

    /// Entry, threads, shared memory.
    const fn decode(self) -> (&'static str, u32, u32) {
        match self {
            Self::D64 => ("tenp_attention_decode_64", 128, 34_816),
            Self::D128 => ("tenp_attention_decode_128", 128, 69_632),
            Self::D192 => ("tenp_attention_decode_192", 128, 88_064),
            Self::D256 => ("tenp_attention_decode_256", 64, 73_728),
        }
    }
}

/// Attention of a batch of sequences. Sequence s asks with rows `query_offsets[s]..query_offsets[s + 1]`; its keys and
/// values are its prefix's rows, then its own; its last query stands at its last key.
#[derive(Debug)]
pub struct Attention<'a> {
    /// Head counts and sizes, scale, window.
    pub shape: &'a AttentionShape,
    /// `[tokens, q_pitch]`, heads of `qk_dim` one after another.
    pub queries: DeviceSlice<'a, bf16>,
    /// `[key_rows, k_pitch]`.
    pub keys: DeviceSlice<'a, bf16>,
    /// `[key_rows, v_pitch]`, heads of `v_dim`.
    pub values: DeviceSlice<'a, bf16>,
    /// `[tokens, out_pitch]`, heads of `v_dim`. A query that sees no key gets zeros.
    pub out: DeviceSliceMut<'a, bf16>,
    /// `[sequences + 1]`.
    pub query_offsets: DeviceSlice<'a, i32>,
    /// `[sequences]` first row and length of a prefix, which sequences may share.
    pub prefix: Option<(DeviceSlice<'a, i32>, DeviceSlice<'a, i32>)>,
    /// `[sequences]` first own row.
    pub key_rows: DeviceSlice<'a, i32>,
    /// `[sequences]` own rows.
    pub key_lens: DeviceSlice<'a, i32>,
    /// Number of sequences.
    pub num_sequences: usize,
    /// Number of queries.
    pub num_tokens: usize,
    /// Rows of the key and value matrices.
    pub num_key_rows: usize,
    /// Elements from one row to the next of queries, keys, values and out: multiples of 8.
    pub pitches: Pitches,
}

/// Elements from one row to the next.
#[derive(Clone, Copy, Debug)]
pub struct Pitches {
    /// Of the queries.
    pub q: usize,
    /// Of the keys.
    pub k: usize,
    /// Of the values.
    pub v: usize,
    /// Of the results.
    pub out: usize,
}

impl Pitches {
    /// Dense rows.
    #[must_use]
    pub const fn dense(shape: &AttentionShape) -> Self {
        Self {
            q: shape.num_heads * shape.qk_dim,
            k: shape.num_kv_heads * shape.qk_dim,
            v: shape.num_kv_heads * shape.v_dim,
            out: shape.num_heads * shape.v_dim,
        }
    }
}

fn invalid(why: String) -> KernelError {
    KernelError::Invalid {
        what: "attention",
        why,
    }
}

fn check_shape(shape: &AttentionShape) -> Result<HeadSize, KernelError> {
    check_multiple("size of a query or key head", shape.qk_dim, 8)?;
    check_multiple("size of a value head", shape.v_dim, 8)?;
    if shape.num_kv_heads == 0 || !shape.num_heads.is_multiple_of(shape.num_kv_heads) {
        return Err(invalid(format!(
            "{} query heads over {} key/value heads",
            shape.num_heads, shape.num_kv_heads
        )));
    }
    if !(shape.scale > 0.0 && shape.scale.is_finite()) {
        return Err(invalid(format!("scale {}", shape.scale)));
    }
    if shape.window == Some(0) {
        return Err(invalid("a window of no keys".into()));
    }
    HeadSize::choose(shape.qk_dim, shape.v_dim)
        .ok_or_else(|| invalid(format!("heads of {} and {}", shape.qk_dim, shape.v_dim)))
}

/// Checks what prefill and decode have in common; the split is left for decode to fill in.
fn params(args: &mut Attention<'_>) -> Result<(HeadSize, TenpAttentionParams), KernelError> {
    let (shape, pitches) = (args.shape, args.pitches);
    let size = check_shape(shape)?;
    let dense = Pitches::dense(shape);
    for (what, pitch, cols) in [
        ("pitch of queries", pitches.q, dense.q),
        ("pitch of keys", pitches.k, dense.k),
        ("pitch of values", pitches.v, dense.v),
        ("pitch of attention output", pitches.out, dense.out),
    ] {
        check_pitch(what, pitch, cols)?;
        check_multiple(what, pitch, 8)?;
    }
    let (tokens, rows, sequences) = (args.num_tokens, args.num_key_rows, args.num_sequences);
    let (prefix_rows, prefix_lens) = match &args.prefix {
        None => (std::ptr::null(), std::ptr::null()),
        Some((rows, lens)) => (
            rows.checked("prefix rows", sequences, 4)?,
            lens.checked("prefix lengths", sequences, 4)?,
        ),
    };
    to_i32("rows of keys", rows)?;
    to_i32("queries", tokens)?;
    let params = TenpAttentionParams {
        q: args
            .queries
            .checked("queries", extent(tokens, pitches.q, dense.q), 16)?,
        k: args
            .keys
            .checked("keys", extent(rows, pitches.k, dense.k), 16)?,
        v: args
            .values
            .checked("values", extent(rows, pitches.v, dense.v), 16)?,
        out: args.out.checked(
            "attention output",
            extent(tokens, pitches.out, dense.out),
            16,
        )?,
        query_offsets: args
            .query_offsets
            .checked("query offsets", sequences + 1, 4)?,
        prefix_rows,
        prefix_lens,
        key_rows: args.key_rows.checked("key rows", sequences, 4)?,
        key_lens: args.key_lens.checked("key lengths", sequences, 4)?,
        split_max: std::ptr::null_mut(),
        split_sum: std::ptr::null_mut(),
        split_out: std::ptr::null_mut(),
        q_pitch: pitches.q as i64,
        k_pitch: pitches.k as i64,
        v_pitch: pitches.v as i64,
        out_pitch: pitches.out as i64,
        num_sequences: to_i32("sequences", sequences)?,
        num_heads: to_i32("heads", shape.num_heads)?,
        num_kv_heads: to_i32("heads", shape.num_kv_heads)?,
        qk_dim: to_i32("head size", shape.qk_dim)?,
        v_dim: to_i32("head size", shape.v_dim)?,
        window: to_i32("window", shape.window.unwrap_or(0))?,
        num_splits: 1,
        split_keys: 64,
        scale: shape.scale,
        padding: 0,
    };
    Ok((size, params))
}

/// Whole prompts, or chunks of them: checks the arguments and makes the call.
///
/// # Errors
/// Lengths, pitches, head counts and sizes that do not fit.
///
/// # Safety
/// What lies on the GPU is right: offsets begin at 0, never go down and end at `num_tokens`; rows of prefixes and own
/// keys are below `num_key_rows`; no length is negative.
pub unsafe fn attention_prefill(mut args: Attention<'_>) -> Result<Call<'_>, KernelError> {
    let (size, params) = params(&mut args)?;
    let (entry, rows, shared_bytes) = size.prefill();
    // Every sequence may end in a tile that is not full; the kernel finds whose tile is whose.
    let tiles = match args.num_sequences {
        0 => 0,
        sequences => args.num_tokens / rows + sequences,
    };
    let blocks = to_i32("tiles of queries", tiles * args.shape.num_heads)?;
    Ok(Call::new(
        entry,
        Launch::line(blocks as u32, 128, shared_bytes),
        &params,
    ))
}

/// How the keys are split over blocks when every sequence has one query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Splits {
    /// Parts of every sequence's keys.
    pub count: usize,
    /// Keys of a part; the last takes all that are left.
    pub keys: usize,
}

/// Query heads that share a block.
const BLOCK_HEADS: usize = 16;

/// Keys that a part has at least, so that adding up the parts stays cheap.
const MIN_SPLIT_KEYS: usize = 256;

impl Splits {
    /// Enough parts for three blocks a multiprocessor, of at least 256 keys. `max_keys` is the most keys that a sequence
    /// has, prefix included; with more the results are right, but the last part does the extra work.
    #[must_use]
    pub fn choose(
        shape: &AttentionShape,
        num_sequences: usize,
        max_keys: usize,
        multiprocessors: usize,
    ) -> Self {
        let seen = shape.window.map_or(max_keys, |w| w.min(max_keys));
        let blocks = num_sequences * head_tiles(shape);
        let wanted = (3 * multiprocessors).div_ceil(blocks.max(1));
        let count = wanted.min(seen / MIN_SPLIT_KEYS).max(1);
        let keys = seen.div_ceil(count).max(1).next_multiple_of(64);
        Self {
            count: seen.div_ceil(keys).max(1),
            keys,
        }
    }

    /// Elements of [`SplitScratch::largest`] and [`SplitScratch::sums`]; times `v_dim` those of [`SplitScratch::out`].
    #[must_use]
    pub const fn scratch_len(&self, shape: &AttentionShape, num_sequences: usize) -> usize {
        match self.count {
            1 => 0,
            count => num_sequences * shape.num_heads * count,
        }
    }
}

/// Blocks of a sequence and split.
const fn head_tiles(shape: &AttentionShape) -> usize {
    match shape.num_kv_heads {
        0 => 0,
        kv_heads => kv_heads * (shape.num_heads / kv_heads).div_ceil(BLOCK_HEADS),
    }
}

/// Where the parts leave their results; [`Splits::scratch_len`].
#[derive(Debug)]
pub struct SplitScratch<'a> {
    /// Largest scores.
    pub largest: DeviceSliceMut<'a, f32>,
    /// Sums of exponentials.
    pub sums: DeviceSliceMut<'a, f32>,
    /// Weighted values.
    pub out: DeviceSliceMut<'a, f32>,
}

/// One query per sequence: checks the arguments and makes the calls, to be run in their order.
///
/// # Errors
/// As [`attention_prefill`]; splits of no keys; not one query per sequence.
///
/// # Safety
/// As [`attention_prefill`], and every sequence has one query.
pub unsafe fn attention_decode<'a>(
    mut args: Attention<'a>,
    mut scratch: SplitScratch<'a>,
    splits: Splits,
) -> Result<Vec<Call<'a>>, KernelError> {
    let (size, mut params) = params(&mut args)?;
    let shape = args.shape;
    if args.num_tokens != args.num_sequences {
        return Err(invalid(format!(
            "{} queries of {} sequences, expected one each",
            args.num_tokens, args.num_sequences
        )));
    }
    if splits.count == 0 || splits.keys == 0 {
        return Err(invalid(format!(
            "{} splits of {} keys",
            splits.count, splits.keys
        )));
    }
    check_multiple("keys of a split", splits.keys, 64)?;
    let parts = splits.scratch_len(shape, args.num_sequences);
    params.split_max = scratch.largest.checked("split maxima", parts, 4)?;
    params.split_sum = scratch.sums.checked("split sums", parts, 4)?;
    params.split_out = scratch
        .out
        .checked("split outputs", parts * shape.v_dim, 4)?;
    // First keys of parts are counted in i32, whether or not there are so many.
    to_i32("keys of all splits", splits.count * splits.keys)?;
    params.num_splits = to_i32("splits", splits.count)?;
    params.split_keys = to_i32("keys of a split", splits.keys)?;
    let (entry, threads, shared_bytes) = size.decode();
    let blocks = args.num_sequences * head_tiles(shape) * splits.count;
    let blocks = to_i32("parts of keys", blocks)? as u32;
    let mut calls = vec![Call::new(
        entry,
        Launch::line(blocks, threads, shared_bytes),
        &params,
    )];
    if splits.count > 1 {
        let rows = args.num_sequences * shape.num_heads;
        let launch = Launch::line(rows.div_ceil(8) as u32, 256, 0);
        calls.push(Call::new("tenp_attention_merge", launch, &params));
    }
    Ok(calls)
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
