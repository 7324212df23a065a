//! Wrappers of `pack.cu`: one expert's weights into device form on the GPU, all neurons or those that are kept.

use half::bf16;

use super::call::Call;
use super::check::{check_multiple, to_i32};
use super::geometry::Launch;
use super::packed::NEURON_PAD;
use super::view::{DeviceSlice, DeviceSliceMut, optional};
use crate::KernelError;
use crate::params::{TenpPackDownParams, TenpPackGateUpParams};

/// Rows of gate and up into an expert's part of `GU`.
#[derive(Debug)]
pub struct PackGateUp<'a> {
    /// `[source_width, hidden]`.
    pub gate: DeviceSlice<'a, bf16>,
    /// `[source_width, hidden]`.
    pub up: DeviceSlice<'a, bf16>,
    /// `[width]`: the neurons to take, in order; without it the first `width`.
    pub keep: Option<DeviceSlice<'a, i32>>,
    /// `[2 · width_padded, hidden]`: the expert's part of `GU`.
    pub out: DeviceSliceMut<'a, bf16>,
    /// Neurons of the source.
    pub source_width: usize,
    /// Neurons to take.
    pub width: usize,
    /// The same, padded to [`NEURON_PAD`] or more.
    pub width_padded: usize,
    /// Hidden size, a multiple of 8.
    pub hidden: usize,
}

/// Columns of down into an expert's part of `DT`.
#[derive(Debug)]
pub struct PackDown<'a> {
    /// `[hidden, source_width]`, any alignment.
    pub down: DeviceSlice<'a, bf16>,
    /// `[width]`: the neurons to take, in order; without it the first `width`. One that is not there gives NaN.
    pub keep: Option<DeviceSlice<'a, i32>>,
    /// `[width_padded, hidden]`: the expert's part of `DT`.
    pub out: DeviceSliceMut<'a, bf16>,
    /// Neurons of the source.
    pub source_width: usize,
    /// Neurons to take.
    pub width: usize,
    /// The same, padded to [`NEURON_PAD`] or more.
    pub width_padded: usize,
    /// Hidden size, a multiple of 8.
    pub hidden: usize,
}

fn check_widths(
    chosen: bool,
    source: usize,
    width: usize,
    padded: usize,
) -> Result<(), KernelError> {
    check_multiple("padded width", padded, NEURON_PAD)?;
    if width > padded {
        return Err(KernelError::Invalid {
            what: "padded width",
            why: format!("{padded} for a width of {width}"),
        });
    }
    if !chosen && width > source {
        return Err(KernelError::Length {
            what: "neurons of the source",
            expected: width,
            got: source,
        });
    }
    Ok(())
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths and widths that do not fit, a hidden size that is no multiple of 8.
///
/// # Safety
/// Every id in `keep` is in 0..`source_width`.
pub unsafe fn pack_gate_up(mut args: PackGateUp<'_>) -> Result<Call<'_>, KernelError> {
    check_multiple("hidden size", args.hidden, 8)?;
    check_widths(
        args.keep.is_some(),
        args.source_width,
        args.width,
        args.width_padded,
    )?;
    let source = args.source_width * args.hidden;
    let params = TenpPackGateUpParams {
        gate: args.gate.checked("gate weight", source, 16)?,
        up: args.up.checked("up weight", source, 16)?,
        keep: optional(args.keep.as_ref(), "neurons to keep", args.width, 4)?,
        out: args.out.checked(
            "packed gate and up",
            2 * args.width_padded * args.hidden,
            16,
        )?,
        width: to_i32("width", args.width)?,
        // GU's rows are counted in i32.
        width_padded: to_i32("rows of GU", 2 * args.width_padded)? / 2,
        hidden: to_i32("hidden size", args.hidden)?,
        padding: 0,
    };
    let launch = Launch::line(args.width_padded.div_ceil(4) as u32, 256, 0);
    Ok(Call::new("tenp_pack_gate_up", launch, &params))
}

/// Rows and columns of a tile of [`pack_down`].
const TILE: usize = 64;

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths and widths that do not fit, a hidden size that is no multiple of 8.
pub fn pack_down(mut args: PackDown<'_>) -> Result<Call<'_>, KernelError> {
    check_multiple("hidden size", args.hidden, 8)?;
    check_widths(
        args.keep.is_some(),
        args.source_width,
        args.width,
        args.width_padded,
    )?;
    let source = args.hidden * args.source_width;
    let params = TenpPackDownParams {
        down: args.down.checked("down weight", source, 2)?,
        keep: optional(args.keep.as_ref(), "neurons to keep", args.width, 4)?,
        out: args
            .out
            .checked("packed down", args.width_padded * args.hidden, 16)?,
        source_width: to_i32("width of the source", args.source_width)?,
        width: to_i32("width", args.width)?,
        width_padded: to_i32("padded width", args.width_padded)?,
        hidden: to_i32("hidden size", args.hidden)?,
    };
    let launch = Launch {
        grid: [
            args.hidden.div_ceil(TILE) as u32,
            args.width_padded.div_ceil(TILE) as u32,
            1,
        ],
        threads: 256,
        shared_bytes: 8448,
    };
    Ok(Call::new("tenp_pack_down", launch, &params))
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
    fn target<'a>(len: usize) -> DeviceSliceMut<'a, bf16> {
        // SAFETY: see above.
        unsafe { DeviceSliceMut::from_raw(0x2000, len) }
    }

    fn down<'a>(keep: Option<usize>) -> PackDown<'a> {
        PackDown {
            down: view(24 * 70),
            keep: keep.map(view),
            out: target(80 * 24),
            source_width: 70,
            width: 65,
            width_padded: 80,
            hidden: 24,
        }
    }

    #[test]
    fn down_is_cut_into_tiles() {
        let launch = pack_down(down(None)).unwrap().launch();
        assert_eq!((launch.grid, launch.threads), ([1, 2, 1], 256));
        assert!(pack_down(down(Some(65))).is_ok());
        assert!(pack_down(down(Some(64))).is_err());
        for wrong in [
            PackDown {
                width: 81,
                ..down(Some(81))
            },
            PackDown {
                width: 71,
                ..down(None)
            },
            PackDown {
                width_padded: 72,
                ..down(None)
            },
            PackDown {
                hidden: 20,
                ..down(None)
            },
            PackDown {
                down: view(24 * 70 - 1),
                ..down(None)
            },
            PackDown {
                out: target(80 * 24 - 1),
                ..down(None)
            },
        ] {
            assert!(pack_down(wrong).is_err());
        }
    }

    #[test]
    fn gate_and_up_are_checked_alike() {
        let args = |width: usize, len: usize| PackGateUp {
            gate: view(len),
            up: view(len),
            keep: None,
            out: target(160 * 24),
            source_width: 70,
            width,
            width_padded: 80,
            hidden: 24,
        };
        // SAFETY: nothing is launched.
        let call = |width, len| unsafe { pack_gate_up(args(width, len)) }.map(|c| c.launch());
        assert_eq!(call(65, 70 * 24), Ok(Launch::line(20, 256, 0)));
        assert!(call(71, 70 * 24).is_err());
        assert!(call(65, 70 * 24 - 1).is_err());
    }
}
