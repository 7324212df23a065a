//! New weights: least squares, and experts that are merged.

use tenp_checkpoint::{Checkpoint, ExpertPlan, LayerPlan, Plan};

use super::Step;
use crate::moments;
use crate::rewrite::held_moments;
use crate::{Model, Sequences};

/// Bytes of a routed expert's weight element, scales left out.
fn element_bytes(checkpoint: &Checkpoint) -> usize {
    let layer = checkpoint.config().moe_layers.first();
    let expert = layer.and_then(|layer| checkpoint.expert(*layer, 0).ok());
    expert.map_or(2, |expert| expert.down.dtype.size())
}

fn is_narrow(expert: &ExpertPlan) -> bool {
    expert.neurons.is_some() || (expert.width == 0 && !expert.dropped)
}

/// Most that a function makes of any layer's narrow experts.
fn of_layer(plan: &Plan, of: impl Fn(&ExpertPlan) -> usize) -> usize {
    let sum = |layer: &LayerPlan| layer.experts.iter().filter(|e| is_narrow(e)).map(&of).sum();
    plan.layers.iter().map(sum).max().unwrap_or(0)
}

/// The narrow experts of a layer, as they will be written.
pub(super) fn narrowed(checkpoint: &Checkpoint, plan: &Plan) -> usize {
    let hidden = checkpoint.config().hidden_size;
    let element = element_bytes(checkpoint);
    of_layer(plan, |expert| 3 * element * hidden * expert.width)
}

/// The two steps of least squares, beside a pass.
pub(super) fn fit(
    model: &Model<'_>,
    sequences: &Sequences,
    plan: &Plan,
    pass: &[(&'static str, usize)],
) -> [Step; 2] {
    let (checkpoint, config) = (model.checkpoint(), model.config());
    let (hidden, width) = (config.hidden_size, config.moe.expert_width);
    let threads = rayon::current_num_threads();
    let tokens = sequences.num_tokens();
    let narrowest = plan.layers.iter().flat_map(|layer| &layer.experts);
    let kept = narrowest.filter(|e| is_narrow(e)).map(|e| e.width).max();
    let kept = kept.unwrap_or(width);
    let down = |expert: &ExpertPlan| element_bytes(checkpoint) * hidden * expert.width;
    let new = of_layer(plan, down);
    let copied = tokens * model.hidden_bytes_per_token() - model.spilled_bytes(tokens);
    let mut fitting = pass.to_vec();
    fitting.extend([
        ("hidden states to go back to", copied),
        (
            "second moments of experts",
            held_moments(of_layer(plan, |_| 1), width),
        ),
        (
            "experts being fitted",
            threads * moments::adding_bytes(width).max(solving(hidden, width, kept)),
        ),
        ("new down projections", new),
    ]);
    let mut running = pass.to_vec();
    running.extend([
        ("new down projections", new),
        ("narrowed experts of a layer", narrowed(checkpoint, plan)),
    ]);
    [
        Step::new("fit a layer", fitting),
        Step::new("run the pruned layer", running),
    ]
}

/// What one fit holds: W in f32, its columns and W' in f64, the parts of the moments (fitted, held out, both), the system and
/// its factor, the solution and its products.
fn solving(hidden: usize, width: usize, kept: usize) -> usize {
    let removed = width - kept;
    let moments = kept * kept + kept * removed + removed * removed;
    let system = 2 * kept * kept + 3 * kept * removed + removed * removed;
    let weights = hidden * (removed + 3 * kept);
    size_of::<f32>() * hidden * (width + kept) + size_of::<f64>() * (3 * moments + system + weights)
}

/// Merging the neurons of a layer: the new experts, and the neurons of the one at hand with their centres in f32.
pub fn merging(checkpoint: &Checkpoint, plan: &Plan) -> Step {
    let config = checkpoint.config();
    let (hidden, width) = (config.hidden_size, config.moe.expert_width);
    let experts = |layer: &LayerPlan| {
        let kept = layer.kept().count();
        let neurons: usize = layer.kept().map(|expert| expert.width).sum();
        (neurons, (layer.experts.len() * width).div_ceil(kept.max(1)))
    };
    let largest = plan.layers.iter().map(experts).max();
    let (neurons, points) = largest.unwrap_or_default();
    Step::new(
        "merge a layer",
        vec![
            (
                "new experts of a layer",
                3 * element_bytes(checkpoint) * hidden * neurons,
            ),
            (
                "neurons being merged, and their centres",
                3 * size_of::<f32>() * hidden * (points + width),
            ),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fit_holds_its_moments_in_three_parts() {
        // H 3, K 5, two kept: 2·2 + 2·3 + 3·3 moments thrice; system and factor, three S × R, one R × R; columns of W.
        let f64s = 3 * 19 + (8 + 18 + 9) + 3 * (3 + 6);
        assert_eq!(solving(3, 5, 2), 4 * 3 * 7 + 8 * f64s);
    }
}
