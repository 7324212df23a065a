//! How much a plan depends on the samples: a bootstrap over groups of them.
//!
//! Each replicate draws as many groups as there are, with replacement (Efron, "Bootstrap methods: another look at the
//! jackknife", 1979; whole groups, because samples in them are only kept as sums), in every domain by itself, and plans
//! again from their sums.

use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Serialize;
use tenp_checkpoint::config::ModelConfig;
use tenp_checkpoint::plan::{ExpertPlan, Plan};
use tenp_checkpoint::statistics::{Folds, LayerStatistics, Statistics};

use crate::accounting::ModelSize;
use crate::calibration::Calibration;
use crate::request::{Choice, PlanRequest};
use crate::score::expert_scores;
use crate::{PruneError, plan};

/// Plans that are made again.
const REPLICATES: usize = 20;

/// How a plan changes with the samples that it was made from; means over the replicates.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stability {
    /// Plans that were made again.
    pub replicates: usize,
    /// Groups of samples, over all domains.
    pub groups: usize,
    /// Share of the kept neurons that would be others.
    pub neurons_changed: f64,
    /// The largest such share of a replicate.
    pub neurons_changed_most: f64,
    /// Share of the experts kept whole (or kept at all, where experts are dropped) that would be others.
    pub experts_changed: f64,
    /// Spearman's rank correlation of the expert scores with the plan's, mean over layers.
    pub expert_rank_correlation: f64,
    /// The same by layer.
    pub layers: Vec<LayerStability>,
}

/// [`Stability`] of a MoE layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerStability {
    /// The model's own index.
    pub layer: usize,
    /// Share of the kept neurons that would be others.
    pub neurons_changed: f64,
    /// Share of the experts kept whole (or kept at all) that would be others.
    pub experts_changed: f64,
    /// Spearman's rank correlation of the expert scores with the plan's.
    pub expert_rank_correlation: f64,
}

/// What is counted of a layer in one replicate.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    neurons: usize,
    neurons_changed: usize,
    experts: usize,
    experts_changed: usize,
    correlation: f64,
}

/// How `planned`, the plan that `request` came to, changes with the samples. `None` where no domain has two groups.
///
/// # Errors
/// As [`crate::plan()`].
pub fn stability(
    (config, size, fingerprint): (&ModelConfig, &ModelSize, &str),
    (statistics, folds): (&Statistics, &Folds),
    request: &PlanRequest,
    planned: &Plan,
) -> Result<Option<Stability>, PruneError> {
    if !folds.values().any(|groups| groups.len() > 1) {
        return Ok(None);
    }
    let choice = Choice::resolve(request)?;
    let scores = |statistics: &Statistics| {
        let weights = &request.domain_weights;
        let calibration = Calibration::new(config, fingerprint, statistics, weights, &[])?;
        Ok::<_, PruneError>(expert_scores(
            &calibration,
            choice.expert_score,
            request.seed,
        ))
    };
    let planned_scores = scores(statistics)?;
    // By replicate and layer.
    let mut counts = Vec::new();
    for replicate in 0..REPLICATES {
        let drawn = drawn(statistics, folds, replicate as u64);
        let other = plan(config, size, fingerprint, &drawn, request)?;
        let layers = planned.layers.iter().zip(&other.layers).map(|(a, b)| {
            let mut counts = Counts::default();
            for (a, b) in a.experts.iter().zip(&b.experts) {
                counts.add(a, b, config.moe.expert_width);
            }
            counts
        });
        let mut layers: Vec<Counts> = layers.collect();
        let pairs = planned_scores.iter().zip(scores(&drawn)?);
        for (counts, (a, b)) in layers.iter_mut().zip(pairs) {
            counts.correlation = rank_correlation(a, &b);
        }
        counts.push(layers);
    }
    let groups = folds.values().map(Vec::len).sum();
    Ok(Some(summary(&counts, planned, groups)))
}

