//! Applying a plan: a new checkpoint folder, whole or not at all.

mod ahead;
mod files;
mod folder;
mod form;
mod gather;
mod layout;
mod memory;
mod mtp;
mod rewrite;
mod tensors;
mod verify;

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::fingerprint::hex;
use crate::plan::{LayerPlan, Plan};
use crate::shard::Shard;
use crate::work::Inputs;
use crate::writer::DEFAULT_SHARD_BYTES;
use crate::{Checkpoint, CheckpointError, Dtype, PlannedTensor};

use folder::{Folder, Target};
use form::{Kind, Output};
use rewrite::Rewritten;

pub use memory::writing_memory;
pub use verify::{Difference, Verification, verify};

pub use rewrite::{LayerRewriter, Notes, RewrittenExpert, RewrittenLayer};

/// How experts of unequal width are written. Plans that only drop whole experts, or keep everything, come out as stock
/// checkpoints whatever the form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutputForm {
    /// True shapes, own architecture name, widths in `config.json`.
    #[default]
    Ragged,
    /// Zeros up to the original width: loads everywhere, saves nothing.
    Padded,
    /// One width for all experts, in the config's own field: loads everywhere.
    Uniform,
}

impl OutputForm {
    /// `ragged`, `padded` or `uniform`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ragged => "ragged",
            Self::Padded => "padded",
            Self::Uniform => "uniform",
        }
    }
}

/// Element type of the output's weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutputDtype {
    /// The input's, tensor by tensor.
    #[default]
    Same,
    /// bf16 in place of fp8, without scales and without a `quantization_config`; others as they are.
    Bf16,
}

impl OutputDtype {
    /// For fingerprints and messages.
    fn name(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Bf16 => "bf16",
        }
    }

    /// What a weight of this type becomes.
    pub fn of(self, input: Dtype) -> Dtype {
        match (self, input) {
            (Self::Bf16, Dtype::F8E4M3) => Dtype::BF16,
            _ => input,
        }
    }
}

/// What becomes of the layers for multi-token prediction, which are not calibrated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mtp {
    /// Widths and number of experts of the last MoE layer; neurons and experts by their weight norms.
    #[default]
    Prune,
    /// As they are.
    Keep,
    /// Gone, and the config announces none.
    Drop,
}

impl Mtp {
    /// `prune`, `keep` or `drop`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prune => "prune",
            Self::Keep => "keep",
            Self::Drop => "drop",
        }
    }
}

/// What else decides an output folder.
#[derive(Clone, Debug)]
pub struct ApplyOptions {
    /// Form of narrowed experts.
    pub form: OutputForm,
    /// Element type of weights.
    pub dtype: OutputDtype,
    /// Layers for multi-token prediction.
    pub mtp: Mtp,
    /// Upper bound of a shard's tensor bytes (a single larger tensor gets a shard of its own).
    pub shard_bytes: u64,
    /// Replace an output folder that is not empty.
    pub force: bool,
    /// Discard what an unfinished run of other inputs has left.
    pub restart: bool,
    /// Files to put beside the checkpoint, such as its model card.
    pub extra_files: Vec<(String, Vec<u8>)>,
    /// Becomes `report.json`, together with the run's fingerprint and sizes.
    pub report: Map<String, Value>,
    /// Makes `report.html` from the finished report.
    pub page: Option<ReportPage>,
}

/// Text of a page that shows a report.
pub type ReportPage = fn(&Value) -> Result<String, Box<dyn std::error::Error + Send + Sync>>;

impl Default for ApplyOptions {
    fn default() -> Self {
        Self {
            form: OutputForm::default(),
            dtype: OutputDtype::default(),
            mtp: Mtp::default(),
            shard_bytes: DEFAULT_SHARD_BYTES,
            force: false,
            restart: false,
            extra_files: Vec::new(),
            report: Map::new(),
            page: None,
        }
    }
}

/// What [`apply`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApplyOutcome {
    /// The folder was written.
    Written {
        /// Bytes of the shard files.
        bytes: u64,
        /// Number of tensors.
        tensors: usize,
        /// Number of shards.
        shards: usize,
        /// Of these, written by an earlier run that did not finish.
        resumed_shards: usize,
        /// The plan keeps everything: shards, index and config are byte for byte those of the input.
        identical: bool,
    },
    /// The folder is the finished output of the same run; nothing was done.
    AlreadyFinished,
}

