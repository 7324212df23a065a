//! What a plan records for DERN (arXiv 2509.10377): everything that decides the merging, but no weights.

use serde::{Deserialize, Serialize};

use crate::CheckpointError;
use crate::config::ModelConfig;

/// DERN's settings. Segments and their similarity are defined in `docs/methods.md`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dern {
    /// Weights of the cosines of gate row, up row and down column in the similarity.
    pub lambda: [f64; 3],
    /// A dropped expert's neuron moves where its best similarity is above this, else it is discarded.
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
    /// S of every expert, `[MoE layer][expert]`: its share of the router's choices, merged over the domains.
    #[serde(rename = "S")]
    pub scores: Vec<Vec<f64>>,
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
}

impl Dern {
    /// Refuses values that no plan of this program holds.
    pub(super) fn check(&self, config: &ModelConfig) -> Result<(), CheckpointError> {
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
        let (layers, experts) = (config.moe_layers.len(), config.moe.num_experts);
        let shaped = self.scores.len() == layers && self.scores.iter().all(|l| l.len() == experts);
        if !shaped {
            return refuse(format!("S is not {layers} lists of {experts} numbers"));
        }
        match self
            .scores
            .iter()
            .flatten()
            .find(|s| !(s.is_finite() && **s >= 0.0))
        {
            Some(score) => refuse(format!("S holds {score}, which is no number of at least 0")),
            None => Ok(()),
        }
    }
}
