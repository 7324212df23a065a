//! `plan`: which experts and neurons stay.

use anyhow::Result;
use serde_json::json;
use tenp_checkpoint::{Checkpoint, Plan, Statistics};
use tenp_prune::{PlanRequest, PruneError};

use super::stats;
use crate::cli::{DataArgs, DeviceArg, HiddenArgs, MIN_TOKENS, PlanCommand, RunArgs};
use crate::failure::usage;
use crate::place::Place;
use crate::search::{self, Search};
use crate::{cards, console, models, picture, requests};

pub(super) fn run(args: &PlanCommand) -> Result<()> {
    let request = requests::request(&args.plan)?;
    check_data(args, search::measures(&request))?;
    let checkpoint = models::open(&args.model)?;
    models::check_file("--output", &args.output, Some(&args.model), &[&args.stats])?;
    let tables = request.tables()?;
    let statistics = Statistics::read_tables(&args.stats, &|name| tables.contains(&name))?;
    check_whole(args, &statistics)?;
    let plan = make(args, &checkpoint, &statistics, &request).map_err(|error| match error
        .downcast_ref::<PruneError>()
    {
        Some(PruneError::Fingerprint { .. }) => error.context(args.stats.display().to_string()),
        _ => error,
    })?;
    plan.write(&args.output)?;
    if args.json {
        console::json(&json!({
            "method": plan.method,
            "options": plan.options,
            "accounting": plan.accounting,
            "uncalibrated": plan.uncalibrated,
        }));
    } else {
        console::data(&text(&checkpoint, &plan));
    }
    console::note(&format!("wrote {}", args.output.display()));
    Ok(())
}

/// Some shares alone are only planned from where that is meant.
fn check_whole(args: &PlanCommand, statistics: &Statistics) -> Result<()> {
    let missing = statistics.missing_shares();
    let stats = args.stats.display();
    match (args.partial_stats, missing.is_empty()) {
        (true, true) => Err(usage(format!(
            "--partial-stats has no effect: {stats} misses no share of its calibration"
        ))),
        (false, false) => Err(usage(format!(
            "--stats {stats}: share(s) {} of the calibration are not in it; add them with `stats merge`, or plan without \
             them with --partial-stats",
            stats::list(&missing)
        ))),
        _ => Ok(()),
    }
}

/// Text is there exactly where something is measured on it.
fn check_data(args: &PlanCommand, measures: bool) -> Result<()> {
    if matches!(args.run.device, DeviceArg::Cuda(_)) {
        return Err(usage(
            "--device cuda has no effect here: what is measured while planning runs on the CPU; leave it out",
        ));
    }
    match (measures, args.data.is_empty()) {
        (true, true) => Err(usage(
            "--allocation sensitivity and --alpha search are measured on calibration text: give --data",
        )),
        (false, false) => Err(usage(
            "--data has no effect here: such a plan is made from --stats alone; it needs --allocation sensitivity or --alpha search",
        )),
        (false, true) if args.seq_len.is_some() || args.run.compute.is_some() => Err(usage(
            "--seq-len and --compute have no effect without --data",
        )),
        _ => Ok(()),
    }
}

fn make(
    args: &PlanCommand,
    checkpoint: &Checkpoint,
    statistics: &Statistics,
    request: &PlanRequest,
) -> Result<Plan> {
    if args.data.is_empty() {
        return requests::plan(checkpoint, statistics, request);
    }
    // What cannot be planned is refused before anything is measured.
    requests::plan(
        checkpoint,
        statistics,
        &search::rehearsed(request, checkpoint.config())?,
    )?;
    let data = DataArgs {
        data: args.data.clone(),
        samples: args.samples,
        seq_len: args.seq_len,
        min_tokens: MIN_TOKENS,
    };
    let domains = models::Texts::new(checkpoint).domains(&data)?;
    search::check(request, &domains)?;
    let run = RunArgs {
        device: DeviceArg::Cpu,
        ..args.run
    };
    let spill = HiddenArgs::default().spill(&args.output);
    let search = Search::new(
        checkpoint,
        &domains,
        &Place::new(run)?,
        (spill, request.tables()?),
    );
    requests::plan(checkpoint, statistics, &search.settle(statistics, request)?)
}

/// Accounting and picture, for people.
pub(super) fn text(checkpoint: &Checkpoint, plan: &Plan) -> String {
    let mut rows = cards::accounting_rows(plan);
    if !plan.uncalibrated.is_empty() {
        let list: Vec<String> = plan
            .uncalibrated
            .iter()
            .map(|(l, e)| format!("{l}/{e}"))
            .collect();
        rows.push(vec![
            "experts without tokens, by weight norm".to_owned(),
            format!("{} (layer/expert: {})", list.len(), list.join(", ")),
        ]);
    }
    let rows = rows.iter().map(|row| (row[0].as_str(), row[1].as_str()));
    let mut text = console::pairs(rows, 44);
    text.push('\n');
    text.push_str(&picture::widths(
        plan,
        checkpoint.config().moe.expert_width,
        console::columns(),
    ));
    text
}
