//! Budgets and widths: how many neurons each expert keeps. Pure functions of numbers; `docs/methods.md`, "Allocation".
//!
//! Shares given in decimal (0.29 of 50) are often an ulp below the half or the integer that was meant, so counts are
//! rounded half up, and rounded down, with a slack of 1e-9.

mod drop;
mod global;
mod sensitivity;
mod trapezoid;

pub use drop::{KeptExperts, kept_count, kept_experts};
pub use global::global_widths;
pub use sensitivity::{ErrorCurves, SensitivityWidths, measured_widths, sensitivity_widths};
pub use trapezoid::{trapezoid_widths, whole_experts, whole_experts_per_layer};

use crate::PruneError;

/// Size of a model's routed part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// MoE layers L.
    pub num_layers: usize,
    /// Routed experts N of a layer.
    pub num_experts: usize,
    /// Neurons K of an expert.
    pub expert_width: usize,
}

impl Shape {
    /// Neurons of all routed experts, L·N·K.
    pub fn num_neurons(&self) -> usize {
        self.num_layers
            .saturating_mul(self.num_experts)
            .saturating_mul(self.expert_width)
    }
}

/// What guarded experts, which stay whole, leave of a budget of neurons.
fn left_by_guarded(shape: Shape, guarded: usize, budget: usize) -> Result<usize, PruneError> {
    let needed = guarded * shape.expert_width;
    budget
        .checked_sub(needed)
        .ok_or(PruneError::GuardedOverBudget {
            guarded,
            needed,
            budget,
        })
}

/// Share α of experts kept whole when none is given: 5/9·ρ², which meets the values published for DeepSeek-V2-Lite
/// (arXiv 2606.09885): ρ = 0.6 → 0.20, ρ = 0.3 → 0.05.
pub fn default_alpha(keep: f64) -> f64 {
    5.0 / 9.0 * keep * keep
}

/// Width multiple q when none is given: the largest of 32, 16, 8, 4, 2 that divides K and is at most K/12, else 1.
pub fn default_quantum(expert_width: usize) -> usize {
    [32, 16, 8, 4, 2]
        .into_iter()
        .find(|&quantum| expert_width.is_multiple_of(quantum) && quantum * 12 <= expert_width)
        .unwrap_or(1)
}

/// Every divisor of `number`, ascending.
pub fn divisors(number: usize) -> Vec<usize> {
    let mut small = Vec::new();
    let mut large = Vec::new();
    let mut candidate = 1;
    while candidate <= number / candidate {
        if number.is_multiple_of(candidate) {
            small.push(candidate);
            if candidate != number / candidate {
                large.push(number / candidate);
            }
        }
        candidate += 1;
    }
    large.reverse();
    small.append(&mut large);
    small
}

/// The width multiple asked for, or the default.
///
/// # Errors
/// `requested` does not divide the expert width.
pub fn quantum(requested: Option<usize>, expert_width: usize) -> Result<usize, PruneError> {
    match requested {
        None => Ok(default_quantum(expert_width)),
        Some(got) if got > 0 && expert_width.is_multiple_of(got) => Ok(got),
        Some(got) => Err(PruneError::WidthMultiple {
            got,
            width: expert_width,
            divisors: divisors(expert_width),
        }),
    }
}

/// Neurons to keep in all, `B = q·round(ρ·L·N·K/q)`.
pub fn budget(shape: Shape, quantum: usize, keep: f64) -> usize {
    let neurons = shape.num_neurons();
    (quantum * round_half_up(keep * neurons as f64 / quantum as f64)).min(neurons)
}

/// The one width of a uniform allocation, `W′ = q·round(ρ·K/q)`.
pub fn uniform_width(expert_width: usize, quantum: usize, keep: f64) -> usize {
    (quantum * round_half_up(keep * expert_width as f64 / quantum as f64)).min(expert_width)
}

/// Rounds a count half up; negative numbers and NaN give 0.
pub(crate) fn round_half_up(count: f64) -> usize {
    round_down(count + 0.5)
}

/// Rounds a count down; negative numbers and NaN give 0.
pub(crate) fn round_down(count: f64) -> usize {
    (count + 1e-9).floor() as usize
}

/// Orders scores from high to low; equal ones stay for the caller's tie rule.
pub(crate) fn descending(left: f64, right: f64) -> std::cmp::Ordering {
    right
        .partial_cmp(&left)
        .unwrap_or(std::cmp::Ordering::Equal)
}

/// Euclidean norm, summed in order.
pub(crate) fn l2_norm<'a>(values: impl IntoIterator<Item = &'a f64>) -> f64 {
    values
        .into_iter()
        .map(|value| value * value)
        .sum::<f64>()
        .sqrt()
}

/// `value / norm`, 0 where the norm is 0.
pub(crate) fn divided(value: f64, norm: f64) -> f64 {
    if norm == 0.0 { 0.0 } else { value / norm }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_alpha_meets_the_published_values() {
        assert!((default_alpha(0.6) - 0.20).abs() < 1e-12);
        assert!((default_alpha(0.3) - 0.05).abs() < 1e-12);
    }

    #[test]
    fn default_quantum_is_at_most_a_twelfth() {
        let cases = [
            (96, 8),
            (1408, 32),
            (768, 32),
            (48, 4),
            (24, 2),
            (12, 1),
            (8, 1),
            (1, 1),
            (33, 1),
            (384, 32),
        ];
        for (width, expected) in cases {
            assert_eq!(default_quantum(width), expected, "width {width}");
        }
    }

    #[test]
    fn a_quantum_that_does_not_divide_lists_the_divisors() {
        assert_eq!(quantum(Some(32), 96), Ok(32));
        let error = quantum(Some(7), 12).unwrap_err();
        assert_eq!(
            error,
            PruneError::WidthMultiple {
                got: 7,
                width: 12,
                divisors: vec![1, 2, 3, 4, 6, 12]
            }
        );
        assert!(
            error.to_string().contains("divisors: 1, 2, 3, 4, 6, 12"),
            "{error}"
        );
        assert!(quantum(Some(0), 12).is_err());
        assert_eq!(divisors(36), [1, 2, 3, 4, 6, 9, 12, 18, 36]);
    }

    #[test]
    fn counts_round_half_up_in_decimal() {
        assert_eq!(round_half_up(2.5), 3);
        assert_eq!(round_half_up(2.499), 2);
        assert_eq!(round_half_up(0.29 * 50.0), 15);
        assert_eq!(round_down(3.0 - 1e-12), 3);
        assert_eq!(round_half_up(-1.0), 0);
        assert_eq!(round_half_up(f64::NAN), 0);
    }

    #[test]
    fn budgets_of_the_worked_examples() {
        let demo = Shape {
            num_layers: 7,
            num_experts: 16,
            expert_width: 96,
        };
        assert_eq!(budget(demo, 8, 0.6), 6448);
        let lite = Shape {
            num_layers: 26,
            num_experts: 64,
            expert_width: 1408,
        };
        assert_eq!(budget(lite, 32, 0.6), 1_405_760);
        assert_eq!(budget(demo, 8, 1.0), 7 * 16 * 96);
    }

    #[test]
    fn uniform_width_is_the_nearest_multiple() {
        assert_eq!(uniform_width(96, 8, 0.6), 56);
        assert_eq!(uniform_width(1408, 32, 0.6), 832);
        assert_eq!(uniform_width(1408, 128, 0.5), 768);
        assert_eq!(uniform_width(96, 8, 1.0), 96);
        assert_eq!(uniform_width(96, 8, 0.001), 0);
    }
}
