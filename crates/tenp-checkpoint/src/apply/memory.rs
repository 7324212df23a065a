//! What writing an output holds in memory beside the mapped files.

use super::ahead::PLACE_BYTES;
use super::layout::{self, OutputTensor, Recipe};
use super::tensors::WAITING_PIECES;
use super::{ApplyOptions, OutputDtype, form, gather, mtp, mtp_plans};
use crate::atomic::BUFFER_BYTES;
use crate::plan::{ExpertPlan, Plan};
use crate::{Checkpoint, CheckpointError, Dtype, Part};

/// Parts of the memory that [`super::apply`] takes, by name. Rewritten weights lie in files, and are of the same sizes.
///
/// # Errors
/// [`CheckpointError::Form`], or a plan that cannot be written as text.
pub fn writing_memory(
    checkpoint: &Checkpoint,
    plan: &Plan,
    options: &ApplyOptions,
) -> Result<Vec<(&'static str, usize)>, CheckpointError> {
    let output = form::decide(checkpoint, plan, options)?;
    let mtp_plans = mtp_plans(checkpoint, plan, &output, &|_| {
        Ok(mtp::no_norms(checkpoint))
    })?;
    let tensors = layout::tensors(checkpoint, plan, &mtp_plans, &output);
    let copied = |output: &&OutputTensor<'_>| {
        // Merging makes whole experts too.
        plan.dern.is_none()
            && gather::unchanged(checkpoint, &output.recipe, options.dtype).is_some()
    };
    let changed = || tensors.iter().filter(|output| !copied(output));
    let making = changed().map(|tensor| making_bytes(checkpoint, &tensor.recipe, options.dtype));
    let made = changed().map(piece_bytes).max().unwrap_or(0);
    // Every second piece is the scales of the one before: those that wait are small.
    let scales = changed().any(|output| matches!(output.recipe, Recipe::Scales(..)));
    let waiting = if scales { 0 } else { WAITING_PIECES };
    let moe = &checkpoint.config().moe;
    let norms = mtp_plans.len() * size_of::<f64>() * moe.num_experts * moe.expert_width;
    Ok(vec![
        ("a tensor being made", making.max().unwrap_or(0)),
        ("tensors that are made", made * (waiting + 1)),
        ("names and places of tensors", list_bytes(&tensors)),
        ("the plan as text", plan.to_json(checkpoint.dir())?.len()),
        ("neurons of MTP layers", norms),
        ("the writer's buffer", BUFFER_BYTES),
    ])
}

/// The output's tensors, once with their sources, once for the shards, and once in the order of reading.
fn list_bytes(tensors: &[OutputTensor<'_>]) -> usize {
    let of = |output: &OutputTensor<'_>| {
        let text = output.tensor.name.capacity() + size_of_val(&output.tensor.shape[..]);
        size_of::<OutputTensor<'_>>() + size_of_val(&output.tensor) + 2 * text + PLACE_BYTES
    };
    tensors.iter().map(of).sum()
}

/// Bytes that are handed to the writer at once; copies are not.
fn piece_bytes(output: &OutputTensor<'_>) -> usize {
    let bytes = output.tensor.num_bytes() as usize;
    match &output.recipe {
        Recipe::FusedGateUp { .. } | Recipe::FusedDown { .. } => {
            bytes / output.recipe.experts().count().max(1)
        }
        Recipe::Copy(tensor) if tensor.dtype == output.tensor.dtype => 0,
        _ => bytes,
    }
}

/// Bytes that are in memory while a recipe is followed; copies are not.
fn making_bytes(checkpoint: &Checkpoint, recipe: &Recipe<'_>, dtype: OutputDtype) -> usize {
    match recipe {
        Recipe::Expert {
            layer,
            plan,
            part,
            width,
        } => expert_bytes(checkpoint, (*layer, plan, *part, *width), dtype),
        Recipe::FusedGateUp { .. } | Recipe::FusedDown { .. } => {
            let experts = recipe.experts();
            let each = experts.map(|expert| making_bytes(checkpoint, &expert, dtype));
            each.max().unwrap_or(0)
        }
        Recipe::Copy(tensor) if dtype.of(tensor.dtype) != tensor.dtype => {
            converted_bytes(tensor.bytes.len(), dtype.of(tensor.dtype))
        }
        Recipe::Shared { part, width, .. } => {
            let hidden = checkpoint.config().hidden_size;
            let element = layer_dtype(checkpoint, recipe, *part).size();
            hidden * width * element
        }
        Recipe::Copy(_) | Recipe::KeptExperts(..) | Recipe::Scales(..) => 0,
    }
}

fn layer_dtype(checkpoint: &Checkpoint, recipe: &Recipe<'_>, part: Part) -> Dtype {
    let Recipe::Shared { layer, .. } = recipe else {
        return Dtype::F32;
    };
    let tensor = checkpoint.tensor(&checkpoint.spelling().shared(*layer, part));
    tensor.map_or(Dtype::F32, |tensor| tensor.dtype)
}

fn expert_bytes(
    checkpoint: &Checkpoint,
    (layer, plan, part, width): (usize, &ExpertPlan, Part, usize),
    dtype: OutputDtype,
) -> usize {
    let Ok(expert) = checkpoint.expert(layer, plan.id) else {
        return 0;
    };
    let matrix = expert.part(part);
    let across = match part {
        Part::Gate | Part::Up => matrix.cols,
        Part::Down => matrix.rows,
    };
    let to = dtype.of(matrix.dtype);
    let converted = if to == matrix.dtype {
        0
    } else {
        converted_bytes(matrix.rows * matrix.cols, to)
    };
    converted + across * width * to.size()
}

/// A matrix of so many values widened, and in its new type.
fn converted_bytes(values: usize, to: Dtype) -> usize {
    values * (size_of::<f32>() + to.size())
}
