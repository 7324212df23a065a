//! Wrapper of `expert_sums.cu`: the running sums of the experts, from the dot products of a batch.

use super::call::Call;
use super::check::to_i32;
use super::geometry::Launch;
use super::moe_direction::{ROW_DOTS, TOKEN_DOTS};
use super::view::{DeviceSlice, DeviceSliceMut};
use crate::KernelError;
use crate::cpu::direction::ExpertSums as CpuSums;
use crate::error::check_len;
use crate::params::{
    TENP_EXPERT_DIRECTION, TENP_EXPERT_GATE, TENP_EXPERT_GATED_NORM, TENP_EXPERT_NORM,
    TENP_EXPERT_NORM_SQ, TENP_EXPERT_NORMALISED_GATE, TENP_EXPERT_OUTPUT_PEAK,
    TENP_EXPERT_RESIDUAL_DIRECTION, TENP_NUM_EXPERT_SUMS, TenpExpertSumsParams,
};

/// Adds a batch to the sums of the experts.
#[derive(Debug)]
pub struct ExpertSums<'a> {
    /// `[experts + 1]`.
    pub group_offsets: DeviceSlice<'a, i32>,
    /// `[rows]`.
    pub token_of_row: DeviceSlice<'a, i32>,
    /// `[rows]`.
    pub row_weights: DeviceSlice<'a, f32>,
    /// `[rows, ROW_DOTS]` of [`super::moe_direction`].
    pub row_dots: DeviceSlice<'a, f64>,
    /// `[rows]` of the same.
    pub row_peaks: DeviceSlice<'a, f32>,
    /// `[T, TOKEN_DOTS]` of the same.
    pub token_dots: DeviceSlice<'a, f64>,
    /// `[TENP_NUM_EXPERT_SUMS, experts]`, added to; the peaks are maxima.
    pub sums: DeviceSliceMut<'a, f64>,
    /// `[experts]`, added to.
    pub tokens: DeviceSliceMut<'a, i64>,
    /// `[experts]`, added to: rows whose norm is not finite; they count and their gates do, nothing else.
    pub non_finite: DeviceSliceMut<'a, i64>,
    /// Rows at most.
    pub num_rows: usize,
    /// Tokens.
    pub num_tokens: usize,
    /// Experts.
    pub num_experts: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths that do not fit.
pub fn expert_sums(mut args: ExpertSums<'_>) -> Result<Call<'_>, KernelError> {
    let (rows, experts) = (args.num_rows, args.num_experts);
    let dots = TOKEN_DOTS * args.num_tokens;
    to_i32("rows", rows)?;
    let params = TenpExpertSumsParams {
        group_offsets: args
            .group_offsets
            .checked("group offsets", experts + 1, 4)?,
        token_of_row: args.token_of_row.checked("tokens of rows", rows, 4)?,
        row_weights: args.row_weights.checked("weights of rows", rows, 4)?,
        row_dots: args
            .row_dots
            .checked("dot products of rows", ROW_DOTS * rows, 8)?,
        row_peaks: args.row_peaks.checked("peaks of rows", rows, 4)?,
        token_dots: args.token_dots.checked("dot products of tokens", dots, 8)?,
        sums: args
            .sums
            .checked("sums of experts", NUM_SUMS * experts, 8)?,
        tokens: args.tokens.checked("tokens of experts", experts, 8)?,
        non_finite: args
            .non_finite
            .checked("rows that are not finite", experts, 8)?,
        num_experts: to_i32("experts", experts)?,
        padding: 0,
    };
    Ok(Call::new("tenp_expert_sums", launch(experts), &params))
}

const NUM_SUMS: usize = TENP_NUM_EXPERT_SUMS as usize;

fn launch(experts: usize) -> Launch {
    Launch::line(experts as u32, 256, 576)
}

/// The tables, copied back, in the form that the CPU path has them in.
///
/// # Errors
/// [`KernelError::Length`] if a table is not `[experts]`, or `sums` not eight of them.
pub fn to_cpu_sums(
    sums: &[f64],
    tokens: &[i64],
    non_finite: &[i64],
) -> Result<Vec<CpuSums>, KernelError> {
    let experts = tokens.len();
    check_len("sums of experts", NUM_SUMS * experts, sums.len())?;
    check_len("rows that are not finite", experts, non_finite.len())?;
    let table = |which: u32, e: usize| sums[which as usize * experts + e];
    Ok((0..experts)
        .map(|e| CpuSums {
            tokens: tokens[e],
            gate: table(TENP_EXPERT_GATE, e),
            normalised_gate: table(TENP_EXPERT_NORMALISED_GATE, e),
            norm: table(TENP_EXPERT_NORM, e),
            norm_sq: table(TENP_EXPERT_NORM_SQ, e),
            gated_norm: table(TENP_EXPERT_GATED_NORM, e),
            direction: table(TENP_EXPERT_DIRECTION, e),
            residual_direction: table(TENP_EXPERT_RESIDUAL_DIRECTION, e),
            output_peak: table(TENP_EXPERT_OUTPUT_PEAK, e),
            non_finite: non_finite[e] as u64,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_per_expert() {
        assert_eq!(launch(64), Launch::line(64, 256, 576));
        assert!(launch(0).is_empty());
    }

    #[test]
    fn tables_become_the_sums_of_each_expert() {
        let sums: Vec<f64> = (0..16).map(f64::from).collect();
        let got = to_cpu_sums(&sums, &[7, 8], &[0, 1]).unwrap();
        assert_eq!((got[1].tokens, got[1].non_finite), (8, 1));
        assert_eq!((got[0].gate, got[1].gate), (0.0, 1.0));
        assert_eq!((got[0].direction, got[1].output_peak), (10.0, 15.0));
        assert!(to_cpu_sums(&sums[1..], &[7, 8], &[0, 1]).is_err());
        assert!(to_cpu_sums(&sums, &[7, 8], &[0]).is_err());
    }

    #[test]
    fn lengths_are_checked() {
        // SAFETY: nothing is read or written through the views.
        let ints = unsafe { DeviceSlice::<i32>::from_raw(0x1000, 6) };
        // SAFETY: as above.
        let floats = unsafe { DeviceSlice::<f32>::from_raw(0x2000, 6) };
        let args = |row_dots, token_dots, sums| {
            // SAFETY: as above.
            let doubles = |len| unsafe { DeviceSlice::<f64>::from_raw(0x3000, len) };
            // SAFETY: as above.
            let counts = || unsafe { DeviceSliceMut::<i64>::from_raw(0x4000, 2) };
            expert_sums(ExpertSums {
                group_offsets: ints,
                token_of_row: ints,
                row_weights: floats,
                row_dots: doubles(row_dots),
                row_peaks: floats,
                token_dots: doubles(token_dots),
                // SAFETY: as above.
                sums: unsafe { DeviceSliceMut::from_raw(0x5000, sums) },
                tokens: counts(),
                non_finite: counts(),
                num_rows: 6,
                num_tokens: 3,
                num_experts: 2,
            })
            .is_ok()
        };
        assert!(args(12, 15, 16));
        assert!(!args(11, 15, 16));
        assert!(!args(12, 14, 16));
        assert!(!args(12, 15, 15));
    }
}
