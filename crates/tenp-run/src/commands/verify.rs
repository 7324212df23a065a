//! `verify`: is a pruned checkpoint what its plan makes of the original?

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tenp_checkpoint::{Difference, Plan, Verification, verify};

use crate::cli::Verify;
use crate::failure::DifferenceError;
use crate::progress::{Progress, Unit};
use crate::{console, models};

/// Differences that are shown to people.
const SHOWN: usize = 20;

pub(super) fn run(args: &Verify) -> Result<()> {
    models::check_folder(&args.output)?;
    let checkpoint = models::open(&args.against)?;
    let path = args
        .plan
        .clone()
        .unwrap_or_else(|| args.output.join("tenp_plan.json"));
    let plan = Plan::read(&path)?;
    let mut progress: Option<Progress> = None;
    let found = verify(&checkpoint, &plan, &args.output, &mut |done, total| {
        progress
            .get_or_insert_with(|| Progress::new("verify", Unit::Bytes, total, 1))
            .set(done);
    });
    let found = found.with_context(|| format!("cannot verify {}", args.output.display()))?;
    if let Some(progress) = &progress {
        progress.finish();
    }
    if args.json {
        console::json(&as_json(&found));
    } else {
        console::data(&as_text(&found));
    }
    match found.differences.len() {
        0 => Ok(()),
        count => Err(anyhow::Error::new(DifferenceError(format!(
            "{} is not what {} makes of {}: {count} difference(s); write it again with apply --force",
            args.output.display(),
            path.display(),
            args.against.display()
        )))),
    }
}

fn as_json(found: &Verification) -> Value {
    let difference = |d: &Difference| json!({"place": d.place, "problem": d.problem});
    let differences: Vec<Value> = found.differences.iter().map(difference).collect();
    json!({
        "tensors": found.tensors,
        "checked_only_for_shape": found.computed,
        "bytes_compared": found.bytes_compared,
        "differences": differences,
    })
}

fn as_text(found: &Verification) -> String {
    let shown = found.differences.iter().take(SHOWN);
    let mut lines: Vec<String> = shown
        .map(|difference| format!("{}: {}", difference.place, difference.problem))
        .collect();
    let more = found.differences.len().saturating_sub(SHOWN);
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    let computed = match found.computed {
        0 => String::new(),
        count => format!(
            "; {count} hold computed weights, which were checked only for shape, type and finite values"
        ),
    };
    let well = match found.differences.len() {
        0 => "; all as they should be",
        _ => "",
    };
    lines.push(format!(
        "{} tensors, {} compared{computed}{well}\n",
        found.tensors,
        console::bytes(found.bytes_compared)
    ));
    lines.join("\n")
}
