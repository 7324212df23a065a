//! The bytes of output tensors: rows and columns of kept neurons, zeros after them.

use super::OutputDtype;
use super::layout::Recipe;
use super::rewrite::Rewritten;
use crate::fp8::scale_name;
use crate::names::Part;
use crate::plan::ExpertPlan;
use crate::{Checkpoint, CheckpointError, Dtype, Matrix, OwnedMatrix, TensorView};

/// Where the bytes of output tensors go.
pub(super) trait Receiver<'a> {
    fn take(&mut self, bytes: Vec<u8>) -> Result<(), CheckpointError>;

    /// A tensor of the source as it is.
    fn take_tensor(&mut self, tensor: TensorView<'a>) -> Result<(), CheckpointError>;
}

/// Scales in f32 as they are stored: new ones are bf16 numbers, and copied ones were of this type.
fn stored(scales: &[u8], dtype: Dtype) -> Vec<u8> {
    let values: Vec<f32> = scales
        .as_chunks()
        .0
        .iter()
        .map(|scale| f32::from_le_bytes(*scale))
        .collect();
    dtype.narrow(&values).expect("scales have a float dtype")
}

/// The tensor of the source that a recipe makes as it is, if nothing of its expert is rewritten: one of a whole expert that
/// has tensors of its own.
pub(super) fn unchanged<'c>(
    checkpoint: &'c Checkpoint,
    recipe: &Recipe<'_>,
    dtype: OutputDtype,
) -> Option<TensorView<'c>> {
    let Recipe::Expert {
        layer,
        plan,
        part,
        width,
    } = recipe
    else {
        return None;
    };
    let whole = plan.kept().is_none() && *width == checkpoint.config().moe.expert_width;
    let name = whole.then(|| checkpoint.spelling().expert(*layer, plan.id, *part))?;
    let tensor = checkpoint.tensor(&name).ok()?;
    (dtype.of(tensor.dtype) == tensor.dtype).then_some(tensor)
}

/// Where output tensors come from.
pub(super) struct Source<'a> {
    checkpoint: &'a Checkpoint,
    rewritten: Option<&'a Rewritten>,
    dtype: OutputDtype,
    /// Scales of the fp8 matrix that was made last: they follow it.
    scales: Option<(Made, Vec<u8>)>,
}

/// A matrix that is made.
#[derive(PartialEq)]
enum Made {
    Expert(usize, usize, Part),
    Shared(usize, Part),
}

impl Made {
    fn of(recipe: &Recipe<'_>) -> Option<Self> {
        match recipe {
            Recipe::Expert {
                layer, plan, part, ..
            } => Some(Self::Expert(*layer, plan.id, *part)),
            Recipe::Shared { layer, part, .. } => Some(Self::Shared(*layer, *part)),
            _ => None,
        }
    }
}

