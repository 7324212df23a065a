//! One pass over the calibration text, every statistic (`docs/methods.md`).

mod keep;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use sha2::{Digest, Sha256};
use tenp_checkpoint::{Checkpoint, Folds, LayerStatistics, Statistics};
use tenp_kernels::cpu::direction::ExpertSums;
use tenp_kernels::cpu::neuron::NeuronSums;
use tenp_kernels::{Compute, RaggedLayout};

use crate::weights::non_finite_expert;
use crate::{BlockSums, Model, ModelError, Observer, Sequences, WeightNorms};

use keep::Collected;
pub use keep::Keep;

/// Groups that the samples of a domain are put into, at most.
const MAX_FOLDS: usize = 8;

/// Groups of samples whose sums are kept apart, to see how much scores depend on the samples.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoldOptions {
    /// Groups per domain; `None`: as many as cost no time, from one to eight.
    pub num_folds: Option<usize>,
    /// Names of the `[N,K]` statistics that are kept of each group. All `[N]` ones are.
    pub tables: Vec<&'static str>,
    /// The same of the domains; `None`: all, without which statistics cannot be written.
    pub domain_tables: Option<Vec<&'static str>>,
    /// Bytes of the domains' `[N,K]` statistics above which layers are kept on the disk at once; then as whenever they are kept,
    /// they are let go of, and [`Keep::write`] puts everything together. `None`: they stay in memory.
    pub held_bytes: Option<usize>,
}

impl FoldOptions {
    fn keeps(&self, table: &str) -> bool {
        let tables = self.domain_tables.as_ref();
        tables.is_none_or(|tables| tables.contains(&table))
    }
}

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
    let options = FoldOptions::default();
    let (statistics, _) = calibrate_in_folds(model, domains, &options, None, progress)?;
    Ok(statistics)
}

