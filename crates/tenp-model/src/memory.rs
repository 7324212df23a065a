//! What the steps of a run hold in memory on the CPU beside the mapped file, part by part: each part is the size of the
//! buffers it is named after. Where a GPU runs the model, its own account is taken.

mod pass;
mod recovery;
mod statistics;

use tenp_checkpoint::{OutputDtype, Plan};

use crate::calibrate::{FoldOptions, Keep, grouped};
use crate::evaluate::{logit_bytes, output_bytes};
use crate::{Model, Sequences, generate};

use pass::PassMemory;
pub use recovery::{merging, narrowed, rewritten};
pub use statistics::StatisticsMemory;

/// Layers that are packed here, and sent to the GPU from here.
const STAGED: &str = "layers on their way to the GPU";

/// At the end of a pass there.
const BACK: &str = "hidden states that come back";

/// A step of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// What is done.
    pub name: &'static str,
    /// What it holds at once.
    pub parts: Vec<(&'static str, usize)>,
    /// Bytes on the GPU, where one runs the model.
    pub device: Option<usize>,
}

impl Step {
    /// A step that holds some parts; those of no size are left out.
    pub fn new(name: &'static str, parts: Vec<(&'static str, usize)>) -> Self {
        let parts = parts.into_iter().filter(|(_, bytes)| *bytes > 0).collect();
        Self {
            name,
            parts,
            device: None,
        }
    }

    /// The step with so much on the GPU.
    #[must_use]
    fn on_device(self, device: Option<usize>) -> Self {
        Self { device, ..self }
    }

    /// All parts.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|(_, bytes)| bytes).sum()
    }

    /// The step with more beside it.
    #[must_use]
    pub fn beside(mut self, what: &'static str, bytes: usize) -> Self {
        if bytes > 0 {
            self.parts.push((what, bytes));
        }
        self
    }
}

/// The layers run over `domains` (name, samples), with every statistic, and what is kept of it on the way.
pub fn calibration(
    model: &Model<'_>,
    domains: &[(String, Vec<Vec<u32>>)],
    options: &FoldOptions,
) -> Step {
    let (sequences, labels) = grouped(model, domains, options);
    let memory = StatisticsMemory::new(model.config(), domains.len());
    let memory = memory.kept_by(options, labels.len());
    let tokens = sequences.num_tokens();
    // On a GPU the blocks of a label are added up there, and those of all labels come back at once.
    let (mut parts, sums, device) = if let Some(bytes) = model.engine_bytes(&sequences, true) {
        let there = bytes.running() + memory.label() * labels.len();
        let parts = vec![(STAGED, bytes.host)];
        (parts, memory.sums(labels.len()), Some(there))
    } else {
        let pass = PassMemory::new(model, &sequences);
        let blocks = pass.in_flight();
        // One waits for its turn where there are several.
        let sums = memory.sums(blocks + usize::from(blocks > 1));
        (pass.parts(true), sums, None)
    };
    let all = memory.layers_before_last();
    let held = options.held_bytes.map(|most| most + memory.layer());
    let done = held.map_or(all, |most| all.min(most));
    parts.extend([
        ("statistics of the layers done", done),
        ("sums of a layer", sums),
        ("hidden states being kept", Keep::chunk_bytes(model, tokens)),
    ]);
    Step::new("calibrate", parts).on_device(device)
}

/// Errors of cut experts, measured in one pass.
pub fn cut_errors(model: &Model<'_>, sequences: &Sequences) -> Step {
    let pass = PassMemory::new(model, sequences);
    let mut parts = pass.parts(false);
    parts.extend([
        ("activations of many blocks", pass.held_activations()),
        ("experts being cut", pass.cutting()),
    ]);
    Step::new("measure errors", parts)
}

/// Plans tried side by side; `plan` is one of their size.
pub fn plan_trials(
    model: &Model<'_>,
    sequences: &Sequences,
    plan: &Plan,
    num_plans: usize,
) -> Step {
    let pass = PassMemory::new(model, sequences);
    let together = crate::candidates::together(model.config(), sequences).min(num_plans);
    let mut parts = pass.parts(false);
    parts.extend([
        (
            "hidden states of the other plans",
            (together - 1) * pass.hidden(),
        ),
        (
            "narrowed experts of a layer",
            recovery::narrowed(model.checkpoint(), plan, OutputDtype::Same)[0],
        ),
        (
            "logits",
            crate::head::batch_bytes(model.config(), sequences.num_tokens()),
        ),
        ("plans", num_plans * plan_bytes(plan)),
    ]);
    Step::new("try plans", parts)
}

