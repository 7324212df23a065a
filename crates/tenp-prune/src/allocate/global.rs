//! The global allocation: the best neurons of the whole model, wherever they are.

use super::{Shape, descending, left_by_guarded};
use crate::PruneError;

/// Widths `[layer][expert]` that keep the neurons with the highest scores of the whole model.
///
/// `scores` are `[layer][expert][neuron]`, comparable over all layers. So that widths are multiples of `quantum`,
/// an expert's neurons are taken in blocks of q from its best down, and blocks compete by the sum of their scores
/// (ties: lower layer, lower expert, better block). Block sums fall within an expert, so the chosen blocks are
/// always its best ones, and no other choice of multiples of q has a higher total. Guarded experts are whole.
/// The widths add up to `budget`, a multiple of `quantum`.
///
/// # Errors
/// Guarded experts that the budget cannot pay for.
pub fn global_widths(
    shape: Shape,
    quantum: usize,
    budget: usize,
    scores: &[Vec<Vec<f64>>],
    guarded: &[Vec<bool>],
) -> Result<Vec<Vec<usize>>, PruneError> {
    let mut widths = vec![vec![0; shape.num_experts]; shape.num_layers];
    let mut blocks = Vec::new();
    let mut num_guarded = 0;
    for (layer, experts) in scores.iter().enumerate() {
        for (expert, neurons) in experts.iter().enumerate() {
            if guarded[layer][expert] {
                widths[layer][expert] = shape.expert_width;
                num_guarded += 1;
                continue;
            }
            let mut sorted = neurons.clone();
            sorted.sort_by(|a, b| descending(*a, *b));
            let sums = sorted
                .chunks(quantum.max(1))
                .map(|block| block.iter().sum::<f64>());
            blocks.extend(
                sums.enumerate()
                    .map(|(block, sum)| (sum, layer, expert, block)),
            );
        }
    }
    let rest = left_by_guarded(shape, num_guarded, budget)?;
    blocks.sort_by(|a, b| descending(a.0, b.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    for &(_, layer, expert, _) in blocks.iter().take(rest / quantum.max(1)) {
        widths[layer][expert] += quantum;
    }
    Ok(widths)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        num_layers: 2,
        num_experts: 2,
        expert_width: 4,
    };

    fn scores() -> Vec<Vec<Vec<f64>>> {
        vec![
            vec![vec![9.0, 1.0, 8.0, -5.0], vec![0.0, 0.0, 0.0, 0.0]],
            vec![vec![7.0, 6.0, 5.0, 4.0], vec![3.0, -1.0, -1.0, -1.0]],
        ]
    }

    #[test]
    fn the_best_neurons_stay_wherever_they_are() {
        let guarded = vec![vec![false; 2]; 2];
        let widths = global_widths(SHAPE, 1, 7, &scores(), &guarded).unwrap();
        assert_eq!(widths, [[2, 0], [4, 1]]);
    }

    #[test]
    fn blocks_keep_widths_to_the_multiple() {
        let guarded = vec![vec![false; 2]; 2];
        let widths = global_widths(SHAPE, 2, 8, &scores(), &guarded).unwrap();
        // Blocks: [17, -4], [0, 0], [13, 9], [2, -2].
        assert_eq!(widths, [[2, 0], [4, 2]]);
        let widths = global_widths(SHAPE, 2, 16, &scores(), &guarded).unwrap();
        assert_eq!(widths, [[4, 4], [4, 4]]);
    }

    #[test]
    fn ties_go_to_the_lower_layer_and_expert() {
        let guarded = vec![vec![false; 2]; 2];
        let same = vec![vec![vec![1.0; 4]; 2]; 2];
        assert_eq!(
            global_widths(SHAPE, 1, 6, &same, &guarded).unwrap(),
            [[4, 2], [0, 0]]
        );
    }

    #[test]
    fn guarded_experts_are_whole() {
        let guarded = vec![vec![false, true], vec![false, false]];
        assert_eq!(
            global_widths(SHAPE, 1, 6, &scores(), &guarded).unwrap(),
            [[2, 4], [0, 0]]
        );
        let error = global_widths(SHAPE, 1, 3, &scores(), &guarded).unwrap_err();
        assert_eq!(
            error,
            PruneError::GuardedOverBudget {
                guarded: 1,
                needed: 4,
                budget: 3
            }
        );
    }
}
