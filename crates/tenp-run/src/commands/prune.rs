//! `prune`: calibrate, plan and apply.

use std::time::Instant;

use anyhow::Result;
use serde_json::json;
use tenp_checkpoint::{Checkpoint, check_form, check_output};
use tenp_kernels::cpu::linear::linear;
use tenp_kernels::{Compute, MatrixView};
use tenp_model::Model;

use crate::cli::{FormArg, Prune};
use crate::failure::usage;
use crate::{console, models, requests};

pub(super) fn run(args: &Prune) -> Result<()> {
    let request = requests::request(&args.plan)?;
    let checkpoint = models::open(&args.model)?;
    if let Some(original) = checkpoint.pruned_from() {
        let dir = args.model.display();
        return Err(usage(format!(
            "{dir} is already pruned (from {original}); prune the original checkpoint"
        )));
    }
    check_output(&checkpoint, &args.output.output, args.output.force)?;
    if let Some(path) = &args.save_stats {
        models::check_file("--save-stats", path, Some(&args.model))?;
    }
    let names = args.data.data.iter().map(|data| data.domain.as_str());
    let rehearsed = requests::rehearse(&checkpoint, names, &request)?;
    check_form(&checkpoint, &rehearsed, args.output.form.into())?;
    let domains = models::Texts::new(&checkpoint).domains(&args.data)?;
    if args.dry_run {
        let bytes_after = match args.output.form {
            FormArg::Padded if !rehearsed.drops_experts() => rehearsed.accounting.bytes_before,
            _ => rehearsed.accounting.bytes_after,
        };
        return dry_run(&checkpoint, args, bytes_after, models::num_tokens(&domains));
    }
    let statistics = super::calibrate::run_domains(&checkpoint, &domains, args.compute.into())?;
    if let Some(path) = &args.save_stats {
        statistics.write(path)?;
        console::note(&format!("wrote {}", path.display()));
    }
    let plan = requests::plan(&checkpoint, &statistics, &request)?;
    let calibration = json!({
        "domains": domains.iter().map(|(name, samples)| {
            json!({"domain": name, "samples": samples.len(), "tokens": samples.iter().map(Vec::len).sum::<usize>()})
        }).collect::<Vec<_>>(),
        "compute": statistics.compute,
    });
    let outcome = super::apply::write(&checkpoint, &plan, &args.output, Some(calibration))?;
    if args.json {
        console::json(&super::apply::outcome_json(&plan, outcome));
    } else {
        console::data(&super::plan::text(&checkpoint, &plan));
    }
    Ok(())
}

/// What the run would take. The time is the arithmetic at the rate this machine shows in a short product.
fn dry_run(checkpoint: &Checkpoint, args: &Prune, bytes_after: u64, tokens: usize) -> Result<()> {
    let (size, config) = (checkpoint.size(), checkpoint.config());
    let compute: Compute = args.compute.into();
    let model = Model::new(checkpoint, compute);
    let memory = model.working_bytes(tokens);
    // The forward pass, and a third of the routed part again for the contributions.
    let routed_active =
        size.parameters_routed as f64 * config.moe.top_k as f64 / config.moe.num_experts as f64;
    let flops = tokens as f64 * (2.0 * size.parameters_active as f64 + 2.0 * routed_active / 3.0);
    let rate = measured_rate(compute)?;
    let seconds = flops / rate;
    if args.json {
        console::json(&json!({
            "tokens": tokens,
            "bytes_before": size.bytes_total,
            "bytes_after": bytes_after,
            "memory_bytes": memory,
            "disk_bytes": bytes_after,
            "compute_seconds": seconds,
            "bytes_read": 2 * size.bytes_total,
        }));
        return Ok(());
    }
    let rows = [
        ("calibration tokens", tokens.to_string()),
        (
            "model",
            format!(
                "{} → {}",
                console::bytes(size.bytes_total),
                console::bytes(bytes_after)
            ),
        ),
        ("disk needed", console::bytes(bytes_after)),
        (
            "peak memory beside the mapped file",
            console::bytes(memory as u64),
        ),
        (
            "calibration arithmetic",
            format!(
                "{seconds:.0} s at the {:.0} GFLOP/s measured just now",
                rate / 1e9
            ),
        ),
        (
            "read",
            format!(
                "{} (once to calibrate, once to write)",
                console::bytes(2 * size.bytes_total)
            ),
        ),
    ];
    let rows = rows.iter().map(|(name, value)| (*name, value.as_str()));
    console::data(&console::pairs(rows, 36));
    Ok(())
}

/// FLOP/s of a product of the calibration's kind.
fn measured_rate(compute: Compute) -> Result<f64> {
    let (rows, inner, outputs) = (448, 1024, 1024);
    let x: Vec<f32> = (0..rows * inner)
        .map(|i| (i % 17) as f32 * 0.1 - 0.8)
        .collect();
    let w: Vec<f32> = (0..outputs * inner)
        .map(|i| (i % 13) as f32 * 0.1 - 0.6)
        .collect();
    let weight = MatrixView::from_f32(outputs, inner, &w)?;
    let mut out = vec![0.0; rows * outputs];
    linear(compute, &x, &weight, None, &mut out)?;
    let started = Instant::now();
    let mut runs = 0;
    while started.elapsed().as_secs_f64() < 0.3 {
        linear(compute, &x, &weight, None, &mut out)?;
        runs += 1;
    }
    Ok((2 * rows * inner * outputs * runs) as f64 / started.elapsed().as_secs_f64())
}
