//! Dropping whole experts: how many stay, and which.

use tenp_checkpoint::config::{GroupScore, Moe};

use super::round_half_up;
use super::trapezoid::ranked;
use crate::PruneError;

/// Experts kept in every layer, the same number in every router group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptExperts {
    /// Router groups, 1 without group-limited routing.
    pub num_groups: usize,
    /// Experts kept in a group.
    pub per_group: usize,
}

impl KeptExperts {
    /// Experts kept in a layer.
    pub fn per_layer(&self) -> usize {
        self.num_groups * self.per_group
    }

    /// Which experts of a layer stay: in each group the ones with the highest scores, guarded ones first (ties:
    /// lower id).
    pub fn select(&self, scores: &[f64], guarded: &[bool]) -> Vec<bool> {
        let group_size = scores.len() / self.num_groups.max(1);
        let mut kept = vec![false; scores.len()];
        let mut taken = vec![0; self.num_groups];
        for expert in ranked(scores, guarded) {
            if let Some(taken) = taken.get_mut(expert / group_size.max(1))
                && *taken < self.per_group
            {
                *taken += 1;
                kept[expert] = true;
            }
        }
        kept
    }
}

/// How many experts to keep in every layer: round(ρN), at least top-k. With group-limited routing round(ρN/G) in each
/// of the G groups, at least enough for the groups in play to hold top-k, and 2 where a group's score is the sum of
/// its best two.
///
/// # Errors
/// No smaller number of experts lets the router choose its top-k, or the groups are uneven.
pub fn kept_experts(moe: &Moe, keep: f64) -> Result<KeptExperts, PruneError> {
    let limits = Limits::of(moe)?;
    if limits.minimum == limits.group_size && keep < 1.0 {
        return Err(limits.unreachable(moe));
    }
    let wanted = round_half_up(keep * moe.num_experts as f64 / limits.num_groups as f64);
    Ok(KeptExperts {
        num_groups: limits.num_groups,
        per_group: wanted.clamp(limits.minimum, limits.group_size),
    })
}

/// `count` experts in every layer.
///
/// # Errors
/// More than there are, so few that the router could not choose its top-k, or not the same number in every router group.
pub fn kept_count(moe: &Moe, count: usize) -> Result<KeptExperts, PruneError> {
    let limits = Limits::of(moe)?;
    let refuse = |problem: String| {
        let possible = limits.minimum..=limits.group_size;
        Err(PruneError::Experts {
            got: count,
            problem,
            possible: possible.map(|n| n * limits.num_groups).collect(),
        })
    };
    if count > moe.num_experts {
        return refuse(format!("a layer has {} experts", moe.num_experts));
    }
    if !count.is_multiple_of(limits.num_groups) {
        return refuse(format!(
            "each of the {} router groups must keep the same number",
            limits.num_groups
        ));
    }
    let per_group = count / limits.num_groups;
    if per_group < limits.minimum {
        return refuse(format!("the router could not choose its {}", moe.top_k));
    }
    Ok(KeptExperts {
        num_groups: limits.num_groups,
        per_group,
    })
}

/// What a router allows.
struct Limits {
    num_groups: usize,
    top_groups: usize,
    group_size: usize,
    /// Experts that a group must keep.
    minimum: usize,
}

impl Limits {
    fn of(moe: &Moe) -> Result<Self, PruneError> {
        let (num_groups, top_groups, at_least) = match moe.router.groups {
            None => (1, 1, 1),
            Some(groups) => {
                let least = if groups.score == GroupScore::TopTwoSum {
                    2
                } else {
                    1
                };
                (groups.num_groups, groups.top_groups, least)
            }
        };
        let minimum = at_least.max(moe.top_k.div_ceil(top_groups.clamp(1, num_groups.max(1))));
        let limits = Self {
            num_groups,
            top_groups,
            group_size: moe.num_experts / num_groups.max(1),
            minimum,
        };
        let even = num_groups > 0 && moe.num_experts.is_multiple_of(num_groups);
        if !even || top_groups == 0 || minimum > limits.group_size {
            return Err(limits.unreachable(moe));
        }
        Ok(limits)
    }

    fn unreachable(&self, moe: &Moe) -> PruneError {
        PruneError::TopKUnreachable {
            top_k: moe.top_k,
            num_experts: moe.num_experts,
            num_groups: self.num_groups,
            top_groups: self.top_groups,
            minimum: self.minimum,
        }
    }
}