fn summary(counts: &[Vec<Counts>], planned: &Plan, groups: usize) -> Stability {
    let share = |part: usize, all: usize| part as f64 / all.max(1) as f64;
    let mean = |values: &mut dyn Iterator<Item = f64>| {
        let (sum, n) = values.fold((0.0, 0_usize), |(sum, n), v| (sum + v, n + 1));
        sum / n.max(1) as f64
    };
    let neurons_changed: Vec<f64> = counts
        .iter()
        .map(|layers| {
            share(
                layers.iter().map(|c| c.neurons_changed).sum(),
                layers.iter().map(|c| c.neurons).sum(),
            )
        })
        .collect();
    let experts_changed = |layers: &Vec<Counts>| {
        share(
            layers.iter().map(|c| c.experts_changed).sum(),
            layers.iter().map(|c| c.experts).sum(),
        )
    };
    let layers = planned.layers.iter().enumerate().map(|(i, layer)| {
        let of = || counts.iter().map(|layers| layers[i]);
        LayerStability {
            layer: layer.layer,
            neurons_changed: mean(&mut of().map(|c| share(c.neurons_changed, c.neurons))),
            experts_changed: mean(&mut of().map(|c| share(c.experts_changed, c.experts))),
            expert_rank_correlation: mean(&mut of().map(|c| c.correlation)),
        }
    });
    let layers: Vec<LayerStability> = layers.collect();
    Stability {
        replicates: counts.len(),
        groups,
        neurons_changed: mean(&mut neurons_changed.iter().copied()),
        neurons_changed_most: neurons_changed.iter().copied().fold(0.0, f64::max),
        experts_changed: mean(&mut counts.iter().map(experts_changed)),
        expert_rank_correlation: mean(&mut layers.iter().map(|l| l.expert_rank_correlation)),
        layers,
    }
}

impl Counts {
    fn add(&mut self, planned: &ExpertPlan, other: &ExpertPlan, full: usize) {
        let whole = |expert: &ExpertPlan| !expert.dropped && expert.width == full;
        if whole(planned) {
            self.experts += 1;
            self.experts_changed += usize::from(!whole(other));
        }
        let kept = |expert: &ExpertPlan| {
            let mut kept = vec![false; full];
            match &expert.neurons {
                _ if expert.dropped => {}
                None => kept.fill(true),
                Some(ids) => {
                    for &id in ids {
                        kept[id as usize] = true;
                    }
                }
            }
            kept
        };
        for (before, after) in kept(planned).into_iter().zip(kept(other)) {
            self.neurons += usize::from(before);
            self.neurons_changed += usize::from(before && !after);
        }
    }
}

/// Statistics of groups drawn with replacement.
fn drawn(statistics: &Statistics, folds: &Folds, replicate: u64) -> Statistics {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&replicate.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    let domains = folds.iter().map(|(name, groups)| {
        let mut layers: BTreeMap<usize, LayerStatistics> = BTreeMap::new();
        for _ in 0..groups.len() {
            // The bias of the remainder is below 2^-60.
            let chosen = &groups[(rng.next_u64() % groups.len() as u64) as usize];
            for (layer, sums) in chosen {
                match layers.get_mut(layer) {
                    Some(all) => all.add(sums),
                    None => drop(layers.insert(*layer, sums.clone())),
                }
            }
        }
        (name.clone(), layers)
    });
    Statistics {
        checkpoint: statistics.checkpoint.clone(),
        domains: domains.collect(),
        ..Statistics::default()
    }
}

/// Spearman's rank correlation; equal values share the mean of their ranks. 1 where either side has one value only.
pub fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (ranks(a), ranks(b));
    let mean = (a.len() as f64 - 1.0) / 2.0;
    let product = |x: &[f64], y: &[f64]| -> f64 {
        let terms = x.iter().zip(y);
        terms.map(|(x, y)| (x - mean) * (y - mean)).sum()
    };
    let spread = (product(&a, &a) * product(&b, &b)).sqrt();
    if spread == 0.0 {
        1.0
    } else {
        product(&a, &b) / spread
    }
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for run in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let rank = start as f64 + (run.len() - 1) as f64 / 2.0;
        for &i in run {
            ranks[i] = rank;
        }
        start += run.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_equal_values_are_shared() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0]), [2.5, 0.0, 2.5, 1.0]);
    }

    #[test]
    fn rank_correlations() {
        assert_eq!(rank_correlation(&[1.0, 2.0, 9.0], &[0.0, 5.0, 6.0]), 1.0);
        assert_eq!(rank_correlation(&[1.0, 2.0, 9.0], &[3.0, 2.0, 1.0]), -1.0);
        // 1 − 6·Σd²/(n(n² − 1)) = 1 − 6·2/24.
        assert!((rank_correlation(&[1.0, 2.0, 3.0], &[1.0, 3.0, 2.0]) - 0.5).abs() < 1e-12);
        assert_eq!(rank_correlation(&[1.0], &[2.0]), 1.0);
    }
}
