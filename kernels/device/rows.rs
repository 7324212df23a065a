//! Wrappers of `rows.cu`: the embedding, rows of one type turned into another, chosen rows scaled.

use half::{bf16, f16};

use super::call::Call;
use super::check::{check_multiple, to_i32};
use super::geometry::Launch;
use super::view::{DeviceSlice, DeviceSliceMut, optional, optional_mut};
use crate::KernelError;
use crate::params::{
    TENP_BF16, TENP_F16, TENP_F32, TenpConvertRowsParams, TenpEmbeddingParams, TenpScaleRowsParams,
};

/// `hidden_states[t] = table[ids[t]]`; an id outside the vocabulary gives a row of NaN.
#[derive(Debug)]
pub struct Embedding<'a> {
    /// `[vocab_size, hidden]`.
    pub table: DeviceSlice<'a, bf16>,
    /// `[tokens]`.
    pub ids: DeviceSlice<'a, i32>,
    /// `[tokens, hidden]`.
    pub hidden_states: DeviceSliceMut<'a, f32>,
    /// Number of tokens.
    pub num_tokens: usize,
    /// Rows of the table.
    pub vocab_size: usize,
    /// Hidden size, a multiple of 8.
    pub hidden: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths that do not fit, a hidden size that is no multiple of 8.
