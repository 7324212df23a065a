//! `apply`: write the checkpoint of a plan.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use tenp_checkpoint::{
    ApplyOptions, ApplyOutcome, Checkpoint, LayerRewriter, Mtp, OutputDtype, OutputForm, Plan,
    Statistics, apply_rewritten, check_form, check_output, check_unfinished, output_bytes,
};
use tenp_kernels::Compute;
use tenp_model::calibrate::{FoldOptions, Keep};
use tenp_model::rewrite::{Dern, LeastSquares, Rescale};
use tenp_model::{Model, Spill};

use super::calibrate::{Keeping, run_kept};
use crate::cli::{
    Apply, ComputeArg, DataArgs, DeviceArg, DtypeArg, FormArg, MIN_TOKENS, MtpArg, OutputArgs,
    RecoverArg,
};
use crate::failure::usage;
use crate::forecast::{Forecast, Sizes};
use crate::models::Domains;
use crate::place::Place;
use crate::progress::{Progress, Unit};
use crate::recovery::{self, Recovery};
use crate::unfinished::{self, CALIBRATION, OUTPUT};
use crate::{cards, console, models, report_page};

pub(super) fn run(args: &Apply) -> Result<()> {
    recovery::check(args.recover)?;
    check_data(args)?;
    let checkpoint = models::open(&args.model)?;
    check_effect(&checkpoint, &args.output)?;
    let plan = Plan::read(&args.plan)?;
    let on_device = plan.dern.is_some() || args.recover.recover != RecoverArg::None;
    if matches!(args.run.device, DeviceArg::Cuda(_)) && !on_device {
        return Err(usage(
            "--device cuda has no effect here: without merging and recovery nothing is computed; leave it out",
        ));
    }
    plan.validate(&checkpoint)
        .with_context(|| format!("cannot apply {}", args.plan.display()))?;
    recovery::check_plan(args.recover, &checkpoint, &plan)?;
    let place = if on_device {
        Place::new(args.run)?
    } else {
        Place::Cpu(match args.run.compute {
            Some(ComputeArg::Bf16) => Compute::Bf16,
            _ => Compute::F32,
        })
    };
    let text = match args.recover.recover {
        RecoverArg::None => None,
        _ => Some(calibration(args, &checkpoint, &plan)?),
    };
    let spill = args.hidden.spill(&args.output.output);
    if args.dry_run {
        return place.with_model(&checkpoint, |model| {
            dry_run(&model.spilling(&spill), args, &plan, text)
        });
    }
    let sequences;
    let mut keep = None;
    let recovery = match text {
        None => Recovery::None,
        Some((domains, weights)) if args.recover.recover == RecoverArg::Rescale => {
            let (statistics, kept) = calibrated(args, &checkpoint, &domains, (&place, &spill))?;
            keep = Some(kept);
            recovery::rescale(&checkpoint, &plan, &statistics, &weights)?
        }
        Some((domains, weights)) => {
            sequences = recovery::sequences(&domains, &weights);
            recovery::least_squares(args.recover, &sequences)
        }
    };
    let making = Making {
        calibration: Map::new(),
        recovery,
        place: &place,
        spill: &spill,
    };
    let written = write(&checkpoint, &plan, &args.output, making);
    if let Some(kept) = keep {
        match &written {
            Ok(_) => kept.finish(),
            Err(_) => drop(unfinished::unchanged(&checkpoint, kept)?),
        }
    }
    let outcome = written?;
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

/// What the flags say of the output.
pub(super) fn options(output: &OutputArgs) -> ApplyOptions {
    ApplyOptions {
        form: output.form.into(),
        dtype: match output.dtype {
            Some(DtypeArg::Bf16) => OutputDtype::Bf16,
            None => OutputDtype::Same,
        },
        mtp: match output.mtp {
            None | Some(MtpArg::Prune) => Mtp::Prune,
            Some(MtpArg::Keep) => Mtp::Keep,
            Some(MtpArg::Drop) => Mtp::Drop,
        },
        shard_bytes: output.shard_size,
        force: output.force,
        restart: output.restart,
        ..ApplyOptions::default()
    }
}

/// Refuses flags of the output that would have no effect on this model.
pub(super) fn check_effect(checkpoint: &Checkpoint, output: &OutputArgs) -> Result<()> {
    if output.dtype.is_some() && !checkpoint.is_fp8() {
        return Err(usage(
            "--dtype bf16 has no effect here: no weight of the model is fp8, and others keep their type; leave it out",
        ));
    }
    if output.mtp.is_some() && !checkpoint.has_mtp() {
        return Err(usage(
            "--mtp has no effect here: the model has no layer for multi-token prediction; leave it out",
        ));
    }
    Ok(())
}

/// The text that recovery is to be made on, and what its domains weigh in the plan. What would be refused later is refused
/// before it is read.
fn calibration(
    args: &Apply,
    checkpoint: &Checkpoint,
    plan: &Plan,
) -> Result<(Domains, BTreeMap<String, f64>)> {
    let writing = options(&args.output);
    check_form(checkpoint, plan, &writing)?;
    let needed = output_bytes(checkpoint, plan, &writing)?;
    check_output(checkpoint, &args.output.output, args.output.force, needed)?;
    if !args.output.restart {
        check_unfinished(checkpoint, &args.output.output, &writing)?;
    }
    let data = DataArgs {
        data: args.data.clone(),
        samples: args.samples,
        seq_len: args.seq_len,
        min_tokens: MIN_TOKENS,
    };
    let domains = models::Texts::new(checkpoint).domains(&data)?;
    let weights = recovery::plan_weights(plan, &domains);
    Ok((domains, weights))
}

/// Statistics of the text, and where they are kept until the output is written.
fn calibrated(
    args: &Apply,
    checkpoint: &Checkpoint,
    domains: &Domains,
    (place, spill): (&Place, &Spill),
) -> Result<(Statistics, Keep)> {
    let output = &args.output.output;
    let keeping = Keeping {
        output,
        restart: args.output.restart,
        every: args.keep.every(),
    };
    let calibrated = place.with_model(checkpoint, |model| {
        run_kept(&model.spilling(spill), domains, place, &keeping)
    });
    calibrated.map_err(|error| unfinished::explain(error, output, &[CALIBRATION]))
}

/// What the run would take.
fn dry_run(
    model: &Model<'_>,
    args: &Apply,
    plan: &Plan,
    text: Option<(Domains, BTreeMap<String, f64>)>,
) -> Result<()> {
    let writing = options(&args.output);
    let output = output_bytes(model.checkpoint(), plan, &writing)?;
    check_output(
        model.checkpoint(),
        &args.output.output,
        args.output.force,
        0,
    )?;
    let mut forecast = Forecast::new(*model);
    let mut tokens = 0;
    if let Some((domains, weights)) = text {
        if args.recover.recover == RecoverArg::Rescale {
            forecast.calibration(&domains, &FoldOptions::default())?;
            forecast.drop_statistics();
            tokens = models::num_tokens(&domains);
        } else {
            let sequences = recovery::sequences(&domains, &weights);
            forecast.fits(&sequences, plan, writing.dtype)?;
            tokens = sequences.num_tokens();
        }
    }
    forecast.merging(plan, writing.dtype)?;
    let recovers = args.recover.recover != RecoverArg::None;
    forecast.writing(plan, &writing, output, recovers)?;
    let sizes = Sizes {
        tokens,
        output,
        is_checkpoint: true,
    };
    forecast.show(sizes, args.json);
    Ok(())
}

fn check_data(args: &Apply) -> Result<()> {
    match (args.recover.recover, args.data.is_empty()) {
        (RecoverArg::None, false) => Err(usage(
            "--data has no effect without --recover: a plan is applied without text",
        )),
        (RecoverArg::Rescale | RecoverArg::LeastSquares, true) => {
            Err(usage("--recover needs calibration text: give --data"))
        }
        _ if args.hidden.hidden_memory.is_some() && args.recover.recover == RecoverArg::None => {
            Err(usage(
                "--hidden-memory has no effect without --recover, which runs text layer by layer",
            ))
        }
        _ => Ok(()),
    }
}

/// What goes into an output beside checkpoint and plan.
pub(super) struct Making<'a> {
    /// What the report says of the calibration.
    pub(super) calibration: Map<String, Value>,
    pub(super) recovery: Recovery<'a>,
    /// Of merging, and of the model that is fitted to.
    pub(super) place: &'a Place,
    /// Of the hidden states of what is fitted.
    pub(super) spill: &'a Spill,
}

