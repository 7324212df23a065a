//! Applying a plan: a new checkpoint folder, whole or not at all.

mod files;
mod folder;
mod form;
mod gather;
mod layout;
mod rewrite;

use std::path::Path;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::checkpoint::hex;
use crate::plan::Plan;
use crate::shard::Shard;
use crate::writer::{DEFAULT_SHARD_BYTES, WrittenShards, write_shards};
use crate::{Checkpoint, CheckpointError, Dtype, PlannedTensor};

use folder::Target;
use form::{Kind, Output};
use rewrite::Rewritten;

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutputDtype {
    /// The input's, tensor by tensor.
    #[default]
    Same,
    /// bf16 in place of fp8, without scales and without a `quantization_config`; others as they are.
    Bf16,
}

impl OutputDtype {
    /// What a weight of this type becomes.
    pub fn of(self, input: Dtype) -> Dtype {
        match (self, input) {
            (Self::Bf16, Dtype::F8E4M3) => Dtype::BF16,
            _ => input,
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
    /// Upper bound of a shard's tensor bytes (a single larger tensor gets a shard of its own).
    pub shard_bytes: u64,
    /// Replace an output folder that is not empty.
    pub force: bool,
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
            shard_bytes: DEFAULT_SHARD_BYTES,
            force: false,
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
        /// The plan keeps everything: shards, index and config are byte for byte those of the input.
        identical: bool,
    },
    /// The folder is the finished output of the same run; nothing was done.
    AlreadyFinished,
}

/// Writes the checkpoint that a plan makes of another into `out`, which appears as a whole or not at all.
///
/// `progress` is called with tensor bytes written and the total. Same checkpoint, plan and options give the same bytes.
/// Everything is built in a temporary folder beside `out`, which is removed on error; the input is never touched. With
/// [`ApplyOptions::force`] a finished output is written again.
///
/// # Errors
/// An unsound plan or another checkpoint's, a plan that merges experts (see [`apply_rewritten`]), a form that cannot hold it, an `out` that is the input, contains it, lies
/// inside it or is not empty, a full disk, any failed file operation.
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
/// depth order, before tensors are written, and not at all where nothing is cut.
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
    let output = form::decide(checkpoint, plan, options.form, options.dtype)?;
    let settings = rewriter.as_ref().map(|rewriter| rewriter.settings());
    let fingerprint = run_fingerprint(checkpoint, plan, out, options, settings.as_deref())?;
    let Some(target) = Target::find(out, checkpoint.dir(), options.force, &fingerprint)? else {
        return Ok(ApplyOutcome::AlreadyFinished);
    };
    let tensors = layout::tensors(checkpoint, plan, &output);
    let planned: Vec<PlannedTensor> = tensors.iter().map(|out| out.tensor.clone()).collect();
    let total = match output.kind {
        Kind::Identical => checkpoint.shards.iter().map(Shard::num_bytes).sum(),
        _ => planned.iter().map(PlannedTensor::num_bytes).sum(),
    };
    let folder = target.create(total)?;
    let rewritten = match rewriter {
        Some(rewriter) if output.kind != Kind::Identical => Some(Rewritten::collect(
            checkpoint,
            plan,
            (rewriter, options.dtype),
            folder.parent(),
            total,
        )?),
        _ => None,
    };
    let written = if output.kind == Kind::Identical {
        files::copy_checkpoint(checkpoint, folder.path(), total, progress)?
    } else {
        let written = write_tensors(
            gather::Source {
                checkpoint,
                rewritten: rewritten.as_ref(),
                dtype: options.dtype,
            },
            &tensors,
            &planned,
            folder.path(),
            options.shard_bytes,
            total,
            progress,
        )?;
        let config = form::config(checkpoint, plan, &output);
        files::write_json(&folder.path().join("config.json"), &config, total)?;
        written
    };
    let side = files::Side {
        checkpoint,
        plan,
        options,
        notes: rewritten.as_ref().map(Rewritten::notes),
        output: &output,
        fingerprint: &fingerprint,
        written: &written,
        num_tensors: planned.len(),
        needed: total,
    };
    side.write(folder.path())?;
    folder.commit()?;
    Ok(ApplyOutcome::Written {
        bytes: written.bytes,
        tensors: planned.len(),
        shards: written.shards.len(),
        identical: output.kind == Kind::Identical,
    })
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

/// Bytes of all tensors that a plan leaves.
///
/// # Errors
/// [`CheckpointError::Form`].
pub fn output_bytes(
    checkpoint: &Checkpoint,
    plan: &Plan,
    options: &ApplyOptions,
) -> Result<u64, CheckpointError> {
    let output = form::decide(checkpoint, plan, options.form, options.dtype)?;
    let tensors = layout::tensors(checkpoint, plan, &output);
    Ok(tensors.iter().map(|out| out.tensor.num_bytes()).sum())
}

/// Refuses a form that cannot hold the plan.
///
/// # Errors
/// [`CheckpointError::Form`].
pub fn check_form(
    checkpoint: &Checkpoint,
    plan: &Plan,
    form: OutputForm,
) -> Result<(), CheckpointError> {
    form::decide(checkpoint, plan, form, OutputDtype::Same).map(drop)
}

fn write_tensors(
    source: gather::Source<'_>,
    tensors: &[layout::OutputTensor<'_>],
    planned: &[PlannedTensor],
    dir: &Path,
    shard_bytes: u64,
    total: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<WrittenShards, CheckpointError> {
    let mut done = 0;
    let mut layer = None;
    progress(0, total);
    write_shards(dir, planned, shard_bytes, &mut |index, sink| {
        let output = &tensors[index];
        source.write(output, sink)?;
        // The source's pages of a finished layer would otherwise pile up in this process.
        let own = crate::layer_of(&output.tensor.name);
        if layer != own {
            if let Some(finished) = layer {
                source.checkpoint.release_layer(finished);
            }
            layer = own;
        }
        done += output.tensor.num_bytes();
        progress(done, total);
        Ok(())
    })
}

/// Identifies a run: two runs of the same fingerprint write the same checkpoint.
fn run_fingerprint(
    checkpoint: &Checkpoint,
    plan: &Plan,
    out: &Path,
    options: &ApplyOptions,
    rewriter: Option<&str>,
) -> Result<String, CheckpointError> {
    let plan = plan.to_json(out)?;
    let mut hash = Sha256::new();
    hash.update(b"tenp-apply 1\0");
    hash.update(checkpoint.fingerprint());
    hash.update((plan.len() as u64).to_le_bytes());
    hash.update(&plan);
    hash.update(options.form.name());
    hash.update(options.shard_bytes.to_le_bytes());
    if options.dtype == OutputDtype::Bf16 {
        hash.update(b"bf16\0");
    }
    if let Some(settings) = rewriter {
        hash.update(b"rewriter\0");
        hash.update(settings);
    }
    Ok(hex(&hash.finalize()))
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
