//! `inspect`: what a checkpoint is.

use anyhow::Result;
use serde_json::{Map, Value, json};
use tenp_checkpoint::Checkpoint;

use crate::cli::Inspect;
use crate::{console, models};

pub(super) fn run(args: &Inspect) -> Result<()> {
    let checkpoint = models::open_partial(&args.model)?;
    if args.json {
        console::json(&as_json(&checkpoint));
    } else {
        console::data(&as_text(&checkpoint));
    }
    Ok(())
}

fn dtype(checkpoint: &Checkpoint) -> String {
    format!("{:?}", checkpoint.dtype()).to_lowercase()
}

fn as_json(checkpoint: &Checkpoint) -> Value {
    let (config, size) = (checkpoint.config(), checkpoint.size());
    let mut out = Map::new();
    out.insert("family".into(), json!(config.family.model_type()));
    out.insert("layers".into(), json!(config.num_layers));
    out.insert("moe_layers".into(), json!(config.moe_layers));
    out.insert("experts".into(), json!(config.moe.num_experts));
    out.insert("top_k".into(), json!(config.moe.top_k));
    out.insert("expert_width".into(), json!(config.moe.expert_width));
    if let Some(counts) = differing_counts(checkpoint) {
        out.insert("experts_per_layer".into(), json!(counts));
    }
    if let Some(widths) = &config.widths {
        out.insert("widths".into(), json!(widths));
    }
    let parameters = json!({"total": size.parameters_total, "routed": size.parameters_routed, "active": size.parameters_active});
    out.insert("parameters".into(), parameters);
    out.insert("dtype".into(), json!(dtype(checkpoint)));
    out.insert("bytes".into(), json!(size.bytes_total));
    out.insert("missing_shards".into(), json!(checkpoint.missing_shards()));
    Value::Object(out)
}

/// Experts of every MoE layer, where they differ.
fn differing_counts(checkpoint: &Checkpoint) -> Option<Vec<usize>> {
    let config = checkpoint.config();
    let layers = 0..config.moe_layers.len();
    let counts: Vec<usize> = layers.map(|index| config.num_experts(index)).collect();
    let differ = counts.iter().any(|count| *count != counts[0]);
    differ.then_some(counts)
}

fn as_text(checkpoint: &Checkpoint) -> String {
    let (config, size) = (checkpoint.config(), checkpoint.size());
    let moe = &config.moe;
    let widths = match &config.widths {
        None => moe.expert_width.to_string(),
        Some(widths) => {
            let all = widths.iter().flatten();
            let (min, max) = (all.clone().min().unwrap_or(&0), all.max().unwrap_or(&0));
            format!(
                "{min} to {max} (ragged, before pruning {})",
                moe.expert_width
            )
        }
    };
    let experts = match differing_counts(checkpoint) {
        None => moe.num_experts.to_string(),
        Some(counts) => {
            let (min, max) = (counts.iter().min(), counts.iter().max());
            format!("{} to {}", min.unwrap_or(&0), max.unwrap_or(&0))
        }
    };
    let routed_share = size.parameters_routed as f64 / size.parameters_total.max(1) as f64;
    let mut rows = vec![
        ("family", config.family.model_type().to_owned()),
        (
            "layers",
            format!("{} ({} MoE)", config.num_layers, config.moe_layers.len()),
        ),
        (
            "routed experts",
            format!("{experts} per layer, top-{}", moe.top_k),
        ),
        ("expert width", widths),
        (
            "shared expert",
            if moe.shared_width > 0 {
                moe.shared_width.to_string()
            } else {
                "none".to_owned()
            },
        ),
        ("hidden size", config.hidden_size.to_string()),
        ("vocabulary", config.vocab_size.to_string()),
        ("parameters", console::count(size.parameters_total)),
        (
            "  routed",
            format!(
                "{} ({})",
                console::count(size.parameters_routed),
                console::percent(routed_share)
            ),
        ),
        ("  active per token", console::count(size.parameters_active)),
        ("dtype", dtype(checkpoint)),
        ("bytes", console::bytes(size.bytes_total)),
    ];
    if let Some(original) = checkpoint.pruned_from() {
        rows.push(("pruned from", original.to_string()));
    }
    for shard in checkpoint.missing_shards() {
        rows.push(("missing shard", shard.clone()));
    }
    console::pairs(rows.iter().map(|(name, value)| (*name, value.as_str())), 18)
}