pub fn embedding(mut args: Embedding<'_>) -> Result<Call<'_>, KernelError> {
    check_multiple("hidden size", args.hidden, 8)?;
    let params = TenpEmbeddingParams {
        table: args
            .table
            .checked("embedding table", args.vocab_size * args.hidden, 16)?,
        ids: args.ids.checked("token ids", args.num_tokens, 4)?,
        hidden_states: args.hidden_states.checked(
            "embedded tokens",
            args.num_tokens * args.hidden,
            16,
        )?,
        num_tokens: to_i32("tokens", args.num_tokens)?,
        vocab_size: to_i32("vocabulary", args.vocab_size)?,
        hidden: to_i32("hidden size", args.hidden)?,
        padding: 0,
    };
    let launch = Launch::row_per_block(args.num_tokens, args.hidden / 8);
    Ok(Call::new("tenp_embedding", launch, &params))
}

/// What is converted.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// f32.
    F32(DeviceSlice<'a, f32>),
    /// bf16.
    Bf16(DeviceSlice<'a, bf16>),
    /// f16.
    F16(DeviceSlice<'a, f16>),
}

/// out = clamp(input + bias), rounded to nearest even where it becomes bf16.
#[derive(Debug)]
pub struct ConvertRows<'a> {
    /// `[rows, in_pitch]`.
    pub input: Elements<'a>,
    /// `[cols]`.
    pub bias: Option<DeviceSlice<'a, f32>>,
    /// `[rows]`: row of each row in the outputs; without it each keeps its own.
    pub out_rows: Option<DeviceSlice<'a, i32>>,
    /// `[num_out_rows, out_pitch]`.
    pub out_f32: Option<DeviceSliceMut<'a, f32>>,
    /// `[num_out_rows, out_pitch]`.
    pub out_bf16: Option<DeviceSliceMut<'a, bf16>>,
    /// Rows of the input.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Elements from one row of the input to the next.
    pub in_pitch: usize,
    /// Rows of the outputs.
    pub num_out_rows: usize,
    /// Elements from one row of the outputs to the next.
    pub out_pitch: usize,
    /// Clamp to ±this, a positive number.
    pub clip: Option<f32>,
}

/// Elements from the first of `rows` rows to the last row's last.
pub(super) fn extent(rows: usize, pitch: usize, cols: usize) -> usize {
    match rows {
        0 => 0,
        _ => (rows - 1) * pitch + cols,
    }
}

/// Rows must not overlap.
pub(super) fn check_pitch(
    what: &'static str,
    pitch: usize,
    cols: usize,
) -> Result<(), KernelError> {
    if pitch >= cols {
        return Ok(());
    }
    Err(KernelError::Invalid {
        what,
        why: format!("{pitch} for rows of {cols} elements"),
    })
}

/// The kernels' form of an optional bound: 0 for none.
pub(super) fn clip_value(clip: Option<f32>) -> Result<f32, KernelError> {
    match clip {
        None => Ok(0.0),
        Some(clip) if clip > 0.0 => Ok(clip),
        Some(clip) => Err(KernelError::Invalid {
            what: "clip",
            why: format!("{clip} is not positive"),
        }),
    }
}

/// Without a map of rows there are as many outputs as inputs.
pub(super) fn check_out_rows(
    mapped: bool,
    rows: usize,
    num_out_rows: usize,
) -> Result<(), KernelError> {
    if mapped || rows <= num_out_rows {
        return Ok(());
    }
    Err(KernelError::Length {
        what: "output rows",
        expected: rows,
        got: num_out_rows,
    })
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths and pitches that do not fit, a clip that is not positive.
///
/// # Safety
/// Every row in `out_rows` is in 0..`num_out_rows`, and no row is there twice.
pub unsafe fn convert_rows(mut args: ConvertRows<'_>) -> Result<Call<'_>, KernelError> {
    check_pitch("pitch of converted rows", args.in_pitch, args.cols)?;
    check_pitch("pitch of converted rows", args.out_pitch, args.cols)?;
    check_out_rows(args.out_rows.is_some(), args.rows, args.num_out_rows)?;
    let in_len = extent(args.rows, args.in_pitch, args.cols);
    let out_len = extent(args.num_out_rows, args.out_pitch, args.cols);
    let (in_, in_dtype) = match &args.input {
        Elements::F32(x) => (x.checked("rows to convert", in_len, 4)?, TENP_F32),
        Elements::Bf16(x) => (x.checked("rows to convert", in_len, 2)?, TENP_BF16),
        Elements::F16(x) => (x.checked("rows to convert", in_len, 2)?, TENP_F16),
    };
    let params = TenpConvertRowsParams {
        in_,
        bias: optional(args.bias.as_ref(), "bias", args.cols, 4)?,
        out_rows: optional(args.out_rows.as_ref(), "output rows", args.rows, 4)?,
        out_f32: optional_mut(args.out_f32.as_mut(), "converted rows", out_len, 4)?,
        out_bf16: optional_mut(args.out_bf16.as_mut(), "converted rows", out_len, 2)?,
        in_pitch: args.in_pitch as i64,
        out_pitch: args.out_pitch as i64,
        num_rows: to_i32("rows to convert", args.rows)?,
        cols: to_i32("columns to convert", args.cols)?,
        in_dtype: in_dtype as i32,
        clip: clip_value(args.clip)?,
    };
    let launch = Launch::row_per_block(args.rows, args.cols.div_ceil(8));
    Ok(Call::new("tenp_convert_rows", launch, &params))
}

/// `out[i] = scales[row_ids[i]] · input[row_ids[i]]`, in f32.
#[derive(Debug)]
pub struct ScaleRows<'a> {
    /// `[num_in_rows, in_pitch]`.
    pub input: DeviceSlice<'a, bf16>,
    /// `[rows]`: which rows.
    pub row_ids: DeviceSlice<'a, i32>,
    /// `[num_in_rows]`; 1 without it.
    pub scales: Option<DeviceSlice<'a, f32>>,
    /// `[rows, out_pitch]`; columns up to the next multiple of 8 become zeros.
    pub out: DeviceSliceMut<'a, f32>,
    /// Rows that are wanted.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Rows of the input.
    pub num_in_rows: usize,
    /// Elements from one row of the input to the next, a multiple of 8.
    pub in_pitch: usize,
    /// Elements from one row of the output to the next, a multiple of 8.
    pub out_pitch: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths and pitches that do not fit.
///
/// # Safety
/// Every row in `row_ids` is in 0..`num_in_rows`.
pub unsafe fn scale_rows(mut args: ScaleRows<'_>) -> Result<Call<'_>, KernelError> {
    let padded = args.cols.next_multiple_of(8);
    check_multiple("pitch of rows to scale", args.in_pitch, 8)?;
    check_multiple("pitch of scaled rows", args.out_pitch, 8)?;
    check_pitch("pitch of rows to scale", args.in_pitch, args.cols)?;
    check_pitch("pitch of scaled rows", args.out_pitch, padded)?;
    let in_len = extent(args.num_in_rows, args.in_pitch, args.cols);
    let out_len = extent(args.rows, args.out_pitch, padded);
    let params = TenpScaleRowsParams {
        in_: args.input.checked("rows to scale", in_len, 16)?,
        row_ids: args.row_ids.checked("rows to scale", args.rows, 4)?,
        scales: optional(args.scales.as_ref(), "scales of rows", args.num_in_rows, 4)?,
        out: args.out.checked("scaled rows", out_len, 16)?,
        in_pitch: args.in_pitch as i64,
        out_pitch: args.out_pitch as i64,
        num_rows: to_i32("rows to scale", args.rows)?,
        cols: to_i32("columns to scale", args.cols)?,
    };
    let launch = Launch::row_per_block(args.rows, padded / 8);
    Ok(Call::new("tenp_scale_rows", launch, &params))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never read or written through.
    fn view<'a, T: bytemuck::Pod>(len: usize) -> DeviceSlice<'a, T> {
        // SAFETY: see above.
        unsafe { DeviceSlice::from_raw(0x1000, len) }
    }

    fn convert(len: usize, num_out_rows: usize, clip: Option<f32>) -> Result<(), KernelError> {
        let args = ConvertRows {
            input: Elements::F16(view(len)),
            bias: None,
            out_rows: None,
            out_f32: None,
            out_bf16: None,
            rows: 3,
            cols: 10,
            in_pitch: 12,
            num_out_rows,
            out_pitch: 10,
            clip,
        };
        // SAFETY: there is no map of rows.
        unsafe { convert_rows(args) }.map(drop)
    }

    #[test]
    fn misfits_are_refused() {
        // The last row may end where its elements do.
        assert_eq!(convert(34, 3, Some(1.0)), Ok(()));
        assert!(matches!(
            convert(33, 3, None),
            Err(KernelError::Length {
                expected: 34,
                got: 33,
                ..
            })
        ));
        assert!(convert(34, 2, None).is_err());
        assert!(convert(34, 3, Some(0.0)).is_err());
        assert!(convert(34, 3, Some(f32::NAN)).is_err());
        assert!(check_pitch("pitch", 9, 10).is_err());
        assert_eq!(extent(0, 12, 10), 0);
    }

    #[test]
    fn embedding_rows_are_whole_vectors() {
        let call = |hidden: usize, tokens: usize| {
            // SAFETY: nothing is ever written through the view.
            let hidden_states = unsafe { DeviceSliceMut::from_raw(0x2000, 4096) };
            embedding(Embedding {
                table: view(4096),
                ids: view(tokens),
                hidden_states,
                num_tokens: tokens,
                vocab_size: 4,
                hidden,
            })
            .map(|call| call.launch())
        };
        assert_eq!(call(1024, 3), Ok(Launch::line(3, 128, 0)));
        assert!(call(1020, 3).is_err());
        assert!(call(1024, 5).is_err());
        assert_eq!(Launch::row_per_block(7, 0), Launch::line(7, 32, 0));
        assert_eq!(Launch::row_per_block(7, 900), Launch::line(7, 256, 0));
    }
}
