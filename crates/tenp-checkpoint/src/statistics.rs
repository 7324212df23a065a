//! Calibration statistics: sums that any method can be planned from, and that merge by addition.
//!
//! Formulas are in `docs/methods.md` ("One pass, every statistic"). N is the number of routed experts of a layer, K
//! their width before pruning; `[N,K]` tables are row-major.

mod fields;
mod file;
mod merge;
mod parts;
mod shards;

use std::collections::BTreeMap;

pub use parts::{read_parts, write_parts};
pub use shards::Share;

/// Statistics of one layer over one domain's tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerStatistics {
    /// Routed experts N.
    pub num_experts: usize,
    /// Expert width K (the widest expert of a ragged layer; rows of narrower experts end in zeros).
    pub width: usize,
    /// `[N]` tokens routed to each expert.
    pub tokens: Vec<i64>,
    /// Tokens that went through the layer.
    pub total_tokens: i64,
    /// `[N]` sum g.
    pub gate_sum: Vec<f64>,
    /// `[N]` sum of g / Σ g over the token's chosen experts.
    pub normalised_gate_sum: Vec<f64>,
    /// `[N]` sum ‖y‖.
    pub norm_sum: Vec<f64>,
    /// `[N]` sum ‖y‖².
    pub norm_sq_sum: Vec<f64>,
    /// `[N]` sum g‖y‖.
    pub gated_norm_sum: Vec<f64>,
    /// `[N]` sum g‖y‖(1 − cos(x, y)).
    pub direction: Vec<f64>,
    /// `[N]` sum g‖y‖ · max(0, 1 − cos(r, r + Σ g y)).
    pub residual_direction: Vec<f64>,
    /// `[N]` `max ‖y‖_inf`; merges by maximum.
    pub output_peak: Vec<f64>,
    /// `[N,K]` `sum h_j⟨w_j, y⟩ / (‖y‖ + 1e-8)`.
    pub contribution: Vec<f64>,
    /// `[N,K]` sum of the same term's absolute value.
    pub contribution_abs: Vec<f64>,
    /// `[N,K]` `sum |h_j|·‖w_j‖`.
    pub activation_norm: Vec<f64>,
    /// `[N,K]` `sum (g h_j)²‖w_j‖²`.
    pub energy: Vec<f64>,
    /// `[N,K]` `max (g h_j)²‖w_j‖²`; merges by maximum.
    pub peak: Vec<f64>,
    /// `[N,K]` `sum h_j`.
    pub mean: Vec<f64>,
    /// `[N,K]` `sum h_j²`.
    pub second_moment: Vec<f64>,
    /// `[N,K]` `‖gate row‖² + ‖up row‖² + ‖w_j‖²`, from the weights; must be equal in merged files.
    pub neuron_weight_norm_sq: Vec<f64>,
    /// `[N,K]` `‖w_j‖²`, from the weights; must be equal in merged files.
    pub down_norm_sq: Vec<f64>,
}

/// A statistics file: everything one calibration pass (or several, merged) learned about a checkpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Statistics {
    /// Fingerprint of the checkpoint that was calibrated.
    pub checkpoint: String,
    /// Fingerprints of the token ids that went in: domain, then one entry per calibration run.
    pub tokens: BTreeMap<String, Vec<String>>,
    /// Version of the program that wrote the file.
    pub version: String,
    /// Compute dtype of the calibration run(s), `f32` or `bf16`, sorted and deduplicated.
    pub compute: Vec<String>,
    /// Fingerprint of the one run that made the file, if it is of one: the same run makes the same file.
    pub run: String,
    /// Shares of calibrations of which others are not in the statistics, sorted.
    pub shares: Vec<Share>,
    /// Layers by domain, then by the model's own layer index.
    pub domains: BTreeMap<String, BTreeMap<usize, LayerStatistics>>,
}

impl Statistics {
    /// Lets go of the `[N,K]` tables that are not `wanted`, by name, as [`Self::read_tables`] does. They cannot be written
    /// any more.
    pub fn keep_tables(&mut self, wanted: &[&str]) {
        let gone = || {
            let tables = fields::FIELDS.iter().filter(|field| field.per_neuron);
            tables.filter(|field| !wanted.contains(&field.name))
        };
        for layer in self.domains.values_mut().flat_map(BTreeMap::values_mut) {
            for field in gone() {
                *(field.get_mut)(layer) = Vec::new();
            }
        }
    }
}

impl LayerStatistics {
    /// Lets go of the `[N,K]` tables.
    pub fn let_go(&mut self) {
        for field in fields::FIELDS.iter().filter(|field| field.per_neuron) {
            *(field.get_mut)(self) = Vec::new();
        }
    }

    /// Bytes of the `[N,K]` tables.
    pub fn table_bytes(&self) -> usize {
        let tables = fields::FIELDS.iter().filter(|field| field.per_neuron);
        tables
            .map(|field| size_of_val(&(field.get)(self)[..]))
            .sum()
    }
}

/// Statistics of groups of samples kept apart, by domain: the groups, each with its layers by the model's own index.
///
/// Only the `[N,K]` tables that were asked for are there; the others are empty.
pub type Folds = BTreeMap<String, Vec<BTreeMap<usize, LayerStatistics>>>;

impl LayerStatistics {
    /// Statistics of a layer that no token went through: zeros everywhere.
    pub fn zeros(num_experts: usize, width: usize) -> Self {
        let mut layer = Self {
            num_experts,
            width,
            tokens: vec![0; num_experts],
            ..Self::default()
        };
        for field in fields::FIELDS {
            *(field.get_mut)(&mut layer) = vec![0.0; field.length(num_experts, width)];
        }
        layer
    }

    /// Gives every f64 statistic new values, in file order.
    pub(crate) fn fill(&mut self, value: &mut dyn FnMut() -> f64) {
        for field in fields::FIELDS {
            (field.get_mut)(self).fill_with(&mut *value);
        }
    }
}
