//! `calibrate`: every statistic in one pass.

use anyhow::Result;
use tenp_checkpoint::{Checkpoint, Folds, Statistics};
use tenp_model::Model;
use tenp_model::calibrate::{FoldOptions, calibrate_in_folds};

use crate::answers::Samples;
use crate::cli::Calibrate;
use crate::coverage::Coverage;
use crate::place::Place;
use crate::progress::{Progress, Unit};
use crate::{answers, console, models};

pub(super) fn run(args: &Calibrate) -> Result<()> {
    answers::check(args.answers)?;
    let checkpoint = models::open(&args.model)?;
    let read = args.data.files();
    models::check_file("--output", &args.output, Some(&args.model), &read)?;
    let place = Place::new(args.run)?;
    let samples = Samples::read(&models::Texts::new(&checkpoint), &args.data, args.answers)?;
    let statistics = place.with_model(&checkpoint, |model| {
        run_domains_on(&model, &samples.answer(&model)?.domains)
    })?;
    Coverage::of(&statistics).warn(args.data.min_tokens);
    statistics.write(&args.output)?;
    console::note(&format!("wrote {}", args.output.display()));
    Ok(())
}

/// Runs samples that are already token ids.
pub(crate) fn run_domains(
    checkpoint: &Checkpoint,
    domains: &[(String, Vec<Vec<u32>>)],
    place: &Place,
) -> Result<Statistics> {
    place.with_model(checkpoint, |model| run_domains_on(&model, domains))
}

/// The same with a model that is there.
pub(super) fn run_domains_on(
    model: &Model<'_>,
    domains: &[(String, Vec<Vec<u32>>)],
) -> Result<Statistics> {
    Ok(run_in_folds(model, domains, &FoldOptions::default())?.0)
}

/// The same, and the sums of groups of samples.
pub(super) fn run_in_folds(
    model: &Model<'_>,
    domains: &[(String, Vec<Vec<u32>>)],
    folds: &FoldOptions,
) -> Result<(Statistics, Folds)> {
    let layers = model.config().num_layers;
    let total = models::num_tokens(domains) * layers;
    let progress = Progress::new("calibrate", Unit::Tokens, total as u64, layers);
    let advance = |_, tokens| progress.advance(tokens as u64);
    let statistics = calibrate_in_folds(model, domains, folds, &advance)?;
    progress.finish();
    Ok(statistics)
}
