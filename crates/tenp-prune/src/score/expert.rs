//! Expert scores of every domain, merged, and the super-expert guard.

use tenp_checkpoint::statistics::LayerStatistics;

use super::random::{Purpose, random_scores};
use crate::ExpertScore;
use crate::allocate::{divided, l2_norm};
use crate::calibration::Calibration;

/// Scores `[moe layer][expert]`: `Σ_τ weight_τ · I^τ/‖I^τ‖₂` over the domains τ, the norm over the experts of a layer
/// (0 where it is 0). Random scores depend on the seed alone.
///
/// Source of the merging and of `direction`: arXiv 2606.09885.
pub fn expert_scores(
    calibration: &Calibration<'_>,
    score: ExpertScore,
    seed: u64,
) -> Vec<Vec<f64>> {
    let shape = calibration.shape();
    (0..shape.num_layers)
        .map(|layer| {
            if score == ExpertScore::Random {
                return random_scores(seed, Purpose::Experts, layer as u64, shape.num_experts);
            }
            let mut merged = vec![0.0; shape.num_experts];
            for domain in calibration.domains() {
                let scores = domain_scores(domain.layers[layer], score);
                let norm = l2_norm(&scores);
                for (merged, score) in merged.iter_mut().zip(scores) {
                    *merged += domain.weight * divided(score, norm);
                }
            }
            merged
        })
        .collect()
}

/// The family `tokens^(−b) Σ g^a ‖y‖^c` and the two direction scores, from one domain's sums; 0 without tokens.
fn domain_scores(statistics: &LayerStatistics, score: ExpertScore) -> Vec<f64> {
    let counts = || statistics.tokens.iter().map(|&tokens| tokens as f64);
    let means = |sums: &[f64]| {
        sums.iter()
            .zip(counts())
            .map(|(&sum, tokens)| divided(sum, tokens))
            .collect()
    };
    match score {
        ExpertScore::Direction => statistics.direction.clone(),
        ExpertScore::Frequency => counts().collect(),
        ExpertScore::Gating => statistics.gate_sum.clone(),
        ExpertScore::Ean => statistics.norm_sum.clone(),
        ExpertScore::Reap => means(&statistics.gated_norm_sum),
        ExpertScore::Man => means(&statistics.norm_sum),
        ExpertScore::Msan => means(&statistics.norm_sq_sum),
        ExpertScore::EasyEp => statistics.residual_direction.clone(),
        ExpertScore::GatingShare => {
            let total = statistics.total_tokens as f64;
            let shares = statistics.normalised_gate_sum.iter();
            shares.map(|&sum| divided(sum, total)).collect()
        }
        ExpertScore::Random => vec![0.0; statistics.num_experts],
    }
}

/// Super experts `[moe layer][expert]`: `output_peak` (maximum over the domains) above the 99.5th percentile of all
/// experts of all layers and above a tenth of the largest. The percentile interpolates linearly between the two
/// nearest experts, so that it lies below the largest even where there are fewer than 200.
///
/// Super experts: arXiv 2507.23279.
pub fn super_experts(calibration: &Calibration<'_>) -> Vec<Vec<bool>> {
    let shape = calibration.shape();
    let peaks: Vec<Vec<f64>> = (0..shape.num_layers)
        .map(|layer| {
            let mut peaks = vec![0.0_f64; shape.num_experts];
            for domain in calibration.domains() {
                for (peak, &other) in peaks.iter_mut().zip(&domain.layers[layer].output_peak) {
                    *peak = peak.max(other);
                }
            }
            peaks
        })
        .collect();
    let mut sorted: Vec<f64> = peaks.iter().flatten().copied().collect();
    sorted.sort_by(f64::total_cmp);
    let largest = sorted.last().copied().unwrap_or(0.0);
    let threshold = percentile(&sorted, 0.995).max(largest / 10.0);
    peaks
        .into_iter()
        .map(|layer| layer.into_iter().map(|peak| peak > threshold).collect())
        .collect()
}

/// Linear interpolation between order statistics of ascending `sorted` numbers; 0 of none.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let place = share * last as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (place - below as f64) * (sorted[above] - sorted[below])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statistics() -> LayerStatistics {
        LayerStatistics {
            num_experts: 3,
            tokens: vec![4, 0, 2],
            gate_sum: vec![1.0, 0.0, 3.0],
            norm_sum: vec![8.0, 0.0, 6.0],
            norm_sq_sum: vec![20.0, 0.0, 18.0],
            gated_norm_sum: vec![2.0, 0.0, 5.0],
            direction: vec![7.0, 0.0, 9.0],
            residual_direction: vec![0.5, 0.0, 0.25],
            normalised_gate_sum: vec![3.0, 0.0, 5.0],
            total_tokens: 8,
            ..LayerStatistics::default()
        }
    }

    #[test]
    fn the_family_by_hand() {
        let cases = [
            (ExpertScore::Direction, [7.0, 0.0, 9.0]),
            (ExpertScore::Frequency, [4.0, 0.0, 2.0]),
            (ExpertScore::Gating, [1.0, 0.0, 3.0]),
            (ExpertScore::Ean, [8.0, 0.0, 6.0]),
            (ExpertScore::Reap, [0.5, 0.0, 2.5]),
            (ExpertScore::Man, [2.0, 0.0, 3.0]),
            (ExpertScore::Msan, [5.0, 0.0, 9.0]),
            (ExpertScore::EasyEp, [0.5, 0.0, 0.25]),
            (ExpertScore::GatingShare, [0.375, 0.0, 0.625]),
        ];
        for (score, expected) in cases {
            assert_eq!(domain_scores(&statistics(), score), expected, "{score}");
        }
    }

    #[test]
    fn percentile_interpolates() {
        assert_eq!(percentile(&[], 0.995), 0.0);
        assert_eq!(percentile(&[3.0], 0.995), 3.0);
        assert_eq!(percentile(&[0.0, 1.0], 0.5), 0.5);
        let hundred_and_one: Vec<f64> = (0..=100).map(f64::from).collect();
        assert!((percentile(&hundred_and_one, 0.995) - 99.5).abs() < 1e-9);
    }
}