/// [`calibrate`], with the sums of groups of samples beside those of the domains. A group is a run of consecutive samples.
///
/// The number of groups decides the order of additions, and with it the last bits of the domains' sums. With `keep` the
/// calibration goes on where an earlier one of the same inputs stopped, at [`Keep::next_layer`]; the result does not depend
/// on it.
///
/// # Errors
/// As [`calibrate`]; what was kept cannot be read back.
pub fn calibrate_in_folds(
    model: &Model<'_>,
    domains: &[(String, Vec<Vec<u32>>)],
    options: &FoldOptions,
    mut keep: Option<&mut Keep>,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<(Statistics, Folds), ModelError> {
    let (sequences, labels) = grouped(model, domains, options);
    let mut collected = empty(model, domains, &labels);
    let collector = Collector {
        checkpoint: model.checkpoint(),
        num_domains: domains.len(),
        labels,
        fold_tables: &options.tables,
        current: Mutex::new(None),
        progress,
    };
    let (layers, num_layers) = (&model.config().moe_layers[..], model.config().num_layers);
    let mut run = model.begin(&sequences)?;
    if let Some(keep) = &mut keep {
        keep.hold(options.held_bytes);
        keep.restore(model.config(), &mut collected, &mut run, &sequences)?;
    }
    while run.step(&collector)? {
        if let Some((layer, sums)) = collector.finish_layer()? {
            collected.add(domains, options, layer, sums);
        }
        if let Some(keep) = &mut keep {
            keep.layer_done(layers, &mut collected, &run, &sequences);
        }
    }
    if let Some(keep) = &mut keep {
        keep.all_done(layers, &mut collected, num_layers);
    }
    Ok((collected.statistics, collected.folds))
}

/// The sequences of all domains, and domain and group of each of their labels.
pub(crate) fn grouped(
    model: &Model<'_>,
    domains: &[(String, Vec<Vec<u32>>)],
    options: &FoldOptions,
) -> (Sequences, Vec<(usize, usize)>) {
    let (mut sequences, mut labels) = (Sequences::default(), Vec::new());
    for (d, (_, samples)) in domains.iter().enumerate() {
        let num_folds = num_folds(model, samples, options.num_folds);
        for fold in 0..num_folds {
            let group = samples.len() * fold / num_folds..samples.len() * (fold + 1) / num_folds;
            for sample in &samples[group] {
                sequences.push(sample, labels.len());
            }
            labels.push((d, fold));
        }
    }
    (sequences, labels)
}

/// Statistics without any layer, of these groups.
fn empty(
    model: &Model<'_>,
    domains: &[(String, Vec<Vec<u32>>)],
    labels: &[(usize, usize)],
) -> Collected {
    let mut statistics = Statistics {
        checkpoint: model.checkpoint().fingerprint().to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        compute: vec![match model.compute() {
            Compute::F32 => "f32".to_owned(),
            Compute::Bf16 => "bf16".to_owned(),
        }],
        ..Statistics::default()
    };
    let mut folds = Folds::new();
    for (d, (name, samples)) in domains.iter().enumerate() {
        let num_folds = labels.iter().filter(|(domain, _)| *domain == d).count();
        statistics
            .tokens
            .insert(name.clone(), vec![tokens_fingerprint(samples)]);
        statistics.domains.insert(name.clone(), BTreeMap::new());
        folds.insert(name.clone(), vec![BTreeMap::new(); num_folds]);
    }
    Collected { statistics, folds }
}

impl Collected {
    fn add(
        &mut self,
        domains: &[(String, Vec<Vec<u32>>)],
        options: &FoldOptions,
        layer: usize,
        sums: LayerSums,
    ) {
        for (d, (name, _)) in domains.iter().enumerate() {
            let tables = self.statistics.domains.entry(name.clone()).or_default();
            let kept = sums.statistics(&sums.domains[d], &|table| options.keeps(table));
            tables.insert(layer, kept);
        }
        for ((d, fold), sums) in sums.folds {
            if let Some(groups) = self.folds.get_mut(&domains[d].0) {
                groups[fold].insert(layer, sums);
            }
        }
    }
}

/// Groups of a domain: as many as asked for, or as many as have a block of tokens each, so that no block is smaller than
/// it would be without groups. Never more than there are samples.
fn num_folds(model: &Model<'_>, samples: &[Vec<u32>], asked: Option<usize>) -> usize {
    let tokens: usize = samples.iter().map(Vec::len).sum();
    let free = (tokens / model.block_tokens()).min(MAX_FOLDS);
    asked.unwrap_or(free).min(samples.len()).max(1)
}

/// Fingerprint of token ids: the order of samples and their boundaries count.
pub fn tokens_fingerprint(samples: &[Vec<u32>]) -> String {
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
    /// Domain and group of every label.
    labels: Vec<(usize, usize)>,
    fold_tables: &'m [&'static str],
    /// The layer that is running, and its sums.
    current: Mutex<Option<(usize, LayerSums)>>,
    progress: &'m (dyn Fn(usize, usize) + Sync),
}

/// Running sums of one layer.
struct LayerSums {
    layout: RaggedLayout,
    weight_norms: WeightNorms,
    domains: Vec<Sums>,
    /// The group whose blocks are being added, by label.
    fold: Option<(usize, Sums)>,
    /// Finished groups, by domain and group.
    folds: Vec<((usize, usize), LayerStatistics)>,
    /// Block whose sums are added next: always in this order, so that the bits do not depend on the threads.
    next_block: usize,
    waiting: BTreeMap<usize, BlockSums>,
}

/// Sums over some tokens.
#[derive(Clone)]
struct Sums {
    experts: Vec<ExpertSums>,
    neurons: NeuronSums,
    total_tokens: i64,
}

impl Sums {
    fn new(layout: &RaggedLayout) -> Self {
        Self {
            experts: vec![ExpertSums::default(); layout.num_experts()],
            neurons: NeuronSums::new(layout.clone()),
            total_tokens: 0,
        }
    }

    fn add(&mut self, experts: &[ExpertSums], neurons: &NeuronSums, tokens: i64) {
        for (sum, more) in self.experts.iter_mut().zip(experts) {
            sum.merge(more);
        }
        self.neurons.merge(neurons);
        self.total_tokens += tokens;
    }
}

impl LayerSums {
    fn new(layout: RaggedLayout, weight_norms: WeightNorms, num_domains: usize) -> Self {
        Self {
            weight_norms,
            domains: vec![Sums::new(&layout); num_domains],
            fold: None,
            folds: Vec::new(),
            next_block: 0,
            waiting: BTreeMap::new(),
            layout,
        }
    }
}

