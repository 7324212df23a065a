//! The pruning plan: which experts stay whole, and which neurons of the others stay.

mod dern;
mod file;
mod validate;

use serde::{Deserialize, Serialize};

use crate::config::ModelConfig;

pub use dern::{Dern, Initialisation, MergeWeights, RouterRule, Scope};
pub use file::{FORMAT, VERSION};

/// A plan as written to `plan.json` and to `tenp_plan.json` inside an output folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Always `tenp-plan`.
    pub format: String,
    /// Format version, 1.
    pub version: u32,
    /// Method name as given on the command line (`tenp`, `enp`, `reap`, …).
    pub method: String,
    /// Everything else that decided the plan: allocation, scores, ρ, α, slope, quantum, seed, domain weights.
    pub options: serde_json::Map<String, serde_json::Value>,
    /// Fingerprint of the checkpoint the plan is for.
    pub fingerprint: String,
    /// How what is dropped is merged into what stays; absent where it is only dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dern: Option<Dern>,
    /// MoE layers in depth order.
    pub layers: Vec<LayerPlan>,
    /// What the plan keeps.
    pub accounting: Accounting,
    /// `[layer, expert]` pairs that no calibration token reached; scored by weight norm.
    pub uncalibrated: Vec<(usize, usize)>,
}

/// One MoE layer of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// The model's own layer index.
    pub layer: usize,
    /// Every expert of the input layer, ascending by id.
    pub experts: Vec<ExpertPlan>,
}

/// One expert of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertPlan {
    /// Expert id in the input checkpoint.
    pub id: usize,
    /// Neurons kept.
    pub width: usize,
    /// Kept neuron ids, ascending; absent when all are kept or the expert is dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neurons: Option<Vec<u32>>,
    /// The expert leaves the router (width is 0). A narrow expert of width 0 that is not dropped stays in the router.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dropped: bool,
}

/// Fractions are in `[0, 1]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(non_snake_case)]
pub struct Accounting {
    /// Kept share of routed-expert parameters.
    pub E: f64,
    /// Share of routed-expert parameters still executed per token, measured from the calibration tokens.
    pub A: f64,
    /// Share of activations that land on whole experts.
    pub f: f64,
    /// Kept share of the whole model's parameters.
    pub model: f64,
    /// Bytes of all tensors before.
    pub bytes_before: u64,
    /// Bytes of all tensors after.
    pub bytes_after: u64,
}

impl Plan {
    /// Whether every expert stays whole: applying the plan copies the checkpoint.
    pub fn keeps_everything(&self, config: &ModelConfig) -> bool {
        self.narrows_nothing(config) && !self.drops_experts()
    }

    /// Whether every expert that stays keeps its full width.
    pub fn narrows_nothing(&self, config: &ModelConfig) -> bool {
        self.kept_experts()
            .all(|expert| expert.width == config.moe.expert_width)
    }

    /// Whether any expert leaves its router.
    pub fn drops_experts(&self) -> bool {
        self.layers
            .iter()
            .flat_map(|layer| &layer.experts)
            .any(|expert| expert.dropped)
    }

    /// How many experts each MoE layer keeps.
    pub fn num_experts(&self) -> Vec<usize> {
        let count = |layer: &LayerPlan| layer.kept().count();
        self.layers.iter().map(count).collect()
    }

    /// Whether a stock architecture can say what the plan leaves: experts of full width, as many in every layer.
    pub fn is_stock(&self, config: &ModelConfig) -> bool {
        self.narrows_nothing(config) && self.same_num_experts().is_some()
    }

    /// How many experts every layer keeps, if it is the same number.
    pub fn same_num_experts(&self) -> Option<usize> {
        let counts = self.num_experts();
        let first = *counts.first()?;
        counts.iter().all(|count| *count == first).then_some(first)
    }

    /// The width that all experts that stay share, if they do.
    pub fn uniform_width(&self) -> Option<usize> {
        let mut widths = self.kept_experts().map(|expert| expert.width);
        let first = widths.next()?;
        widths.all(|width| width == first).then_some(first)
    }

    /// Widths of the experts that stay, `[MoE layer][expert]`.
    pub fn widths(&self) -> Vec<Vec<usize>> {
        self.layers.iter().map(LayerPlan::widths).collect()
    }

    fn kept_experts(&self) -> impl Iterator<Item = &ExpertPlan> {
        self.layers.iter().flat_map(LayerPlan::kept)
    }
}

impl ExpertPlan {
    /// Kept neuron ids; `None` when all are kept.
    pub fn kept(&self) -> Option<&[u32]> {
        match &self.neurons {
            Some(neurons) => Some(neurons),
            None if self.width == 0 => Some(&[]),
            None => None,
        }
    }
}

impl LayerPlan {
    /// Widths of the experts that stay.
    pub fn widths(&self) -> Vec<usize> {
        self.kept().map(|expert| expert.width).collect()
    }

    /// Experts that stay in the router, ascending by id; their position is their id in the output.
    pub fn kept(&self) -> impl Iterator<Item = &ExpertPlan> {
        self.experts.iter().filter(|expert| !expert.dropped)
    }
}
