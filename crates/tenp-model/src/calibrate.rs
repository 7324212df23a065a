//! One pass over the calibration text, every statistic (`docs/methods.md`).

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use sha2::{Digest, Sha256};
use tenp_checkpoint::{Checkpoint, LayerStatistics, Statistics};
use tenp_kernels::cpu::direction::ExpertSums;
use tenp_kernels::cpu::neuron::NeuronSums;
use tenp_kernels::{Compute, RaggedLayout};

use crate::weights::non_finite_expert;
use crate::{BlockSums, Model, ModelError, Observer, Sequences, WeightNorms};

/// Runs the model over `domains` (name, samples) and collects every statistic.
///
/// `progress(layer, tokens)` is called as blocks of tokens pass a layer, from any thread.
///
/// # Errors
/// As [`Model::hidden_states`]; an expert whose outputs are not finite is named.
pub fn calibrate(
    model: &Model<'_>,
    domains: &[(String, Vec<Vec<u32>>)],
    progress: &(dyn Fn(usize, usize) + Sync),
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
    let collector = Collector {
        checkpoint: model.checkpoint(),
        num_domains: domains.len(),
        current: Mutex::new(None),
        progress,
    };
    let mut run = model.begin(&sequences)?;
    while run.step(&collector)? {
        if let Some((layer, sums)) = collector.finish_layer()? {
            for (d, (name, _)) in domains.iter().enumerate() {
                let tables = statistics.domains.entry(name.clone()).or_default();
                tables.insert(layer, layer_statistics(&sums, d));
            }
        }
    }
    Ok(statistics)
}

/// Fingerprint of token ids: the order of samples and their boundaries count.
pub(crate) fn tokens_fingerprint(samples: &[Vec<u32>]) -> String {
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
    checkpoint: &'c Checkpoint,
    num_domains: usize,
    /// The layer that is running, and its sums.
    current: Mutex<Option<(usize, LayerSums)>>,
    progress: &'m (dyn Fn(usize, usize) + Sync),
}

/// Running sums of one layer.
struct LayerSums {
    layout: RaggedLayout,
    weight_norms: WeightNorms,
    /// By domain.
    experts: Vec<Vec<ExpertSums>>,
    neurons: Vec<NeuronSums>,
    total_tokens: Vec<i64>,
    /// Block whose sums are added next: always in this order, so that the bits do not depend on the threads.
    next_block: usize,
    waiting: BTreeMap<usize, BlockSums>,
}

impl LayerSums {
    fn new(layout: RaggedLayout, weight_norms: WeightNorms, num_domains: usize) -> Self {
        let num_experts = layout.num_experts();
        Self {
            weight_norms,
            experts: vec![vec![ExpertSums::default(); num_experts]; num_domains],
            neurons: vec![NeuronSums::new(layout.clone()); num_domains],
            total_tokens: vec![0; num_domains],
            next_block: 0,
            waiting: BTreeMap::new(),
            layout,
        }
    }

    /// Takes a finished block, and adds all that are next in order.
    fn add(&mut self, index: usize, block: BlockSums) {
        self.waiting.insert(index, block);
        while let Some(block) = self.waiting.remove(&self.next_block) {
            self.next_block += 1;
            let d = block.label;
            for (sum, more) in self.experts[d].iter_mut().zip(&block.experts) {
                sum.merge(more);
            }
            self.neurons[d].merge(&block.neurons);
            self.total_tokens[d] += block.num_tokens as i64;
        }
    }
}

impl Collector<'_, '_> {
    fn current(&self) -> MutexGuard<'_, Option<(usize, LayerSums)>> {
        self.current
            .lock()
            .expect("nothing panics while sums are added")
    }

    /// The sums of the layer that has just passed, if it is a MoE layer.
    fn finish_layer(&self) -> Result<Option<(usize, LayerSums)>, ModelError> {
        let Some((layer, sums)) = self.current().take() else {
            return Ok(None);
        };
        for experts in &sums.experts {
            if let Some(expert) = experts.iter().position(|e| e.non_finite > 0) {
                return Err(non_finite_expert(self.checkpoint, layer, expert));
            }
        }
        Ok(Some((layer, sums)))
    }
}

impl Observer for Collector<'_, '_> {
    fn wants_sums(&self) -> bool {
        true
    }

    fn begin_sums(
        &self,
        layer: usize,
        layout: &RaggedLayout,
        norms: WeightNorms,
    ) -> Result<(), ModelError> {
        // Found here and not in the outputs, so that experts without tokens are checked too.
        let damaged = norms.whole.iter().position(|norm| !norm.is_finite());
        if let Some(neuron) = damaged {
            let mut experts = 0..layout.num_experts();
            let expert = experts.find(|&e| layout.range(e).contains(&neuron));
            let expert = expert.expect("every neuron is some expert's");
            return Err(non_finite_expert(self.checkpoint, layer, expert));
        }
        let sums = LayerSums::new(layout.clone(), norms, self.num_domains);
        *self.current() = Some((layer, sums));
        Ok(())
    }

    fn sums(&self, _layer: usize, index: usize, sums: BlockSums) -> Result<(), ModelError> {
        if let Some((_, layer)) = &mut *self.current() {
            layer.add(index, sums);
        }
        Ok(())
    }

    fn progress(&self, layer: usize, tokens: usize) {
        (self.progress)(layer, tokens);
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
    let WeightNorms { whole, down } = &sums.weight_norms;
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
