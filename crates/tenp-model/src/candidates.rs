//! How well plans predict a text, without writing them.

use std::sync::Arc;

use tenp_checkpoint::{Checkpoint, ExpertTensors, ModelConfig, OutputDtype, Plan, Room};
use tenp_kernels::Compute;
use tenp_kernels::cpu::elementwise::log_sum_exp;

use crate::cpu::{BufferPool, CpuModel, CpuPass};
use crate::engine::Pass as _;
use crate::head::Head;
use crate::narrow::Narrow;
use crate::{ModelError, Sequences, Spill};

/// Hidden states of the plans that run side by side may take this much memory.
const PASS_BYTES: usize = 1 << 30;

/// Mean negative log-likelihood of `sequences` under each plan, nats per token, every token but each first one predicted;
/// `weights` weighs the tokens of each label.
///
/// The plans go through the layers side by side, as many as fit in 1 GiB of hidden states, so that a layer is read once for
/// all of them. Runs on the CPU; what should not be in memory goes to files where `spill` says. `progress` is told each layer
/// that a plan has passed.
///
/// # Errors
/// Token ids or lengths that the model does not have, unreadable tensors, activations that are not finite, a full disk.
pub fn plan_nlls(
    checkpoint: &Checkpoint,
    (compute, spill): (Compute, &Spill),
    plans: &[Plan],
    (sequences, weights): (&Sequences, &[f64]),
    progress: &dyn Fn(),
) -> Result<Vec<f64>, ModelError> {
    let config = checkpoint.config();
    sequences.check(config)?;
    let model = CpuModel {
        checkpoint,
        compute,
        spill: Some(spill),
    };
    let head = Head::new(checkpoint, compute, None)?;
    let mut nlls = Vec::with_capacity(plans.len());
    // One plan runs at a time: all share the buffers.
    let buffers = Arc::new(BufferPool::default());
    for plans in plans.chunks(together(config, sequences)) {
        let mut passes = plans
            .iter()
            .map(|_| Ok(CpuPass::new(model, sequences, None)?.sharing(&buffers)))
            .collect::<Result<Vec<_>, ModelError>>()?;
        for layer in 0..config.num_layers {
            for (plan, pass) in plans.iter().zip(&mut passes) {
                step((checkpoint, plan), layer, spill, pass)?;
                progress();
            }
            checkpoint.release_layer(layer);
        }
        for pass in passes {
            let hidden = pass.normed()?;
            nlls.push(nll(&head, &hidden, sequences, weights)?);
        }
    }
    Ok(nlls)
}

/// Plans that run side by side.
pub(crate) fn together(config: &ModelConfig, sequences: &Sequences) -> usize {
    let bytes = size_of::<f32>() * config.hidden_size * sequences.num_tokens();
    (PASS_BYTES / bytes.max(1)).max(1)
}

fn step(
    (checkpoint, plan): (&Checkpoint, &Plan),
    layer: usize,
    spill: &Spill,
    pass: &mut CpuPass<'_>,
) -> Result<(), ModelError> {
    let room = Room::new(&spill.dir);
    let narrow = match plan.layers.iter().find(|l| l.layer == layer) {
        Some(plan) => {
            let place = (OutputDtype::Same, &room);
            Narrow::all(checkpoint, plan, place, &|_| None)?
        }
        None => Vec::new(),
    };
    let experts: Vec<(usize, ExpertTensors<'_>)> = narrow
        .iter()
        .map(|(id, expert)| (*id, expert.tensors()))
        .collect();
    pass.step_with(&experts)
}

fn nll(
    head: &Head<'_>,
    hidden: &[f32],
    sequences: &Sequences,
    weights: &[f64],
) -> Result<f64, ModelError> {
    let (mut rows, mut targets) = (Vec::new(), Vec::new());
    for span in sequences.spans() {
        for row in span.rows.start..span.rows.end.saturating_sub(1) {
            rows.push(row);
            targets.push((sequences.ids()[row + 1], weights[span.label]));
        }
    }
    let (mut sum, mut count, mut next) = (0.0, 0.0, 0);
    head.for_each(hidden, &rows, |_, logits| {
        let (id, weight) = targets[next];
        next += 1;
        sum += weight * (log_sum_exp(logits) - f64::from(logits[id as usize]));
        count += weight;
    })?;
    Ok(if count > 0.0 { sum / count } else { 0.0 })
}
