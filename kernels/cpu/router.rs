//! From router logits to chosen experts and their weights. All arithmetic is f32.

use rayon::prelude::*;

use super::elementwise::{sigmoid, softmax};
use crate::KernelError;
use crate::error::check_len;

/// Router arithmetic of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterSpec {
    /// Experts.
    pub num_experts: usize,
    /// Experts chosen per token.
    pub top_k: usize,
    /// Element-wise sigmoid scores instead of a softmax.
    pub sigmoid: bool,
    /// `[num_experts]`, added to the scores for the selection only.
    pub correction_bias: Option<Vec<f32>>,
    /// Group-limited selection.
    pub groups: Option<GroupLimit>,
    /// Divide the chosen weights by their sum.
    pub normalise: bool,
    /// Multiplies the weights last.
    pub scaling: f32,
}

/// Only experts of the best groups can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupLimit {
    /// Equal groups of consecutive experts.
    pub num_groups: usize,
    /// Groups in play for a token.
    pub top_groups: usize,
    /// A group's score is the sum of its best two experts (otherwise its best).
    pub top_two_sum: bool,
}

/// The choice for a batch of tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routing {
    /// `[tokens, top_k]`, best first.
    pub expert_ids: Vec<u32>,
    /// `[tokens, top_k]` weight that multiplies each chosen expert's output.
    pub weights: Vec<f32>,
}

impl RouterSpec {
    /// Checks the counts.
    ///
    /// # Errors
    /// [`KernelError::Invalid`] for a top-k or groups that cannot be met, [`KernelError::Length`] for the bias.
    pub fn check(&self) -> Result<(), KernelError> {
        let invalid = |why: String| {
            Err(KernelError::Invalid {
                what: "router",
                why,
            })
        };
        if self.top_k == 0 || self.top_k > self.num_experts {
            return invalid(format!(
                "top-{} of {} experts",
                self.top_k, self.num_experts
            ));
        }
        if let Some(bias) = &self.correction_bias {
            check_len("router correction bias", self.num_experts, bias.len())?;
        }
        if let Some(g) = self.groups {
            if g.num_groups == 0
                || !self.num_experts.is_multiple_of(g.num_groups)
                || g.top_groups > g.num_groups
            {
                return invalid(format!(
                    "{} of {} groups over {} experts",
                    g.top_groups, g.num_groups, self.num_experts
                ));
            }
            let size = self.num_experts / g.num_groups;
            if self.top_k > g.top_groups * size {
                return invalid(format!(
                    "top-{} of {} groups of {size} experts",
                    self.top_k, g.top_groups
                ));
            }
        }
        Ok(())
    }

    /// Routes every row of `logits` (`[tokens, num_experts]`, overwritten with the scores).
    ///
    /// Ties go to the lower expert id.
    ///
    /// # Errors
    /// As [`RouterSpec::check`], and [`KernelError::Length`] if `logits` is no multiple of the number of experts.
    pub fn route(&self, logits: &mut [f32]) -> Result<Routing, KernelError> {
        self.check()?;
        let tokens = logits.len() / self.num_experts;
        check_len("router logits", tokens * self.num_experts, logits.len())?;
        let mut routing = Routing {
            expert_ids: vec![0; tokens * self.top_k],
            weights: vec![0.0; tokens * self.top_k],
        };
        logits
            .par_chunks_mut(self.num_experts)
            .zip(routing.expert_ids.par_chunks_mut(self.top_k))
            .zip(routing.weights.par_chunks_mut(self.top_k))
            .with_min_len(32)
            .for_each(|((logits, ids), weights)| self.route_token(logits, ids, weights));
        Ok(routing)
    }

    fn route_token(&self, scores: &mut [f32], ids: &mut [u32], weights: &mut [f32]) {
        if self.sigmoid {
            for score in scores.iter_mut() {
                *score = sigmoid(*score);
            }
        } else {
            softmax(scores);
        }
        let mut choice: Vec<f32> = match &self.correction_bias {
            Some(bias) => scores.iter().zip(bias).map(|(s, b)| s + b).collect(),
            None => scores.to_vec(),
        };
        if let Some(limit) = self.groups {
            mask_groups(&mut choice, limit);
        }
        top(&choice, ids);
        let mut sum = 0.0;
        for (weight, &id) in weights.iter_mut().zip(ids.iter()) {
            *weight = scores[id as usize];
            sum += *weight;
        }
        let divisor = match (self.normalise, self.sigmoid) {
            (true, true) => sum + 1e-20,
            (true, false) => sum,
            (false, _) => 1.0,
        };
        for weight in weights {
            *weight = *weight / divisor * self.scaling;
        }
    }
}