/// Writes the output folder with card and report, and says what happened.
pub(super) fn write(
    checkpoint: &Checkpoint,
    plan: &Plan,
    output: &OutputArgs,
    making: Making<'_>,
) -> Result<ApplyOutcome> {
    let form = output.form.into();
    let options = ApplyOptions {
        extra_files: vec![(
            "README.md".to_owned(),
            cards::model_card(checkpoint, plan, form).into_bytes(),
        )],
        report: cards::report(checkpoint, plan, making.calibration),
        page: Some(report_page::page),
        ..self::options(output)
    };
    let computing = OnceLock::new();
    let mut progress: Option<Progress> = None;
    let made = Rewriting {
        checkpoint,
        plan,
        recovery: making.recovery,
        place: making.place,
        spill: making.spill,
    };
    let outcome = made.with_rewriter(&computing, |rewriter| {
        Ok(apply_rewritten(
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
        )?)
    });
    let left = &[OUTPUT, CALIBRATION];
    let outcome = outcome.map_err(|error| unfinished::explain(error, &output.output, left))?;
    for progress in computing.get().into_iter().chain(&progress) {
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
        ApplyOutcome::Written {
            bytes,
            shards,
            resumed_shards,
            ..
        } => {
            let bytes = console::bytes(bytes);
            let earlier = match resumed_shards {
                0 => String::new(),
                n => format!(", {n} of them by an earlier run"),
            };
            format!("wrote {out}: {bytes} in {shards} shard(s){earlier}")
        }
    });
    Ok(outcome)
}

