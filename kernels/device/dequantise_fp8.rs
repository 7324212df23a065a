//! Wrapper of `dequantise_fp8.cu`: block-scaled e4m3 to bf16.

use half::bf16;

use super::call::Call;
use super::check::to_i32;
use super::geometry::Launch;
use super::view::{DeviceSlice, DeviceSliceMut};
use crate::params::TenpDequantiseFp8Params;
use crate::{FP8_BLOCK, KernelError};

/// out = element · scale of its block, rounded to nearest even.
#[derive(Debug)]
pub struct DequantiseFp8<'a> {
    /// `[rows, cols]` codes of OCP FP8 E4M3.
    pub input: DeviceSlice<'a, u8>,
    /// `[⌈rows / 128⌉, ⌈cols / 128⌉]`.
    pub scales: DeviceSlice<'a, f32>,
    /// `[rows, cols]`.
    pub out: DeviceSliceMut<'a, bf16>,
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths that do not fit.
pub fn dequantise_fp8(mut args: DequantiseFp8<'_>) -> Result<Call<'_>, KernelError> {
    let len = args.rows * args.cols;
    let blocks = args.rows.div_ceil(FP8_BLOCK) * args.cols.div_ceil(FP8_BLOCK);
    let params = TenpDequantiseFp8Params {
        in_: args.input.checked("fp8 weight", len, 1)?,
        scales: args.scales.checked("fp8 scales", blocks, 4)?,
        out: args.out.checked("bf16 weight", len, 2)?,
        num_rows: to_i32("rows of the weight", args.rows)?,
        // The last block's columns are counted past the last element.
        cols: to_i32("columns of the weight", args.cols + FP8_BLOCK)? - FP8_BLOCK as i32,
    };
    let launch = Launch::row_per_block(args.rows, args.cols.div_ceil(16));
    Ok(Call::new("tenp_dequantise_fp8", launch, &params))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_needs_its_scale() {
        let call = |scales: usize, len: usize| {
            // SAFETY: nothing is ever read or written through the views.
            let (input, scales, out) = unsafe {
                (
                    DeviceSlice::from_raw(0x1000, len),
                    DeviceSlice::from_raw(0x2000, scales),
                    DeviceSliceMut::from_raw(0x3000, 129 * 300),
                )
            };
            dequantise_fp8(DequantiseFp8 {
                input,
                scales,
                out,
                rows: 129,
                cols: 300,
            })
            .map(|call| call.launch())
        };
        assert_eq!(call(6, 129 * 300), Ok(Launch::line(129, 32, 0)));
        assert!(matches!(
            call(5, 129 * 300),
            Err(KernelError::Length {
                what: "fp8 scales",
                expected: 6,
                ..
            })
        ));
        assert!(call(6, 129 * 300 - 1).is_err());
    }
}
