//! A model and statistics made up from a seed: consistent shapes, plausible values, a few experts without tokens.

use std::collections::BTreeMap;

use tenp_checkpoint::config::{
    Attention, Family, ModelConfig, Moe, QkNorm, Rope, RopeScaling, Router, RouterGroups,
    RouterScore,
};
use tenp_checkpoint::plan::Plan;
use tenp_checkpoint::statistics::{LayerStatistics, Statistics};
use tenp_prune::allocate::Shape;
use tenp_prune::{Calibration, ModelSize, PlanRequest, PruneError};

pub(crate) const FINGERPRINT: &str = "sha256:synthetic";
/// Shape of the worked example of `docs/methods.md`.
pub(crate) const DEMO: Shape = Shape {
    num_layers: 7,
    num_experts: 16,
    expert_width: 96,
};
/// Small enough to write values by hand.
pub(crate) const TINY: Shape = Shape {
    num_layers: 2,
    num_experts: 4,
    expert_width: 8,
};

/// A model with its statistics.
pub(crate) struct Case {
    pub(crate) config: ModelConfig,
    pub(crate) size: ModelSize,
    pub(crate) statistics: Statistics,
}

impl Case {
    /// One domain `default`.
    pub(crate) fn new(shape: Shape, seed: u64) -> Self {
        Self::with_domains(shape, seed, &["default"])
    }

    pub(crate) fn with_domains(shape: Shape, seed: u64, domains: &[&str]) -> Self {
        let config = config(shape, None);
        let mut numbers = Numbers(seed);
        let mut statistics = Statistics {
            checkpoint: FINGERPRINT.to_owned(),
            ..Statistics::default()
        };
        for domain in domains {
            let layers = config
                .moe_layers
                .iter()
                .map(|&layer| (layer, layer_statistics(shape, &mut numbers)));
            statistics
                .domains
                .insert((*domain).to_owned(), layers.collect());
        }
        share_weight_norms(&mut statistics);
        let routed = shape.num_neurons() as u64 * 3 * HIDDEN;
        let size = ModelSize {
            parameters_total: routed + 10_000,
            parameters_routed: routed,
            bytes_total: 2 * (routed + 10_000),
            routed_bytes: 2 * routed,
            router_row_bytes: 2 * HIDDEN,
            router_row_parameters: HIDDEN,
        };
        Self {
            config,
            size,
            statistics,
        }
    }

    pub(crate) fn plan(&self, request: &PlanRequest) -> Result<Plan, PruneError> {
        tenp_prune::plan(
            &self.config,
            &self.size,
            FINGERPRINT,
            &self.statistics,
            request,
        )
    }

    pub(crate) fn calibration(&self) -> Calibration<'_> {
        self.weighted(&BTreeMap::new())
    }

    pub(crate) fn weighted(&self, weights: &BTreeMap<String, f64>) -> Calibration<'_> {
        let tables = [
            "contribution",
            "contribution_abs",
            "activation_norm",
            "energy",
            "peak",
            "mean",
            "second_moment",
            "neuron_weight_norm_sq",
            "down_norm_sq",
        ];
        Calibration::new(
            &self.config,
            FINGERPRINT,
            &self.statistics,
            weights,
            &tables,
        )
        .unwrap()
    }

    /// Statistics of a MoE layer, counted in depth order.
    pub(crate) fn layer(&mut self, domain: &str, position: usize) -> &mut LayerStatistics {
        let id = self.config.moe_layers[position];
        self.statistics
            .domains
            .get_mut(domain)
            .unwrap()
            .get_mut(&id)
            .unwrap()
    }

    /// Leaves an expert without a token in one domain.
    pub(crate) fn silence(&mut self, domain: &str, position: usize, expert: usize) {
        let width = self.config.moe.expert_width;
        let layer = self.layer(domain, position);
        layer.tokens[expert] = 0;
        for table in layer.expert_tables() {
            table[expert] = 0.0;
        }
        for table in layer.neuron_sums() {
            table[expert * width..][..width].fill(0.0);
        }
    }
}

/// The tables by kind, for changes that treat all alike.
pub(crate) trait Tables {
    fn expert_tables(&mut self) -> [&mut Vec<f64>; 8];
    /// What the calibration text adds up or maximises.
    fn neuron_sums(&mut self) -> [&mut Vec<f64>; 7];
    /// What comes from the weights.
    fn weight_norms(&mut self) -> [&mut Vec<f64>; 2];
}