/// Experts outside the best groups can no longer be chosen.
fn mask_groups(choice: &mut [f32], limit: GroupLimit) {
    let size = choice.len() / limit.num_groups;
    let scores: Vec<f32> = choice
        .chunks_exact(size)
        .map(|group| {
            let mut best = [0u32; 2];
            let best = &mut best[..if limit.top_two_sum { 2.min(size) } else { 1 }];
            top(group, best);
            best.iter().map(|&i| group[i as usize]).sum()
        })
        .collect();
    let mut kept = vec![0u32; limit.top_groups];
    top(&scores, &mut kept);
    for (g, group) in choice.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&(g as u32)) {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

/// Indices of the largest values, largest first, ties to the lower index. NaN counts as smallest.
fn top(values: &[f32], out: &mut [u32]) {
    let mut taken = vec![false; values.len()];
    for slot in out {
        let mut best: Option<usize> = None;
        for (i, &v) in values.iter().enumerate() {
            if !taken[i]
                && best.is_none_or(|b| v > values[b] || (values[b].is_nan() && !v.is_nan()))
            {
                best = Some(i);
            }
        }
        let best = best.expect("no more indices are asked for than there are values");
        taken[best] = true;
        *slot = best as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(num_experts: usize, top_k: usize) -> RouterSpec {
        RouterSpec {
            num_experts,
            top_k,
            sigmoid: false,
            correction_bias: None,
            groups: None,
            normalise: false,
            scaling: 1.0,
        }
    }

    #[test]
    fn softmax_top_k_and_normalisation() {
        let logits = [0.0f32, 2.0, 1.0, 2.0];
        let total: f32 = logits.iter().map(|v| v.exp()).sum();
        let mut router = spec(4, 2);
        let routing = router.route(&mut logits.clone()).unwrap();
        assert_eq!(routing.expert_ids, [1, 3]);
        assert!((routing.weights[0] - 2f32.exp() / total).abs() < 1e-6);
        router.normalise = true;
        router.scaling = 2.5;
        let routing = router.route(&mut logits.clone()).unwrap();
        assert!(
            (routing.weights[0] - 1.25).abs() < 1e-6 && (routing.weights[1] - 1.25).abs() < 1e-6
        );
    }

    #[test]
    fn bias_moves_the_choice_but_not_the_weight() {
        let mut router = spec(4, 1);
        router.sigmoid = true;
        router.correction_bias = Some(vec![0.0, 0.0, 0.0, 5.0]);
        let routing = router.route(&mut [3.0, 1.0, 0.5, 0.0]).unwrap();
        assert_eq!(routing.expert_ids, [3]);
        assert!((routing.weights[0] - 0.5).abs() < 1e-6);
    }

    #[test]
    fn groups_are_scored_by_their_best_or_their_best_two() {
        // Group 0 has the single best expert, group 1 the best pair.
        let logits = [3.0f32, -9.0, 2.0, 2.0];
        let mut router = spec(4, 1);
        router.sigmoid = true;
        router.groups = Some(GroupLimit {
            num_groups: 2,
            top_groups: 1,
            top_two_sum: false,
        });
        assert_eq!(router.route(&mut logits.clone()).unwrap().expert_ids, [0]);
        router.groups = Some(GroupLimit {
            num_groups: 2,
            top_groups: 1,
            top_two_sum: true,
        });
        assert_eq!(router.route(&mut logits.clone()).unwrap().expert_ids, [2]);
    }

    #[test]
    fn impossible_counts_are_refused() {
        assert!(spec(4, 5).check().is_err());
        let mut router = spec(8, 3);
        router.groups = Some(GroupLimit {
            num_groups: 4,
            top_groups: 1,
            top_two_sum: true,
        });
        assert!(router.check().is_err());
        router.groups = Some(GroupLimit {
            num_groups: 3,
            top_groups: 1,
            top_two_sum: true,
        });
        assert!(router.check().is_err());
    }
}
