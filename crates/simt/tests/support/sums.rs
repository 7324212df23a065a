//! Dot products of a batch and the sums of its experts, through their wrappers.

use simt::Buffer;
use tenp_kernels::cpu::direction::ExpertSums;
use tenp_kernels::device::expert_sums::{self as wrapper, expert_sums, to_cpu_sums};
use tenp_kernels::device::moe_combine::{ExpertOutputs, Slots};
use tenp_kernels::device::moe_direction::{MoeDirection, ROW_DOTS, TOKEN_DOTS, moe_direction};

use super::moe::{Grouped, Tables};
use super::{Sim, view, view_mut};

/// What `tenp_moe_direction` makes.
pub struct Direction {
    pub combined: Buffer<f32>,
    pub row_dots: Buffer<f64>,
    pub row_peaks: Buffer<f32>,
    pub row_inverse: Buffer<f32>,
    pub token_dots: Buffer<f64>,
}

/// Runs it; `context` is x and the residual stream.
pub fn direction(
    tables: &Tables,
    y: ExpertOutputs<'_>,
    slots: Slots<'_>,
    context: (&[f32], &[f32]),
    sim: Sim,
) -> Direction {
    let (tokens, rows) = (slots.num_tokens, slots.num_rows());
    let x = Buffer::input("x", context.0);
    let residual = Buffer::input("residual", context.1);
    let made = Direction {
        combined: Buffer::output("combined", x.len()),
        row_dots: Buffer::output("row_dots", ROW_DOTS * rows),
        row_peaks: Buffer::output("row_peaks", rows),
        row_inverse: Buffer::output("row_inverse", rows),
        token_dots: Buffer::output("token_dots", TOKEN_DOTS * tokens),
    };
    sim.go(moe_direction(MoeDirection {
        experts: tables.view(),
        y,
        slots,
        x: view(&x),
        residual: view(&residual),
        combined: view_mut(&made.combined),
        row_dots: view_mut(&made.row_dots),
        row_peaks: view_mut(&made.row_peaks),
        row_inverse: view_mut(&made.row_inverse),
        token_dots: view_mut(&made.token_dots),
        hidden: x.len().checked_div(tokens).unwrap_or(8),
    }));
    made
}

/// The sums of the experts after the batch, `before` before it.
pub fn expert_sums_of(
    grouped: &Grouped,
    made: &Direction,
    before: &[ExpertSums],
    sim: Sim,
) -> Vec<ExpertSums> {
    let tables = [
        |s: &ExpertSums| s.gate,
        |s: &ExpertSums| s.normalised_gate,
        |s: &ExpertSums| s.norm,
        |s: &ExpertSums| s.norm_sq,
        |s: &ExpertSums| s.gated_norm,
        |s: &ExpertSums| s.direction,
        |s: &ExpertSums| s.residual_direction,
        |s: &ExpertSums| s.output_peak,
    ];
    let sums: Vec<f64> = tables.iter().flat_map(|of| before.iter().map(of)).collect();
    let tokens: Vec<i64> = before.iter().map(|s| s.tokens).collect();
    let non_finite: Vec<i64> = before.iter().map(|s| s.non_finite as i64).collect();
    let sums = Buffer::in_out("sums", &sums);
    let tokens = Buffer::in_out("tokens", &tokens);
    let non_finite = Buffer::in_out("non_finite", &non_finite);
    sim.go(expert_sums(wrapper::ExpertSums {
        group_offsets: view(&grouped.group_offsets),
        token_of_row: view(&grouped.token_of_row),
        row_weights: view(&grouped.row_weights),
        row_dots: view(&made.row_dots),
        row_peaks: view(&made.row_peaks),
        token_dots: view(&made.token_dots),
        sums: view_mut(&sums),
        tokens: view_mut(&tokens),
        non_finite: view_mut(&non_finite),
        num_rows: grouped.token_of_row.len(),
        num_tokens: made.token_dots.len() / TOKEN_DOTS,
        num_experts: before.len(),
    }));
    to_cpu_sums(&sums.to_vec(), &tokens.to_vec(), &non_finite.to_vec()).expect("whole tables")
}
