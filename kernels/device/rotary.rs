//! Wrapper of `rotary.cu`: [`RotaryTable::rotate`](crate::cpu::rotary::RotaryTable::rotate) on the GPU.

use half::bf16;

use super::call::Call;
use super::check::to_i32;
use super::geometry::Launch;
use super::rows::{check_out_rows, check_pitch, clip_value, extent};
use super::view::{DeviceSlice, DeviceSliceMut, InOut, optional, optional_mut};
use crate::KernelError;
use crate::params::TenpRotaryParams;

/// The table of angles, as [`RotaryTable`](crate::cpu::rotary::RotaryTable) makes it, on the GPU.
#[derive(Clone, Copy, Debug)]
pub struct Angles<'a> {
    /// `[positions, pairs]`.
    pub cosines: DeviceSlice<'a, f32>,
    /// `[positions, pairs]`.
    pub sines: DeviceSlice<'a, f32>,
    /// Positions in the table.
    pub positions: usize,
    /// Pairs of a head.
    pub pairs: usize,
    /// Pairs are neighbours; otherwise element i and i + pairs.
    pub interleaved: bool,
    /// The first elements of a head are rotated; otherwise the last.
    pub leading: bool,
}

/// Rotates the last (or first) 2 · pairs elements of each head, copies the others.
#[derive(Debug)]
pub struct Rotary<'a> {
    /// `[tokens, x_pitch]`, and where the f32 result goes if it is wanted: over x only without `out_rows` and with equal
    /// pitches.
    pub x: InOut<'a, f32>,
    /// The table.
    pub angles: Angles<'a>,
    /// `[tokens]`; a position outside the table gives NaN.
    pub positions: DeviceSlice<'a, i32>,
    /// `[tokens]`: row of each token in the outputs; without it each keeps its own.
    pub out_rows: Option<DeviceSlice<'a, i32>>,
    /// `[num_out_rows, out_pitch]`.
    pub out_bf16: Option<DeviceSliceMut<'a, bf16>>,
    /// Number of tokens.
    pub num_tokens: usize,
    /// Heads of a token.
    pub num_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements from one token of x to the next.
    pub x_pitch: usize,
    /// Rows of the outputs.
    pub num_out_rows: usize,
    /// Elements from one row of the outputs to the next.
    pub out_pitch: usize,
    /// Clamp to ±this first, a positive number.
    pub clip: Option<f32>,
}

fn check(args: &Rotary<'_>) -> Result<(), KernelError> {
    let cols = args.num_heads * args.head_dim;
    check_pitch("pitch of rotary input", args.x_pitch, cols)?;
    check_pitch("pitch of rotary output", args.out_pitch, cols)?;
    check_out_rows(args.out_rows.is_some(), args.num_tokens, args.num_out_rows)?;
    if 2 * args.angles.pairs > args.head_dim {
        return Err(KernelError::Invalid {
            what: "rotary head size",
            why: format!(
                "{} with {} rotary elements",
                args.head_dim,
                2 * args.angles.pairs
            ),
        });
    }
    if matches!(args.x, InOut::Over(_))
        && (args.out_rows.is_some() || args.x_pitch != args.out_pitch)
    {
        return Err(KernelError::Invalid {
            what: "rotary input",
            why: "rows move, so the result cannot take its place".into(),
        });
    }
    Ok(())
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths, pitches and head sizes that do not fit; a result in place of x whose rows would move.
///
/// # Safety
/// Every row in `out_rows` is in 0..`num_out_rows`, and no row is there twice.
pub unsafe fn rotary(mut args: Rotary<'_>) -> Result<Call<'_>, KernelError> {
    check(&args)?;
    let cols = args.num_heads * args.head_dim;
    let x_len = extent(args.num_tokens, args.x_pitch, cols);
    let out_len = extent(args.num_out_rows, args.out_pitch, cols);
    let angles = args.angles.positions * args.angles.pairs;
    let f32_len = match args.x {
        InOut::Over(_) => x_len,
        InOut::Apart(..) => out_len,
    };
    let (x, out_f32) = args.x.checked("rotary input", (x_len, f32_len), 4)?;
    let params = TenpRotaryParams {
        x,
        cosines: args.angles.cosines.checked("rotary cosines", angles, 4)?,
        sines: args.angles.sines.checked("rotary sines", angles, 4)?,
        positions: args.positions.checked("positions", args.num_tokens, 4)?,
        out_rows: optional(args.out_rows.as_ref(), "output rows", args.num_tokens, 4)?,
        out_f32,
        out_bf16: optional_mut(args.out_bf16.as_mut(), "rotary output", out_len, 2)?,
        x_pitch: args.x_pitch as i64,
        out_pitch: args.out_pitch as i64,
        clip: clip_value(args.clip)?,
        num_tokens: to_i32("tokens", args.num_tokens)?,
        num_heads: to_i32("heads", args.num_heads)?,
        head_dim: to_i32("head size", args.head_dim)?,
        num_pairs: to_i32("rotary pairs", args.angles.pairs)?,
        num_positions: to_i32("positions", args.angles.positions)?,
        interleaved: i32::from(args.angles.interleaved),
        leading: i32::from(args.angles.leading),
    };
    let launch = Launch::row_per_block(args.num_tokens, cols.div_ceil(8));
    Ok(Call::new("tenp_rotary", launch, &params))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never read through.
    fn view<'a, T: bytemuck::Pod>(len: usize) -> DeviceSlice<'a, T> {
        // SAFETY: see above.
        unsafe { DeviceSlice::from_raw(0x1000, len) }
    }

    fn args(x: InOut<'_, f32>) -> Rotary<'_> {
        Rotary {
            x,
            angles: Angles {
                cosines: view(40),
                sines: view(40),
                positions: 10,
                pairs: 4,
                interleaved: false,
                leading: false,
            },
            positions: view(3),
            out_rows: None,
            out_bf16: None,
            num_tokens: 3,
            num_heads: 2,
            head_dim: 9,
            x_pitch: 20,
            num_out_rows: 3,
            out_pitch: 20,
            clip: None,
        }
    }

    fn error(args: Rotary<'_>) -> KernelError {
        // SAFETY: nothing is launched.
        unsafe { rotary(args) }.map(drop).unwrap_err()
    }

    #[test]
    fn misfits_are_refused() {
        let over = |len| {
            // SAFETY: nothing is ever written through the view.
            InOut::Over(unsafe { DeviceSliceMut::from_raw(0x2000, len) })
        };
        let apart = || InOut::Apart(view(58), None);
        // SAFETY: nothing is launched.
        let call = unsafe { rotary(args(over(58))) }.unwrap();
        assert_eq!(call.launch(), Launch::line(3, 32, 0));
        assert!(matches!(
            error(args(over(57))),
            KernelError::Length { expected: 58, .. }
        ));
        for wrong in [
            Rotary {
                head_dim: 7,
                ..args(apart())
            },
            Rotary {
                x_pitch: 17,
                ..args(apart())
            },
            Rotary {
                out_pitch: 17,
                ..args(apart())
            },
            Rotary {
                out_pitch: 21,
                ..args(over(58))
            },
            Rotary {
                out_rows: Some(view(3)),
                ..args(over(58))
            },
            Rotary {
                clip: Some(-1.0),
                ..args(apart())
            },
        ] {
            assert!(matches!(error(wrong), KernelError::Invalid { .. }));
        }
        assert!(matches!(
            error(Rotary {
                positions: view(2),
                ..args(apart())
            }),
            KernelError::Length { .. }
        ));
    }
}
