//! TENP's allocation (arXiv 2606.09885): whole experts, more of them in deeper layers, and narrow ones that share the
//! rest evenly.

use super::{Shape, descending, divided, l2_norm, round_down, round_half_up};
use crate::PruneError;

/// Whole experts of all layers, `M = min(round(α·L·N), ⌊B/K⌋)`.
pub fn whole_experts(shape: Shape, budget: usize, alpha: f64) -> usize {
    let experts = shape.num_layers * shape.num_experts;
    let wanted = round_half_up(alpha * experts as f64).min(experts);
    budget
        .checked_div(shape.expert_width)
        .map_or(0, |affordable| wanted.min(affordable))
}

/// Whole experts of each layer: `⌊N·a_l⌋` with `a_l = α(1 + s(2z_l − 1))`, `z_l = l/(L−1)` (½ for a single layer),
/// and what is missing from `whole` dealt one at a time by the remainders, ties to the deeper layer, full layers
/// skipped. The sum is `whole`, which must not be above L·N.
pub fn whole_experts_per_layer(shape: Shape, whole: usize, alpha: f64, slope: f64) -> Vec<usize> {
    let Shape {
        num_layers,
        num_experts,
        ..
    } = shape;
    let wanted: Vec<f64> = (0..num_layers)
        .map(|layer| num_experts as f64 * share(layer, num_layers, alpha, slope))
        .collect();
    let mut counts: Vec<usize> = wanted
        .iter()
        .map(|&wanted| round_down(wanted).min(num_experts))
        .collect();

    // Whole parts of 1e-9, so that remainders equal on paper are equal here.
    let remainder =
        |layer: usize| ((wanted[layer] - round_down(wanted[layer]) as f64) * 1e9).round() as i64;
    let mut order: Vec<usize> = (0..num_layers).collect();
    order.sort_by_key(|&layer| (-remainder(layer), std::cmp::Reverse(layer)));

    let whole = whole.min(num_layers * num_experts);
    let mut missing = whole.saturating_sub(counts.iter().sum());
    while missing > 0 {
        for &layer in &order {
            if missing > 0 && counts[layer] < num_experts {
                counts[layer] += 1;
                missing -= 1;
            }
        }
    }
    // Only a caller's own `whole`, below what α asks for, leaves something to take back.
    let mut surplus = counts.iter().sum::<usize>().saturating_sub(whole);
    while surplus > 0 {
        for &layer in order.iter().rev() {
            if surplus > 0 && counts[layer] > 0 {
                counts[layer] -= 1;
                surplus -= 1;
            }
        }
    }
    counts
}

/// Share of whole experts at a depth.
fn share(layer: usize, num_layers: usize, alpha: f64, slope: f64) -> f64 {
    let depth = if num_layers > 1 {
        layer as f64 / (num_layers - 1) as f64
    } else {
        0.5
    };
    alpha * (1.0 + slope * (2.0 * depth - 1.0))
}

