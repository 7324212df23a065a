//! `plan`: which experts and neurons stay.

use anyhow::Result;
use serde_json::json;
use tenp_checkpoint::{Checkpoint, Plan, Statistics};

use crate::cli::PlanCommand;
use crate::{cards, console, models, picture, requests};

pub(super) fn run(args: &PlanCommand) -> Result<()> {
    let request = requests::request(&args.plan)?;
    let checkpoint = models::open(&args.model)?;
    let statistics = Statistics::read(&args.stats)?;
    let plan = requests::plan(&checkpoint, &statistics, &request)?;
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
    let mut text = String::new();
    for row in cards::accounting_rows(plan) {
        text.push_str(&format!("{:44} {}\n", row[0], row[1]));
    }
    if !plan.uncalibrated.is_empty() {
        let list: Vec<String> = plan
            .uncalibrated
            .iter()
            .map(|(l, e)| format!("{l}/{e}"))
            .collect();
        text.push_str(&format!(
            "{:44} {} (layer/expert: {})\n",
            "experts without tokens, by weight norm",
            list.len(),
            list.join(", ")
        ));
    }
    text.push('\n');
    text.push_str(&picture::widths(
        plan,
        checkpoint.config().moe.expert_width,
        console::columns(),
    ));
    text
}
