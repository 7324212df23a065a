//! What is written beside the weights: the model card and the report.

use serde_json::{Map, Value, json};
use tenp_checkpoint::{Checkpoint, OutputForm, Plan};

use crate::{console, picture};

/// The command line as the person typed it, without `--threads`, of which no result depends.
pub(crate) fn command_line() -> String {
    // Paths need not be UTF-8.
    let words = std::env::args_os()
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned());
    let mut threads = false;
    let typed = words.filter(|word| {
        let value = std::mem::replace(&mut threads, word == "--threads");
        !value && !threads && !word.starts_with("--threads=")
    });
    let quoted = std::iter::once("tenp-run".to_owned())
        .chain(typed)
        .map(|word| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+".contains(c);
            if !word.is_empty() && word.chars().all(plain) {
                word
            } else {
                format!("'{}'", word.replace('\'', r"'\''"))
            }
        });
    quoted.collect::<Vec<_>>().join(" ")
}

fn base_name(checkpoint: &Checkpoint) -> String {
    let dir = checkpoint
        .dir()
        .canonicalize()
        .unwrap_or_else(|_| checkpoint.dir().to_path_buf());
    dir.file_name()
        .map_or_else(String::new, |n| n.to_string_lossy().into_owned())
}

/// A setting for people: numbers to six digits.
fn shown(value: &Value) -> String {
    match value.as_f64() {
        Some(number) if value.is_f64() => ((number * 1e6).round() / 1e6).to_string(),
        _ => value.to_string(),
    }
}

/// Rows of the accounting, for people.
pub(crate) fn accounting_rows(plan: &Plan) -> Vec<Vec<String>> {
    let a = &plan.accounting;
    [
        ("routed-expert parameters kept (E)", console::percent(a.E)),
        (
            "routed-expert parameters run per token (A)",
            console::percent(a.A),
        ),
        ("activations on whole experts (f)", console::percent(a.f)),
        ("whole model kept", console::percent(a.model)),
        (
            "bytes",
            format!(
                "{} → {}",
                console::bytes(a.bytes_before),
                console::bytes(a.bytes_after)
            ),
        ),
    ]
    .into_iter()
    .map(|(name, value)| vec![name.to_owned(), value])
    .collect()
}

/// `report.json`, but for what the writer adds.
pub(crate) fn report(
    checkpoint: &Checkpoint,
    plan: &Plan,
    calibration: Map<String, Value>,
) -> Map<String, Value> {
    let config = checkpoint.config();
    let layers: Vec<Value> = plan
        .layers
        .iter()
        .map(|layer| {
            let widths: Vec<usize> = layer.experts.iter().map(|e| e.width).collect();
            json!({
                "layer": layer.layer,
                "kept": widths.iter().sum::<usize>() as f64
                    / (config.moe.num_experts * config.moe.expert_width).max(1) as f64,
                "whole_experts": widths.iter().filter(|w| **w == config.moe.expert_width).count(),
                "dropped_experts": layer.experts.iter().filter(|e| e.dropped).count(),
                "widths": widths,
            })
        })
        .collect();
    let mut report = Map::new();
    report.insert(
        "program".into(),
        json!(format!("tenp-run {}", env!("CARGO_PKG_VERSION"))),
    );
    report.insert("command".into(), json!(command_line()));
    report.insert("method".into(), json!(plan.method));
    report.insert("options".into(), Value::Object(plan.options.clone()));
    report.insert("accounting".into(), json!(plan.accounting));
    report.insert("layers".into(), json!(layers));
    report.insert("uncalibrated".into(), json!(plan.uncalibrated));
    report.insert("expert_width".into(), json!(config.moe.expert_width));
    report.extend(calibration);
    report
}

/// The output's `README.md`.
pub(crate) fn model_card(checkpoint: &Checkpoint, plan: &Plan, form: OutputForm) -> String {
    let config = checkpoint.config();
    let base = base_name(checkpoint);
    let identical = plan.keeps_everything(config);
    let stock = identical || plan.is_stock(config);
    let loads = if identical {
        "Everything is kept: this is an identical copy of the base model and loads wherever it does."
    } else if stock {
        "Fewer experts of the old width in the stock architecture: loads in stock transformers and in engines that \
         accept this number of experts."
    } else {
        match form {
            OutputForm::Ragged if plan.same_num_experts().is_none() => {
                "A different number of experts in different layers: runs in `tenp-run` and in engines built on the \
                 `tenp-kernels` crate. Stock loaders refuse it by its architecture name; keep as many experts in every \
                 layer for an output that they load."
            }
            OutputForm::Ragged => {
                "Experts of different width: runs in `tenp-run` and in engines built on the `tenp-kernels` crate. Stock \
                 loaders refuse it by its architecture name; write `--form padded` for a copy that loads everywhere."
            }
            OutputForm::Padded => {
                "Narrow experts are padded with zeros to the old width: loads wherever the base model does, with the \
                 logits of the ragged form and without its saving."
            }
            OutputForm::Uniform => {
                "One width for all experts in the stock architecture: loads in stock transformers, vLLM, SGLang, \
                 llama.cpp converters and others."
            }
        }
    };
    let rows = accounting_rows(plan);
    let rows: Vec<String> = rows
        .iter()
        .map(|r| format!("| {} | {} |", r[0], r[1]))
        .collect();
    let rows = rows.join("\n");
    let options = plan
        .options
        .iter()
        .map(|(k, v)| format!("`{k}` {}", shown(v)))
        .collect::<Vec<_>>()
        .join(", ");
    let uncalibrated = match plan.uncalibrated.len() {
        0 => String::new(),
        n => {
            let list: Vec<String> = plan
                .uncalibrated
                .iter()
                .map(|(l, e)| format!("{l}/{e}"))
                .collect();
            format!(
                "\n{n} experts saw no calibration token and were scored by weight norm (layer/expert): {}.\n",
                list.join(", ")
            )
        }
    };
    format!(
        "---\nbase_model: {quoted}\ntags:\n- mixture-of-experts\n- pruned\n- tenp\n---\n\
         # {base}, pruned with {method}\n\n\
         Made from `{base}` (fingerprint `{fingerprint}`) by\n\n    {command}\n\n\
         | | |\n|---|---|\n{rows}\n\n\
         {loads}\n\n\
         ## Widths\n\n```text\n{picture}```\n\nMethod `{method}`: {options}.\n{uncalibrated}\
         Kept neuron ids are in `tenp_plan.json`, all figures in `report.json`, pictures in `report.html`.\n",
        // A JSON text is a YAML text.
        quoted = json!(base),
        method = plan.method,
        fingerprint = checkpoint.fingerprint(),
        command = command_line(),
        picture = picture::widths(plan, config.moe.expert_width, 100),
    )
}
