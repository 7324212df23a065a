//! From flags to a planning request.

use std::path::Path;

use anyhow::Result;
use tenp_checkpoint::{Checkpoint, Folds, LayerStatistics, Plan, Statistics};
use tenp_prune::{Allocation, DernRequest, ModelSize, PlanRequest, Stability};

use crate::cli::{AlphaArg, Normalise, PlanArgs};
use crate::failure::usage;
use crate::search;

/// What the flags ask for.
pub(crate) fn request(args: &PlanArgs) -> Result<PlanRequest> {
    let allocation = args.allocation.as_deref().map(allocation).transpose()?;
    let keep = match (args.keep, &allocation) {
        (Some(_), Some(Allocation::File(_))) => {
            return Err(usage(
                "--keep has no effect with --allocation file:PATH, whose widths are the budget",
            ));
        }
        (Some(keep), _) => keep,
        (None, Some(Allocation::File(_))) => 1.0,
        (None, _) if args.experts.is_some() => 1.0,
        (None, _) => {
            return Err(usage(
                "--keep is missing: the share of neurons to keep, such as --keep 0.6 (or --experts COUNT)",
            ));
        }
    };
    let defaults = PlanRequest::default();
    if args.slope.is_some()
        && allocation
            .as_ref()
            .is_some_and(|a| *a != Allocation::Trapezoid)
    {
        return Err(usage(
            "--slope has no effect with this --allocation; it needs trapezoid",
        ));
    }
    Ok(PlanRequest {
        method: args.method,
        keep,
        alpha: match args.alpha {
            Some(AlphaArg::Share(share)) => Some(share),
            Some(AlphaArg::Search) | None => None,
        },
        search_alpha: args.alpha == Some(AlphaArg::Search),
        alphas_tried: Vec::new(),
        slope: args.slope.unwrap_or(defaults.slope),
        width_multiple: args.width_multiple,
        allocation,
        expert_score: args.expert_score,
        neuron_score: args.neuron_score,
        protect_super: args.protect_super,
        exact: args.exact,
        error_scale: args.error_scale,
        normalise_layer: args.normalise.contains(&Normalise::Layer),
        normalise_domains: args.normalise.contains(&Normalise::Domains),
        domain_weights: args.domain_weight.iter().cloned().collect(),
        seed: args.seed,
        experts: args.experts.clone(),
        dern: DernRequest {
            lambda: args.dern.lambda,
            threshold: args.dern.threshold,
            router: args.dern.router.map(Into::into),
            initialisation: args.dern.init.map(Into::into),
            merge_weights: args.dern.merge_weights.map(Into::into),
            sign_canonical: args.dern.sign_canonical,
        },
    })
}

fn allocation(text: &str) -> Result<Allocation> {
    match text.split_once(':') {
        Some(("file", path)) => Ok(Allocation::File(widths(Path::new(path))?)),
        _ => match text {
            "trapezoid" => Ok(Allocation::Trapezoid),
            "uniform" => Ok(Allocation::Uniform),
            "global" => Ok(Allocation::Global),
            "sensitivity" => Ok(Allocation::Sensitivity(None)),
            _ => Err(usage(format!(
                "--allocation {text}: expected trapezoid, uniform, global, sensitivity or file:PATH"
            ))),
        },
    }
}

/// Widths from JSON: `[[…], …]`, or an object whose `widths` (or `tenp.widths`, a ragged config) is that.
fn widths(path: &Path) -> Result<Vec<Vec<usize>>> {
    let text = std::fs::read(path)
        .map_err(|e| usage(format!("--allocation file:{}: {e}", path.display())))?;
    let value: serde_json::Value = serde_json::from_slice(&text)
        .map_err(|e| usage(format!("--allocation file:{}: {e}", path.display())))?;
    let found = [&value, &value["widths"], &value["tenp"]["widths"]]
        .into_iter()
        .find(|v| v.is_array());
    found
        .and_then(|v| serde_json::from_value(v.clone()).ok())
        .ok_or_else(|| {
            let what = "expected widths as [[width, …], …], one list per MoE layer";
            usage(format!("--allocation file:{}: {what}", path.display()))
        })
}

/// The plan that statistics without any token would give. Its widths and neurons mean nothing, but it has the size of
/// the real one, and what cannot be planned is refused here, before a calibration that may take hours.
pub(crate) fn rehearse<'d>(
    checkpoint: &Checkpoint,
    domains: impl IntoIterator<Item = &'d str>,
    request: &PlanRequest,
) -> Result<Plan> {
    let config = checkpoint.config();
    let zeros = || LayerStatistics::zeros(config.moe.num_experts, config.moe.expert_width);
    let layers = || config.moe_layers.iter().map(|&layer| (layer, zeros()));
    let statistics = Statistics {
        checkpoint: checkpoint.fingerprint().to_owned(),
        domains: domains
            .into_iter()
            .map(|domain| (domain.to_owned(), layers().collect()))
            .collect(),
        ..Statistics::default()
    };
    plan(
        checkpoint,
        &statistics,
        &search::rehearsed(request, config)?,
    )
}

/// Plans a checkpoint from its statistics.
pub(crate) fn plan(
    checkpoint: &Checkpoint,
    statistics: &Statistics,
    request: &PlanRequest,
) -> Result<Plan> {
    if let Some(original) = checkpoint.pruned_from() {
        let dir = checkpoint.dir().display();
        return Err(usage(format!(
            "{dir} is already pruned (from {original}); plan from the original checkpoint"
        )));
    }
    Ok(tenp_prune::plan(
        checkpoint.config(),
        &model_size(checkpoint)?,
        checkpoint.fingerprint(),
        statistics,
        request,
    )?)
}

/// How much a plan depends on its samples, if they were kept in groups.
pub(crate) fn stability(
    checkpoint: &Checkpoint,
    (statistics, folds): (&Statistics, &Folds),
    request: &PlanRequest,
    plan: &Plan,
) -> Result<Option<Stability>> {
    let size = model_size(checkpoint)?;
    let model = (checkpoint.config(), &size, checkpoint.fingerprint());
    Ok(tenp_prune::stability(
        model,
        (statistics, folds),
        request,
        plan,
    )?)
}

fn model_size(checkpoint: &Checkpoint) -> Result<ModelSize> {
    let size = checkpoint.size();
    let config = checkpoint.config();
    let layer = config.moe_layers.first().copied().unwrap_or_default();
    let router = checkpoint.router(layer)?;
    let bias_bytes = match router.correction_bias {
        Some(_) => checkpoint
            .tensor(&checkpoint.spelling().correction_bias(layer))?
            .dtype
            .size() as u64,
        None => 0,
    };
    let row = config.hidden_size as u64;
    Ok(ModelSize {
        parameters_total: size.parameters_total,
        parameters_routed: size.parameters_routed,
        bytes_total: size.bytes_total,
        routed_bytes: size.bytes_routed,
        router_row_bytes: row * router.weight.dtype.size() as u64 + bias_bytes,
        router_row_parameters: row + u64::from(bias_bytes > 0),
    })
}
