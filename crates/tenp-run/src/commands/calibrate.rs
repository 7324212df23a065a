//! `calibrate`: every statistic in one pass.

use anyhow::Result;
use tenp_checkpoint::{Checkpoint, Statistics};
use tenp_model::{Model, calibrate};

use crate::cli::Calibrate;
use crate::place::Place;
use crate::progress::{Progress, Unit};
use crate::{console, models};

pub(super) fn run(args: &Calibrate) -> Result<()> {
    let checkpoint = models::open(&args.model)?;
    let read = args.data.files();
    models::check_file("--output", &args.output, Some(&args.model), &read)?;
    let place = Place::new(args.run)?;
    let domains = models::Texts::new(&checkpoint).domains(&args.data)?;
    let statistics = run_domains(&checkpoint, &domains, &place)?;
    statistics.write(&args.output)?;
    console::note(&format!("wrote {}", args.output.display()));
    Ok(())
}

/// Runs samples that are already token ids.
pub(super) fn run_domains(
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
    let layers = model.config().num_layers;
    let total = models::num_tokens(domains) * layers;
    let progress = Progress::new("calibrate", Unit::Tokens, total as u64, layers);
    let advance = |_, tokens| progress.advance(tokens as u64);
    let statistics = calibrate::calibrate(model, domains, &advance)?;
    progress.finish();
    report_unreached(&statistics);
    Ok(statistics)
}

fn report_unreached(statistics: &Statistics) {
    let mut reached: std::collections::BTreeMap<usize, Vec<bool>> =
        std::collections::BTreeMap::new();
    for layers in statistics.domains.values() {
        for (layer, table) in layers {
            let seen = reached
                .entry(*layer)
                .or_insert_with(|| vec![false; table.num_experts]);
            for (seen, tokens) in seen.iter_mut().zip(&table.tokens) {
                *seen |= *tokens > 0;
            }
        }
    }
    let missed: Vec<String> = reached
        .iter()
        .flat_map(|(l, seen)| {
            seen.iter()
                .enumerate()
                .filter(|(_, s)| !**s)
                .map(move |(e, _)| format!("{l}/{e}"))
        })
        .collect();
    if !missed.is_empty() {
        let shown = missed
            .iter()
            .take(20)
            .cloned()
            .collect::<Vec<_>>()
            .join(", ");
        let more = if missed.len() > 20 { ", …" } else { "" };
        console::note(&format!(
            "{} experts saw no token (layer/expert): {shown}{more}; more or other calibration text would reach them",
            missed.len()
        ));
    }
}
