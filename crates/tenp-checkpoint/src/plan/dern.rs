//! What a plan records for DERN (arXiv 2509.10377): everything that decides the merging, but no weights.

use serde::{Deserialize, Serialize};

use super::{ExpertPlan, LayerPlan};
use crate::CheckpointError;
use crate::config::ModelConfig;

/// DERN's settings. Segments and their similarity are defined in `docs/methods.md`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dern {
    /// What is merged into what.
    #[serde(default, skip_serializing_if = "Scope::is_experts")]
    pub scope: Scope,
    /// Weights of the cosines of gate row, up row and down column in the similarity.
    pub lambda: [f64; 3],
    /// A dropped neuron moves where its best similarity is above this, else it is discarded.
    pub threshold: f64,
    /// (up, w) and (−up, −w) count as the same neuron.
    pub sign_canonical: bool,
    /// What becomes of the kept router rows.
    pub router: RouterRule,
    /// Where the k-means starts.
    pub initialisation: Initialisation,
    /// Seed of a random start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// What a neuron weighs in the mean of its cluster.
    pub merge_weights: MergeWeights,
    /// Rounds of the k-means, at most.
    pub rounds: usize,
    /// S of every expert, `[MoE layer][expert]`: its share of the router's choices, merged over the domains. Absent
    /// within experts, where it is the same for all that are merged.
    #[serde(rename = "S", default, skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<Vec<f64>>,
    /// Energy of every neuron of the narrow experts, `[MoE layer][expert][neuron]`, as a share of its expert's largest;
    /// empty for other experts, and absent where energy has no part.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<Vec<Vec<f32>>>,
}

/// What is merged into what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// Neurons of dropped experts into the experts that stay.
    #[default]
    Experts,
    /// Neurons that a narrow expert loses into those it keeps.
    Neurons,
}

impl Scope {
    // Serde hands over a reference.
    #[allow(clippy::trivially_copy_pass_by_ref)]
    fn is_experts(&self) -> bool {
        *self == Self::Experts
    }
}

/// Router rows of kept experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouterRule {
    /// A kept row gains the dropped row times the share of the dropped expert's neurons that went to the kept one.
    #[default]
    Transfer,
    /// Left alone.
    Keep,
}

/// Start of the k-means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Initialisation {
    /// The neurons with the largest entry of a gate row.
    #[default]
    Peak,
    /// Neurons by lot.
    Random,
    /// The neurons that the expert has or keeps of its own.
    Kept,
}

/// Weights of the means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MergeWeights {
    /// S of the expert that the neuron comes from.
    #[default]
    Router,
    /// Every neuron counts the same.
    Uniform,
    /// The neuron's own energy, as the plan lists it.
    Energy,
}

impl Dern {
    /// Refuses values that no plan of this program holds.
    pub(super) fn check(
        &self,
        config: &ModelConfig,
        layers: &[LayerPlan],
    ) -> Result<(), CheckpointError> {
        let refuse = |problem: String| {
            Err(CheckpointError::Plan {
                place: ", dern".to_owned(),
                problem: format!("{problem}; make the plan again"),
            })
        };
        if let Some(value) = self.lambda.iter().find(|v| !(v.is_finite() && **v >= 0.0)) {
            return refuse(format!("lambda {value} is no number of at least 0"));
        }
        if self.lambda.iter().sum::<f64>() <= 0.0 {
            return refuse("every lambda is 0".to_owned());
        }
        if !self.threshold.is_finite() {
            return refuse(format!("threshold {} is no number", self.threshold));
        }
        if self.rounds == 0 {
            return refuse("no round of k-means is allowed".to_owned());
        }
        if self.initialisation == Initialisation::Random && self.seed.is_none() {
            return refuse("the start is random, but there is no seed".to_owned());
        }
        match self.scope {
            Scope::Experts => self.check_scores(config).or_else(refuse),
            Scope::Neurons => self.check_weights(config, layers).or_else(refuse),
        }
    }

    fn check_scores(&self, config: &ModelConfig) -> Result<(), String> {
        if self.merge_weights == MergeWeights::Energy || !self.weights.is_empty() {
            return Err("energies only have a part within experts".to_owned());
        }
        let (layers, experts) = (config.moe_layers.len(), config.moe.num_experts);
        let shaped = self.scores.len() == layers && self.scores.iter().all(|l| l.len() == experts);
        if !shaped {
            return Err(format!("S is not {layers} lists of {experts} numbers"));
        }
        let mut scores = self.scores.iter().flatten();
        match scores.find(|s| !(s.is_finite() && **s >= 0.0)) {
            Some(score) => Err(format!("S holds {score}, which is no number of at least 0")),
            None => Ok(()),
        }
    }

    fn check_weights(&self, config: &ModelConfig, layers: &[LayerPlan]) -> Result<(), String> {
        if layers
            .iter()
            .flat_map(|layer| &layer.experts)
            .any(|e| e.dropped)
        {
            return Err("merges within experts, but experts are dropped".to_owned());
        }
        if self.router != RouterRule::Keep || !self.scores.is_empty() {
            return Err("within experts the router stays and there is no S".to_owned());
        }
        match self.merge_weights {
            MergeWeights::Router => {
                return Err("within experts the router's favour weighs nothing".to_owned());
            }
            MergeWeights::Uniform if self.weights.is_empty() => return Ok(()),
            MergeWeights::Uniform => return Err("uniform weights need no list".to_owned()),
            MergeWeights::Energy => {}
        }
        let full = config.moe.expert_width;
        let fits = |(plan, weights): (&LayerPlan, &Vec<Vec<f32>>)| {
            let expected = |e: &ExpertPlan| if e.neurons.is_some() { full } else { 0 };
            let lengths = weights.iter().map(Vec::len);
            lengths.eq(plan.experts.iter().map(expected))
        };
        if self.weights.len() != layers.len() || !layers.iter().zip(&self.weights).all(fits) {
            return Err(format!(
                "weights are not a list of {full} numbers for every narrow expert, and an empty one for the others"
            ));
        }
        let mut weights = self.weights.iter().flatten().flatten();
        match weights.find(|w| !(w.is_finite() && **w >= 0.0)) {
            Some(weight) => Err(format!(
                "weights hold {weight}, which is no number of at least 0"
            )),
            None => Ok(()),
        }
    }
}
