//! New weights: least squares, and experts that are merged. A layer's new matrices are in a [`Room`].

use tenp_checkpoint::{Checkpoint, ExpertPlan, LayerPlan, OutputDtype, Plan, Room};

use super::Step;
use super::pass::PassMemory;
use crate::moments;
use crate::rewrite::{fits_at_once, held_moments};
use crate::{Model, Sequences};

/// Bytes of a routed expert's weight element in the output, scales left out.
fn element_bytes(checkpoint: &Checkpoint, dtype: OutputDtype) -> usize {
    let layer = checkpoint.config().moe_layers.first();
    let expert = layer.and_then(|layer| checkpoint.expert(*layer, 0).ok());
    expert.map_or(2, |expert| dtype.of(expert.down.dtype).size())
}

fn is_narrow(expert: &ExpertPlan) -> bool {
    expert.neurons.is_some() || (expert.width == 0 && !expert.dropped)
}

/// What a function makes of a layer's narrow experts.
fn of_layer(layer: &LayerPlan, of: impl Fn(&ExpertPlan) -> usize) -> usize {
    let narrow = layer.experts.iter().filter(|e| is_narrow(e));
    narrow.map(of).sum()
}

/// Most that a function makes of any layer.
fn of_layers(plan: &Plan, of: impl Fn(&LayerPlan) -> usize) -> usize {
    plan.layers.iter().map(of).max().unwrap_or(0)
}

/// The narrow experts of a layer, as they will be written: bytes in memory and in files.
pub fn narrowed(checkpoint: &Checkpoint, plan: &Plan, dtype: OutputDtype) -> [usize; 2] {
    let neuron = 3 * element_bytes(checkpoint, dtype) * checkpoint.config().hidden_size;
    let bytes = |layer: &LayerPlan| of_layer(layer, |expert| neuron * expert.width);
    Room::split(of_layers(plan, bytes))
}

/// Bytes of the new weights of all layers, which lie beside an output until it is written: every matrix of the experts that
/// stay where neurons are merged, else the down projections of narrow ones.
pub fn rewritten(checkpoint: &Checkpoint, plan: &Plan, dtype: OutputDtype) -> usize {
    let matrix = element_bytes(checkpoint, dtype) * checkpoint.config().hidden_size;
    let layers = plan.layers.iter();
    if plan.dern.is_some() {
        let kept = layers.flat_map(LayerPlan::kept).map(|expert| expert.width);
        return 3 * matrix * kept.sum::<usize>();
    }
    layers
        .map(|layer| of_layer(layer, |expert| matrix * expert.width))
        .sum()
}

/// The two steps of least squares, beside a pass.
pub(super) fn fit(
    model: &Model<'_>,
    sequences: &Sequences,
    plan: &Plan,
    dtype: OutputDtype,
) -> [Step; 2] {
    let (checkpoint, config) = (model.checkpoint(), model.config());
    let width = config.moe.expert_width;
    let threads = rayon::current_num_threads();
    let tokens = sequences.num_tokens();
    let column = element_bytes(checkpoint, dtype) * config.hidden_size;
    let down = |layer: &LayerPlan| of_layer(layer, |expert| column * expert.width);
    let [new, _] = Room::split(of_layers(plan, down));
    let fits = of_layers(plan, |layer| fits_at_once(config, layer).1);
    let moments = held_moments(of_layers(plan, |layer| of_layer(layer, |_| 1)), width);
    let (pass, copied, [there, running_there]) =
        if let Some(bytes) = model.engine_bytes(sequences, false) {
            // A block's hidden states are put back at once; moments are in f32, half as large.
            let fitting = bytes.running() + bytes.block_hidden + moments / 2;
            let pass = vec![(super::STAGED, bytes.host)];
            (pass, 0, [Some(fitting), Some(bytes.running())])
        } else {
            let hidden = tokens * model.hidden_bytes_per_token() - model.spilled_bytes(tokens);
            let pass = PassMemory::new(model, sequences).parts(false);
            (pass, hidden, [None; 2])
        };
    let mut fitting = pass.clone();
    fitting.extend([
        ("hidden states to go back to", copied),
        ("second moments of experts", moments),
        (
            "experts being fitted",
            fits.max(threads * moments::adding_bytes(width)),
        ),
        ("new down projections", new),
    ]);
    let mut running = pass;
    let [narrowed, _] = narrowed(checkpoint, plan, dtype);
    running.push(("narrowed experts of a layer", narrowed));
    [
        Step::new("fit a layer", fitting).on_device(there),
        Step::new("run the pruned layer", running).on_device(running_there),
    ]
}

/// Merging the neurons of a layer: the new experts, and the neurons of the one at hand with their centres in f32; and the
/// bytes of new experts that go to files.
pub fn merging(checkpoint: &Checkpoint, plan: &Plan, dtype: OutputDtype) -> (Step, usize) {
    let config = checkpoint.config();
    let (hidden, width) = (config.hidden_size, config.moe.expert_width);
    let experts = |layer: &LayerPlan| {
        let kept = layer.kept().count();
        let neurons: usize = layer.kept().map(|expert| expert.width).sum();
        (neurons, (layer.experts.len() * width).div_ceil(kept.max(1)))
    };
    let largest = plan.layers.iter().map(experts).max();
    let (neurons, points) = largest.unwrap_or_default();
    let [new, in_files] = Room::split(3 * element_bytes(checkpoint, dtype) * hidden * neurons);
    let step = Step::new(
        "merge a layer",
        vec![
            ("new experts of a layer", new),
            (
                "neurons being merged, and their centres",
                3 * size_of::<f32>() * hidden * (points + width),
            ),
        ],
    );
    (step, in_files)
}
