//! `prune`: calibrate, plan and apply.

use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value, json};
use tenp_checkpoint::{
    ApplyOutcome, Checkpoint, Folds, OutputForm, Plan, Statistics, Work, check_form, check_output,
    check_unfinished, output_bytes,
};
use tenp_model::Model;
use tenp_model::calibrate::FoldOptions;
use tenp_prune::PlanRequest;

use super::apply::{self, Making};
use crate::answers::{Answered, Samples};
use crate::cli::{Prune, RecoverArg};
use crate::coverage::Coverage;
use crate::failure::usage;
use crate::forecast::{Forecast, Sizes};
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
        domain_tables: match &args.save_stats {
            Some(_) => None,
            None => Some(recovery::tables(&request, args.recover)?),
        },
        held_bytes: None,
    };
    if args.dry_run {
        return place.with_model(&checkpoint, |model| {
            let model = model.spilling(&spill);
            dry_run(&model, args, &samples, (&request, &folds), bytes_after)
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
    let decisive = unfinished::calibration_inputs(&checkpoint, samples.named_inputs(), &place);
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
    let mut keep = unfinished::unchanged(&checkpoint, keep)?;
    let calibrated = calibrated.map_err(|e| unfinished::explain(e, out, &[CALIBRATION]));
    let (answered, (mut statistics, folds)) = calibrated?;
    statistics.run = run;
    unfinished::tell_trouble(&keep);
    let calibrated = (&answered, statistics, folds);
    let made = make(args, (&checkpoint, &place), &request, calibrated, &inputs);
    if made.is_err() {
        keep = unfinished::unchanged(&checkpoint, keep)?;
    }
    let (plan, outcome) = made?;
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
    (answered, mut statistics, folds): (&Answered, Statistics, Folds),
    inputs: &str,
) -> Result<(Plan, ApplyOutcome)> {
    let domains = &answered.domains;
    let coverage = Coverage::of(&statistics);
    coverage.warn(args.data.min_tokens);
    if let Some(path) = &args.save_stats {
        statistics.write(path)?;
        console::note(&format!("wrote {}", path.display()));
    }
    statistics.keep_tables(&recovery::tables(request, args.recover)?);
    let spill = args.hidden.spill(&args.output.output);
    let search = Search::new(
        checkpoint,
        domains,
        place,
        (spill.clone(), request.tables()?),
    );
    let searched = search.settle(&statistics, request)?;
    drop(search);
    let plan = requests::plan(checkpoint, &statistics, &searched)?;
    let stability = requests::stability(checkpoint, (&statistics, &folds), &searched, &plan)?;
    drop(folds);
    let mut calibration = Map::new();
    let about = about(answered, &statistics, inputs);
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
            RecoverArg::Rescale => recovery::rescale(checkpoint, &plan, &statistics, weights)?,
            RecoverArg::LeastSquares => recovery::least_squares(args.recover, &sequences),
        },
        place,
        spill: &spill,
    };
    drop(statistics);
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

/// What the run would take.
fn dry_run(
    model: &Model<'_>,
    args: &Prune,
    samples: &Samples,
    (request, folds): (&PlanRequest, &FoldOptions),
    bytes_after: u64,
) -> Result<()> {
    let mut forecast = Forecast::new(*model);
    let domains = samples.longest(model);
    if let Some(new_tokens) = samples.new_tokens(model) {
        forecast.generation(&samples.domains, new_tokens)?;
    }
    forecast.calibration(&domains, folds)?;
    let names = domains.iter().map(|(name, _)| name.as_str());
    let rehearsed = requests::rehearse(model.checkpoint(), names, request)?;
    forecast.keep_tables(&domains, recovery::tables(request, args.recover)?.len());
    forecast.planning(&domains, request, &rehearsed)?;
    forecast.drop_statistics();
    let writing = apply::options(&args.output);
    if args.recover.recover == RecoverArg::LeastSquares {
        let sequences = recovery::sequences(&domains, &request.domain_weights);
        forecast.fits(&sequences, &rehearsed, writing.dtype)?;
    }
    forecast.merging(&rehearsed, writing.dtype)?;
    let recovers = args.recover.recover != RecoverArg::None;
    forecast.writing(&rehearsed, &writing, bytes_after, recovers)?;
    let sizes = Sizes {
        tokens: models::num_tokens(&domains),
        output: bytes_after,
        is_checkpoint: true,
    };
    forecast.show(sizes, args.json);
    Ok(())
}
