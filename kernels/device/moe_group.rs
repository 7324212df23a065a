//! Wrappers of `moe_group.cu`: the slots of a batch grouped by expert, and rows gathered by index.

use half::bf16;

use super::call::Call;
use super::check::to_i32;
use super::geometry::Launch;
use super::view::{DeviceSlice, DeviceSliceMut, optional};
use crate::KernelError;
use crate::params::{TENP_GROUP_CHUNK, TenpGatherRowsParams, TenpMoeGroupParams};

/// Experts that the grouping kernels can count.
pub const MAX_EXPERTS: usize = 1023;

/// Length of the scratch that grouping `num_slots` slots needs.
#[must_use]
pub const fn group_scratch_len(num_slots: usize, num_experts: usize) -> usize {
    num_slots.div_ceil(TENP_GROUP_CHUNK as usize) * (num_experts + 1)
}

/// The stable counting sort of a batch's slots: [`crate::ExpertGroups`] on the GPU.
#[derive(Debug)]
pub struct MoeGroup<'a> {
    /// `[tokens, top_k]`; an id that is no expert's is routed nowhere.
    pub expert_ids: DeviceSlice<'a, i32>,
    /// `[tokens, top_k]`.
    pub slot_weights: DeviceSlice<'a, f32>,
    /// [`group_scratch_len`].
    pub scratch: DeviceSliceMut<'a, i32>,
    /// `[experts + 1]`.
    pub group_offsets: DeviceSliceMut<'a, i32>,
    /// `[tokens · top_k]`.
    pub token_of_row: DeviceSliceMut<'a, i32>,
    /// `[tokens, top_k]`; −1 for a slot that is routed nowhere.
    pub row_of_slot: DeviceSliceMut<'a, i32>,
    /// `[tokens · top_k]`.
    pub row_weights: DeviceSliceMut<'a, f32>,
    /// Number of tokens.
    pub num_tokens: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Number of experts.
    pub num_experts: usize,
}

fn launches(num_slots: usize, num_experts: usize) -> Vec<(&'static str, Launch)> {
    let classes = 4 * (num_experts as u32 + 1);
    if num_slots <= TENP_GROUP_CHUNK as usize {
        return vec![(
            "tenp_moe_group_small",
            Launch::line(1, 256, 4224 + 2 * classes),
        )];
    }
    let chunks = num_slots.div_ceil(TENP_GROUP_CHUNK as usize) as u32;
    vec![
        ("tenp_moe_count", Launch::line(chunks, 256, 4096)),
        ("tenp_moe_offsets", Launch::line(1, 1024, 8320 + classes)),
        ("tenp_moe_group", Launch::line(chunks, 256, 4096)),
    ]
}

/// Checks the arguments and makes the calls, to be run in their order.
///
/// # Errors
/// Lengths that do not fit, more than [`MAX_EXPERTS`] experts, no expert per token.
pub fn moe_group(mut args: MoeGroup<'_>) -> Result<Vec<Call<'_>>, KernelError> {
    if args.num_experts > MAX_EXPERTS || args.top_k == 0 {
        return Err(KernelError::Invalid {
            what: "expert grouping",
            why: format!(
                "{} experts (at most {MAX_EXPERTS}), {} per token",
                args.num_experts, args.top_k
            ),
        });
    }
    let slots = args.num_tokens * args.top_k;
    let chunks = slots.div_ceil(TENP_GROUP_CHUNK as usize);
    let params = TenpMoeGroupParams {
        expert_ids: args.expert_ids.checked("expert ids", slots, 4)?,
        slot_weights: args.slot_weights.checked("routing weights", slots, 4)?,
        chunk_counts: args.scratch.checked(
            "grouping scratch",
            group_scratch_len(slots, args.num_experts),
            4,
        )?,
        group_offsets: args
            .group_offsets
            .checked("group offsets", args.num_experts + 1, 4)?,
        token_of_row: args.token_of_row.checked("tokens of rows", slots, 4)?,
        row_of_slot: args.row_of_slot.checked("rows of slots", slots, 4)?,
        row_weights: args.row_weights.checked("weights of rows", slots, 4)?,
        num_slots: to_i32("slots", slots)?,
        top_k: to_i32("experts of a token", args.top_k)?,
        num_experts: to_i32("experts", args.num_experts)?,
        num_chunks: to_i32("chunks of slots", chunks)?,
    };
    let calls = launches(slots, args.num_experts).into_iter();
    Ok(calls
        .map(|(entry, launch)| Call::new(entry, launch, &params))
        .collect())
}

/// `out[r] = input[row_ids[r]]`; a negative id gives a row of zeros.
#[derive(Debug)]
pub struct GatherRows<'a> {
    /// `[input_rows, cols]`.
    pub input: DeviceSlice<'a, bf16>,
    /// `[rows]`, each below `input_rows`: the caller's promise, ids lie on the GPU.
    pub row_ids: DeviceSlice<'a, i32>,
    /// `[rows, cols]`.
    pub out: DeviceSliceMut<'a, bf16>,
    /// `[1]`: rows from this number on are left alone.
    pub num_live_rows: Option<DeviceSlice<'a, i32>>,
    /// Rows of the input.
    pub input_rows: usize,
    /// Rows of the output.
    pub rows: usize,
    /// Elements of a row, a multiple of 8.
    pub cols: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths that do not fit.
///
/// # Safety
/// Every id is below `input_rows`.
pub unsafe fn gather_rows(mut args: GatherRows<'_>) -> Result<Call<'_>, KernelError> {
    super::check::check_multiple("gathered columns", args.cols, 8)?;
    let params = TenpGatherRowsParams {
        in_: args
            .input
            .checked("gather input", args.input_rows * args.cols, 16)?,
        row_ids: args.row_ids.checked("gather ids", args.rows, 4)?,
        out: args
            .out
            .checked("gather output", args.rows * args.cols, 16)?,
        num_live_rows: optional(args.num_live_rows.as_ref(), "live rows", 1, 4)?,
        num_rows: to_i32("gathered rows", args.rows)?,
        cols: to_i32("gathered columns", args.cols)?,
    };
    let launch = Launch::line(args.rows.div_ceil(8) as u32, 256, 0);
    Ok(Call::new("tenp_gather_rows", launch, &params))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_batches_take_one_launch() {
        assert_eq!(
            launches(1024, 64),
            [("tenp_moe_group_small", Launch::line(1, 256, 4224 + 8 * 65))]
        );
        let large = launches(1025, 64);
        assert_eq!(large.len(), 3);
        assert_eq!(large[0].1.grid[0], 2);
        assert_eq!(
            large[1],
            ("tenp_moe_offsets", Launch::line(1, 1024, 8320 + 4 * 65))
        );
        assert_eq!(group_scratch_len(1025, 64), 130);
    }
}