impl Tables for LayerStatistics {
    fn expert_tables(&mut self) -> [&mut Vec<f64>; 8] {
        [
            &mut self.gate_sum,
            &mut self.normalised_gate_sum,
            &mut self.norm_sum,
            &mut self.norm_sq_sum,
            &mut self.gated_norm_sum,
            &mut self.direction,
            &mut self.residual_direction,
            &mut self.output_peak,
        ]
    }

    fn neuron_sums(&mut self) -> [&mut Vec<f64>; 7] {
        [
            &mut self.contribution,
            &mut self.contribution_abs,
            &mut self.activation_norm,
            &mut self.energy,
            &mut self.peak,
            &mut self.mean,
            &mut self.second_moment,
        ]
    }

    fn weight_norms(&mut self) -> [&mut Vec<f64>; 2] {
        [&mut self.neuron_weight_norm_sq, &mut self.down_norm_sq]
    }
}

const HIDDEN: u64 = 16;

/// A config whose MoE layers start after one dense layer.
pub(crate) fn config(shape: Shape, groups: Option<RouterGroups>) -> ModelConfig {
    ModelConfig {
        family: Family::DeepseekV2,
        hidden_size: HIDDEN as usize,
        num_layers: shape.num_layers + 1,
        vocab_size: 32,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        dense_width: 64,
        attention: Attention::Gqa {
            num_heads: 2,
            num_kv_heads: 2,
            head_dim: 8,
            rotary_dim: 8,
            qkv_bias: false,
            o_bias: false,
            qk_norm: QkNorm::None,
            sliding_window: vec![None; shape.num_layers + 1],
            clip_qkv: None,
        },
        rope: Rope {
            theta: 1e4,
            interleaved: false,
            scaling: RopeScaling::None,
        },
        moe: Moe {
            num_experts: shape.num_experts,
            top_k: 2.min(shape.num_experts),
            expert_width: shape.expert_width,
            shared_width: 0,
            shared_gate: false,
            router: Router {
                score: RouterScore::Softmax,
                correction_bias: false,
                groups,
                normalise: false,
                scaling: 1.0,
            },
        },
        moe_layers: (1..=shape.num_layers).collect(),
        widths: None,
        num_mtp_layers: 0,
        max_positions: 128,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}

fn layer_statistics(shape: Shape, numbers: &mut Numbers) -> LayerStatistics {
    let (experts, neurons) = (shape.num_experts, shape.num_experts * shape.expert_width);
    let tokens: Vec<i64> = (0..experts)
        .map(|_| 1 + (numbers.next() * 200.0) as i64)
        .collect();
    let per_expert = |numbers: &mut Numbers| -> Vec<f64> {
        tokens
            .iter()
            .map(|&tokens| tokens as f64 * (0.1 + numbers.next()))
            .collect()
    };
    let per_neuron = |numbers: &mut Numbers, low: f64| -> Vec<f64> {
        (0..neurons)
            .map(|at| tokens[at / shape.expert_width] as f64 * (low + numbers.next()))
            .collect()
    };
    let mut layer = LayerStatistics {
        num_experts: experts,
        width: shape.expert_width,
        total_tokens: tokens.iter().sum::<i64>() / 2,
        ..LayerStatistics::default()
    };
    for table in layer.expert_tables() {
        *table = per_expert(numbers);
    }
    for table in layer.neuron_sums() {
        *table = per_neuron(numbers, 0.05);
    }
    for table in layer.weight_norms() {
        *table = (0..neurons).map(|_| 0.5 + numbers.next()).collect();
    }
    layer.contribution = per_neuron(numbers, -0.4);
    layer.mean = per_neuron(numbers, -0.2);
    // A second moment is at least the squared mean.
    for (at, second_moment) in layer.second_moment.iter_mut().enumerate() {
        *second_moment += layer.mean[at].powi(2) / tokens[at / shape.expert_width] as f64;
    }
    layer.tokens = tokens;
    layer
}

/// Weight norms come from the weights: the same in every domain.
fn share_weight_norms(statistics: &mut Statistics) {
    let Some(first) = statistics.domains.values().next().cloned() else {
        return;
    };
    for layers in statistics.domains.values_mut() {
        for (layer, source) in layers.values_mut().zip(first.values()) {
            layer
                .neuron_weight_norm_sq
                .clone_from(&source.neuron_weight_norm_sq);
            layer.down_norm_sq.clone_from(&source.down_norm_sq);
        }
    }
}

/// SplitMix64, as numbers in [0, 1).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 * (-53_f64).exp2()
    }
}
