//! Wrapper of `moe_contribution.cu`: each neuron's projected contribution, summed over its rows (`docs/methods.md`).

use std::ptr;

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

/// What ⟨w, y⟩ is made of.
#[derive(Clone, Copy, Debug)]
pub enum Projected<'a> {
    /// Outputs: w · y over the hidden size.
    Outputs {
        /// `[S, H]`.
        down_t: DeviceSlice<'a, bf16>,
        /// `[rows, H]`.
        y: DeviceSlice<'a, bf16>,
    },
    /// Gram matrices: (G h) of the neuron over the expert's width, which needs no y.
    Gram {
        /// `[2S, hidden_pitch]` of [`gram_matrices`](super::gram::gram_matrices).
        gram: DeviceSlice<'a, bf16>,
    },
}

/// Σ c and Σ |c| over the rows of each tile, c = h ⟨w, y⟩ / (‖y‖ + 1e-8).
#[derive(Debug)]
pub struct MoeContribution<'a> {
    /// Which entry: the schedule was made for the same one.
    pub product: Product,
    /// The experts.
    pub experts: ExpertTables<'a>,
    /// ⟨w, y⟩.
    pub projected: Projected<'a>,
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
    let rows = args.num_rows;
    let room = TENP_NUM_CONTRIBUTION_SUMS as usize * args.sums.stride;
    let [down_t, y, gram] = operands(&args)?;
    let params = TenpMoeContributionParams {
        down_t,
        y,
        gram,
        h: args
            .h
            .checked("expert hidden states", rows * args.hidden_pitch, 16)?,
        row_inverse: args.row_inverse.checked("inverse norms", rows, 4)?,
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
        num_neurons: to_i32("padded neurons", args.experts.layout.total())?,
    };
    let launch = args.product.launch(multiprocessors, experts);
    let entry = match args.projected {
        Projected::Outputs { .. } => args.product.entry,
        Projected::Gram { .. } => args.product.in_gram_form(),
    };
    let call = Call::new(entry, launch, &params);
    if args.product.tile.needs_wgmma() {
        Ok(call.with_maps(maps(&args)?))
    } else {
        Ok(call)
    }
}

/// Down weights, outputs and Gram matrices: what is not read is null.
fn operands(args: &MoeContribution<'_>) -> Result<[*const u16; 3], KernelError> {
    let neurons = args.experts.layout.total();
    match args.projected {
        Projected::Outputs { down_t, y } => Ok([
            down_t.checked("down weights", neurons * args.hidden, 16)?,
            y.checked("expert outputs", args.num_rows * args.hidden, 16)?,
            ptr::null(),
        ]),
        Projected::Gram { gram } => {
            let gram = gram.checked("Gram matrices", 2 * neurons * args.hidden_pitch, 16)?;
            Ok([ptr::null(), ptr::null(), gram])
        }
    }
}

/// Of the weights, of the rows that are multiplied, and of h.
fn maps(args: &MoeContribution<'_>) -> Result<[TensorMap; 3], KernelError> {
    let (neurons, tile) = (args.experts.layout.total(), args.product.tile.rows());
    let weight_tile = args.product.weight_tile;
    let of = |rows: usize, pitch: usize| [rows, pitch, pitch];
    let h = of(args.num_rows, args.hidden_pitch);
    let h = TensorMap::new("expert hidden states", args.h, h, tile)?;
    match args.projected {
        Projected::Outputs { down_t, y } => {
            let weights = of(neurons, args.hidden);
            let outputs = of(args.num_rows, args.hidden);
            Ok([
                TensorMap::new("down weights", down_t, weights, weight_tile)?,
                TensorMap::new("expert outputs", y, outputs, tile)?,
                h,
            ])
        }
        Projected::Gram { gram } => {
            let matrices = of(2 * neurons, args.hidden_pitch);
            let matrices = TensorMap::new("Gram matrices", gram, matrices, weight_tile)?;
            Ok([matrices, h, h])
        }
    }
}