/// What computes new weights of a plan, if anything does.
pub(super) struct Rewriting<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) plan: &'a Plan,
    pub(super) recovery: Recovery<'a>,
    pub(super) place: &'a Place,
    /// Of the hidden states of what is fitted.
    pub(super) spill: &'a Spill,
}

impl Rewriting<'_> {
    /// Writes the checkpoint with everything else as it is by default.
    pub(super) fn write(&self, out: &Path, progress: &OnceLock<Progress>) -> Result<()> {
        self.with_rewriter(progress, |rewriter| {
            let (options, silent) = (ApplyOptions::default(), &mut |_, _| ());
            apply_rewritten(self.checkpoint, self.plan, out, &options, rewriter, silent)?;
            Ok(())
        })
    }

    /// Gives it to `work`; `progress` starts with its first layer.
    pub(super) fn with_rewriter<R>(
        &self,
        progress: &OnceLock<Progress>,
        work: impl FnOnce(Option<&mut dyn LayerRewriter>) -> Result<R>,
    ) -> Result<R> {
        let (checkpoint, plan) = (self.checkpoint, self.plan);
        match &self.recovery {
            Recovery::None => {
                let total = plan.layers.len() as u64;
                let start = move || Progress::new("merge", Unit::Layers, total, 1);
                let advance = Box::new(move |_| progress.get_or_init(start).advance(1));
                let dern = match self.place {
                    Place::Cpu(compute) => Dern::new(checkpoint, plan, *compute, advance),
                    #[cfg(feature = "cuda")]
                    Place::Gpu(device) => Dern::on(checkpoint, plan, device.clone(), advance),
                };
                match dern {
                    Some(mut dern) => work(Some(&mut dern)),
                    None => work(None),
                }
            }
            Recovery::Rescale(factors) => {
                work(Some(&mut Rescale::new(checkpoint, factors.clone())))
            }
            Recovery::LeastSquares { sequences, options } => {
                let layers = checkpoint.config().num_layers;
                let total = (sequences.num_tokens() * layers) as u64;
                let start = move || Progress::new("recover", Unit::Tokens, total, layers);
                let advance = Box::new(move |tokens: usize| {
                    progress.get_or_init(start).advance(tokens as u64);
                });
                self.place.with_model(checkpoint, |model| {
                    let model = model.spilling(self.spill);
                    let fit = LeastSquares::new(&model, sequences, *options, advance)?;
                    work(Some(&mut { fit }))
                })
            }
        }
    }
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
            resumed_shards,
            identical,
        } => {
            value["bytes"] = json!(bytes);
            value["tensors"] = json!(tensors);
            value["shards"] = json!(shards);
            value["resumed_shards"] = json!(resumed_shards);
            value["identical"] = json!(identical);
        }
    }
    value
}
