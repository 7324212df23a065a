//! Widths from measured errors: a multiple-choice knapsack over all experts of all layers, solved at the exact total.

use super::{Shape, descending, left_by_guarded};
use crate::PruneError;

/// Cells of the table that closes the gap, at most; beyond that the answer is the greedy one, within its stated bound.
const MAX_CELLS: usize = 1 << 25;

/// Widths at which errors are measured, at most, beside 0.
const MEASURED: usize = 12;

/// What cutting experts costs, measured on text.
#[derive(Clone, Debug, PartialEq)]
pub struct ErrorCurves {
    /// Widths measured, ascending, from 0 to the whole width.
    pub widths: Vec<usize>,
    /// `[moe layer][expert][width]`: Σ g²‖y − y′‖², y′ the output of the narrowed expert.
    pub errors: Vec<Vec<Vec<f64>>>,
    /// By MoE layer: Σ‖r‖² of the residual stream behind it.
    pub residuals: Vec<f64>,
}

/// Widths, and how good they are.
#[derive(Clone, Debug, PartialEq)]
pub struct SensitivityWidths {
    /// `[moe layer][expert]`.
    pub widths: Vec<Vec<usize>>,
    /// Sum of the errors.
    pub error: f64,
    /// No choice of widths of the same total has a smaller sum.
    pub bound: f64,
}

/// Widths to measure at: every multiple of `quantum`, or of the fewest quanta that give at most twelve steps.
pub fn measured_widths(expert_width: usize, quantum: usize) -> Vec<usize> {
    let quantum = quantum.max(1);
    let step = quantum * (expert_width / quantum).div_ceil(MEASURED).max(1);
    let mut widths: Vec<usize> = (0..expert_width).step_by(step).collect();
    widths.push(expert_width);
    widths
}

/// Widths that add up to `budget`, a multiple of `quantum`, with the least sum of errors. `values[layer][expert]` are the
/// errors at the widths `measured`; between them they are interpolated.
///
/// The lower convex hulls of the curves are climbed by slope, which is optimal wherever the budget is met at a corner of a
/// hull. Where it is not, the experts whose width may differ in a better answer (those within the gap of the Lagrangian
/// bound, H. Everett, *Generalized Lagrange multiplier method*, 1963) are solved exactly by dynamic programming.
///
/// # Errors
/// Guarded experts that the budget cannot pay for.
pub fn sensitivity_widths(
    shape: Shape,
    quantum: usize,
    budget: usize,
    measured: &[usize],
    values: &[Vec<Vec<f64>>],
    guarded: &[Vec<bool>],
) -> Result<SensitivityWidths, PruneError> {
    let quantum = quantum.max(1);
    let mut widths = vec![vec![0; shape.num_experts]; shape.num_layers];
    let (mut curves, mut places) = (Vec::new(), Vec::new());
    for (layer, experts) in values.iter().enumerate() {
        for (expert, errors) in experts.iter().enumerate() {
            if guarded[layer][expert] {
                widths[layer][expert] = shape.expert_width;
            } else {
                curves.push(interpolated(measured, errors, quantum, shape.expert_width));
                places.push((layer, expert));
            }
        }
    }
    let num_guarded = shape.num_layers * shape.num_experts - places.len();
    let rest = left_by_guarded(shape, num_guarded, budget)?;
    let solved = solve(&curves, rest / quantum);
    for (&(layer, expert), quanta) in places.iter().zip(&solved.quanta) {
        widths[layer][expert] = quanta * quantum;
    }
    Ok(SensitivityWidths {
        widths,
        error: solved.error,
        bound: solved.bound,
    })
}

/// Errors at 0, 1, 2, … quanta.
fn interpolated(measured: &[usize], errors: &[f64], quantum: usize, whole: usize) -> Vec<f64> {
    let at = |width: usize| {
        let right = measured.partition_point(|&w| w < width);
        if measured[right] == width {
            return errors[right];
        }
        let (a, b) = (measured[right - 1], measured[right]);
        let share = (width - a) as f64 / (b - a) as f64;
        errors[right - 1] + share * (errors[right] - errors[right - 1])
    };
    (0..=whole / quantum)
        .map(|quanta| at(quanta * quantum))
        .collect()
}

struct Solved {
    quanta: Vec<usize>,
    error: f64,
    bound: f64,
}