/// Figures of a model, from passes over these sequences. Logits are made when a pass is over.
pub fn evaluation(model: &Model<'_>, passes: &[Sequences]) -> Step {
    let steps = |sequences: &Sequences| {
        let tokens = sequences.num_tokens();
        let logits = ("logits", crate::head::batch_bytes(model.config(), tokens));
        measuring("measure", model, (sequences, 1), [], [logits])
    };
    largest(passes.iter().flat_map(steps))
}

/// A model and its reference side by side, in passes over these sequences.
pub fn comparison(model: &Model<'_>, passes: &[Sequences]) -> Step {
    let steps = |sequences: &Sequences| {
        let (config, tokens) = (model.config(), sequences.num_tokens());
        let outputs = [("outputs of a layer", output_bytes(config, tokens))];
        let logits = [("logits", logit_bytes(config, tokens))];
        let name = "compare with the full model";
        measuring(name, model, (sequences, 2), outputs, logits)
    };
    largest(passes.iter().flat_map(steps))
}

/// The layers run over a pass's sequences by `models` models in turn, and what is made of the hidden states behind them.
fn measuring<const N: usize>(
    name: &'static str,
    model: &Model<'_>,
    (sequences, models): (&Sequences, usize),
    beside: [(&'static str, usize); N],
    behind: [(&'static str, usize); 1],
) -> [Step; 2] {
    let tokens = sequences.num_tokens();
    let (running, hidden, device) = if let Some(bytes) = model.engine_bytes(sequences, false) {
        let parts = vec![(STAGED, models * bytes.host)];
        let back = models * tokens * model.hidden_bytes_per_token();
        let behind = [&parts[..], &[(BACK, back)]].concat();
        (parts, behind, Some(models * bytes.with_logits()))
    } else {
        let (running, hidden) = PassMemory::new(model, sequences).measuring(models);
        (running, hidden, None)
    };
    let step =
        |parts: Vec<_>, more: &[_]| Step::new(name, [&parts[..], more].concat()).on_device(device);
    [step(running, &beside), step(hidden, &behind)]
}

fn largest(steps: impl Iterator<Item = Step>) -> Step {
    let steps: Vec<Step> = steps.collect();
    // The largest on the GPU may be another.
    let device = steps.iter().filter_map(|step| step.device).max();
    let largest = steps.into_iter().max_by_key(Step::bytes);
    largest.unwrap_or_default().on_device(device)
}

/// Answers of up to `new_tokens` more tokens behind the samples.
pub fn generation(model: &Model<'_>, sequences: &Sequences, new_tokens: usize) -> Step {
    let tokens = sequences.num_tokens();
    let (mut parts, device) = if let Some(bytes) = model.engine_bytes(sequences, false) {
        let back = tokens * model.hidden_bytes_per_token();
        let cached = generate::most_cached_on_device(model.config(), sequences, new_tokens);
        let parts = vec![(STAGED, bytes.host), (BACK, back)];
        (parts, Some(bytes.with_logits() + cached))
    } else {
        let cached = generate::most_cached_bytes(model.config(), sequences, new_tokens);
        let mut parts = PassMemory::new(model, sequences).parts(false);
        parts.push(("keys and values", cached));
        (parts, None)
    };
    parts.push((
        "logits",
        crate::head::batch_bytes(model.config(), sequences.spans().len()),
    ));
    Step::new("generate", parts).on_device(device)
}

/// Least squares: the fit of a layer, and the pruned layer run for those behind it.
pub fn fit(model: &Model<'_>, sequences: &Sequences, plan: &Plan, dtype: OutputDtype) -> [Step; 2] {
    recovery::fit(model, sequences, plan, dtype)
}

/// Ids of the kept neurons. They are sorted in place, so there is room for all of an expert's.
pub fn plan_bytes(plan: &Plan) -> usize {
    let experts = plan.layers.iter().flat_map(|layer| &layer.experts);
    let neurons = experts.filter_map(|expert| expert.neurons.as_ref());
    neurons.map(|ids| size_of::<u32>() * ids.capacity()).sum()
}
