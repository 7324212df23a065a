//! Neuron scores: sums over tokens and domains turned into one number per neuron.

use tenp_checkpoint::statistics::LayerStatistics;

use super::random::{Purpose, random_scores};
use crate::NeuronScore;
use crate::allocate::{descending, divided, l2_norm};
use crate::calibration::Calibration;

/// Share a of the peak in the energy score `(1 − a)·energy + a·peak` (CAMERA-P).
pub const PEAK_SHARE: f64 = 0.9;

/// Which neuron score, and how domains are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeuronScoring {
    /// The score.
    pub score: NeuronScore,
    /// Divide each domain's vector of an expert by its L2 norm before adding the domains up.
    pub normalise_domains: bool,
    /// Seed of random scores.
    pub seed: u64,
}

/// Scores `[moe layer][expert][neuron]`, comparable within an expert.
///
/// Sums of the domains add, times their weights, and are divided by the tokens, times the same weights:
/// `P_j = Σ_τ weight_τ·contribution^τ_j / Σ_τ weight_τ·tokens^τ` (ENP, arXiv 2606.09885). An expert that no token reached has
/// `sqrt(‖gate row‖² + ‖up row‖² + ‖w_j‖²)` instead, except that random scores stay random.
pub fn neuron_scores(calibration: &Calibration<'_>, scoring: NeuronScoring) -> Vec<Vec<Vec<f64>>> {
    per_expert(calibration, |layer, expert| {
        expert_neuron_scores(calibration, layer, expert, scoring)
    })
}

/// [`neuron_scores`] of one expert; `layer` counts MoE layers.
pub(crate) fn expert_neuron_scores(
    calibration: &Calibration<'_>,
    layer: usize,
    expert: usize,
    scoring: NeuronScoring,
) -> Vec<f64> {
    let rows = Rows::new(calibration, layer, expert);
    if let Some(scores) = rows.without_text(scoring) {
        return scores;
    }
    if rows.tokens() == 0.0 {
        return rows.weight_norms();
    }
    if !scoring.normalise_domains {
        return rows.scores(scoring.score, Scale::PerToken);
    }
    let mut merged = vec![0.0; rows.width];
    for part in &rows.parts {
        let alone = Rows {
            parts: vec![*part],
            ..rows
        };
        let scores = alone.scores(scoring.score, Scale::PerToken);
        let norm = l2_norm(&scores);
        for (merged, score) in merged.iter_mut().zip(scores) {
            *merged += part.weight * divided(score, norm);
        }
    }
    merged
}

/// Scores `[moe layer][expert][neuron]` for the global allocation: sums, not divided by tokens, so that they compare
/// over experts; with `normalise_layer` divided by their layer's L2 norm. Experts without tokens have zeros (or
/// their weight norm or random score, where that is the score).
pub(crate) fn global_scores(
    calibration: &Calibration<'_>,
    scoring: NeuronScoring,
    normalise_layer: bool,
) -> Vec<Vec<Vec<f64>>> {
    let mut scores = per_expert(calibration, |layer, expert| {
        let rows = Rows::new(calibration, layer, expert);
        rows.without_text(scoring)
            .unwrap_or_else(|| rows.scores(scoring.score, Scale::Sum))
    });
    if normalise_layer {
        for layer in &mut scores {
            let norm = l2_norm(layer.iter().flatten());
            layer
                .iter_mut()
                .flatten()
                .for_each(|score| *score = divided(*score, norm));
        }
    }
    scores
}

/// The `width` neurons with the highest scores (ties: lower id), ascending.
pub(crate) fn best_neurons(scores: &[f64], width: usize) -> Vec<u32> {
    let mut order = best_first(scores);
    order.truncate(width);
    order.sort_unstable();
    order
}

/// All neurons, those with higher scores first (ties: lower id).
pub(crate) fn best_first(scores: &[f64]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| descending(scores[a as usize], scores[b as usize]).then(a.cmp(&b)));
    order
}

fn per_expert(
    calibration: &Calibration<'_>,
    scores: impl Fn(usize, usize) -> Vec<f64>,
) -> Vec<Vec<Vec<f64>>> {
    let shape = calibration.shape();
    (0..shape.num_layers)
        .map(|layer| {
            (0..shape.num_experts)
                .map(|expert| scores(layer, expert))
                .collect()
        })
        .collect()
}

#[derive(Clone, Copy)]
enum Scale {
    PerToken,
    Sum,
}

/// One domain's share of an expert's sums.
#[derive(Clone, Copy)]
struct Part<'a> {
    weight: f64,
    statistics: &'a LayerStatistics,
}

/// The rows of one expert in the `[N,K]` tables of some domains.
struct Rows<'a> {
    parts: Vec<Part<'a>>,
    layer: usize,
    expert: usize,
    width: usize,
}