/// Widths `[layer][expert]`: in each layer the `whole_per_layer` experts with the highest score stay whole (ties:
/// lower id), guarded ones first and beyond that number where they are more. The others share the rest of the
/// budget in multiples of `quantum`; what does not divide goes one quantum each to the narrow experts with the
/// highest score over its layer's L2 norm (ties: lower layer, lower expert). The widths add up to `budget`, which
/// must be a multiple of `quantum` and at most L·N·K.
///
/// # Errors
/// Guarded experts that the budget cannot pay for.
pub fn trapezoid_widths(
    shape: Shape,
    quantum: usize,
    budget: usize,
    whole_per_layer: &[usize],
    scores: &[Vec<f64>],
    guarded: &[Vec<bool>],
) -> Result<Vec<Vec<usize>>, PruneError> {
    let width = shape.expert_width;
    let mut widths = vec![vec![0; shape.num_experts]; shape.num_layers];
    let mut narrow = Vec::new();
    for (layer, ((scores, guarded), &whole)) in
        scores.iter().zip(guarded).zip(whole_per_layer).enumerate()
    {
        let num_guarded = guarded.iter().filter(|&&guarded| guarded).count();
        let order = ranked(scores, guarded);
        let (whole, rest) = order.split_at(whole.max(num_guarded).min(order.len()));
        for &expert in whole {
            widths[layer][expert] = width;
        }
        let norm = l2_norm(scores);
        narrow.extend(
            rest.iter()
                .map(|&expert| (divided(scores[expert], norm), layer, expert)),
        );
    }

    let needed = (shape.num_layers * shape.num_experts - narrow.len()) * width;
    let rest = budget
        .checked_sub(needed)
        .ok_or_else(|| PruneError::GuardedOverBudget {
            guarded: guarded.iter().flatten().filter(|&&guarded| guarded).count(),
            needed,
            budget,
        })?;
    if narrow.is_empty() {
        return Ok(widths);
    }
    let quanta = rest / quantum.max(1);
    let (each, left) = (quanta / narrow.len(), quanta % narrow.len());
    narrow.sort_by(|a, b| descending(a.0, b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    for (rank, &(_, layer, expert)) in narrow.iter().enumerate() {
        widths[layer][expert] = quantum * (each + usize::from(rank < left));
    }
    Ok(widths)
}

/// Experts of a layer, guarded ones first, then by score; ties: lower id.
pub(super) fn ranked(scores: &[f64], guarded: &[bool]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| {
        guarded[b]
            .cmp(&guarded[a])
            .then(descending(scores[a], scores[b]))
            .then(a.cmp(&b))
    });
    order
}

#[cfg(test)]
mod tests {
    use super::super::budget;
    use super::*;

    const DEMO: Shape = Shape {
        num_layers: 7,
        num_experts: 16,
        expert_width: 96,
    };

    fn unguarded(shape: Shape) -> Vec<Vec<bool>> {
        vec![vec![false; shape.num_experts]; shape.num_layers]
    }

    /// Scores that differ everywhere and fall with the expert id.
    fn falling(shape: Shape) -> Vec<Vec<f64>> {
        (0..shape.num_layers)
            .map(|layer| {
                (0..shape.num_experts)
                    .map(|e| 1.0 / (1.0 + e as f64 + 0.01 * layer as f64))
                    .collect()
            })
            .collect()
    }

    fn histogram(widths: &[Vec<usize>]) -> Vec<(usize, usize)> {
        let mut counts = std::collections::BTreeMap::new();
        for &width in widths.iter().flatten() {
            *counts.entry(width).or_insert(0) += 1;
        }
        counts.into_iter().collect()
    }

    #[test]
    fn worked_example_of_the_demo_model() {
        let total = budget(DEMO, 8, 0.6);
        let whole = whole_experts(DEMO, total, 0.2);
        assert_eq!((total, whole), (6448, 22));
        let per_layer = whole_experts_per_layer(DEMO, whole, 0.2, 1.0 / 3.0);
        assert_eq!(per_layer, [2, 2, 3, 3, 4, 4, 4]);
        let widths =
            trapezoid_widths(DEMO, 8, total, &per_layer, &falling(DEMO), &unguarded(DEMO)).unwrap();
        assert_eq!(histogram(&widths), [(48, 88), (56, 2), (96, 22)]);
    }

    #[test]
    fn worked_example_of_deepseek_v2_lite() {
        let shape = Shape {
            num_layers: 26,
            num_experts: 64,
            expert_width: 1408,
        };
        let total = budget(shape, 32, 0.6);
        let whole = whole_experts(shape, total, 0.2);
        assert_eq!((total, whole), (1_405_760, 333));
        let per_layer = whole_experts_per_layer(shape, whole, 0.2, 1.0 / 3.0);
        assert_eq!(per_layer.iter().sum::<usize>(), 333);
        let widths = trapezoid_widths(
            shape,
            32,
            total,
            &per_layer,
            &falling(shape),
            &unguarded(shape),
        )
        .unwrap();
        assert_eq!(histogram(&widths), [(672, 4), (704, 1327), (1408, 333)]);
    }

    #[test]
    fn slope_turns_the_trapezoid() {
        let flat = Shape {
            num_layers: 4,
            num_experts: 10,
            expert_width: 8,
        };
        assert_eq!(whole_experts_per_layer(flat, 20, 0.5, 0.0), [5, 5, 5, 5]);
        assert_eq!(whole_experts_per_layer(flat, 20, 0.5, 1.0), [0, 3, 7, 10]);
        assert_eq!(whole_experts_per_layer(flat, 20, 0.5, -1.0), [10, 7, 3, 0]);
        let single = Shape {
            num_layers: 1,
            ..flat
        };
        assert_eq!(whole_experts_per_layer(single, 5, 0.5, 1.0), [5]);
    }

    #[test]
    fn equal_remainders_go_to_the_deeper_layer() {
        let shape = Shape {
            num_layers: 3,
            num_experts: 4,
            expert_width: 8,
        };
        assert_eq!(whole_experts_per_layer(shape, 5, 0.4, 0.0), [1, 2, 2]);
    }

    #[test]
    fn full_layers_hand_their_surplus_on() {
        let shape = Shape {
            num_layers: 3,
            num_experts: 4,
            expert_width: 8,
        };
        // N·a_l = 0, 3.2, 6.4: the deepest layer would take more than it has.
        assert_eq!(whole_experts_per_layer(shape, 10, 0.8, 1.0), [2, 4, 4]);
    }

    #[test]
    fn guarded_experts_take_the_first_places_and_more() {
        let shape = Shape {
            num_layers: 2,
            num_experts: 4,
            expert_width: 8,
        };
        let scores = vec![vec![4.0, 3.0, 2.0, 1.0]; 2];
        let mut guarded = unguarded(shape);
        guarded[0][2] = true;
        guarded[0][3] = true;
        let widths = trapezoid_widths(shape, 1, 32, &[1, 1], &scores, &guarded).unwrap();
        assert_eq!(widths[0][2..], [8, 8]);
        assert_eq!(widths[1][0], 8);
        assert_eq!(widths.iter().flatten().sum::<usize>(), 32);
        let error = trapezoid_widths(shape, 1, 16, &[1, 1], &scores, &guarded).unwrap_err();
        assert_eq!(
            error,
            PruneError::GuardedOverBudget {
                guarded: 2,
                needed: 24,
                budget: 16
            }
        );
    }

    #[test]
    fn leftover_quanta_follow_the_normalised_scores() {
        let shape = Shape {
            num_layers: 2,
            num_experts: 2,
            expert_width: 4,
        };
        // Raw scores of layer 1 are far larger, normalised ones are smaller for its first expert.
        let scores = vec![vec![3.0, 0.0], vec![50.0, 50.0]];
        let widths = trapezoid_widths(shape, 1, 5, &[0, 0], &scores, &unguarded(shape)).unwrap();
        assert_eq!(widths, [[2, 1], [1, 1]]);
        let widths = trapezoid_widths(shape, 1, 6, &[0, 0], &scores, &unguarded(shape)).unwrap();
        assert_eq!(widths, [[2, 1], [2, 1]]);
    }

    #[test]
    fn equal_scores_keep_the_lower_id_whole() {
        let shape = Shape {
            num_layers: 1,
            num_experts: 3,
            expert_width: 4,
        };
        let widths =
            trapezoid_widths(shape, 4, 4, &[1], &[vec![1.0; 3]], &unguarded(shape)).unwrap();
        assert_eq!(widths, [[4, 0, 0]]);
    }
}
