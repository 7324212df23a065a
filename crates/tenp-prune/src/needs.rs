//! Which tables of a statistics file a plan is made from, so that no other has to be read.

use tenp_checkpoint::plan::Scope;

use crate::request::{Choice, PlanRequest};
use crate::{NeuronScore, PruneError};

impl PlanRequest {
    /// Names of the `[N,K]` statistics that [`crate::plan()`] looks at for this request; of the `[N]` ones it may look at
    /// any.
    ///
    /// # Errors
    /// Options out of range or without effect for the method.
    pub fn tables(&self) -> Result<Vec<&'static str>, PruneError> {
        Ok(Choice::resolve(self)?.tables())
    }
}

impl Choice<'_> {
    /// Names of the `[N,K]` statistics that decide something.
    pub(crate) fn tables(&self) -> Vec<&'static str> {
        if !self.uses_neuron_score() {
            return Vec::new();
        }
        let mut tables = self.neuron_score.tables().to_vec();
        // The fallback of experts that no token reached.
        if self.neuron_score != NeuronScore::WeightNorm {
            tables.push("neuron_weight_norm_sq");
        }
        // What neurons weigh where those of an expert are merged.
        if self.merges == Some(Scope::Neurons) {
            tables.extend(NeuronScore::Energy.tables());
        }
        tables.sort_unstable();
        tables.dedup();
        tables
    }
}

impl NeuronScore {
    /// Names of the `[N,K]` statistics that the score is made from.
    pub const fn tables(self) -> &'static [&'static str] {
        match self {
            Self::Contribution => &["contribution"],
            Self::ContributionAbs => &["contribution_abs"],
            Self::ActivationNorm => &["activation_norm"],
            Self::Energy => &["energy", "peak"],
            Self::Wifv => &["mean", "second_moment", "down_norm_sq"],
            Self::WeightNorm => &["neuron_weight_norm_sq"],
            Self::Random => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Method;

    #[test]
    fn a_plan_says_what_it_reads() {
        let tables = |method, neuron_score| {
            let request = PlanRequest {
                method,
                neuron_score,
                ..PlanRequest::default()
            };
            request.tables().unwrap()
        };
        assert_eq!(
            tables(Method::Tenp, None),
            ["contribution", "neuron_weight_norm_sq"]
        );
        assert_eq!(
            tables(Method::Enp, Some(NeuronScore::Energy)),
            ["energy", "neuron_weight_norm_sq", "peak"]
        );
        assert_eq!(
            tables(Method::TenpDern, None),
            ["contribution", "energy", "neuron_weight_norm_sq", "peak"]
        );
        assert!(tables(Method::Reap, None).is_empty());
        assert_eq!(
            tables(Method::RandomNeurons, None),
            ["neuron_weight_norm_sq"]
        );
    }
}
