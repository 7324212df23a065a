//! Projection rescale: what a narrowed expert's kept columns are multiplied by.

use std::collections::BTreeMap;

use tenp_checkpoint::config::ModelConfig;
use tenp_checkpoint::plan::Plan;
use tenp_checkpoint::statistics::Statistics;

use crate::calibration::Calibration;
use crate::score::{NeuronScoring, expert_neuron_scores, uncalibrated};
use crate::{NeuronScore, PruneError};

/// Bounds of a factor.
const BOUNDS: [f64; 2] = [0.5, 2.0];

/// `ΣP_all / ΣP_kept` of every expert, within [0.5, 2], `[MoE layer][expert]`; P is the contribution. Dropping the
/// neurons that pull against the output first makes what is left overshoot, and this undoes it on average.
///
/// 1 for experts that no calibration token reached, that are dropped, or whose kept neurons contribute nothing.
///
/// # Errors
/// Statistics of another checkpoint, incomplete or not finite.
pub fn rescale_factors(
    config: &ModelConfig,
    fingerprint: &str,
    statistics: &Statistics,
    domain_weights: &BTreeMap<String, f64>,
    plan: &Plan,
) -> Result<Vec<Vec<f64>>, PruneError> {
    let tables = NeuronScore::Contribution.tables();
    let calibration = Calibration::new(config, fingerprint, statistics, domain_weights, tables)?;
    let unknown = uncalibrated(&calibration);
    let scoring = NeuronScoring {
        score: NeuronScore::Contribution,
        normalise_domains: false,
        seed: 0,
    };
    let factor = |layer: usize, id: usize| {
        let expert = &plan.layers[layer].experts[id];
        let neurons = expert.neurons.as_ref().filter(|_| !unknown[layer][id]);
        neurons.map_or(1.0, |kept| {
            let scores = expert_neuron_scores(&calibration, layer, id, scoring);
            let kept: f64 = kept.iter().map(|&j| scores[j as usize]).sum();
            clamped(scores.iter().sum(), kept)
        })
    };
    let shape = calibration.shape();
    Ok((0..shape.num_layers)
        .map(|layer| (0..shape.num_experts).map(|id| factor(layer, id)).collect())
        .collect())
}

fn clamped(all: f64, kept: f64) -> f64 {
    let [least, most] = BOUNDS;
    if kept > 0.0 {
        (all / kept).clamp(least, most)
    } else {
        1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_stay_within_bounds() {
        assert_eq!(clamped(3.0, 4.0), 0.75);
        assert_eq!(clamped(1.0, 4.0), 0.5);
        assert_eq!(clamped(-1.0, 4.0), 0.5);
        assert_eq!(clamped(9.0, 4.0), 2.0);
        assert_eq!(clamped(1.0, 0.0), 1.0);
        assert_eq!(clamped(-1.0, -2.0), 1.0);
    }
}
