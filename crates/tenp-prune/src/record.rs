//! The decision values written into a plan, so that it explains itself.

use serde_json::{Map, Value, json};

use crate::calibration::Calibration;
use crate::plan::{Decision, positions};
use crate::request::{Choice, PlanRequest, Target};

/// Every value that had a part in the decision, in a fixed order; what had none is absent.
pub(crate) fn options(
    calibration: &Calibration<'_>,
    request: &PlanRequest,
    choice: &Choice<'_>,
    decision: &Decision,
    guarded: &[Vec<bool>],
) -> Map<String, Value> {
    let mut options = Map::new();
    let mut record = |name: &str, value: Value| {
        options.insert(name.to_owned(), value);
    };
    if let Some(experts) = &request.experts {
        record("experts", one_or_all(experts));
    } else if !matches!(choice.target, Target::File(_)) {
        record("keep", json!(request.keep));
    }
    if let Some(allocation) = choice.target.allocation_name() {
        record("allocation", json!(allocation));
    }
    if matches!(choice.target, Target::Uniform | Target::UniformExact) {
        record("exact", json!(request.exact));
    }
    if let Target::Trapezoid { alpha, slope } = choice.target {
        record("alpha", json!(alpha));
        record("slope", json!(slope));
        if !request.alphas_tried.is_empty() {
            record("alphas_tried", json!(request.alphas_tried));
        }
    }
    if let Some(quantum) = decision.quantum {
        record("width_multiple", json!(quantum));
    }
    if let Some(whole) = &decision.whole_experts {
        record("whole_experts", json!(whole));
    }
    if let Some(kept) = &decision.kept {
        record("experts_kept", one_or_all(kept));
    }
    if choice.uses_expert_score() {
        record("expert_score", json!(choice.expert_score.name()));
    }
    if choice.uses_neuron_score() {
        record("neuron_score", json!(choice.neuron_score.name()));
        record("normalise_domains", json!(request.normalise_domains));
    }
    if choice.target == Target::Global {
        record("normalise_layer", json!(request.normalise_layer));
    }
    if let Some(sensitivity) = &decision.sensitivity {
        record("error_scale", json!(sensitivity.scale));
        record(
            "sensitivity",
            json!({
                "widths": sensitivity.measured,
                "layer_errors": sensitivity.curves,
                "error": sensitivity.error,
                "bound": sensitivity.bound,
            }),
        );
    }
    record("domain_weights", domain_weights(calibration, request));
    record("protect_super", json!(request.protect_super));
    if request.protect_super {
        record(
            "guarded",
            json!(positions(guarded, calibration.layer_ids())),
        );
    }
    if choice.uses_seed() || (choice.merges.is_some() && request.dern.starts_at_random()) {
        record("seed", json!(request.seed));
    }
    options
}

/// One number where it is the same for all layers.
fn one_or_all(counts: &[usize]) -> Value {
    match counts.split_first() {
        Some((first, others)) if others.iter().all(|other| other == first) => json!(first),
        _ => json!(counts),
    }
}

/// The weights that counted, and the domains that were left out.
fn domain_weights(calibration: &Calibration<'_>, request: &PlanRequest) -> Value {
    let mut weights = request.domain_weights.clone();
    for domain in calibration.domains() {
        weights.insert(domain.name.to_owned(), domain.weight);
    }
    json!(weights)
}
