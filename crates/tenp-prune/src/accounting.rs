//! What a plan keeps: `docs/methods.md`, "Accounting".

use tenp_checkpoint::plan::{Accounting, LayerPlan};

use crate::calibration::Calibration;

/// Sizes of a checkpoint, as its reader counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelSize {
    /// Parameters of all tensors.
    pub parameters_total: u64,
    /// Parameters of the routed experts that a plan covers (those of the MoE layers).
    pub parameters_routed: u64,
    /// Bytes of all tensors.
    pub bytes_total: u64,
    /// Bytes of the same routed experts.
    pub routed_bytes: u64,
    /// Bytes of one router row, its bias element included: what an expert dropped from one layer takes with it.
    pub router_row_bytes: u64,
    /// Parameters of one router row, its bias element included.
    pub router_row_parameters: u64,
}

/// The shares and bytes a plan keeps.
///
/// `E` counts neurons (all cost the same). `A` and `f` use the calibration routing: tokens (summed over domains) times
/// width, and the tokens on whole experts. Tokens of a dropped expert go to the experts that stay in its layer, in
/// proportion to their own: the router still chooses top-k. So plans that drop experts and keep the others whole have
/// `A = f = 1`: they save memory, not arithmetic. Without a token anywhere, `A = E` and `f` is the whole experts'
/// share of the experts in the router.
pub fn accounting(
    calibration: &Calibration<'_>,
    size: &ModelSize,
    layers: &[LayerPlan],
) -> Accounting {
    let shape = calibration.shape();
    let neurons = shape.num_neurons() as u64;
    let experts = || layers.iter().flat_map(|layer| &layer.experts);
    let kept = experts()
        .map(|expert| expert.width as u64)
        .sum::<u64>()
        .min(neurons);
    let dropped = experts().filter(|expert| expert.dropped).count() as u64;

    let routed = Routed::of(calibration, layers);
    let removed = neurons - kept;
    let lost = |of: u64, row: u64| {
        share_of(of, removed, neurons).saturating_add(row.saturating_mul(dropped))
    };
    let parameters_after = size
        .parameters_total
        .saturating_sub(lost(size.parameters_routed, size.router_row_parameters));
    let kept_share = ratio(kept as f64, neurons as f64).unwrap_or(1.0);
    Accounting {
        E: kept_share,
        A: routed.executed.unwrap_or(kept_share).min(1.0),
        f: routed.on_whole.min(1.0),
        model: ratio(parameters_after as f64, size.parameters_total as f64).unwrap_or(1.0),
        bytes_before: size.bytes_total,
        bytes_after: size
            .bytes_total
            .saturating_sub(lost(size.routed_bytes, size.router_row_bytes)),
    }
}

/// Where the calibration tokens land after pruning.
struct Routed {
    /// Σ tokens·width / Σ tokens·K, none without tokens.
    executed: Option<f64>,
    on_whole: f64,
}

impl Routed {
    fn of(calibration: &Calibration<'_>, layers: &[LayerPlan]) -> Self {
        let full = calibration.shape().expert_width;
        let (mut all, mut executed, mut whole) = (0.0, 0.0, 0.0);
        let (mut in_router, mut whole_experts) = (0_usize, 0_usize);
        for (plan, tokens) in layers.iter().zip(calibration.tokens()) {
            let (mut kept_tokens, mut kept_work, mut kept_whole) = (0.0, 0.0, 0.0);
            for (expert, &tokens) in plan.experts.iter().zip(&tokens) {
                if expert.dropped {
                    continue;
                }
                let is_whole = expert.width == full;
                in_router += 1;
                whole_experts += usize::from(is_whole);
                kept_tokens += tokens as f64;
                kept_work += tokens as f64 * expert.width as f64;
                kept_whole += if is_whole { tokens as f64 } else { 0.0 };
            }
            let layer_tokens = tokens.iter().map(|&tokens| tokens as f64).sum::<f64>();
            if kept_tokens > 0.0 {
                // Multiplied first: products of counts are exact, so a layer that only drops comes out at exactly 1.
                all += layer_tokens;
                executed += kept_work * layer_tokens / kept_tokens;
                whole += kept_whole * layer_tokens / kept_tokens;
            }
        }
        Self {
            executed: ratio(executed, all * full as f64),
            on_whole: ratio(whole, all)
                .or_else(|| ratio(whole_experts as f64, in_router as f64))
                .unwrap_or(0.0),
        }
    }
}

fn ratio(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

/// `total · part / whole` in integers, rounded down.
fn share_of(total: u64, part: u64, whole: u64) -> u64 {
    let product = u128::from(total) * u128::from(part);
    product.checked_div(u128::from(whole)).unwrap_or(0) as u64
}
