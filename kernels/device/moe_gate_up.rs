//! Wrapper of `moe_gate_up.cu`: the grouped gate and up products with SwiGLU, and the neurons' sums over h.

use half::bf16;

use super::call::Call;
use super::check::{check_multiple, to_i32};
use super::geometry::Product;
use super::moe_schedule::{ExpertTables, Schedule};
use super::packed::NEURON_PAD;
use super::tensor_map::TensorMap;
use super::view::{DeviceSlice, DeviceSliceMut, optional};
use crate::KernelError;
use crate::params::{TENP_NUM_ACTIVATION_SUMS, TenpMoeGateUpParams};

/// Where a product leaves the sums of its tiles.
#[derive(Debug)]
pub struct Partials<'a> {
    /// `[sums, stride]`.
    pub partials: DeviceSliceMut<'a, f32>,
    /// `[experts + 1]` of the product's schedule.
    pub offsets: DeviceSlice<'a, i64>,
    /// Elements of one sum's table: [`super::geometry::partial_stride`].
    pub stride: usize,
}

/// h = silu(gate x) · (up x) of every row.
#[derive(Debug)]
pub struct MoeGateUp<'a> {
    /// Which entry: the schedule was made for the same one.
    pub product: Product,
    /// The experts.
    pub experts: ExpertTables<'a>,
    /// `[2S, H]`.
    pub gate_up: DeviceSlice<'a, bf16>,
    /// `[x_rows, H]`.
    pub x: DeviceSlice<'a, bf16>,
    /// `[rows]`; without it row r of x is row r.
    pub token_of_row: Option<DeviceSlice<'a, i32>>,
    /// `[rows, hidden_pitch]`.
    pub h: DeviceSliceMut<'a, bf16>,
    /// `[experts + 1]`.
    pub group_offsets: DeviceSlice<'a, i32>,
    /// Of this product.
    pub schedule: Schedule<'a>,
    /// `[rows]` weights and the sums' room, for the entries with statistics.
    pub sums: Option<(DeviceSlice<'a, f32>, Partials<'a>)>,
    /// Rows of x: tokens, or rows where there is no `token_of_row`.
    pub x_rows: usize,
    /// Rows at most.
    pub num_rows: usize,
    /// Hidden size H, a multiple of 8.
    pub hidden: usize,
    /// Elements from one row of h to the next.
    pub hidden_pitch: usize,
}

pub(super) fn check_pitch(experts: &ExpertTables<'_>, pitch: usize) -> Result<(), KernelError> {
    check_multiple("pitch of h", pitch, NEURON_PAD)?;
    let widest = experts.layout.hidden_pitch();
    if pitch >= widest {
        return Ok(());
    }
    Err(KernelError::Invalid {
        what: "pitch of h",
        why: format!("{pitch}, but the widest expert has {widest} padded neurons"),
    })
}

/// Checks the arguments and makes the call for `multiprocessors` multiprocessors.
///
/// # Errors
/// Sizes that do not fit together; sums asked of an entry without them, or left out of one with them.
pub fn moe_gate_up(
    mut args: MoeGateUp<'_>,
    multiprocessors: usize,
) -> Result<Call<'_>, KernelError> {
    let experts = args.experts.layout.num_experts();
    check_multiple("hidden size", args.hidden, 8)?;
    check_pitch(&args.experts, args.hidden_pitch)?;
    let wants_sums = args.product == Product::gate_up_stats(args.product.tile);
    if !wants_sums && args.product != Product::gate_up(args.product.tile)
        || wants_sums != args.sums.is_some()
    {
        return Err(KernelError::Invalid {
            what: "gate and up product",
            why: format!(
                "{} with {} sums",
                args.product.entry,
                if args.sums.is_some() { "its" } else { "no" }
            ),
        });
    }
    let (neuron_offsets, widths) = args.experts.pointers()?;
    let (order, tile_offsets) = args.schedule.pointers(experts)?;
    let weights = 2 * args.experts.layout.total() * args.hidden;
    let mut params = TenpMoeGateUpParams {
        gate_up: args.gate_up.checked("gate and up weights", weights, 16)?,
        x: args
            .x
            .checked("expert input", args.x_rows * args.hidden, 16)?,
        token_of_row: optional(
            args.token_of_row.as_ref(),
            "tokens of rows",
            args.num_rows,
            4,
        )?,
        h: args.h.checked(
            "expert hidden states",
            args.num_rows * args.hidden_pitch,
            16,
        )?,
        group_offsets: args
            .group_offsets
            .checked("group offsets", experts + 1, 4)?,
        neuron_offsets,
        widths,
        order,
        tile_offsets,
        row_weights: std::ptr::null(),
        partials: std::ptr::null_mut(),
        partial_offsets: std::ptr::null(),
        partial_stride: 0,
        num_experts: to_i32("experts", experts)?,
        hidden: to_i32("hidden size", args.hidden)?,
        hidden_pitch: to_i32("pitch of h", args.hidden_pitch)?,
        padding: 0,
    };
    if let Some((row_weights, sums)) = &mut args.sums {
        let room = TENP_NUM_ACTIVATION_SUMS as usize * sums.stride;
        params.row_weights = row_weights.checked("weights of rows", args.num_rows, 4)?;
        params.partials = sums.partials.checked("partial sums", room, 4)?;
        params.partial_offsets = sums.offsets.checked("partial offsets", experts + 1, 8)?;
        params.partial_stride = sums.stride as i64;
    }
    let launch = args.product.launch(multiprocessors, experts);
    if !args.product.tile.needs_wgmma() {
        return Ok(Call::new(args.product.entry, launch, &params));
    }
    let weights = TensorMap::new(
        "gate and up weights",
        args.gate_up,
        [2 * args.experts.layout.total(), args.hidden, args.hidden],
        2 * args.product.weight_tile,
    )?;
    if args.token_of_row.is_some() {
        // Rows are gathered one by one, for which there is no map.
        let call = Call::new(args.product.gathering(), launch, &params);
        return Ok(call.with_maps([weights; 3]));
    }
    let rows = TensorMap::new(
        "expert input",
        args.x,
        [args.x_rows, args.hidden, args.hidden],
        args.product.tile.rows(),
    )?;
    Ok(Call::new(args.product.entry, launch, &params).with_maps([weights, rows, rows]))
}
