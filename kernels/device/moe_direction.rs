//! Wrapper of `moe_direction.cu`: the combined output and every dot product that the experts' sums need.

use super::call::Call;
use super::check::{check_multiple, to_i32};
use super::geometry::Launch;
use super::moe_combine::{ExpertOutputs, Slots};
use super::moe_schedule::ExpertTables;
use super::view::{DeviceSlice, DeviceSliceMut};
use crate::KernelError;
use crate::params::TenpMoeDirectionParams;

/// Dot products of a row: x·y, y·y.
pub const ROW_DOTS: usize = 2;

/// Dot products of a token: x·x, r·r, r·(r+m), (r+m)·(r+m), and the sum of its weights.
pub const TOKEN_DOTS: usize = 5;

/// Largest hidden size: a token's m must fit into a block's shared memory on every supported chip.
pub const MAX_HIDDEN: usize = 24_576;

/// m = Σ g y, and the dot products, in one pass over y.
#[derive(Debug)]
pub struct MoeDirection<'a> {
    /// The experts.
    pub experts: ExpertTables<'a>,
    /// `[rows, H]`.
    pub y: ExpertOutputs<'a>,
    /// The slots.
    pub slots: Slots<'a>,
    /// `[T, H]` what the experts received.
    pub x: DeviceSlice<'a, f32>,
    /// `[T, H]` residual stream before the layer's norm.
    pub residual: DeviceSlice<'a, f32>,
    /// `[T, H]`: m.
    pub combined: DeviceSliceMut<'a, f32>,
    /// `[rows, ROW_DOTS]`.
    pub row_dots: DeviceSliceMut<'a, f64>,
    /// `[rows]` largest |y|, NaN if an element is NaN.
    pub row_peaks: DeviceSliceMut<'a, f32>,
    /// `[rows]` 1 / (‖y‖ + 1e-8), 0 where ‖y‖ is zero or not finite.
    pub row_inverse: DeviceSliceMut<'a, f32>,
    /// `[T, TOKEN_DOTS]`.
    pub token_dots: DeviceSliceMut<'a, f64>,
    /// Hidden size H, a multiple of 8, at most [`MAX_HIDDEN`].
    pub hidden: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths and sizes that do not fit, or no expert per token.
pub fn moe_direction(mut args: MoeDirection<'_>) -> Result<Call<'_>, KernelError> {
    check_multiple("hidden size", args.hidden, 8)?;
    if args.hidden > MAX_HIDDEN {
        return Err(KernelError::Invalid {
            what: "hidden size",
            why: format!("{}, at most {MAX_HIDDEN}", args.hidden),
        });
    }
    let (tokens, rows) = (args.slots.num_tokens, args.slots.num_rows());
    let len = tokens * args.hidden;
    let (y_f32, y_bf16) = args.y.pointers(rows * args.hidden)?;
    let (row_of_slot, expert_ids, slot_weights) = args.slots.pointers()?;
    let params = TenpMoeDirectionParams {
        y_f32,
        y_bf16,
        x: args.x.checked("layer input", len, 16)?,
        residual: args.residual.checked("residual stream", len, 16)?,
        row_of_slot,
        expert_ids,
        slot_weights,
        widths: args.experts.pointers()?.1,
        combined: args.combined.checked("combined output", len, 16)?,
        row_dots: args
            .row_dots
            .checked("dot products of rows", ROW_DOTS * rows, 8)?,
        row_peaks: args.row_peaks.checked("peaks of rows", rows, 4)?,
        row_inverse: args.row_inverse.checked("inverse norms", rows, 4)?,
        token_dots: args
            .token_dots
            .checked("dot products of tokens", TOKEN_DOTS * tokens, 8)?,
        num_tokens: to_i32("tokens", tokens)?,
        top_k: to_i32("experts of a token", args.slots.top_k)?,
        hidden: to_i32("hidden size", args.hidden)?,
        padding: 0,
    };
    Ok(Call::new(
        "tenp_moe_direction",
        launch(tokens, args.hidden),
        &params,
    ))
}

fn launch(tokens: usize, hidden: usize) -> Launch {
    Launch::line(tokens as u32, 128, 4 * hidden as u32 + 320)
}

#[cfg(test)]
mod tests {
    use super::super::PaddedLayout;
    use super::*;
    use crate::RaggedLayout;

    #[test]
    fn a_block_per_token_fits_every_chip() {
        assert_eq!(launch(5, 2048), Launch::line(5, 128, 8512));
        assert!(launch(5, MAX_HIDDEN).shared_bytes <= 99 * 1024);
    }

    #[test]
    fn arguments_are_checked() {
        let layout = PaddedLayout::new(&RaggedLayout::new(vec![16]).unwrap()).unwrap();
        // SAFETY: nothing is read or written through the views.
        let ints = unsafe { DeviceSlice::<i32>::from_raw(0x1000, 6) };
        // SAFETY: as above.
        let floats = unsafe { DeviceSlice::<f32>::from_raw(0x2000, 48) };
        let args = |hidden, row_dots, token_dots| {
            // SAFETY: as above.
            let room = |len| unsafe { DeviceSliceMut::<f32>::from_raw(0x4000, len) };
            // SAFETY: as above.
            let doubles = |len| unsafe { DeviceSliceMut::<f64>::from_raw(0x8000, len) };
            moe_direction(MoeDirection {
                experts: ExpertTables {
                    layout: &layout,
                    neuron_offsets: ints,
                    widths: ints,
                },
                y: ExpertOutputs::F32(floats),
                slots: Slots {
                    row_of_slot: ints,
                    expert_ids: ints,
                    weights: floats,
                    num_tokens: 3,
                    top_k: 2,
                },
                x: floats,
                residual: floats,
                combined: room(24),
                row_dots: doubles(row_dots),
                row_peaks: room(6),
                row_inverse: room(6),
                token_dots: doubles(token_dots),
                hidden,
            })
            .is_ok()
        };
        assert!(args(8, 12, 15));
        assert!(!args(8, 11, 15));
        assert!(!args(8, 12, 14));
        assert!(!args(7, 12, 15));
        assert!(!args(MAX_HIDDEN + 8, 12, 15));
    }
}
