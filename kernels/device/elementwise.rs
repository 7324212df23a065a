//! Wrappers of `elementwise.cu`.

use half::bf16;

use super::call::Call;
use super::check::to_i32;
use super::geometry::Launch;
use super::rows::{check_pitch, extent};
use super::view::{DeviceSlice, DeviceSliceMut, InOut, optional};
use crate::KernelError;
use crate::params::{TenpAddParams, TenpCountNonFiniteParams, TenpSiluMulParams};

/// out = silu(gate) · up, the activation of a dense layer or a shared expert.
#[derive(Debug)]
pub struct SiluMul<'a> {
    /// `[rows, pitch]`.
    pub gate: DeviceSlice<'a, f32>,
    /// `[rows, pitch]`.
    pub up: DeviceSlice<'a, f32>,
    /// `[rows, cols]`.
    pub out: DeviceSliceMut<'a, bf16>,
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Elements from one row of gate and up to the next.
    pub pitch: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths and pitches that do not fit.
pub fn silu_mul(mut args: SiluMul<'_>) -> Result<Call<'_>, KernelError> {
    check_pitch("pitch of gate and up", args.pitch, args.cols)?;
    let len = extent(args.rows, args.pitch, args.cols);
    let params = TenpSiluMulParams {
        gate: args.gate.checked("gate", len, 4)?,
        up: args.up.checked("up", len, 4)?,
        out: args.out.checked("activation", args.rows * args.cols, 2)?,
        pitch: args.pitch as i64,
        num_rows: to_i32("rows of the activation", args.rows)?,
        cols: to_i32("columns of the activation", args.cols)?,
    };
    let launch = Launch::row_per_block(args.rows, args.cols.div_ceil(8));
    Ok(Call::new("tenp_silu_mul", launch, &params))
}

/// out = a + g · b, g = sigmoid(row_logits) of the row, or 1.
#[derive(Debug)]
pub struct Add<'a> {
    /// `[rows, cols]` a, and where the sum goes, which must be wanted.
    pub a: InOut<'a, f32>,
    /// `[rows, cols]`.
    pub b: DeviceSlice<'a, f32>,
    /// `[rows]`.
    pub row_logits: Option<DeviceSlice<'a, f32>>,
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths that do not fit, no place for the sum.
pub fn add(mut args: Add<'_>) -> Result<Call<'_>, KernelError> {
    let len = args.rows * args.cols;
    let (a, out): (*const f32, *mut f32) = args.a.checked("summand", (len, len), 4)?;
    if out.is_null() && len > 0 {
        return Err(KernelError::Invalid {
            what: "sum",
            why: "there is no place for it".into(),
        });
    }
    let params = TenpAddParams {
        a,
        b: args.b.checked("summand", len, 4)?,
        row_logits: optional(args.row_logits.as_ref(), "gate logits", args.rows, 4)?,
        out,
        num_rows: to_i32("rows of the sum", args.rows)?,
        cols: to_i32("columns of the sum", args.cols)?,
    };
    let launch = Launch::row_per_block(args.rows, args.cols.div_ceil(4));
    Ok(Call::new("tenp_add", launch, &params))
}

/// Elements that a block of [`count_non_finite`] takes before more blocks are made.
const COUNT_CHUNK: usize = 8 * 1024;

/// Adds the number of NaN and infinite elements of `x` to `count`, `[1]`, on `multiprocessors` multiprocessors.
///
/// # Errors
/// A count of no elements.
pub fn count_non_finite<'a>(
    x: DeviceSlice<'a, f32>,
    mut count: DeviceSliceMut<'a, i32>,
    multiprocessors: usize,
) -> Result<Call<'a>, KernelError> {
    let len = x.len();
    let params = TenpCountNonFiniteParams {
        x: x.checked("numbers to check", len, 4)?,
        count: count.checked("count of damaged numbers", 1, 4)?,
        len: len as i64,
    };
    let blocks = len.div_ceil(COUNT_CHUNK).min(4 * multiprocessors.max(1));
    let launch = Launch::line(blocks as u32, 256, 32);
    Ok(Call::new("tenp_count_non_finite", launch, &params))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never read through.
    fn view<'a, T: bytemuck::Pod>(len: usize) -> DeviceSlice<'a, T> {
        // SAFETY: see above.
        unsafe { DeviceSlice::from_raw(0x1000, len) }
    }

    /// Never written through.
    fn target<'a, T: bytemuck::Pod>(len: usize) -> DeviceSliceMut<'a, T> {
        // SAFETY: see above.
        unsafe { DeviceSliceMut::from_raw(0x2000, len) }
    }

    #[test]
    fn misfits_are_refused() {
        let activation = |len: usize, pitch: usize| {
            silu_mul(SiluMul {
                gate: view(len),
                up: view(len),
                out: target(30),
                rows: 3,
                cols: 10,
                pitch,
            })
            .map(drop)
        };
        assert_eq!(activation(34, 12), Ok(()));
        assert!(activation(33, 12).is_err());
        assert!(activation(34, 9).is_err());

        let sum = |out: Option<DeviceSliceMut<'static, f32>>, logits: usize| {
            add(Add {
                a: InOut::Apart(view(30), out),
                b: view(30),
                row_logits: Some(view(logits)),
                rows: 3,
                cols: 10,
            })
            .map(drop)
        };
        assert_eq!(sum(Some(target(30)), 3), Ok(()));
        assert!(matches!(
            sum(None, 3),
            Err(KernelError::Invalid { what: "sum", .. })
        ));
        assert!(sum(Some(target(29)), 3).is_err());
        assert!(sum(Some(target(30)), 2).is_err());
        assert!(count_non_finite(view(5), target(0), 132).is_err());
    }

    #[test]
    fn long_arrays_are_counted_by_a_bounded_grid() {
        let grid = |len| {
            let call = count_non_finite(view(len), target(1), 132).unwrap();
            call.launch().grid[0]
        };
        assert_eq!((grid(0), grid(1), grid(8193)), (0, 1, 2));
        assert_eq!(grid(1 << 30), 528);
    }
}
