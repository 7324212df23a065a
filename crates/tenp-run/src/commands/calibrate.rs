//! `calibrate`: every statistic in one pass.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tenp_checkpoint::{Checkpoint, Folds, Statistics, Work, folder_of, sync_folder};
use tenp_model::Model;
use tenp_model::calibrate::{FoldOptions, Keep, calibrate_in_folds};
use tenp_model::memory::StatisticsMemory;

use crate::answers::Samples;
use crate::cli::Calibrate;
use crate::coverage::Coverage;
use crate::forecast::{Forecast, Sizes};
use crate::models::Domains;
use crate::place::Place;
use crate::progress::{Progress, Unit};
use crate::unfinished::{self, CALIBRATION, OUTPUT};
use crate::{answers, console, models};

pub(super) fn run(args: &Calibrate) -> Result<()> {
    answers::check(args.answers)?;
    let checkpoint = models::open(&args.model)?;
    let (out, read) = (&args.output, args.data.files());
    models::check_file("--output", out, Some(&args.model), &read)?;
    let place = Place::new(args.run)?;
    place.check_hidden(args.hidden)?;
    let spill = args.hidden.spill(out);
    let mut samples = Samples::read(&models::Texts::new(&checkpoint), &args.data, args.answers)?;
    let share = args.shard.map(|share| samples.take_share(share));
    let share = share.transpose()?;
    if args.dry_run {
        return place.with_model(&checkpoint, |model| {
            dry_run(&model.spilling(&spill), &samples, args.json)
        });
    }
    let mut inputs = unfinished::calibration_inputs(&checkpoint, samples.named_inputs(), &place);
    if let Some(share) = &share {
        inputs.insert("share of the samples".to_owned(), share.to_string());
    }
    let fingerprint = models::fingerprint(&inputs);
    if !args.restart && is_finished(out, &fingerprint) {
        Work::remove_leftover(Work::place(out, OUTPUT), out);
        console::note(&format!(
            "{} is already the finished output of this run; nothing to do",
            out.display()
        ));
        return Ok(());
    }
    let (folds, every) = (fold_options(), args.keep.every());
    let mut keep = unfinished::keep((out, OUTPUT), inputs, &folds, args.restart, every)?;
    let calibrated = place.with_model(&checkpoint, |model| {
        let model = model.spilling(&spill);
        let answered = samples.answer(&model, &mut keep)?;
        run_in_folds(&model, &answered.domains, &folds, Some(&mut keep))
    });
    let mut keep = unfinished::unchanged(&checkpoint, keep)?;
    let explain = |error| unfinished::explain(error, out, &[OUTPUT]);
    let (mut statistics, _) = calibrated.map_err(explain)?;
    unfinished::tell_trouble(&keep);
    Coverage::of(&statistics).warn(args.data.min_tokens);
    statistics.run = fingerprint;
    statistics.shares = share.into_iter().filter(|share| share.parts > 1).collect();
    // Written in the folder first: a process that dies leaves nothing anywhere else.
    let whole = keep.work().dir().join("statistics");
    let written = keep.write(&statistics, &whole);
    written.map_err(|error| explain(error.into()))?;
    std::fs::rename(&whole, out).with_context(|| format!("cannot write {}", out.display()))?;
    sync_folder(folder_of(out));
    keep.finish();
    console::note(&format!("wrote {}", out.display()));
    Ok(())
}

/// Bytes of statistics by neuron that stay in memory until it is time to keep a layer.
const HELD_BYTES: usize = 512 << 20;

/// Nothing but the file needs the statistics.
fn fold_options() -> FoldOptions {
    FoldOptions {
        held_bytes: Some(HELD_BYTES),
        ..FoldOptions::default()
    }
}

/// What the run would take.
fn dry_run(model: &Model<'_>, samples: &Samples, json: bool) -> Result<()> {
    let mut forecast = Forecast::new(*model);
    let domains = samples.longest(model);
    if let Some(new_tokens) = samples.new_tokens(model) {
        forecast.generation(&samples.domains, new_tokens)?;
    }
    forecast.calibration(&domains, &fold_options())?;
    let statistics = StatisticsMemory::new(model.config(), domains.len());
    let sizes = Sizes {
        tokens: models::num_tokens(&domains),
        output: statistics.all() as u64,
        is_checkpoint: false,
    };
    forecast.show(sizes, json);
    Ok(())
}

/// Whether a file is what the very same run has written.
fn is_finished(path: &Path, fingerprint: &str) -> bool {
    path.is_file()
        && Statistics::read_tables(path, &|_| false).is_ok_and(|there| there.run == fingerprint)
}

/// Runs samples that are already token ids.
pub(crate) fn run_domains(
    checkpoint: &Checkpoint,
    domains: &[(String, Vec<Vec<u32>>)],
    place: &Place,
) -> Result<Statistics> {
    place.with_model(checkpoint, |model| {
        Ok(run_in_folds(&model, domains, &FoldOptions::default(), None)?.0)
    })
}

/// Where a calibration that is part of something else keeps what it has done.
pub(super) struct Keeping<'a> {
    /// The file or folder that is being made, beside which it is kept.
    pub(super) output: &'a Path,
    pub(super) restart: bool,
    /// Time that is worth keeping.
    pub(super) every: Duration,
}

/// Runs samples that are already token ids, and goes on where an earlier run of the same inputs stopped. What is kept stays
/// until the caller is done with the statistics.
pub(super) fn run_kept(
    model: &Model<'_>,
    domains: &Domains,
    place: &Place,
    keeping: &Keeping<'_>,
) -> Result<(Statistics, Keep)> {
    let checkpoint = model.checkpoint();
    let text = answers::text_inputs(domains);
    let inputs = unfinished::calibration_inputs(checkpoint, text, place);
    let (folds, beside) = (FoldOptions::default(), (keeping.output, CALIBRATION));
    let mut keep = unfinished::keep(beside, inputs, &folds, keeping.restart, keeping.every)?;
    let calibrated = run_in_folds(model, domains, &folds, Some(&mut keep));
    let keep = unfinished::unchanged(checkpoint, keep)?;
    let (statistics, _) = calibrated?;
    unfinished::tell_trouble(&keep);
    Ok((statistics, keep))
}

/// Runs samples, and sums groups of them.
pub(super) fn run_in_folds(
    model: &Model<'_>,
    domains: &[(String, Vec<Vec<u32>>)],
    folds: &FoldOptions,
    keep: Option<&mut Keep>,
) -> Result<(Statistics, Folds)> {
    let layers = model.config().num_layers;
    let tokens = models::num_tokens(domains);
    let total = (tokens * layers) as u64;
    let next = keep
        .as_deref()
        .map_or(0, |keep| keep.next_layer(model.config()));
    if next > 0 {
        console::note(&format!(
            "going on with the calibration at layer {next} of {layers}"
        ));
    }
    let before = model.waited().unwrap_or_default();
    let progress = Progress::new("calibrate", Unit::Tokens, total, layers);
    let progress = progress.going_on((tokens * next) as u64);
    let advance = |_, tokens| progress.advance(tokens as u64);
    let statistics = calibrate_in_folds(model, domains, folds, keep, &advance)?;
    progress.finish();
    if let Some(waited) = model.waited() {
        let weights = waited.weights.saturating_sub(before.weights).as_secs_f64();
        let kernels = waited.kernels.saturating_sub(before.kernels).as_secs_f64();
        console::note(&format!(
            "of that, {weights:.1} s until weights were read, {kernels:.1} s until the GPU was done and its sums were here"
        ));
    }
    Ok(statistics)
}
