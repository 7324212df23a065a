//! Wrapper of `segment_norms.cu`: norms of the neurons' gate rows, up rows and down columns.

use half::bf16;

use super::call::Call;
use super::check::{check_multiple, to_i32};
use super::geometry::Launch;
use super::packed::NEURON_PAD;
use super::view::{DeviceSlice, DeviceSliceMut, optional_mut};
use crate::KernelError;
use crate::params::TenpSegmentNormsParams;

/// Norms of every neuron of packed experts; padding has norm 0.
#[derive(Debug)]
pub struct SegmentNorms<'a> {
    /// `[2S, H]`.
    pub gate_up: DeviceSlice<'a, bf16>,
    /// `[S, H]`.
    pub down_t: DeviceSlice<'a, bf16>,
    /// `[3, S]` squared norms: gate row, up row, down column.
    pub squares: Option<DeviceSliceMut<'a, f64>>,
    /// `[4, S]` 1 / norm of the three and of all together; 0 where that norm is zero or not finite.
    pub inverse: Option<DeviceSliceMut<'a, f32>>,
    /// Padded neurons S.
    pub num_neurons: usize,
    /// Hidden size H, a multiple of 8.
    pub hidden: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths and sizes that do not fit.
pub fn segment_norms(mut args: SegmentNorms<'_>) -> Result<Call<'_>, KernelError> {
    let (neurons, hidden) = (args.num_neurons, args.hidden);
    check_multiple("hidden size", hidden, 8)?;
    check_multiple("padded neurons", neurons, NEURON_PAD)?;
    let params = TenpSegmentNormsParams {
        gate_up: args
            .gate_up
            .checked("gate and up weights", 2 * neurons * hidden, 16)?,
        down_t: args.down_t.checked("down weights", neurons * hidden, 16)?,
        squares: optional_mut(
            args.squares.as_mut(),
            "squared norms of neurons",
            3 * neurons,
            8,
        )?,
        inverse: optional_mut(
            args.inverse.as_mut(),
            "inverse norms of neurons",
            4 * neurons,
            4,
        )?,
        num_neurons: to_i32("neurons", neurons)?,
        hidden: to_i32("hidden size", hidden)?,
    };
    Ok(Call::new("tenp_segment_norms", launch(neurons), &params))
}

fn launch(neurons: usize) -> Launch {
    Launch::line(neurons.div_ceil(8) as u32, 256, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warp_per_neuron() {
        assert_eq!(launch(48), Launch::line(6, 256, 0));
        assert!(launch(0).is_empty());
    }

    #[test]
    fn sizes_are_checked() {
        // SAFETY: nothing is read through the views.
        let (weights, room) = unsafe {
            (
                DeviceSlice::from_raw(0x1000, 2 * 32 * 8),
                DeviceSliceMut::from_raw(0x8000, 4 * 32 - 1),
            )
        };
        let args = |num_neurons, hidden| SegmentNorms {
            gate_up: weights,
            down_t: weights,
            squares: None,
            inverse: None,
            num_neurons,
            hidden,
        };
        assert!(segment_norms(args(32, 8)).is_ok());
        assert!(segment_norms(args(31, 8)).is_err());
        assert!(segment_norms(args(32, 7)).is_err());
        assert!(segment_norms(args(48, 8)).is_err());
        let mut short = args(32, 8);
        short.inverse = Some(room);
        assert!(matches!(
            segment_norms(short),
            Err(KernelError::Length {
                expected: 128,
                got: 127,
                ..
            })
        ));
    }
}