#[cfg(test)]
mod tests {
    use tenp_checkpoint::config::{Router, RouterGroups, RouterScore};

    use super::*;

    fn moe(num_experts: usize, top_k: usize, groups: Option<RouterGroups>) -> Moe {
        Moe {
            num_experts,
            top_k,
            expert_width: 8,
            shared_width: 0,
            shared_gate: false,
            router: Router {
                score: RouterScore::Softmax,
                correction_bias: false,
                groups,
                normalise: false,
                scaling: 1.0,
            },
        }
    }

    fn groups(num_groups: usize, top_groups: usize, score: GroupScore) -> RouterGroups {
        RouterGroups {
            num_groups,
            top_groups,
            score,
        }
    }

    #[test]
    fn counts_round_half_up_but_hold_top_k() {
        let per_layer = |moe: &Moe, keep| kept_experts(moe, keep).map(|kept| kept.per_layer());
        assert_eq!(per_layer(&moe(64, 6, None), 0.6), Ok(38));
        assert_eq!(per_layer(&moe(10, 2, None), 0.25), Ok(3));
        assert_eq!(per_layer(&moe(64, 6, None), 0.01), Ok(6));
        assert_eq!(per_layer(&moe(64, 6, None), 1.0), Ok(64));
    }

    #[test]
    fn groups_keep_the_same_number() {
        let v3 = moe(256, 8, Some(groups(8, 4, GroupScore::TopTwoSum)));
        let kept = kept_experts(&v3, 0.6).unwrap();
        assert_eq!(
            kept,
            KeptExperts {
                num_groups: 8,
                per_group: 19
            }
        );
        assert_eq!(kept_experts(&v3, 0.001).unwrap().per_group, 2);
        let v2 = moe(160, 6, Some(groups(8, 3, GroupScore::Max)));
        assert_eq!(kept_experts(&v2, 0.001).unwrap().per_group, 2);
        assert_eq!(kept_experts(&v2, 1.0).unwrap().per_layer(), 160);
    }

    #[test]
    fn an_unreachable_top_k_is_refused() {
        assert!(kept_experts(&moe(4, 5, None), 0.5).is_err());
        assert!(kept_experts(&moe(8, 2, Some(groups(8, 4, GroupScore::TopTwoSum))), 0.5).is_err());
        assert!(kept_experts(&moe(10, 2, Some(groups(4, 2, GroupScore::Max))), 0.5).is_err());
        // Every expert is needed: a share below 1 must not quietly keep all.
        let pairs = moe(8, 3, Some(groups(4, 2, GroupScore::Max)));
        assert!(kept_experts(&pairs, 0.75).is_err());
        assert_eq!(kept_experts(&pairs, 1.0).unwrap().per_layer(), 8);
        let error =
            kept_experts(&moe(16, 6, Some(groups(8, 2, GroupScore::Max))), 0.5).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("6 of 16 experts in 8 groups, 2 in play"),
            "{error}"
        );
    }

    #[test]
    fn counts_are_taken_as_they_are_or_refused() {
        let kept = |moe: &Moe, count| kept_count(moe, count).map(|kept| kept.per_layer());
        let plain = moe(64, 6, None);
        assert_eq!(kept(&plain, 48), Ok(48));
        assert_eq!(kept(&plain, 6), Ok(6));
        assert_eq!(kept(&plain, 64), Ok(64));
        let v3 = moe(256, 8, Some(groups(8, 4, GroupScore::TopTwoSum)));
        assert_eq!(kept(&v3, 16), Ok(16));
        for (moe, count, problem) in [
            (&plain, 65, "a layer has 64"),
            (&plain, 5, "could not choose its 6"),
            (&plain, 0, "could not choose its 6"),
            (&v3, 100, "each of the 8 router groups"),
            (&v3, 8, "possible here: 16, 24, 32"),
        ] {
            let error = kept_count(moe, count).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn the_best_of_each_group_stay() {
        let kept = KeptExperts {
            num_groups: 2,
            per_group: 1,
        };
        let scores = [9.0, 8.0, 1.0, 1.0];
        assert_eq!(
            kept.select(&scores, &[false; 4]),
            [true, false, true, false]
        );
        let guarded = [false, true, false, false];
        assert_eq!(kept.select(&scores, &guarded), [false, true, true, false]);
        let whole = KeptExperts {
            num_groups: 1,
            per_group: 2,
        };
        assert_eq!(
            whole.select(&scores, &[false; 4]),
            [true, true, false, false]
        );
    }
}
