//! Wrapper of `moe_down.cu`: the grouped down product.

use half::bf16;

use super::call::Call;
use super::check::{check_multiple, to_i32};
use super::geometry::Product;
use super::moe_gate_up::check_pitch;
use super::moe_schedule::{ExpertTables, Schedule};
use super::tensor_map::{BOX_INNER, TensorMap};
use super::view::{DeviceSlice, DeviceSliceMut, optional_mut};
use crate::KernelError;
use crate::params::TenpMoeDownParams;

/// y = down h of every row; rows of an expert of width 0 are left alone.
#[derive(Debug)]
pub struct MoeDown<'a> {
    /// Which entry: the schedule was made for the same one, with H outputs.
    pub product: Product,
    /// The experts.
    pub experts: ExpertTables<'a>,
    /// `[S, H]`.
    pub down_t: DeviceSlice<'a, bf16>,
    /// `[rows, hidden_pitch]`.
    pub h: DeviceSlice<'a, bf16>,
    /// `[rows, H]`.
    pub y_f32: Option<DeviceSliceMut<'a, f32>>,
    /// `[rows, H]`.
    pub y_bf16: Option<DeviceSliceMut<'a, bf16>>,
    /// `[square_partials(product, H), rows]`: sums of squares of y over each tile's outputs.
    pub square_partials: Option<DeviceSliceMut<'a, f32>>,
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

/// Rows of the table of partial squares.
#[must_use]
pub const fn square_partials(product: &Product, hidden: usize) -> usize {
    hidden.div_ceil(product.weight_tile)
}

/// Checks the arguments and makes the call for `multiprocessors` multiprocessors.
///
/// # Errors
/// Sizes that do not fit together, or an entry that is no down product.
pub fn moe_down(mut args: MoeDown<'_>, multiprocessors: usize) -> Result<Call<'_>, KernelError> {
    let experts = args.experts.layout.num_experts();
    check_multiple("hidden size", args.hidden, 8)?;
    check_pitch(&args.experts, args.hidden_pitch)?;
    if args.product != Product::down(args.product.tile) {
        return Err(KernelError::Invalid {
            what: "down product",
            why: format!("{} is none", args.product.entry),
        });
    }
    let (neuron_offsets, widths) = args.experts.pointers()?;
    let (order, tile_offsets) = args.schedule.pointers(experts)?;
    let outputs = args.num_rows * args.hidden;
    let squares = square_partials(&args.product, args.hidden) * args.num_rows;
    let weights = args.experts.layout.total() * args.hidden;
    let params = TenpMoeDownParams {
        down_t: args.down_t.checked("down weights", weights, 16)?,
        h: args.h.checked(
            "expert hidden states",
            args.num_rows * args.hidden_pitch,
            16,
        )?,
        y_f32: optional_mut(args.y_f32.as_mut(), "expert outputs", outputs, 16)?,
        y_bf16: optional_mut(args.y_bf16.as_mut(), "expert outputs", outputs, 16)?,
        square_partials: optional_mut(
            args.square_partials.as_mut(),
            "partial squares",
            squares,
            4,
        )?,
        group_offsets: args
            .group_offsets
            .checked("group offsets", experts + 1, 4)?,
        neuron_offsets,
        widths,
        order,
        tile_offsets,
        num_rows: args.num_rows as i64,
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
    // The inner dimension of the product is the map's rows, in stages as long as a box is wide.
    let weights = TensorMap::new(
        "down weights",
        args.down_t,
        [args.experts.layout.total(), args.hidden, args.hidden],
        BOX_INNER as usize,
    )?;
    let rows = TensorMap::new(
        "expert hidden states",
        args.h,
        [args.num_rows, args.hidden_pitch, args.hidden_pitch],
        args.product.tile.rows(),
    )?;
    Ok(call.with_maps([weights, rows, rows]))
}
