//! The layers for multi-token prediction (MTP), which have experts but are not calibrated.

use rayon::prelude::*;
use serde_json::{Value, json};

use super::Mtp;
use super::form::Kind;
use crate::config::ModelConfig;
use crate::plan::{ExpertPlan, LayerPlan, Plan};
use crate::{Checkpoint, CheckpointError, Part, layer_of};

/// Layers behind those of the model whose tensors are there, ascending: the config may announce more of them, or none.
pub(super) fn layers(checkpoint: &Checkpoint) -> Vec<usize> {
    let config = checkpoint.config();
    let mut layers: Vec<usize> = checkpoint
        .tensors()
        .filter_map(|tensor| layer_of(tensor.name))
        .filter(|layer| *layer >= config.num_layers)
        .collect();
    layers.sort_unstable();
    layers.dedup();
    layers
}

impl Checkpoint {
    /// Whether there are layers for multi-token prediction, or the config announces some.
    pub fn has_mtp(&self) -> bool {
        self.config().num_mtp_layers > 0 || !layers(self).is_empty()
    }
}

/// What a plan makes of the MTP layers: the widths and the number of experts are those of the last MoE layer, the widest
/// for the expert of the largest weight norm. Which neurons stay is said by `norms`.
pub(super) fn plan(
    checkpoint: &Checkpoint,
    plan: &Plan,
    norms: &Norms<'_>,
) -> Result<Vec<LayerPlan>, CheckpointError> {
    let Some(last) = plan.layers.last() else {
        return Ok(Vec::new());
    };
    layers(checkpoint)
        .into_iter()
        .map(|layer| Ok(like(layer, last, checkpoint.config(), &norms(layer)?)))
        .collect()
}

/// Squared weight norms of the neurons of a layer, by expert.
pub(super) type Norms<'a> = dyn Fn(usize) -> Result<Vec<Vec<f64>>, CheckpointError> + 'a;

/// A layer of the shape of another, kept by weight norms.
fn like(layer: usize, model: &LayerPlan, config: &ModelConfig, norms: &[Vec<f64>]) -> LayerPlan {
    let num_experts = config.moe.num_experts;
    let groups = config
        .moe
        .router
        .groups
        .map_or(1, |groups| groups.num_groups);
    let per_group = model.kept().count() / groups;
    let totals: Vec<f64> = norms.iter().map(|neurons| neurons.iter().sum()).collect();
    let heaviest_first = |a: &usize, b: &usize| totals[*b].total_cmp(&totals[*a]).then(a.cmp(b));
    let mut kept: Vec<usize> = Vec::new();
    for group in 0..groups {
        let size = num_experts / groups;
        let mut experts: Vec<usize> = (group * size..(group + 1) * size).collect();
        experts.sort_by(heaviest_first);
        kept.extend(&experts[..per_group]);
    }
    kept.sort_by(heaviest_first);
    let mut widths: Vec<usize> = model.kept().map(|expert| expert.width).collect();
    widths.sort_unstable_by(|a, b| b.cmp(a));
    let mut experts: Vec<ExpertPlan> = (0..num_experts)
        .map(|id| ExpertPlan {
            id,
            width: 0,
            neurons: None,
            dropped: true,
        })
        .collect();
    for (id, width) in kept.into_iter().zip(widths) {
        experts[id].dropped = false;
        experts[id].width = width;
        if width < config.moe.expert_width {
            experts[id].neurons = Some(heaviest(&norms[id], width));
        }
    }
    LayerPlan { layer, experts }
}

/// Ids of the `count` largest, ascending; of equal ones the first.
fn heaviest(norms: &[f64], count: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..norms.len() as u32).collect();
    ids.sort_by(|a, b| {
        norms[*b as usize]
            .total_cmp(&norms[*a as usize])
            .then(a.cmp(b))
    });
    ids.truncate(count);
    ids.sort_unstable();
    ids
}

/// ‖gate row‖² + ‖up row‖² + ‖w_j‖² of every neuron of a layer, read from its weights.
pub(super) fn weight_norms(
    checkpoint: &Checkpoint,
    layer: usize,
) -> Result<Vec<Vec<f64>>, CheckpointError> {
    let experts = 0..checkpoint.config().moe.num_experts;
    let norms = experts.into_par_iter().map(|expert| {
        checkpoint.check_stop()?;
        let tensors = checkpoint.expert(layer, expert)?;
        let mut norms = vec![0.0; tensors.gate.rows];
        for part in [Part::Gate, Part::Up] {
            let matrix = tensors.part(part);
            let mut row = vec![0.0; matrix.cols];
            for (neuron, norm) in norms.iter_mut().enumerate() {
                matrix.widen_row(neuron, &mut row);
                *norm += row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
            }
        }
        let mut row = vec![0.0; tensors.down.cols];
        for r in 0..tensors.down.rows {
            tensors.down.widen_row(r, &mut row);
            for (norm, value) in norms.iter_mut().zip(&row) {
                *norm += f64::from(*value).powi(2);
            }
        }
        if norms.iter().all(|norm| norm.is_finite()) {
            return Ok(norms);
        }
        let name = checkpoint.spelling().expert(layer, expert, Part::Gate);
        Err(CheckpointError::Plan {
            place: format!(", MTP layer {layer}, expert {expert}"),
            problem: format!(
                "a weight beside {name} is a NaN or an infinity: the checkpoint is damaged, download it again, or leave the layer \
                 out with --mtp drop"
            ),
        })
    });
    let norms = std::thread::scope(|scope| {
        scope.spawn(|| checkpoint.prefetch_layer(layer));
        norms.collect()
    });
    checkpoint.release_layer(layer);
    norms
}

/// Sizes need no weights: all neurons count the same.
pub(super) fn no_norms(checkpoint: &Checkpoint) -> Vec<Vec<f64>> {
    let moe = &checkpoint.config().moe;
    vec![vec![1.0; moe.expert_width]; moe.num_experts]
}

/// Whole MTP layers cannot stand in a stock checkpoint of other sizes.
pub(super) fn check_kept(
    checkpoint: &Checkpoint,
    kind: Kind,
    num_experts: usize,
    form: &'static str,
) -> Result<(), CheckpointError> {
    let config = checkpoint.config();
    let width = match kind {
        Kind::Uniform(width) => width,
        _ => config.moe.expert_width,
    };
    let same = (num_experts, width) == (config.moe.num_experts, config.moe.expert_width);
    if same || kind == Kind::Ragged || layers(checkpoint).is_empty() {
        return Ok(());
    }
    Err(CheckpointError::Form {
        form,
        problem: format!(
            "its config has one number for the experts of all layers, here {num_experts} of width {width}, and the MTP layer \
             would keep {} of {}; use --mtp prune or --mtp drop",
            config.moe.num_experts, config.moe.expert_width
        ),
    })
}

/// What became of the MTP layers, for the report; nothing where there are none.
pub(super) fn report(
    checkpoint: &Checkpoint,
    mtp: Mtp,
    kind: Kind,
    plans: &[LayerPlan],
) -> Option<Value> {
    let layers = layers(checkpoint);
    if layers.is_empty() {
        return None;
    }
    let mode = match (mtp, kind) {
        // Nothing is cut anywhere.
        (Mtp::Prune, Kind::Identical) => Mtp::Keep,
        _ => mtp,
    };
    let mut report = json!({"mode": mode.name(), "layers": layers});
    if mode == Mtp::Prune {
        report["plans"] = json!(plans);
    }
    Some(report)
}
