//! Wrapper of `mla_keys.cu`: keys and values of multi-head latent attention.

use half::bf16;

use super::call::Call;
use super::check::to_i32;
use super::geometry::Launch;
use super::rows::{check_out_rows, check_pitch};
use super::view::{DeviceSlice, DeviceSliceMut, optional};
use crate::KernelError;
use crate::params::TenpMlaKeysParams;

/// Each head's key is its own part and the rotated part that all heads share.
#[derive(Debug)]
pub struct MlaKeys<'a> {
    /// `[tokens, num_heads · (nope_dim + v_dim)]`: what the compressed form expands to.
    pub expanded: DeviceSlice<'a, f32>,
    /// `[tokens, compressed_pitch]`, the rotated shared part in the last `rope_dim` elements.
    pub compressed: DeviceSlice<'a, f32>,
    /// `[tokens]`: row of each token in the outputs; without it each keeps its own.
    pub out_rows: Option<DeviceSlice<'a, i32>>,
    /// `[num_out_rows, num_heads · (nope_dim + rope_dim)]`.
    pub keys: DeviceSliceMut<'a, bf16>,
    /// `[num_out_rows, num_heads · v_dim]`.
    pub values: DeviceSliceMut<'a, bf16>,
    /// Number of tokens.
    pub num_tokens: usize,
    /// Rows of the outputs.
    pub num_out_rows: usize,
    /// Heads of a token.
    pub num_heads: usize,
    /// Elements of a key that no position changes.
    pub nope_dim: usize,
    /// Elements of a key that are rotated.
    pub rope_dim: usize,
    /// Elements of a value.
    pub v_dim: usize,
    /// Elements from one token of `compressed` to the next.
    pub compressed_pitch: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths and pitches that do not fit.
///
/// # Safety
/// Every row in `out_rows` is in 0..`num_out_rows`, and no row is there twice.
pub unsafe fn mla_keys(mut args: MlaKeys<'_>) -> Result<Call<'_>, KernelError> {
    check_pitch(
        "pitch of compressed keys",
        args.compressed_pitch,
        args.rope_dim,
    )?;
    check_out_rows(args.out_rows.is_some(), args.num_tokens, args.num_out_rows)?;
    let (tokens, heads) = (args.num_tokens, args.num_heads);
    let own = args.nope_dim + args.v_dim;
    let qk_dim = args.nope_dim + args.rope_dim;
    let params = TenpMlaKeysParams {
        expanded: args
            .expanded
            .checked("expanded keys", tokens * heads * own, 4)?,
        compressed: args.compressed.checked(
            "compressed keys",
            tokens * args.compressed_pitch,
            4,
        )?,
        out_rows: optional(args.out_rows.as_ref(), "output rows", tokens, 4)?,
        keys: args
            .keys
            .checked("attention keys", args.num_out_rows * heads * qk_dim, 2)?,
        values: args.values.checked(
            "attention values",
            args.num_out_rows * heads * args.v_dim,
            2,
        )?,
        compressed_pitch: args.compressed_pitch as i64,
        num_tokens: to_i32("tokens", tokens)?,
        num_heads: to_i32("heads", heads)?,
        nope_dim: to_i32("head size", args.nope_dim)?,
        rope_dim: to_i32("head size", args.rope_dim)?,
        v_dim: to_i32("head size", args.v_dim)?,
        padding: 0,
    };
    let launch = Launch::row_per_block(tokens, (heads * (qk_dim + args.v_dim)).div_ceil(8));
    Ok(Call::new("tenp_mla_keys", launch, &params))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(expanded: usize, keys: usize, rows: usize, pitch: usize) -> Result<(), KernelError> {
        // SAFETY: nothing is ever read or written through the views.
        unsafe {
            mla_keys(MlaKeys {
                expanded: DeviceSlice::from_raw(0x1000, expanded),
                compressed: DeviceSlice::from_raw(0x1000, 1000),
                out_rows: None,
                keys: DeviceSliceMut::from_raw(0x2000, keys),
                values: DeviceSliceMut::from_raw(0x3000, 1000),
                num_tokens: 3,
                num_out_rows: rows,
                num_heads: 2,
                nope_dim: 16,
                rope_dim: 8,
                v_dim: 16,
                compressed_pitch: pitch,
            })
            .map(drop)
        }
    }

    #[test]
    fn misfits_are_refused() {
        assert_eq!(call(192, 144, 3, 40), Ok(()));
        assert!(call(191, 144, 3, 40).is_err());
        assert!(call(192, 143, 3, 40).is_err());
        assert!(call(192, 144, 2, 40).is_err());
        assert!(call(192, 144, 3, 7).is_err());
    }
}
