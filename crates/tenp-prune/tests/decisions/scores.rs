//! Scores by hand and their merging over domains.

use std::collections::BTreeMap;

use tenp_prune::allocate::Shape;
use tenp_prune::score::{
    NeuronScoring, PEAK_SHARE, expert_scores, neuron_scores, super_experts, uncalibrated,
};
use tenp_prune::{ExpertScore, NeuronScore};

use crate::synthetic::{Case, DEMO, TINY};

const ONE: Shape = Shape {
    num_layers: 1,
    num_experts: 2,
    expert_width: 2,
};

fn scoring(score: NeuronScore) -> NeuronScoring {
    NeuronScoring {
        score,
        normalise_domains: false,
        seed: 0,
    }
}

fn close(left: &[f64], right: &[f64]) {
    assert_eq!(left.len(), right.len());
    for (a, b) in left.iter().zip(right) {
        assert!((a - b).abs() < 1e-12, "{left:?} against {right:?}");
    }
}

/// Two domains with 4 and 1 tokens on expert 0.
fn two_domains() -> Case {
    let mut case = Case::with_domains(ONE, 1, &["a", "b"]);
    let layer = case.layer("a", 0);
    layer.tokens = vec![4, 2];
    layer.direction = vec![3.0, 4.0];
    layer.contribution = vec![8.0, -4.0, 1.0, 1.0];
    layer.energy = vec![10.0, 20.0, 0.0, 0.0];
    layer.peak = vec![5.0, 1.0, 0.0, 0.0];
    layer.mean = vec![4.0, 0.0, 0.0, 0.0];
    layer.second_moment = vec![8.0, 4.0, 0.0, 0.0];
    layer.down_norm_sq = vec![2.0, 3.0, 1.0, 1.0];
    layer.neuron_weight_norm_sq = vec![4.0, 9.0, 16.0, 25.0];
    let layer = case.layer("b", 0);
    layer.tokens = vec![1, 0];
    layer.direction = vec![100.0, 0.0];
    layer.contribution = vec![2.0, 4.0, 0.0, 0.0];
    layer.energy = vec![1.0, 1.0, 0.0, 0.0];
    layer.peak = vec![1.0, 7.0, 0.0, 0.0];
    layer.mean = vec![1.0, 1.0, 0.0, 0.0];
    layer.second_moment = vec![1.0, 1.0, 0.0, 0.0];
    layer.down_norm_sq = vec![2.0, 3.0, 1.0, 1.0];
    layer.neuron_weight_norm_sq = vec![4.0, 9.0, 16.0, 25.0];
    case
}

#[test]
fn expert_scores_add_the_normalised_domains() {
    let case = two_domains();
    let scores = expert_scores(&case.calibration(), ExpertScore::Direction, 0);
    close(&scores[0], &[0.6 + 1.0, 0.8]);
    let weights = BTreeMap::from([("b".to_owned(), 0.25)]);
    close(
        &expert_scores(&case.weighted(&weights), ExpertScore::Direction, 0)[0],
        &[0.85, 0.8],
    );
    let without = BTreeMap::from([("b".to_owned(), 0.0)]);
    close(
        &expert_scores(&case.weighted(&without), ExpertScore::Direction, 0)[0],
        &[0.6, 0.8],
    );
}

#[test]
fn a_domain_without_any_score_counts_nothing() {
    let mut case = two_domains();
    case.layer("b", 0).direction = vec![0.0, 0.0];
    close(
        &expert_scores(&case.calibration(), ExpertScore::Direction, 0)[0],
        &[0.6, 0.8],
    );
}

#[test]
fn neuron_sums_add_and_are_divided_by_all_tokens() {
    let case = two_domains();
    let calibration = case.calibration();
    let first = |score| neuron_scores(&calibration, scoring(score))[0][0].clone();
    close(&first(NeuronScore::Contribution), &[2.0, 0.0]);
    let a = PEAK_SHARE;
    close(
        &first(NeuronScore::Energy),
        &[(1.0 - a) * 11.0 + a * 5.0, (1.0 - a) * 21.0 + a * 7.0],
    );
    // var = 9/5 − 1² and 5/5 − (1/5)².
    close(&first(NeuronScore::Wifv), &[0.8 * 2.0, 0.96 * 3.0]);
    close(&first(NeuronScore::WeightNorm), &[2.0, 3.0]);
}

#[test]
fn weights_multiply_sums_and_tokens_alike() {
    let case = two_domains();
    let weights = BTreeMap::from([("b".to_owned(), 4.0)]);
    let scores = neuron_scores(&case.weighted(&weights), scoring(NeuronScore::Contribution));
    close(&scores[0][0], &[2.0, 12.0 / 8.0]);
}

#[test]
fn domains_can_be_normalised_first() {
    let case = two_domains();
    let normalised = NeuronScoring {
        normalise_domains: true,
        ..scoring(NeuronScore::Contribution)
    };
    let scores = neuron_scores(&case.calibration(), normalised);
    let (a, b) = (80_f64.sqrt(), 20_f64.sqrt());
    close(&scores[0][0], &[8.0 / a + 2.0 / b, -4.0 / a + 4.0 / b]);
    // No token of domain b reached expert 1.
    close(&scores[0][1], &[0.5_f64.sqrt(), 0.5_f64.sqrt()]);
}

#[test]
fn an_expert_without_tokens_has_numbers_everywhere() {
    let mut case = Case::with_domains(TINY, 2, &["a", "b"]);
    case.silence("a", 0, 1);
    case.silence("b", 0, 1);
    case.silence("b", 1, 3);
    let calibration = case.calibration();
    let marked = uncalibrated(&calibration);
    assert_eq!(marked, [[false, true, false, false], [false; 4]]);
    for &score in ExpertScore::ALL {
        let scores = expert_scores(&calibration, score, 1);
        assert!(
            scores.iter().flatten().all(|score| score.is_finite()),
            "{score}"
        );
        if score != ExpertScore::Random {
            assert_eq!(scores[0][1], 0.0, "{score}");
        }
    }
    for &score in NeuronScore::ALL {
        for normalise_domains in [false, true] {
            let scores = neuron_scores(
                &calibration,
                NeuronScoring {
                    score,
                    normalise_domains,
                    seed: 1,
                },
            );
            assert!(
                scores
                    .iter()
                    .flatten()
                    .flatten()
                    .all(|score| score.is_finite()),
                "{score}"
            );
            if score != NeuronScore::Random {
                let norms = neuron_scores(&calibration, scoring(NeuronScore::WeightNorm));
                assert_eq!(scores[0][1], norms[0][1], "{score}");
            }
        }
    }
}

#[test]
fn the_guard_needs_the_percentile_and_a_tenth_of_the_largest() {
    let mut case = Case::with_domains(DEMO, 3, &["a", "b"]);
    for domain in ["a", "b"] {
        for layer in 0..DEMO.num_layers {
            case.layer(domain, layer).output_peak.fill(1.0);
        }
    }
    let count = |case: &Case| {
        super_experts(&case.calibration())
            .iter()
            .flatten()
            .filter(|&&g| g)
            .count()
    };
    assert_eq!(count(&case), 0);
    case.layer("b", 6).output_peak[15] = 50.0;
    assert_eq!(count(&case), 1);
    assert!(super_experts(&case.calibration())[6][15]);
}
