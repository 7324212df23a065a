//! Scores: how much an expert matters to its layer, a neuron to its expert. `docs/methods.md`, "TENP", "Baselines".

mod expert;
mod neuron;
mod random;

pub use expert::{expert_scores, super_experts};
pub use neuron::{NeuronScoring, PEAK_SHARE, neuron_scores};
pub(crate) use neuron::{best_first, best_neurons, expert_neuron_scores, global_scores};

use crate::calibration::Calibration;

/// Experts that no calibration token reached, `[moe layer][expert]`.
pub fn uncalibrated(calibration: &Calibration<'_>) -> Vec<Vec<bool>> {
    calibration
        .tokens()
        .into_iter()
        .map(|layer| layer.into_iter().map(|tokens| tokens == 0).collect())
        .collect()
}
