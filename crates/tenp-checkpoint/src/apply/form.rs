//! Which kind of checkpoint a plan becomes, and what its `config.json` says.

use serde_json::{Map, Value, json};

use super::{ApplyOptions, Mtp, OutputDtype, OutputForm, mtp};
use crate::config::{RAGGED_PREFIX, has_scales_of_powers_of_two};
use crate::names::Spelling;
use crate::plan::{LayerPlan, Plan};
use crate::{Checkpoint, CheckpointError, ModelConfig};

/// What really comes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing is cut.
    Identical,
    /// Whole experts or MTP layers are dropped, or fp8 is left; no expert is narrowed.
    Stock,
    Ragged,
    Padded,
    /// One width for all.
    Uniform(usize),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    pub(super) kind: Kind,
    pub(super) dtype: OutputDtype,
    pub(super) mtp: Mtp,
    /// Experts per layer; the most of any layer where they differ.
    pub(super) num_experts: usize,
    /// Width of the shared expert.
    pub(super) shared_width: usize,
    pub(super) spelling: Spelling,
}

pub(super) fn decide(
    checkpoint: &Checkpoint,
    plan: &Plan,
    options: &ApplyOptions,
) -> Result<Output, CheckpointError> {
    let (form, dtype) = (options.form, options.dtype);
    let config = checkpoint.config();
    let converted = dtype == OutputDtype::Bf16 && checkpoint.is_fp8();
    let lost = options.mtp == Mtp::Drop && checkpoint.has_mtp();
    let kind = if plan.keeps_everything(config) && !converted && !lost {
        Kind::Identical
    } else if plan.is_stock(config) {
        Kind::Stock
    } else {
        check_counts(plan, form)?;
        match form {
            OutputForm::Ragged => Kind::Ragged,
            OutputForm::Padded => Kind::Padded,
            OutputForm::Uniform => Kind::Uniform(uniform_width(plan)?),
        }
    };
    let copies = kind == Kind::Identical || (kind == Kind::Stock && plan.dern.is_none());
    if dtype == OutputDtype::Same
        && !copies
        && has_scales_of_powers_of_two(checkpoint.config_json())
    {
        return Err(CheckpointError::Form {
            form: form.name(),
            problem: "the scales of this fp8 checkpoint are powers of two (scale_fmt ue8m0), which new scales would not be; write \
                      bf16 with --dtype bf16"
                .to_owned(),
        });
    }
    let shared = config.moe.shared_width;
    let most = plan.num_experts().into_iter().max();
    let num_experts = most.unwrap_or(config.moe.num_experts);
    if options.mtp == Mtp::Keep {
        mtp::check_kept(checkpoint, kind, num_experts, form.name())?;
    }
    Ok(Output {
        kind,
        dtype,
        mtp: options.mtp,
        num_experts,
        shared_width: match kind {
            Kind::Uniform(width) if config.family.follows_deepseek() => {
                shared.next_multiple_of(width)
            }
            _ => shared,
        },
        spelling: match kind {
            Kind::Ragged => Spelling::classic(config.family),
            _ => checkpoint.spelling(),
        },
    })
}

/// Stock configs have one field for the number of experts, and no form brings a dropped one back.
fn check_counts(plan: &Plan, form: OutputForm) -> Result<(), CheckpointError> {
    if form == OutputForm::Ragged || plan.same_num_experts().is_some() {
        return Ok(());
    }
    let counts = plan.num_experts();
    let (least, most) = (counts.iter().min(), counts.iter().max());
    Err(CheckpointError::Form {
        form: form.name(),
        problem: format!(
            "its layers keep {} to {} experts, and a stock architecture has one number for all; no form brings a dropped \
             expert back: keep as many in every layer, or use the ragged form",
            least.unwrap_or(&0),
            most.unwrap_or(&0)
        ),
    })
}