fn solve(curves: &[Vec<f64>], budget: usize) -> Solved {
    let (quanta, price) = climb(curves, budget);
    let total = |quanta: &[usize]| -> f64 { curves.iter().zip(quanta).map(|(c, &q)| c[q]).sum() };
    let error = total(&quanta);
    // What each expert's choices cost above its cheapest at this price: never negative, and 0 for corners of its hull.
    let reduced: Vec<Vec<f64>> = curves
        .iter()
        .map(|curve| {
            let priced = || curve.iter().enumerate().map(|(q, v)| v + price * q as f64);
            let least = priced().fold(f64::INFINITY, f64::min);
            priced().map(|v| v - least).collect()
        })
        .collect();
    let gap: f64 = reduced.iter().zip(&quanta).map(|(r, &q)| r[q]).sum();
    let bound = error - gap;
    if gap <= 1e-12 * error {
        return Solved {
            quanta,
            error,
            bound: error,
        };
    }
    match close_gap(&reduced, budget, gap) {
        Some(quanta) => {
            let error = total(&quanta);
            Solved {
                quanta,
                error,
                bound: error,
            }
        }
        None => Solved {
            quanta,
            error,
            bound,
        },
    }
}

/// Climbs the hulls by slope; the last step is taken as far as the budget goes. The price is that step's slope.
fn climb(curves: &[Vec<f64>], budget: usize) -> (Vec<usize>, f64) {
    let mut steps = Vec::new();
    for (index, curve) in curves.iter().enumerate() {
        let hull = lower_hull(curve);
        steps.extend(hull.windows(2).map(|ends| {
            let length = ends[1] - ends[0];
            let slope = (curve[ends[0]] - curve[ends[1]]) / length as f64;
            (slope, index, ends[0], length)
        }));
    }
    steps.sort_by(|a, b| descending(a.0, b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let (mut quanta, mut left, mut price) = (vec![0; curves.len()], budget, 0.0);
    for (slope, index, _, length) in steps {
        if left == 0 {
            break;
        }
        let taken = length.min(left);
        quanta[index] += taken;
        left -= taken;
        price = slope;
    }
    (quanta, price)
}

/// Corners of the lower convex hull of the points (i, curve[i]).
fn lower_hull(curve: &[f64]) -> Vec<usize> {
    let mut hull: Vec<usize> = Vec::new();
    for (i, &value) in curve.iter().enumerate() {
        while let [.., a, b] = hull[..] {
            let slope_to = |j: usize, v: f64| (v - curve[a]) / (j - a) as f64;
            if slope_to(b, curve[b]) < slope_to(i, value) {
                break;
            }
            hull.pop();
        }
        hull.push(i);
    }
    hull
}

/// The choice of exactly `budget` quanta with the least reduced cost. None if the table would be too large. Choices that
/// alone cost more than `gap` are in no better answer.
fn close_gap(reduced: &[Vec<f64>], budget: usize, gap: f64) -> Option<Vec<usize>> {
    let limit = gap * (1.0 + 1e-9);
    let choices: Vec<Vec<usize>> = reduced
        .iter()
        .map(|r| (0..r.len()).filter(|&q| r[q] <= limit).collect())
        .collect();
    let ranges = windows(&choices, budget);
    let cells: usize = ranges.iter().map(|(low, high)| high + 1 - low).sum();
    if cells > MAX_CELLS {
        return None;
    }
    // tables[i][sum − low]: the last choice of the cheapest way to spend `sum` on the first i + 1 experts.
    let mut tables: Vec<Vec<usize>> = Vec::with_capacity(choices.len());
    let (mut costs, mut first) = (vec![0.0], 0);
    for ((choices, reduced), &(low, high)) in choices.iter().zip(reduced).zip(&ranges) {
        let mut next = vec![f64::INFINITY; high + 1 - low];
        let mut table = vec![0; next.len()];
        for &choice in choices {
            for (at, cost) in costs.iter().enumerate() {
                let sum = first + at + choice;
                let cost = cost + reduced[choice];
                if (low..=high).contains(&sum) && cost < next[sum - low] {
                    next[sum - low] = cost;
                    table[sum - low] = choice;
                }
            }
        }
        (costs, first) = (next, low);
        tables.push(table);
    }
    let mut left = budget;
    let mut quanta = vec![0; reduced.len()];
    for (i, table) in tables.iter().enumerate().rev() {
        quanta[i] = table[left - ranges[i].0];
        left -= quanta[i];
    }
    Some(quanta)
}

/// After each expert, the sums that can still end at `budget`.
fn windows(choices: &[Vec<usize>], budget: usize) -> Vec<(usize, usize)> {
    let ends = |c: &Vec<usize>| (c[0], c[c.len() - 1]);
    let (mut least, mut most) = (0, 0);
    let mut rest = choices
        .iter()
        .map(ends)
        .fold((0, 0), |r, e| (r.0 + e.0, r.1 + e.1));
    choices
        .iter()
        .map(|choices| {
            let (low, high) = ends(choices);
            (least, most) = (least + low, most + high);
            rest = (rest.0 - low, rest.1 - high);
            (
                least.max(budget.saturating_sub(rest.1)),
                most.min(budget - rest.0.min(budget)),
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    use super::*;

    /// The least error over every choice.
    fn brute_force(curves: &[Vec<f64>], budget: usize) -> f64 {
        let Some((curve, rest)) = curves.split_first() else {
            return if budget == 0 { 0.0 } else { f64::INFINITY };
        };
        let choices = curve.iter().enumerate().take(budget + 1);
        choices
            .map(|(quanta, error)| error + brute_force(rest, budget - quanta))
            .fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn no_other_choice_of_the_same_total_is_better() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut closed = 0;
        for round in 0..300 {
            let width = 1 + round % 5;
            let curves: Vec<Vec<f64>> = (0..=round % 6)
                .map(|_| {
                    let mut curve: Vec<f64> = (0..width)
                        .map(|_| rng.next_u64() as f64 / 2f64.powi(64))
                        .collect();
                    // Measured curves fall, but not evenly; some of these do not even fall.
                    if round % 3 > 0 {
                        curve.sort_by(|a, b| b.total_cmp(a));
                    }
                    curve.push(0.0);
                    curve
                })
                .collect();
            for budget in 0..=curves.len() * width {
                let greedy = climb(&curves, budget).0;
                let greedy: f64 = curves.iter().zip(greedy).map(|(c, q)| c[q]).sum();
                let solved = solve(&curves, budget);
                assert_eq!(solved.quanta.iter().sum::<usize>(), budget);
                let best = brute_force(&curves, budget);
                assert!((solved.error - best).abs() < 1e-12, "{curves:?} {budget}");
                assert!((solved.bound - best).abs() < 1e-9);
                closed += usize::from(greedy > best + 1e-9);
            }
        }
        assert!(closed > 50, "the greedy answer alone was not enough");
    }

    #[test]
    fn widths_are_multiples_and_guarded_experts_whole() {
        let shape = Shape {
            num_layers: 2,
            num_experts: 2,
            expert_width: 8,
        };
        let measured = measured_widths(8, 2);
        assert_eq!(measured, [0, 2, 4, 6, 8]);
        let curve = |scale: f64| {
            [16.0, 9.0, 4.0, 1.0, 0.0]
                .iter()
                .map(|v| v * scale)
                .collect()
        };
        let values = vec![vec![curve(1.0), curve(10.0)], vec![curve(1.0), curve(0.0)]];
        let mut guarded = vec![vec![false; 2]; 2];
        let free = sensitivity_widths(shape, 2, 16, &measured, &values, &guarded).unwrap();
        assert_eq!(free.widths, [[4, 8], [4, 0]]);
        assert_eq!((free.error, free.bound), (8.0, 8.0));
        guarded[1][1] = true;
        let held = sensitivity_widths(shape, 2, 16, &measured, &values, &guarded).unwrap();
        assert_eq!(held.widths, [[0, 8], [0, 8]]);
        let error = sensitivity_widths(shape, 2, 6, &measured, &values, &guarded).unwrap_err();
        assert!(matches!(error, PruneError::GuardedOverBudget { .. }));
    }

    #[test]
    fn few_widths_are_measured_and_the_others_lie_between() {
        assert_eq!(measured_widths(96, 8).len(), 13);
        let lite = measured_widths(1408, 32);
        assert_eq!((lite.len(), lite[1], lite[11]), (12, 128, 1408));
        assert_eq!(measured_widths(1, 1), [0, 1]);
        let curve = interpolated(&[0, 4, 6], &[8.0, 2.0, 0.0], 1, 6);
        assert_eq!(curve, [8.0, 6.5, 5.0, 3.5, 2.0, 1.0, 0.0]);
    }
}
