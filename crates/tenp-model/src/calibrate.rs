//! One pass over the calibration text, every statistic (`docs/methods.md`).

use std::collections::BTreeMap;

use rayon::prelude::*;
use sha2::{Digest, Sha256};
use tenp_checkpoint::{LayerStatistics, Statistics};
use tenp_kernels::cpu::direction::{ExpertSums, TokenContext, accumulate_expert_sums};
use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::cpu::neuron::{NeuronSums, accumulate_neuron_sums, neuron_weight_norms};
use tenp_kernels::{Compute, RaggedLayout};

use crate::error::AtLayer;
use crate::forward::{Model, MoeBlock, Observer};
use crate::weights::find_non_finite;
use crate::{ModelError, Sequences};

/// Runs the model over `domains` (name, samples) and collects every statistic.
///
/// `progress(layer, tokens)` is called as blocks of tokens pass a layer.
///
/// # Errors
/// As [`Model::hidden_states`]; an expert whose outputs are not finite is named.
pub fn calibrate(
    model: &Model<'_>,
    domains: &[(String, Vec<Vec<u32>>)],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Statistics, ModelError> {
    let mut sequences = Sequences::default();
    let mut statistics = Statistics {
        checkpoint: model.checkpoint().fingerprint().to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        compute: vec![match model.compute() {
            Compute::F32 => "f32".to_owned(),
            Compute::Bf16 => "bf16".to_owned(),
        }],
        ..Statistics::default()
    };
    for (label, (name, samples)) in domains.iter().enumerate() {
        for sample in samples {
            sequences.push(sample, label);
        }
        statistics
            .tokens
            .insert(name.clone(), vec![tokens_fingerprint(samples)]);
        statistics.domains.insert(name.clone(), BTreeMap::new());
    }
    let mut collector = Collector {
        model: *model,
        domains,
        statistics,
        current: None,
        progress,
    };
    let mut run = model.begin(&sequences)?;
    while run.step(&mut collector, None)? {
        collector.finish_layer()?;
    }
    Ok(collector.statistics)
}

/// Fingerprint of token ids: the order of samples and their boundaries count.
fn tokens_fingerprint(samples: &[Vec<u32>]) -> String {
    let mut hash = Sha256::new();
    for sample in samples {
        hash.update((sample.len() as u64).to_le_bytes());
        for id in sample {
            hash.update(id.to_le_bytes());
        }
    }
    let digest = hash.finalize();
    digest
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

struct Collector<'m, 'c> {
    model: Model<'c>,
    domains: &'m [(String, Vec<Vec<u32>>)],
    statistics: Statistics,
    current: Option<LayerSums>,
    progress: &'m mut dyn FnMut(usize, usize),
}

/// Running sums of one layer.
struct LayerSums {
    layer: usize,
    layout: RaggedLayout,
    /// Squared weight norms of the neurons, `[Σ widths]`: (whole neuron, down column).
    weight_norms: (Vec<f64>, Vec<f64>),
    /// By domain.
    experts: Vec<Vec<ExpertSums>>,
    neurons: Vec<NeuronSums>,
    total_tokens: Vec<i64>,
}

impl LayerSums {
    fn new(
        layer: usize,
        experts: &[ExpertWeights<'_>],
        num_domains: usize,
    ) -> Result<Self, ModelError> {
        let layout =
            RaggedLayout::new(experts.iter().map(ExpertWeights::width).collect()).at(layer)?;
        let norms: Vec<_> = experts
            .par_iter()
            .map(neuron_weight_norms)
            .collect::<Result<_, _>>()
            .at(layer)?;
        let (whole, down): (Vec<_>, Vec<_>) = norms.into_iter().unzip();
        Ok(Self {
            layer,
            weight_norms: (whole.concat(), down.concat()),
            experts: vec![vec![ExpertSums::default(); experts.len()]; num_domains],
            neurons: vec![NeuronSums::new(layout.clone()); num_domains],
            total_tokens: vec![0; num_domains],
            layout,
        })
    }
}

impl Observer for Collector<'_, '_> {
    fn moe(&mut self, block: &MoeBlock<'_>) -> Result<(), ModelError> {
        let sums = match &mut self.current {
            Some(sums) => sums,
            empty => empty.insert(LayerSums::new(
                block.layer,
                block.experts,
                self.domains.len(),
            )?),
        };
        let (layer, d, hidden) = (block.layer, block.label, block.activations.hidden());
        let context = TokenContext {
            x: block.x,
            residual: block.residual,
            combined: block.combined,
        };
        let outputs = block.activations.outputs();
        let norms =
            accumulate_expert_sums(block.groups, context, outputs, hidden, &mut sums.experts[d])
                .at(layer)?;
        accumulate_neuron_sums(
            block.experts,
            block.groups,
            block.activations,
            &norms,
            &mut sums.neurons[d],
        )
        .at(layer)?;
        sums.total_tokens[d] += block.groups.num_tokens() as i64;
        Ok(())
    }

    fn scores_neurons(&self) -> bool {
        true
    }

    fn progress(&mut self, layer: usize, tokens: usize) {
        (self.progress)(layer, tokens);
    }
}

impl Collector<'_, '_> {
    /// Turns the running sums of the layer that has just passed into its statistics.
    fn finish_layer(&mut self) -> Result<(), ModelError> {
        let Some(sums) = self.current.take() else {
            return Ok(());
        };
        for (d, (name, _)) in self.domains.iter().enumerate() {
            if let Some(expert) = sums.experts[d].iter().position(|e| e.non_finite > 0) {
                return Err(self.non_finite(sums.layer, expert));
            }
            let table = layer_statistics(&sums, d);
            self.statistics
                .domains
                .entry(name.clone())
                .or_default()
                .insert(sums.layer, table);
        }
        Ok(())
    }

    fn non_finite(&self, layer: usize, expert: usize) -> ModelError {
        let needle = format!(".experts.{expert}.");
        let tensor = find_non_finite(self.model.checkpoint(), |name| {
            tenp_checkpoint::layer_of(name) == Some(layer)
                && (name.contains(&needle)
                    || name.ends_with(".experts.gate_up_proj")
                    || name.ends_with(".experts.down_proj"))
        });
        let cause = match tensor {
            Some(name) => {
                format!("tensor {name} holds a NaN or an infinity; the checkpoint is damaged")
            }
            None => "its weights are; the sums overflow with these inputs".to_owned(),
        };
        ModelError::NonFinite {
            layer,
            expert: Some(expert),
            cause,
        }
    }
}

fn layer_statistics(sums: &LayerSums, domain: usize) -> LayerStatistics {
    let (layout, experts, neurons) = (&sums.layout, &sums.experts[domain], &sums.neurons[domain]);
    let num_experts = layout.num_experts();
    let width = layout.widths().iter().copied().max().unwrap_or(0);
    // Ragged tables become [N, K] with zeros behind narrow experts.
    let table = |value: &dyn Fn(usize) -> f64| {
        let mut out = vec![0f64; num_experts * width];
        for e in 0..num_experts {
            for (j, i) in layout.range(e).enumerate() {
                out[e * width + j] = value(i);
            }
        }
        out
    };
    let (whole, down) = &sums.weight_norms;
    let each = |value: &dyn Fn(&ExpertSums) -> f64| experts.iter().map(value).collect();
    LayerStatistics {
        num_experts,
        width,
        tokens: experts.iter().map(|e| e.tokens).collect(),
        total_tokens: sums.total_tokens[domain],
        gate_sum: each(&|e| e.gate),
        normalised_gate_sum: each(&|e| e.normalised_gate),
        norm_sum: each(&|e| e.norm),
        norm_sq_sum: each(&|e| e.norm_sq),
        gated_norm_sum: each(&|e| e.gated_norm),
        direction: each(&|e| e.direction),
        residual_direction: each(&|e| e.residual_direction),
        output_peak: each(&|e| e.output_peak),
        contribution: table(&|i| neurons.contribution[i]),
        contribution_abs: table(&|i| neurons.contribution_abs[i]),
        activation_norm: table(&|i| neurons.activation[i] * down[i].sqrt()),
        energy: table(&|i| neurons.gated_energy[i] * down[i]),
        peak: table(&|i| neurons.gated_peak[i] * down[i]),
        mean: table(&|i| neurons.mean[i]),
        second_moment: table(&|i| neurons.second_moment[i]),
        neuron_weight_norm_sq: table(&|i| whole[i]),
        down_norm_sq: table(&|i| down[i]),
    }
}
