//! Wrappers of `rms_norm.cu`.

use half::bf16;

use super::call::Call;
use super::check::to_i32;
use super::geometry::Launch;
use super::view::{DeviceSlice, DeviceSliceMut, InOut, optional, optional_mut};
use crate::KernelError;
use crate::params::TenpRmsNormParams;

/// s = x + addend, out = s / √(mean(s²) + eps) · weight over the first `width` elements of each row.
#[derive(Debug)]
pub struct RmsNorm<'a> {
    /// `[rows, x_pitch]` x, and where s goes if it is wanted.
    pub x: InOut<'a, f32>,
    /// `[rows, x_pitch]`, added first.
    pub addend: Option<DeviceSlice<'a, f32>>,
    /// `[width]`.
    pub weight: DeviceSlice<'a, f32>,
    /// `[rows, out_pitch]`.
    pub out_f32: Option<DeviceSliceMut<'a, f32>>,
    /// `[rows, out_pitch]`.
    pub out_bf16: Option<DeviceSliceMut<'a, bf16>>,
    /// Added to the mean square.
    pub eps: f64,
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row that are normalised.
    pub width: usize,
    /// Elements from one row of x to the next.
    pub x_pitch: usize,
    /// Elements from one row of the outputs to the next.
    pub out_pitch: usize,
}

/// Rows up to this width get a warp instead of a block.
const WARP_WIDTH: usize = 512;

/// Which entry, and how it is launched.
fn launch(rows: usize, width: usize) -> (&'static str, Launch) {
    if width <= WARP_WIDTH {
        (
            "tenp_rms_norm_heads",
            Launch::line(rows.div_ceil(8) as u32, 256, 0),
        )
    } else {
        ("tenp_rms_norm", Launch::line(rows as u32, 256, 64))
    }
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths and pitches that do not fit.
pub fn rms_norm(mut args: RmsNorm<'_>) -> Result<Call<'_>, KernelError> {
    for (what, pitch) in [
        ("pitch of the norm's input", args.x_pitch),
        ("pitch of the norm's output", args.out_pitch),
    ] {
        if args.width == 0 || pitch < args.width {
            return Err(KernelError::Invalid {
                what,
                why: format!("{pitch} for rows of {} elements", args.width),
            });
        }
    }
    let extent = |pitch: usize| {
        if args.rows == 0 {
            0
        } else {
            (args.rows - 1) * pitch + args.width
        }
    };
    let (x_len, out_len) = (extent(args.x_pitch), extent(args.out_pitch));
    let (entry, launch) = launch(args.rows, args.width);
    let (x, sum_out) = args.x.checked("norm input", (x_len, x_len), 4)?;
    let params = TenpRmsNormParams {
        x,
        addend: optional(args.addend.as_ref(), "norm addend", x_len, 4)?,
        weight: args.weight.checked("norm weight", args.width, 4)?,
        sum_out,
        out_f32: optional_mut(args.out_f32.as_mut(), "norm output", out_len, 4)?,
        out_bf16: optional_mut(args.out_bf16.as_mut(), "norm output", out_len, 2)?,
        eps: args.eps,
        x_pitch: args.x_pitch as i64,
        out_pitch: args.out_pitch as i64,
        num_rows: to_i32("rows of the norm", args.rows)?,
        width: to_i32("width of the norm", args.width)?,
    };
    Ok(Call::new(entry, launch, &params))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrow_rows_get_a_warp() {
        assert_eq!(
            launch(9, 128),
            ("tenp_rms_norm_heads", Launch::line(2, 256, 0))
        );
        assert_eq!(launch(9, 2048), ("tenp_rms_norm", Launch::line(9, 256, 64)));
        assert!(launch(0, 128).1.is_empty());
    }
}
