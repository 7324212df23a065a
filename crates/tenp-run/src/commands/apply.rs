//! `apply`: write the checkpoint of a plan.

use std::cell::OnceCell;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tenp_checkpoint::{
    ApplyOptions, ApplyOutcome, Checkpoint, LayerRewriter, OutputForm, Plan, apply_rewritten,
};
use tenp_kernels::Compute;
use tenp_model::rewrite::Dern;

use crate::cli::{Apply, FormArg, OutputArgs};
use crate::progress::{Progress, Unit};
use crate::{cards, console, models};

pub(super) fn run(args: &Apply) -> Result<()> {
    let checkpoint = models::open(&args.model)?;
    let plan = Plan::read(&args.plan)?;
    plan.validate(&checkpoint)
        .with_context(|| format!("cannot apply {}", args.plan.display()))?;
    let outcome = write(&checkpoint, &plan, &args.output, None)?;
    if args.json {
        console::json(&outcome_json(&plan, outcome));
    }
    Ok(())
}

impl From<FormArg> for OutputForm {
    fn from(form: FormArg) -> Self {
        match form {
            FormArg::Ragged => Self::Ragged,
            FormArg::Padded => Self::Padded,
            FormArg::Uniform => Self::Uniform,
        }
    }
}

/// Writes the output folder with card and report, and says what happened.
pub(super) fn write(
    checkpoint: &Checkpoint,
    plan: &Plan,
    output: &OutputArgs,
    calibration: Option<Value>,
) -> Result<ApplyOutcome> {
    let form = output.form.into();
    let options = ApplyOptions {
        form,
        shard_bytes: output.shard_size,
        force: output.force,
        extra_files: vec![(
            "README.md".to_owned(),
            cards::model_card(checkpoint, plan, form).into_bytes(),
        )],
        report: cards::report(checkpoint, plan, calibration),
    };
    let merging = OnceCell::new();
    let merged = |_| {
        let start = || Progress::new("merge", Unit::Layers, plan.layers.len() as u64, 1);
        merging.get_or_init(start).advance(1);
    };
    let mut dern = Dern::new(checkpoint, plan, Compute::F32, &merged);
    let rewriter = dern.as_mut().map(|dern| dern as &mut dyn LayerRewriter);
    let mut progress: Option<Progress> = None;
    let outcome = apply_rewritten(
        checkpoint,
        plan,
        &output.output,
        &options,
        rewriter,
        &mut |done, total| {
            progress
                .get_or_insert_with(|| Progress::new("write", Unit::Bytes, total, 1))
                .set(done);
        },
    )?;
    for progress in merging.into_inner().into_iter().chain(progress) {
        progress.finish();
    }
    let out = output.output.display();
    console::note(&match outcome {
        ApplyOutcome::AlreadyFinished => {
            format!("{out} is already the finished output of this run; nothing to do")
        }
        ApplyOutcome::Written {
            identical: true, ..
        } => {
            format!("wrote {out}: everything is kept, so it is an identical copy")
        }
        ApplyOutcome::Written { bytes, shards, .. } => {
            format!(
                "wrote {out}: {} in {shards} shard(s)",
                console::bytes(bytes)
            )
        }
    });
    Ok(outcome)
}

/// The outcome for a machine.
pub(super) fn outcome_json(plan: &Plan, outcome: ApplyOutcome) -> Value {
    let mut value = json!({"accounting": plan.accounting, "uncalibrated": plan.uncalibrated});
    match outcome {
        ApplyOutcome::AlreadyFinished => value["already_finished"] = json!(true),
        ApplyOutcome::Written {
            bytes,
            tensors,
            shards,
            identical,
        } => {
            value["bytes"] = json!(bytes);
            value["tensors"] = json!(tensors);
            value["shards"] = json!(shards);
            value["identical"] = json!(identical);
        }
    }
    value
}