/// Writes the checkpoint that a plan makes of another into `out`, which appears as a whole or not at all.
///
/// `progress` is called with tensor bytes written and the total. Same checkpoint, plan and options give the same bytes.
/// Everything is built in a work folder beside `out`; the input is never touched. Shards that are whole stay there on
/// error, and when the process is killed: the same call goes on behind them. With [`ApplyOptions::force`] a finished
/// output is written again.
///
/// # Errors
/// An unsound plan or another checkpoint's, a plan that merges experts (see [`apply_rewritten`]), a form that cannot hold it, an `out` that is the input, contains it, lies
/// inside it, is not empty or is being written by another process, an unfinished run of other inputs, a full disk, any
/// failed file operation.
pub fn apply(
    checkpoint: &Checkpoint,
    plan: &Plan,
    out: &Path,
    options: &ApplyOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ApplyOutcome, CheckpointError> {
    apply_rewritten(checkpoint, plan, out, options, None, progress)
}

/// [`apply`] with weights of the MoE layers that are what `rewriter` makes of them. It is asked for each layer once, in
/// depth order, before tensors are written, and not at all where nothing is cut. Layers that are made stay on error too.
///
/// # Errors
/// Those of [`apply`] and of the rewriter.
pub fn apply_rewritten(
    checkpoint: &Checkpoint,
    plan: &Plan,
    out: &Path,
    options: &ApplyOptions,
    rewriter: Option<&mut dyn LayerRewriter>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ApplyOutcome, CheckpointError> {
    plan.validate(checkpoint)?;
    if plan.dern.is_some() && rewriter.is_none() {
        return Err(CheckpointError::Plan {
            place: ", dern".to_owned(),
            problem: "experts are to be merged, which copying alone cannot do; give a rewriter"
                .to_owned(),
        });
    }
    files::check_extra(out, &options.extra_files)?;
    let output = form::decide(checkpoint, plan, options)?;
    let settings = rewriter.as_ref().map(|rewriter| rewriter.settings());
    let inputs = inputs(checkpoint, plan, out, options, settings)?;
    let fingerprint = hex(&Sha256::digest(json!(inputs).to_string()));
    let find = || Target::find(out, checkpoint.dir(), options.force, &fingerprint);
    let Some(target) = find()? else {
        folder::remove_leftover(out);
        return Ok(ApplyOutcome::AlreadyFinished);
    };
    let mtp_plans = mtp_plans(checkpoint, plan, &output, &|layer| {
        mtp::weight_norms(checkpoint, layer)
    })?;
    let tensors = layout::tensors(checkpoint, plan, &mtp_plans, &output);
    let total = match output.kind {
        Kind::Identical => checkpoint.shards.iter().map(Shard::num_bytes).sum(),
        _ => tensors.iter().map(|out| out.tensor.num_bytes()).sum(),
    };
    let mut folder = target.begin(inputs, options.restart, total)?;
    // Looked at again: another run may have finished between the look and the hold, or left its place half replaced.
    let Some(target) = find()? else {
        folder.abandon();
        return Ok(ApplyOutcome::AlreadyFinished);
    };
    folder.target = target;
    let run = Run {
        checkpoint,
        plan,
        options,
        output,
        fingerprint,
        total,
        mtp_plans: &mtp_plans,
    };
    run.write(folder, &tensors, rewriter, progress)
}

/// A run that is to be made.
struct Run<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    options: &'a ApplyOptions,
    output: Output,
    fingerprint: String,
    /// Bytes of the output's tensors.
    total: u64,
    mtp_plans: &'a [LayerPlan],
}

impl Run<'_> {
    fn write(
        &self,
        mut folder: Folder,
        tensors: &[layout::OutputTensor<'_>],
        rewriter: Option<&mut dyn LayerRewriter>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<ApplyOutcome, CheckpointError> {
        let (checkpoint, total) = (self.checkpoint, self.total);
        let identical = self.output.kind == Kind::Identical;
        let dir = folder.path().to_path_buf();
        let rewritten = match rewriter {
            Some(rewriter) if !identical => {
                let work = folder.work();
                let rewriter = (rewriter, self.options.dtype);
                let all = Rewritten::collect(checkpoint, self.plan, rewriter, work, total)?;
                Some(all)
            }
            _ => None,
        };
        let mut copying = tensors::Copying::new(folder.work(), total, progress);
        let written = if identical {
            files::copy_checkpoint(checkpoint, &dir, &mut copying)?
        } else {
            let planned: Vec<PlannedTensor> =
                tensors.iter().map(|out| out.tensor.clone()).collect();
            let source = gather::Source::new(checkpoint, rewritten.as_ref(), self.options.dtype);
            let written =
                tensors::write(source, tensors, &planned, self.options, &dir, &mut copying)?;
            let config = form::config(checkpoint, self.plan, self.mtp_plans, &self.output);
            files::write_json(&dir.join("config.json"), &config, total)?;
            written
        };
        let resumed_shards = copying.kept;
        let side = files::Side {
            checkpoint,
            plan: self.plan,
            options: self.options,
            notes: rewritten.as_ref().map(Rewritten::notes),
            output: &self.output,
            mtp: mtp::report(
                checkpoint,
                self.options.mtp,
                self.output.kind,
                self.mtp_plans,
            ),
            fingerprint: &self.fingerprint,
            written: &written,
            num_tensors: tensors.len(),
            needed: total,
        };
        side.write(&dir)?;
        if let Err(error) = checkpoint.check_unchanged() {
            folder.abandon();
            return Err(error);
        }
        folder.commit()?;
        Ok(ApplyOutcome::Written {
            bytes: written.bytes,
            tensors: tensors.len(),
            shards: written.shards.len(),
            resumed_shards,
            identical,
        })
    }
}

/// Refuses an output folder that [`apply`] would refuse, before any other work. An earlier output passes: only the run's
/// fingerprint tells whether it is finished. `needed` bytes must fit on its disk.
///
/// # Errors
/// [`CheckpointError::Output`], [`CheckpointError::DiskFull`], or an unreadable folder.
pub fn check_output(
    checkpoint: &Checkpoint,
    out: &Path,
    force: bool,
    needed: u64,
) -> Result<(), CheckpointError> {
    let earlier = out.join("report.json").exists() && out.join("tenp_plan.json").exists();
    match Target::find(out, checkpoint.dir(), force || earlier, "")? {
        Some(target) => target.check_room(needed),
        None => Ok(()),
    }
}

/// Refuses to go on with an unfinished output of another checkpoint or other options, before the plan is known.
///
/// # Errors
/// [`CheckpointError::Output`].
pub fn check_unfinished(
    checkpoint: &Checkpoint,
    out: &Path,
    options: &ApplyOptions,
) -> Result<(), CheckpointError> {
    let inputs = inputs_beside_plan(checkpoint, options);
    Target::find(out, checkpoint.dir(), true, "")?
        .map_or(Ok(()), |target| target.check_unfinished(&inputs))
}

/// Bytes of all tensors that a plan leaves.
///
/// # Errors
/// [`CheckpointError::Form`].
pub fn output_bytes(
    checkpoint: &Checkpoint,
    plan: &Plan,
    options: &ApplyOptions,
) -> Result<u64, CheckpointError> {
    let output = form::decide(checkpoint, plan, options)?;
    let sizes = mtp_plans(checkpoint, plan, &output, &|_| {
        Ok(mtp::no_norms(checkpoint))
    })?;
    let tensors = layout::tensors(checkpoint, plan, &sizes, &output);
    Ok(tensors.iter().map(|out| out.tensor.num_bytes()).sum())
}

/// Refuses a form that cannot hold the plan.
///
/// # Errors
/// [`CheckpointError::Form`].
pub fn check_form(
    checkpoint: &Checkpoint,
    plan: &Plan,
    options: &ApplyOptions,
) -> Result<(), CheckpointError> {
    form::decide(checkpoint, plan, options).map(drop)
}

/// Plans of the MTP layers that are pruned like the others.
fn mtp_plans(
    checkpoint: &Checkpoint,
    plan: &Plan,
    output: &Output,
    norms: &mtp::Norms<'_>,
) -> Result<Vec<LayerPlan>, CheckpointError> {
    if output.mtp != Mtp::Prune || output.kind == Kind::Identical {
        return Ok(Vec::new());
    }
    mtp::plan(checkpoint, plan, norms)
}

/// Part of a run's inputs: shards of different orders do not go together.
const ORDER_OF_TENSORS: &str = "scales behind their matrix";

/// What decides the output's bytes: two runs of the same inputs write the same checkpoint.
fn inputs(
    checkpoint: &Checkpoint,
    plan: &Plan,
    out: &Path,
    options: &ApplyOptions,
    settings: Option<String>,
) -> Result<Inputs, CheckpointError> {
    let plan = hex(&Sha256::digest(plan.to_json(out)?));
    let mut inputs = inputs_beside_plan(checkpoint, options);
    inputs.insert("plan".to_owned(), plan);
    inputs.insert("recovery".to_owned(), settings.unwrap_or_default());
    Ok(inputs)
}

fn inputs_beside_plan(checkpoint: &Checkpoint, options: &ApplyOptions) -> Inputs {
    let pairs = [
        ("checkpoint", checkpoint.fingerprint().to_owned()),
        ("form", options.form.name().to_owned()),
        ("treatment of MTP layers", options.mtp.name().to_owned()),
        ("dtype", options.dtype.name().to_owned()),
        ("shard size", options.shard_bytes.to_string()),
        ("program version", env!("CARGO_PKG_VERSION").to_owned()),
        ("order of tensors", ORDER_OF_TENSORS.to_owned()),
    ];
    pairs.map(|(name, value)| (name.to_owned(), value)).into()
}

impl Output {
    /// Name of what was really written, for the report.
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Identical => "identical",
            Kind::Stock => "stock",
            Kind::Ragged => "ragged",
            Kind::Padded => "padded",
            Kind::Uniform(_) => "uniform",
        }
    }
}
