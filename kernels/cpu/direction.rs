//! Expert-level sums: sizes of outputs, and how far an expert turns its input.
//!
//! Formulas: `docs/methods.md` section 2. The direction score is TENP's expert importance (arXiv 2606.09885), the
//! residual direction that of EASY-EP. All sums are f64 over an expert's rows in token order.

use rayon::prelude::*;

use super::reduce::{dot_and_square, dots_with_sum, max_abs, sum_squares};
use crate::error::check_len;
use crate::{ExpertGroups, KernelError};

/// Running sums of one expert.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExpertSums {
    /// Rows seen.
    pub tokens: i64,
    /// Σ g.
    pub gate: f64,
    /// Σ g / Σ_k g.
    pub normalised_gate: f64,
    /// Σ ‖y‖.
    pub norm: f64,
    /// Σ ‖y‖².
    pub norm_sq: f64,
    /// Σ g‖y‖.
    pub gated_norm: f64,
    /// Σ g‖y‖(1 − cos(x, y)).
    pub direction: f64,
    /// Σ g‖y‖ · max(0, 1 − cos(r, r + Σ g y)).
    pub residual_direction: f64,
    /// max ‖y‖_inf.
    pub output_peak: f64,
    /// Rows whose output norm is not finite; they add nothing to the norms and directions.
    pub non_finite: u64,
}

impl ExpertSums {
    /// Adds the sums over other rows.
    pub fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.gate += other.gate;
        self.normalised_gate += other.normalised_gate;
        self.norm += other.norm;
        self.norm_sq += other.norm_sq;
        self.gated_norm += other.gated_norm;
        self.direction += other.direction;
        self.residual_direction += other.residual_direction;
        self.output_peak = self.output_peak.max(other.output_peak);
        self.non_finite += other.non_finite;
    }
}

/// What the batch's tokens look like around the layer.
#[derive(Clone, Copy, Debug)]
pub struct TokenContext<'a> {
    /// `[tokens, H]` what the experts received.
    pub x: &'a [f32],
    /// `[tokens, H]` residual stream before the layer's norm.
    pub residual: &'a [f32],
    /// `[tokens, H]` Σ g y of the routed experts.
    pub combined: &'a [f32],
}

/// Adds a batch to the experts' sums and returns `[rows]` ‖y‖ (0 where it is not finite).
///
/// `outputs` is `[rows, H]`, `sums` has one entry per expert.
///
/// # Errors
/// [`KernelError::Length`] for lengths that do not fit.
pub fn accumulate_expert_sums(
    groups: &ExpertGroups,
    context: TokenContext<'_>,
    outputs: &[f32],
    hidden: usize,
    sums: &mut [ExpertSums],
) -> Result<Vec<f64>, KernelError> {
    let len = groups.num_tokens() * hidden;
    check_len("expert sums", groups.num_experts(), sums.len())?;
    check_len("layer input", len, context.x.len())?;
    check_len("residual stream", len, context.residual.len())?;
    check_len("combined output", len, context.combined.len())?;
    check_len("expert outputs", groups.num_rows() * hidden, outputs.len())?;

    // Per token: ‖x‖² and how far the layer turns the residual stream.
    let tokens: Vec<(f64, f64)> = (0..groups.num_tokens())
        .into_par_iter()
        .with_min_len(16)
        .map(|t| {
            let at = t * hidden..(t + 1) * hidden;
            let turn = residual_turn(&context.residual[at.clone()], &context.combined[at.clone()]);
            (sum_squares(&context.x[at]), turn)
        })
        .collect();
    let weight_sums: Vec<f64> = (0..groups.num_tokens())
        .map(|t| {
            groups
                .rows_of_token(t)
                .iter()
                .map(|&r| f64::from(groups.weights()[r as usize]))
                .sum()
        })
        .collect();
    let mut norms = vec![0f64; groups.num_rows()];
    let mut rest = &mut norms[..];
    let mut work = Vec::with_capacity(sums.len());
    for (expert, sums) in sums.iter_mut().enumerate() {
        let (mine, tail) = rest.split_at_mut(groups.rows(expert).len());
        rest = tail;
        work.push((expert, sums, mine));
    }
    work.into_par_iter().for_each(|(expert, sums, norms)| {
        for (row, norm) in groups.rows(expert).zip(norms) {
            let token = groups.token_ids()[row] as usize;
            let y = &outputs[row * hidden..(row + 1) * hidden];
            let [xy, yy] = dot_and_square(&context.x[token * hidden..(token + 1) * hidden], y);
            let (xx, turn) = tokens[token];
            let gate = f64::from(groups.weights()[row]);
            sums.tokens += 1;
            sums.gate += gate;
            if weight_sums[token] != 0.0 {
                sums.normalised_gate += gate / weight_sums[token];
            }
            if !yy.is_finite() {
                sums.non_finite += 1;
                continue;
            }
            *norm = yy.sqrt();
            sums.norm += *norm;
            sums.norm_sq += yy;
            sums.gated_norm += gate * *norm;
            let cosine = if xx > 0.0 && yy > 0.0 {
                xy / (xx * yy).sqrt()
            } else {
                0.0
            };
            sums.direction += gate * *norm * (1.0 - cosine);
            sums.residual_direction += gate * *norm * turn;
            sums.output_peak = sums.output_peak.max(f64::from(max_abs(y)));
        }
    });
    Ok(norms)
}

/// max(0, 1 − cos(r, r + m)); 0 where either vector is zero.
fn residual_turn(residual: &[f32], combined: &[f32]) -> f64 {
    let [rr, ra, aa] = dots_with_sum(residual, combined);
    if rr > 0.0 && aa > 0.0 {
        (1.0 - ra / (rr * aa).sqrt()).max(0.0)
    } else {
        0.0
    }
}
