//! `prune`: calibrate, plan and apply.

use anyhow::Result;
use serde_json::json;
use tenp_checkpoint::{check_form, check_output};
use tenp_model::Model;

use crate::cli::{FormArg, Prune};
use crate::failure::usage;
use crate::place::Place;
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
    let place = Place::new(args.run)?;
    if args.dry_run {
        let bytes_after = match args.output.form {
            FormArg::Padded if !rehearsed.drops_experts() => rehearsed.accounting.bytes_before,
            _ => rehearsed.accounting.bytes_after,
        };
        let tokens = models::num_tokens(&domains);
        return place.with_model(&checkpoint, |model| {
            dry_run(&model, args, bytes_after, tokens)
        });
    }
    let statistics = super::calibrate::run_domains(&checkpoint, &domains, &place)?;
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
fn dry_run(model: &Model<'_>, args: &Prune, bytes_after: u64, tokens: usize) -> Result<()> {
    let (size, config) = (model.checkpoint().size(), model.config());
    let memory = model.working_bytes(tokens);
    // The forward pass, and a third of the routed part again for the contributions.
    let routed_active =
        size.parameters_routed as f64 * config.moe.top_k as f64 / config.moe.num_experts as f64;
    let flops = tokens as f64 * (2.0 * size.parameters_active as f64 + 2.0 * routed_active / 3.0);
    let rate = model.measured_rate()?;
    let seconds = flops / rate;
    if args.json {
        console::json(&json!({
            "tokens": tokens,
            "bytes_before": size.bytes_total,
            "bytes_after": bytes_after,
            "memory_bytes": memory.host,
            "device_bytes": memory.device,
            "disk_bytes": bytes_after,
            "compute_seconds": seconds,
            "bytes_read": 2 * size.bytes_total,
        }));
        return Ok(());
    }
    let mut rows = vec![
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
            console::bytes(memory.host as u64),
        ),
    ];
    if let Some(bytes) = memory.device {
        rows.push(("peak GPU memory", console::bytes(bytes as u64)));
    }
    rows.push((
        "calibration arithmetic",
        format!(
            "{seconds:.0} s at the {:.0} GFLOP/s measured just now",
            rate / 1e9
        ),
    ));
    rows.push((
        "read",
        format!(
            "{} (once to calibrate, once to write)",
            console::bytes(2 * size.bytes_total)
        ),
    ));
    let rows = rows.iter().map(|(name, value)| (*name, value.as_str()));
    console::data(&console::pairs(rows, 36));
    Ok(())
}
