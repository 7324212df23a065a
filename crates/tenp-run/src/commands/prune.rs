//! `prune`: calibrate, plan and apply.

use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value, json};
use tenp_checkpoint::{
    ApplyOutcome, Checkpoint, Folds, OutputForm, Plan, Statistics, Work, check_form, check_output,
    check_unfinished, output_bytes,
};
use tenp_model::Model;
use tenp_model::calibrate::{FoldOptions, Keep};
use tenp_prune::PlanRequest;

use super::apply::{self, Making};
use crate::answers::{Answered, Samples};
use crate::cli::{AnswersArg, Prune, RecoverArg};
use crate::coverage::Coverage;
use crate::failure::usage;
use crate::place::Place;
use crate::recovery::{self, Recovery};
use crate::search::{self, Search};
use crate::unfinished::{self, CALIBRATION, OUTPUT};
use crate::{answers, console, models, requests};

pub(super) fn run(args: &Prune) -> Result<()> {
    let request = requests::request(&args.plan)?;
    recovery::check(args.recover)?;
    answers::check(args.answers)?;
    let checkpoint = models::open(&args.model)?;
    let bytes_after = refuse_early(args, &request, &checkpoint)?;
    let samples = Samples::read(&models::Texts::new(&checkpoint), &args.data, args.answers)?;
    search::check(&request, &samples.domains)?;
    let place = Place::new(args.run)?;
    place.check_hidden(args.hidden)?;
    let spill = args.hidden.spill(&args.output.output);
    let folds = FoldOptions {
        num_folds: args.folds.map(|n| n as usize),
        tables: request.tables()?,
    };
    if args.dry_run {
        return place.with_model(&checkpoint, |model| {
            let model = model.spilling(&spill);
            let most = Keep::most_bytes(
                &model,
                samples.most_tokens(&model),
                samples.domains.len(),
                &folds,
            );
            dry_run(
                &model,
                args,
                (bytes_after, most),
                samples.most_tokens(&model),
            )
        });
    }
    let form: OutputForm = args.output.form.into();
    let writing = apply::options(&args.output);
    let inputs = models::fingerprint(&(
        (checkpoint.fingerprint(), samples.inputs(), place.name()),
        (
            format!("{request:?} {:?}", args.recover),
            format!("{form:?} {:?} {:?}", writing.dtype, writing.mtp),
            args.output.shard_size,
            args.folds,
        ),
        env!("CARGO_PKG_VERSION"),
    ));
    let out = &args.output.output;
    if !args.output.force
        && let Some(plan) = finished(out, &inputs)?
    {
        for purpose in [OUTPUT, CALIBRATION] {
            Work::remove_leftover(Work::place(out, purpose), out);
        }
        report(&checkpoint, args, &plan, ApplyOutcome::AlreadyFinished);
        return Ok(());
    }
    let decisive = unfinished::calibration_inputs(&checkpoint, &samples, &place);
    let run = models::fingerprint(&decisive);
    let (restart, every) = (args.output.restart, args.keep.every());
    let mut keep = unfinished::keep((out, CALIBRATION), decisive, &folds, restart, every)?;
    let calibrated = place.with_model(&checkpoint, |model| {
        let model = model.spilling(&spill);
        let answered = samples.answer(&model, &mut keep)?;
        let domains = &answered.domains;
        let sums = super::calibrate::run_in_folds(&model, domains, &folds, Some(&mut keep))?;
        Ok((answered, sums))
    });
    let calibrated = calibrated.map_err(|e| unfinished::explain(e, out, &[CALIBRATION]));
    let (answered, (mut statistics, folds)) = calibrated?;
    statistics.run = run;
    unfinished::tell_trouble(&keep);
    let calibrated = (&answered, &statistics, folds);
    let (plan, outcome) = make(args, (&checkpoint, &place), &request, calibrated, &inputs)?;
    keep.finish();
    report(&checkpoint, args, &plan, outcome);
    Ok(())
}

/// Refuses what would be refused later, and says how many bytes the output will have.
fn refuse_early(args: &Prune, request: &PlanRequest, checkpoint: &Checkpoint) -> Result<u64> {
    if let Some(original) = checkpoint.pruned_from() {
        let dir = args.model.display();
        return Err(usage(format!(
            "{dir} is already pruned (from {original}); prune the original checkpoint"
        )));
    }
    apply::check_effect(checkpoint, &args.output)?;
    if let Some(path) = &args.save_stats {
        let read = args.data.files();
        models::check_file("--save-stats", path, Some(&args.model), &read)?;
    }
    let names = args.data.data.iter().map(|data| data.domain.as_str());
    let rehearsed = requests::rehearse(checkpoint, names, request)?;
    let writing = apply::options(&args.output);
    check_form(checkpoint, &rehearsed, &writing)?;
    let bytes_after = output_bytes(checkpoint, &rehearsed, &writing)?;
    let (out, force) = (&args.output.output, args.output.force);
    let needed = if args.dry_run { 0 } else { bytes_after };
    check_output(checkpoint, out, force, needed)?;
    if !args.output.restart {
        check_unfinished(checkpoint, out, &writing)?;
    }
    recovery::check_plan(args.recover, checkpoint, &rehearsed)?;
    Ok(bytes_after)
}