fn uniform_width(plan: &Plan) -> Result<usize, CheckpointError> {
    let refuse = |problem: String| {
        Err(CheckpointError::Form {
            form: "uniform",
            problem,
        })
    };
    match plan.uniform_width() {
        Some(0) => refuse("its experts have width 0; keep more, or use the ragged form".to_owned()),
        Some(width) => Ok(width),
        None => {
            let widths = plan.widths().concat();
            let least = widths.iter().min().copied().unwrap_or(0);
            let most = widths.iter().max().copied().unwrap_or(0);
            refuse(format!(
                "its experts are {least} to {most} neurons wide; make the plan with `--method enp`, or use the ragged form"
            ))
        }
    }
}

/// The output's `config.json`.
pub(super) fn config(
    checkpoint: &Checkpoint,
    plan: &Plan,
    mtp: &[LayerPlan],
    output: &Output,
) -> Value {
    let config = checkpoint.config();
    let mut json = checkpoint.config_json().clone();
    keep_remote_code(&mut json);
    if output.dtype == OutputDtype::Bf16 {
        json.shift_remove("quantization_config");
    }
    if output.num_experts != config.moe.num_experts {
        for field in config.family.count_fields() {
            if json.get(field).is_some_and(|value| !value.is_null()) {
                json.insert(field.to_owned(), json!(output.num_experts));
            }
        }
    }
    if output.mtp == Mtp::Drop && config.num_mtp_layers > 0 {
        json.insert("num_nextn_predict_layers".to_owned(), json!(0));
    }
    match output.kind {
        Kind::Ragged => ragged(&mut json, config),
        Kind::Uniform(width) => uniform(&mut json, config, width, output.shared_width),
        Kind::Identical | Kind::Stock | Kind::Padded => {}
    }
    // Also in stock checkpoints, whose loaders ignore it: a padded one would otherwise have the original's fingerprint.
    let mut origin = json!({ "version": 1, "form": output.name() });
    if output.kind == Kind::Ragged {
        origin["widths"] = json!(plan.widths());
        let kept = mtp::layers(checkpoint);
        if output.mtp != Mtp::Drop && !kept.is_empty() {
            let whole = vec![config.moe.expert_width; config.moe.num_experts];
            origin["mtp_widths"] = match mtp {
                [] => json!(vec![whole; kept.len()]),
                pruned => json!(pruned.iter().map(LayerPlan::widths).collect::<Vec<_>>()),
            };
        }
    }
    origin["source_fingerprint"] = json!(checkpoint.fingerprint());
    json.insert("tenp".to_owned(), origin);
    Value::Object(json)
}

/// Code files are not copied, so only references into other repositories (`owner/name--module.Class`) still hold.
fn keep_remote_code(json: &mut Map<String, Value>) {
    let Some(map) = json.get_mut("auto_map").and_then(Value::as_object_mut) else {
        return;
    };
    map.retain(|_, target| target.as_str().is_some_and(|target| target.contains("--")));
    if map.is_empty() {
        json.shift_remove("auto_map");
    }
}

/// Engines that do not know ragged experts must not take this for a stock model: some copy smaller tensors into the
/// corner of their buffers without an error.
fn ragged(json: &mut Map<String, Value>, config: &ModelConfig) {
    let family = config.family;
    json.shift_remove("auto_map");
    let architectures: Vec<String> = json
        .get("architectures")
        .and_then(Value::as_array)
        .map(|names| names.iter().filter_map(Value::as_str).collect::<Vec<_>>())
        .filter(|names| !names.is_empty())
        .unwrap_or_else(|| vec![family.architecture()])
        .into_iter()
        .map(|name| format!("Tenp{name}"))
        .collect();
    json.insert("architectures".to_owned(), json!(architectures));
    json.insert(
        "model_type".to_owned(),
        json!(format!("{RAGGED_PREFIX}{}", family.model_type())),
    );
}

fn uniform(json: &mut Map<String, Value>, config: &ModelConfig, width: usize, shared: usize) {
    json.insert(config.family.width_field().to_owned(), json!(width));
    // DeepSeek loaders compute the shared width as this count times the experts' width.
    if config.family.follows_deepseek() && shared > 0 {
        json.insert("n_shared_experts".to_owned(), json!(shared / width));
    }
}