impl<'a> Source<'a> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        rewritten: Option<&'a Rewritten>,
        dtype: OutputDtype,
    ) -> Self {
        Self {
            checkpoint,
            rewritten,
            dtype,
            scales: None,
        }
    }

    pub(super) fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// The bytes that a recipe makes.
    pub(super) fn make(
        &mut self,
        recipe: &Recipe<'a>,
        to: &mut dyn Receiver<'a>,
    ) -> Result<(), CheckpointError> {
        match recipe {
            Recipe::Copy(tensor) => self.copy(*tensor, to),
            Recipe::KeptExperts(tensor, layer) => {
                if let Some(rewritten) = self.rewritten
                    && tensor.name == self.checkpoint.spelling().router(layer.layer)
                    && let Some(router) = rewritten.router(layer.layer)
                {
                    return to.take(router);
                }
                let stride = tensor.bytes.len() / layer.experts.len().max(1);
                let entries = layer.kept().map(|expert| expert.id * stride);
                to.take(
                    entries
                        .flat_map(|start| &tensor.bytes[start..][..stride])
                        .copied()
                        .collect(),
                )
            }
            Recipe::Expert { .. } | Recipe::Shared { .. } => {
                if let Some(tensor) = self.unchanged(recipe) {
                    return to.take_tensor(tensor);
                }
                let matrix = self.matrix(recipe)?;
                self.scales = Made::of(recipe).zip(Some(matrix.scales));
                to.take(matrix.bytes)
            }
            Recipe::FusedGateUp { .. } | Recipe::FusedDown { .. } => {
                let mut experts = recipe.experts();
                experts.try_for_each(|expert| self.make(&expert, to))
            }
            Recipe::Scales(of, dtype) => {
                if let Some(tensor) = self.unchanged(of) {
                    return to.take_tensor(self.checkpoint.tensor(&scale_name(tensor.name))?);
                }
                let scales = match self.scales.take() {
                    Some((made, scales)) if Made::of(of).as_ref() == Some(&made) => scales,
                    // The matrix was compared in another way, or not at all.
                    _ => self.matrix(of)?.scales,
                };
                to.take(stored(&scales, *dtype))
            }
        }
    }

    /// The tensor of the source that a recipe makes as it is.
    fn unchanged(&self, recipe: &Recipe<'_>) -> Option<TensorView<'a>> {
        let Recipe::Expert {
            layer, plan, part, ..
        } = recipe
        else {
            return None;
        };
        let new = self
            .rewritten
            .is_some_and(|new| new.holds(*layer, plan.id, *part));
        (!new).then(|| unchanged(self.checkpoint, recipe, self.dtype))?
    }

    fn copy(
        &self,
        tensor: TensorView<'a>,
        to: &mut dyn Receiver<'a>,
    ) -> Result<(), CheckpointError> {
        if self.dtype.of(tensor.dtype) == tensor.dtype {
            return to.take_tensor(tensor);
        }
        let [rows, cols] = tensor.shape[..] else {
            unreachable!("only matrices are fp8, which opening the checkpoint has made sure of");
        };
        let matrix = self.checkpoint.matrix(tensor.name, rows, cols)?;
        let new = matrix.in_dtype(self.dtype.of(matrix.dtype));
        let new = new.map_err(|error| self.checkpoint.damaged(tensor.name, error))?;
        to.take(new.bytes)
    }

    /// A matrix of kept neurons, as it is or as it was rewritten, zero-padded to its width.
    fn matrix(&self, recipe: &Recipe<'_>) -> Result<OwnedMatrix, CheckpointError> {
        let checkpoint = self.checkpoint;
        match recipe {
            Recipe::Expert {
                layer,
                plan,
                part,
                width,
            } => {
                let Some(new) = self.new_matrix(*layer, plan, *part) else {
                    return checkpoint.narrowed(*layer, plan, *part, *width, self.dtype);
                };
                let own = match part {
                    Part::Gate | Part::Up => new.rows,
                    Part::Down => new.cols,
                };
                if own == *width {
                    return Ok(new);
                }
                let name = || checkpoint.spelling().expert(*layer, plan.id, *part);
                let padded = new.view().neurons(*part, None, *width);
                padded.map_err(|error| checkpoint.damaged(&name(), error))
            }
            Recipe::Shared { layer, part, width } => {
                let (name, matrix) = self.shared(*layer, *part)?;
                let new = matrix.neurons_in(self.dtype, *part, None, *width);
                new.map_err(|error| checkpoint.damaged(&name, error))
            }
            _ => unreachable!("scales of copies are copied, and fp8 has no other recipe"),
        }
    }

    fn new_matrix(&self, layer: usize, plan: &ExpertPlan, part: Part) -> Option<OwnedMatrix> {
        self.rewritten?.expert(layer, plan.id, part)
    }

    /// One matrix of a layer's shared expert, and its name.
    fn shared(&self, layer: usize, part: Part) -> Result<(String, Matrix<'_>), CheckpointError> {
        let config = self.checkpoint.config();
        let name = self.checkpoint.spelling().shared(layer, part);
        let (rows, cols) = match part {
            Part::Gate | Part::Up => (config.moe.shared_width, config.hidden_size),
            Part::Down => (config.hidden_size, config.moe.shared_width),
        };
        let matrix = self.checkpoint.matrix(&name, rows, cols)?;
        Ok((name, matrix))
    }
}