impl<'a> Rows<'a> {
    fn new(calibration: &Calibration<'a>, layer: usize, expert: usize) -> Self {
        let parts = calibration
            .domains()
            .iter()
            .map(|domain| Part {
                weight: domain.weight,
                statistics: domain.layers[layer],
            })
            .collect();
        Self {
            parts,
            layer,
            expert,
            width: calibration.shape().expert_width,
        }
    }

    /// Scores that do not come from the calibration text.
    fn without_text(&self, scoring: NeuronScoring) -> Option<Vec<f64>> {
        match scoring.score {
            NeuronScore::WeightNorm => Some(self.weight_norms()),
            NeuronScore::Random => {
                let stream = (self.layer as u64) << 32 | self.expert as u64;
                Some(random_scores(
                    scoring.seed,
                    Purpose::Neurons,
                    stream,
                    self.width,
                ))
            }
            _ => None,
        }
    }

    fn row(&self, table: &'a [f64]) -> &'a [f64] {
        &table[self.expert * self.width..][..self.width]
    }

    /// `Σ weight·tokens`.
    fn tokens(&self) -> f64 {
        self.parts
            .iter()
            .map(|part| part.weight * part.statistics.tokens[self.expert] as f64)
            .sum()
    }

    /// `Σ weight·row`.
    fn sum(&self, table: impl Fn(&'a LayerStatistics) -> &'a [f64]) -> Vec<f64> {
        let mut sums = vec![0.0; self.width];
        for part in &self.parts {
            for (sum, value) in sums.iter_mut().zip(self.row(table(part.statistics))) {
                *sum += part.weight * value;
            }
        }
        sums
    }

    fn peak(&self) -> Vec<f64> {
        let mut peaks = vec![0.0_f64; self.width];
        for part in &self.parts {
            for (peak, &value) in peaks.iter_mut().zip(self.row(&part.statistics.peak)) {
                *peak = peak.max(value);
            }
        }
        peaks
    }

    /// `sqrt(‖gate row‖² + ‖up row‖² + ‖w_j‖²)`, the same in every domain.
    fn weight_norms(&self) -> Vec<f64> {
        let first = self
            .parts
            .first()
            .map(|part| self.row(&part.statistics.neuron_weight_norm_sq));
        first.map_or_else(
            || vec![0.0; self.width],
            |row| row.iter().map(|value| value.sqrt()).collect(),
        )
    }

    /// Scores measured on text; zeros without tokens.
    fn scores(&self, score: NeuronScore, scale: Scale) -> Vec<f64> {
        let divisor = match scale {
            Scale::PerToken => self.tokens(),
            Scale::Sum => 1.0,
        };
        let scaled = |sums: Vec<f64>| sums.into_iter().map(|sum| divided(sum, divisor)).collect();
        match score {
            NeuronScore::Contribution => scaled(self.sum(|s| &s.contribution)),
            NeuronScore::ContributionAbs => scaled(self.sum(|s| &s.contribution_abs)),
            NeuronScore::ActivationNorm => scaled(self.sum(|s| &s.activation_norm)),
            NeuronScore::Energy => self
                .sum(|s| &s.energy)
                .into_iter()
                .zip(self.peak())
                .map(|(energy, peak)| (1.0 - PEAK_SHARE) * energy + PEAK_SHARE * peak)
                .collect(),
            NeuronScore::Wifv => scaled(self.weighted_deviations()),
            NeuronScore::WeightNorm | NeuronScore::Random => vec![0.0; self.width],
        }
    }

    /// `tokens·var(h_j)·‖w_j‖²`.
    fn weighted_deviations(&self) -> Vec<f64> {
        let tokens = self.tokens();
        let down = self
            .parts
            .first()
            .map_or(&[][..], |part| self.row(&part.statistics.down_norm_sq));
        self.sum(|s| &s.second_moment)
            .into_iter()
            .zip(self.sum(|s| &s.mean))
            .zip(down)
            // The difference of two nearly equal sums can come out just below zero.
            .map(|((square, sum), norm)| (square - divided(sum * sum, tokens)).max(0.0) * norm)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_neurons_are_ascending_and_ties_keep_the_lower_id() {
        assert_eq!(best_neurons(&[1.0, 3.0, -2.0, 3.0, 1.0], 3), [0, 1, 3]);
        assert_eq!(best_neurons(&[0.0, -0.0, 0.0], 2), [0, 1]);
        assert_eq!(best_neurons(&[1.0, 2.0], 0), [0_u32; 0]);
        assert_eq!(best_neurons(&[1.0, 2.0], 5), [0, 1]);
    }
}