/// Plans and applies.
fn make(
    args: &Prune,
    (checkpoint, place): (&Checkpoint, &Place),
    request: &PlanRequest,
    (answered, statistics, folds): (&Answered, &Statistics, Folds),
    inputs: &str,
) -> Result<(Plan, ApplyOutcome)> {
    let domains = &answered.domains;
    let coverage = Coverage::of(statistics);
    coverage.warn(args.data.min_tokens);
    if let Some(path) = &args.save_stats {
        statistics.write(path)?;
        console::note(&format!("wrote {}", path.display()));
    }
    let searched = Search::new(checkpoint, domains, place).settle(statistics, request)?;
    let plan = requests::plan(checkpoint, statistics, &searched)?;
    let stability = requests::stability(checkpoint, (statistics, &folds), &searched, &plan)?;
    drop(folds);
    let mut calibration = Map::new();
    let about = about(answered, statistics, inputs);
    calibration.insert("calibration".to_owned(), about);
    let few = coverage.json(args.data.min_tokens);
    calibration.insert("coverage".to_owned(), few);
    if let Some(stability) = stability {
        calibration.insert("stability".to_owned(), json!(stability));
    }
    let weights = &request.domain_weights;
    let sequences = recovery::sequences(domains, weights);
    let making = Making {
        calibration,
        recovery: match args.recover.recover {
            RecoverArg::None => Recovery::None,
            RecoverArg::Rescale => recovery::rescale(checkpoint, &plan, statistics, weights)?,
            RecoverArg::LeastSquares => recovery::least_squares(args.recover, &sequences),
        },
        place,
        spill: &args.hidden.spill(&args.output.output),
    };
    let outcome = super::apply::write(checkpoint, &plan, &args.output, making)?;
    Ok((plan, outcome))
}

/// What a report says of the text.
fn about(answered: &Answered, statistics: &Statistics, inputs: &str) -> Value {
    let domains = answered.domains.iter().map(|(name, samples)| {
        let tokens: usize = samples.iter().map(Vec::len).sum();
        json!({"domain": name, "samples": samples.len(), "tokens": tokens})
    });
    let mut about = Map::new();
    about.insert("domains".to_owned(), domains.collect());
    answered.tell(&mut about);
    about.insert("compute".to_owned(), json!(statistics.compute));
    about.insert("inputs".to_owned(), inputs.into());
    about.into()
}

fn report(checkpoint: &Checkpoint, args: &Prune, plan: &Plan, outcome: ApplyOutcome) {
    if args.json {
        console::json(&super::apply::outcome_json(plan, outcome));
    } else {
        console::data(&super::plan::text(checkpoint, plan));
    }
}

/// The plan of an output that this very run has already made; that of another run is refused, before the calibration.
fn finished(out: &Path, inputs: &str) -> Result<Option<Plan>> {
    let Ok(text) = std::fs::read(out.join("report.json")) else {
        return Ok(None);
    };
    let report: Value = serde_json::from_slice(&text).unwrap_or_default();
    let shown = out.display();
    if report["calibration"]["inputs"] != inputs {
        return Err(usage(format!(
            "--output {shown}: is not empty, it holds the output of another run; choose another, or replace it with --force"
        )));
    }
    if Checkpoint::open(out).is_err() {
        return Err(usage(format!(
            "--output {shown}: is this run's output but damaged; write it again with --force"
        )));
    }
    console::note(&format!(
        "{shown} is already the finished output of this run; nothing to do"
    ));
    Ok(Some(Plan::read(&out.join("tenp_plan.json"))?))
}

/// What the run would take. The time is the arithmetic at the rate this machine shows in a short product.
fn dry_run(
    model: &Model<'_>,
    args: &Prune,
    (bytes_after, kept_bytes): (u64, usize),
    tokens: usize,
) -> Result<()> {
    let (size, config) = (model.checkpoint().size(), model.config());
    let memory = model.working_bytes(tokens);
    let disk_bytes = bytes_after + model.spilled_bytes(tokens) as u64;
    // The forward pass, and a third of the routed part again for the contributions.
    let routed_active =
        size.parameters_routed as f64 * config.moe.top_k as f64 / config.moe.num_experts as f64;
    let flops = tokens as f64 * (2.0 * size.parameters_active as f64 + 2.0 * routed_active / 3.0);
    if args.answers.answers == AnswersArg::Generate {
        console::note(
            "with answers as long as they may be; generating them comes on top: as much arithmetic again, and the \
             model read once for each token of the longest answer",
        );
    }
    let rate = model.measured_rate()?;
    let seconds = flops / rate;
    if args.json {
        console::json(&json!({
            "tokens": tokens,
            "bytes_before": size.bytes_total,
            "bytes_after": bytes_after,
            "memory_bytes": memory.host,
            "device_bytes": memory.device,
            "disk_bytes": disk_bytes,
            "kept_bytes": kept_bytes,
            "compute_seconds": seconds,
            "bytes_read": 2 * size.bytes_total,
        }));
        return Ok(());
    }
    let mut rows = vec![
        ("calibration tokens", tokens.to_string()),
        (
            "model",
            format!(
                "{} → {}",
                console::bytes(size.bytes_total),
                console::bytes(bytes_after)
            ),
        ),
        ("disk needed", console::bytes(disk_bytes)),
        (
            "and while calibrating, if that is long",
            console::bytes(kept_bytes as u64),
        ),
        (
            "peak memory beside the mapped file",
            console::bytes(memory.host as u64),
        ),
    ];
    if let Some(bytes) = memory.device {
        rows.push(("peak GPU memory", console::bytes(bytes as u64)));
    }
    rows.push((
        "calibration arithmetic",
        format!(
            "{seconds:.1} s at the {:.0} GFLOP/s measured just now",
            rate / 1e9
        ),
    ));
    rows.push((
        "read",
        format!(
            "{} (once to calibrate, once to write)",
            console::bytes(2 * size.bytes_total)
        ),
    ));
    let rows = rows.iter().map(|(name, value)| (*name, value.as_str()));
    console::data(&console::pairs(rows, 36));
    Ok(())
}
