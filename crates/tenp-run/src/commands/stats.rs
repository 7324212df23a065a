//! `stats merge` and `stats show`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tenp_checkpoint::Statistics;
use tenp_checkpoint::statistics::Share;

use crate::cli::Stats;
use crate::{console, models};

pub(super) fn run(command: Stats) -> Result<()> {
    match command {
        Stats::Merge { files, output } => merge(&files, &output),
        Stats::Show { file, json } => show(&file, json),
    }
}

fn merge(files: &[PathBuf], output: &Path) -> Result<()> {
    let read: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    models::check_file("--output", output, None, &read)?;
    let mut merged: Option<Statistics> = None;
    for file in files {
        let next = Statistics::read(file)?;
        match &mut merged {
            None => merged = Some(next),
            Some(all) => all
                .merge(next)
                .with_context(|| format!("cannot add {}", file.display()))?,
        }
    }
    let Some(merged) = merged else {
        return Ok(());
    };
    merged.write(output)?;
    console::note(&format!("wrote {}", output.display()));
    let missing = merged.missing_shares();
    if !missing.is_empty() {
        console::note(&format!(
            "share(s) {} of the calibration are still missing: merge them too, `plan` asks for --partial-stats without them",
            list(&missing)
        ));
    }
    Ok(())
}

/// `1/4, 3/4`
pub(super) fn list(shares: &[Share]) -> String {
    let shares: Vec<String> = shares.iter().map(Share::to_string).collect();
    shares.join(", ")
}

fn show(file: &Path, as_json: bool) -> Result<()> {
    let statistics = Statistics::read_tables(file, &|_| false)?;
    let domains: Vec<Value> = statistics
        .domains
        .iter()
        .map(|(name, layers)| {
            let tokens = layers.values().map(|l| l.total_tokens).max().unwrap_or(0);
            let unreached: Vec<(usize, usize)> = layers
                .iter()
                .flat_map(|(l, t)| t.tokens.iter().enumerate().filter(|(_, n)| **n == 0).map(move |(e, _)| (*l, e)))
                .collect();
            json!({"domain": name, "tokens": tokens, "layers": layers.keys().collect::<Vec<_>>(), "unreached": unreached})
        })
        .collect();
    let first = statistics.domains.values().flat_map(|l| l.values()).next();
    let (experts, width) = first.map_or((0, 0), |l| (l.num_experts, l.width));
    if as_json {
        console::json(&json!({
            "checkpoint": statistics.checkpoint,
            "version": statistics.version,
            "compute": statistics.compute,
            "missing_shares": statistics.missing_shares().iter().map(Share::to_string).collect::<Vec<_>>(),
            "experts": experts,
            "expert_width": width,
            "domains": domains,
        }));
        return Ok(());
    }
    let mut text = format!(
        "checkpoint  {}\nwritten by  tenp-run {}, compute {}\nexperts     {experts} of width {width}\n\n",
        statistics.checkpoint,
        statistics.version,
        statistics.compute.join(", ")
    );
    let missing = statistics.missing_shares();
    if !missing.is_empty() {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "missing     shares {} of the calibration\n",
            list(&missing)
        );
    }
    let rows: Vec<Vec<String>> = domains
        .iter()
        .map(|d| {
            vec![
                d["domain"].as_str().unwrap_or_default().to_owned(),
                d["tokens"].to_string(),
                d["layers"].as_array().map_or(0, Vec::len).to_string(),
                d["unreached"].as_array().map_or(0, Vec::len).to_string(),
            ]
        })
        .collect();
    text.push_str(&console::table(
        &["domain", "tokens", "MoE layers", "experts without tokens"],
        &rows,
    ));
    console::data(&text);
    Ok(())
}
