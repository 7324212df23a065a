//! Wrapper of `moe_contribution.cu`: each neuron's projected contribution, summed over its rows (`docs/methods.md`).

use half::bf16;

use super::call::Call;
use super::check::{check_multiple, to_i32};
use super::geometry::Product;
use super::moe_gate_up::{Partials, check_pitch};
use super::moe_schedule::{ExpertTables, Schedule};
use super::tensor_map::TensorMap;
use super::view::DeviceSlice;
use crate::KernelError;
use crate::params::{TENP_NUM_CONTRIBUTION_SUMS, TenpMoeContributionParams};

/// Σ c and Σ |c| over the rows of each tile, c = h ⟨w, y⟩ / (‖y‖ + 1e-8).
#[derive(Debug)]
pub struct MoeContribution<'a> {
    /// Which entry: the schedule was made for the same one.
    pub product: Product,
    /// The experts.
    pub experts: ExpertTables<'a>,
    /// `[S, H]`.
    pub down_t: DeviceSlice<'a, bf16>,
    /// `[rows, H]`.
    pub y: DeviceSlice<'a, bf16>,
    /// `[rows, hidden_pitch]`.
    pub h: DeviceSlice<'a, bf16>,
    /// `[rows]` 1 / (‖y‖ + 1e-8), 0 where ‖y‖ is zero or not finite.
    pub row_inverse: DeviceSlice<'a, f32>,
    /// Room for the two sums.
    pub sums: Partials<'a>,
    /// `[experts + 1]`.
    pub group_offsets: DeviceSlice<'a, i32>,
    /// Of this product.
    pub schedule: Schedule<'a>,
    /// Rows at most.
    pub num_rows: usize,
    /// Hidden size H, a multiple of 8.
    pub hidden: usize,
    /// Elements from one row of h to the next.
    pub hidden_pitch: usize,
}

/// Checks the arguments and makes the call for `multiprocessors` multiprocessors.
///
/// # Errors
/// Sizes that do not fit together, or an entry that makes no contributions.
pub fn moe_contribution(
    mut args: MoeContribution<'_>,
    multiprocessors: usize,
) -> Result<Call<'_>, KernelError> {
    let experts = args.experts.layout.num_experts();
    check_multiple("hidden size", args.hidden, 8)?;
    check_pitch(&args.experts, args.hidden_pitch)?;
    if args.product != Product::contribution(args.product.tile) {
        return Err(KernelError::Invalid {
            what: "contribution",
            why: format!("{} makes none", args.product.entry),
        });
    }
    let (neuron_offsets, widths) = args.experts.pointers()?;
    let (order, tile_offsets) = args.schedule.pointers(experts)?;
    let weights = args.experts.layout.total() * args.hidden;
    let room = TENP_NUM_CONTRIBUTION_SUMS as usize * args.sums.stride;
    let params = TenpMoeContributionParams {
        down_t: args.down_t.checked("down weights", weights, 16)?,
        y: args
            .y
            .checked("expert outputs", args.num_rows * args.hidden, 16)?,
        h: args.h.checked(
            "expert hidden states",
            args.num_rows * args.hidden_pitch,
            16,
        )?,
        row_inverse: args
            .row_inverse
            .checked("inverse norms", args.num_rows, 4)?,
        partials: args.sums.partials.checked("partial sums", room, 4)?,
        partial_offsets: args
            .sums
            .offsets
            .checked("partial offsets", experts + 1, 8)?,
        group_offsets: args
            .group_offsets
            .checked("group offsets", experts + 1, 4)?,
        neuron_offsets,
        widths,
        order,
        tile_offsets,
        partial_stride: args.sums.stride as i64,
        num_experts: to_i32("experts", experts)?,
        hidden: to_i32("hidden size", args.hidden)?,
        hidden_pitch: to_i32("pitch of h", args.hidden_pitch)?,
        padding: 0,
    };
    let launch = args.product.launch(multiprocessors, experts);
    let call = Call::new(args.product.entry, launch, &params);
    if !args.product.tile.needs_wgmma() {
        return Ok(call);
    }
    let tile = args.product.tile.rows();
    let weights = TensorMap::new(
        "down weights",
        args.down_t,
        [args.experts.layout.total(), args.hidden, args.hidden],
        args.product.weight_tile,
    )?;
    let y = [args.num_rows, args.hidden, args.hidden];
    let h = [args.num_rows, args.hidden_pitch, args.hidden_pitch];
    Ok(call.with_maps([
        weights,
        TensorMap::new("expert outputs", args.y, y, tile)?,
        TensorMap::new("expert hidden states", args.h, h, tile)?,
    ]))
}