impl Collector<'_, '_> {
    /// Takes a finished block, and adds all that are next in order.
    fn add(&self, layer: &mut LayerSums, index: usize, block: BlockSums) {
        layer.waiting.insert(index, block);
        while let Some(block) = layer.waiting.remove(&layer.next_block) {
            layer.next_block += 1;
            if layer
                .fold
                .as_ref()
                .is_some_and(|(label, _)| *label != block.label)
            {
                self.finish_fold(layer);
            }
            let start = || (block.label, Sums::new(&layer.layout));
            let (_, sums) = layer.fold.get_or_insert_with(start);
            sums.add(&block.experts, &block.neurons, block.num_tokens as i64);
        }
    }

    /// Adds the group that is complete to its domain.
    fn finish_fold(&self, layer: &mut LayerSums) {
        let Some((label, sums)) = layer.fold.take() else {
            return;
        };
        let (domain, fold) = self.labels[label];
        layer.domains[domain].add(&sums.experts, &sums.neurons, sums.total_tokens);
        let tables = layer.statistics(&sums, &|name| self.fold_tables.contains(&name));
        layer.folds.push(((domain, fold), tables));
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
        let Some((layer, mut sums)) = self.current().take() else {
            return Ok(None);
        };
        self.finish_fold(&mut sums);
        for domain in &sums.domains {
            if let Some(expert) = domain.experts.iter().position(|e| e.non_finite > 0) {
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
            self.add(layer, index, sums);
        }
        Ok(())
    }

    fn progress(&self, layer: usize, tokens: usize) {
        (self.progress)(layer, tokens);
    }
}

impl LayerSums {
    /// The statistics of some sums, without the `[N,K]` tables that are not `wanted`.
    fn statistics(&self, sums: &Sums, wanted: &dyn Fn(&str) -> bool) -> LayerStatistics {
        let (layout, experts, neurons) = (&self.layout, &sums.experts, &sums.neurons);
        let num_experts = layout.num_experts();
        let width = layout.widths().iter().copied().max().unwrap_or(0);
        // Ragged tables become [N, K] with zeros behind narrow experts.
        let table = |name: &str, value: &dyn Fn(usize) -> f64| {
            if !wanted(name) {
                return Vec::new();
            }
            let mut out = vec![0f64; num_experts * width];
            for e in 0..num_experts {
                for (j, i) in layout.range(e).enumerate() {
                    out[e * width + j] = value(i);
                }
            }
            out
        };
        let WeightNorms { whole, down } = &self.weight_norms;
        let each = |value: &dyn Fn(&ExpertSums) -> f64| experts.iter().map(value).collect();
        LayerStatistics {
            num_experts,
            width,
            tokens: experts.iter().map(|e| e.tokens).collect(),
            total_tokens: sums.total_tokens,
            gate_sum: each(&|e| e.gate),
            normalised_gate_sum: each(&|e| e.normalised_gate),
            norm_sum: each(&|e| e.norm),
            norm_sq_sum: each(&|e| e.norm_sq),
            gated_norm_sum: each(&|e| e.gated_norm),
            direction: each(&|e| e.direction),
            residual_direction: each(&|e| e.residual_direction),
            output_peak: each(&|e| e.output_peak),
            contribution: table("contribution", &|i| neurons.contribution[i]),
            contribution_abs: table("contribution_abs", &|i| neurons.contribution_abs[i]),
            activation_norm: table("activation_norm", &|i| {
                neurons.activation[i] * down[i].sqrt()
            }),
            energy: table("energy", &|i| neurons.gated_energy[i] * down[i]),
            peak: table("peak", &|i| neurons.gated_peak[i] * down[i]),
            mean: table("mean", &|i| neurons.mean[i]),
            second_moment: table("second_moment", &|i| neurons.second_moment[i]),
            neuron_weight_norm_sq: table("neuron_weight_norm_sq", &|i| whole[i]),
            down_norm_sq: table("down_norm_sq", &|i| down[i]),
        }
    }
}
