//! `plan`: which experts and neurons stay.

use anyhow::Result;
use serde_json::json;
use tenp_checkpoint::{Checkpoint, Plan, Statistics};
use tenp_prune::PruneError;

use crate::cli::PlanCommand;
use crate::{cards, console, models, picture, requests};

pub(super) fn run(args: &PlanCommand) -> Result<()> {
    let request = requests::request(&args.plan)?;
    let checkpoint = models::open(&args.model)?;
    models::check_file("--output", &args.output, Some(&args.model), &[&args.stats])?;
    let tables = request.tables()?;
    let statistics = Statistics::read_tables(&args.stats, &|name| tables.contains(&name))?;
    let plan = requests::plan(&checkpoint, &statistics, &request).map_err(|error| {
        match error.downcast_ref::<PruneError>() {
            Some(PruneError::Fingerprint { .. }) => error.context(args.stats.display().to_string()),
            _ => error,
        }
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
