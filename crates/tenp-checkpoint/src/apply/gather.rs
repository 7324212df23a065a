//! The bytes of output tensors: rows and columns of kept neurons, zeros after them.

use super::OutputDtype;
use super::layout::Recipe;
use super::rewrite::Rewritten;
use crate::atomic::Sink;
use crate::names::Part;
use crate::plan::ExpertPlan;
use crate::{Checkpoint, CheckpointError, Dtype, Matrix, OwnedMatrix, TensorView};

/// Where the bytes of output tensors go.
pub(super) trait Receiver {
    fn take(&mut self, bytes: &[u8]) -> Result<(), CheckpointError>;

    /// A tensor of the source as it is.
    fn take_tensor(
        &mut self,
        _checkpoint: &Checkpoint,
        tensor: &TensorView<'_>,
    ) -> Result<(), CheckpointError> {
        self.take(tensor.bytes)
    }
}

impl Receiver for Sink<'_> {
    fn take(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.write(bytes)
    }

    fn take_tensor(
        &mut self,
        checkpoint: &Checkpoint,
        tensor: &TensorView<'_>,
    ) -> Result<(), CheckpointError> {
        checkpoint.copy(tensor, self)
    }
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

/// Where output tensors come from.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) rewritten: Option<&'a Rewritten>,
    pub(super) dtype: OutputDtype,
}

impl Source<'_> {
    /// The bytes that a recipe makes.
    pub(super) fn make(
        &self,
        recipe: &Recipe<'_>,
        to: &mut dyn Receiver,
    ) -> Result<(), CheckpointError> {
        match recipe {
            Recipe::Copy(tensor) => self.copy(tensor, to),
            Recipe::KeptExperts(tensor, layer) => {
                if let Some(rewritten) = self.rewritten
                    && tensor.name == self.checkpoint.spelling().router(layer.layer)
                    && let Some(router) = rewritten.router(layer.layer)
                {
                    return to.take(&router);
                }
                let stride = tensor.bytes.len() / layer.experts.len().max(1);
                layer
                    .kept()
                    .try_for_each(|expert| to.take(&tensor.bytes[expert.id * stride..][..stride]))
            }
            Recipe::Expert {
                layer,
                plan,
                part,
                width,
            } => to.take(&self.expert(*layer, plan, *part, *width)?),
            Recipe::FusedGateUp { .. } | Recipe::FusedDown { .. } => {
                let mut experts = recipe.experts();
                experts.try_for_each(|expert| self.make(&expert, to))
            }
            Recipe::Scales(of, dtype) => to.take(&stored(&self.scales(of)?, *dtype)),
            Recipe::Shared { layer, part, width } => {
                let (name, matrix) = self.shared(*layer, *part)?;
                let new = matrix.neurons_in(self.dtype, *part, None, *width);
                to.take(
                    &new.map_err(|error| self.checkpoint.damaged(&name, error))?
                        .bytes,
                )
            }
        }
    }

    fn copy(&self, tensor: &TensorView<'_>, to: &mut dyn Receiver) -> Result<(), CheckpointError> {
        if self.dtype.of(tensor.dtype) == tensor.dtype {
            return to.take_tensor(self.checkpoint, tensor);
        }
        let [rows, cols] = tensor.shape[..] else {
            unreachable!("only matrices are fp8, which opening the checkpoint has made sure of");
        };
        let matrix = self.checkpoint.matrix(tensor.name, rows, cols)?;
        let new = matrix.in_dtype(self.dtype.of(matrix.dtype));
        to.take(
            &new.map_err(|error| self.checkpoint.damaged(tensor.name, error))?
                .bytes,
        )
    }

    /// A matrix of an expert's kept neurons, as it is or as it was rewritten, zero-padded to `width`.
    fn expert(
        &self,
        layer: usize,
        plan: &ExpertPlan,
        part: Part,
        width: usize,
    ) -> Result<Vec<u8>, CheckpointError> {
        let checkpoint = self.checkpoint;
        let Some(new) = self.new_matrix(layer, plan, part) else {
            let narrowed = checkpoint.narrowed(layer, plan, part, width, self.dtype)?;
            return Ok(narrowed.bytes);
        };
        let padded = new.view().neurons(part, None, width);
        let name = || checkpoint.spelling().expert(layer, plan.id, part);
        Ok(padded
            .map_err(|error| checkpoint.damaged(&name(), error))?
            .bytes)
    }

    /// Scales of what another recipe makes.
    fn scales(&self, of: &Recipe<'_>) -> Result<Vec<u8>, CheckpointError> {
        match of {
            Recipe::Expert {
                layer,
                plan,
                part,
                width,
            } => {
                let checkpoint = self.checkpoint;
                let scales = if let Some(new) = self.new_matrix(*layer, plan, *part) {
                    new.view().scales_of_neurons(*part, None, *width)
                } else {
                    let old = checkpoint.expert(*layer, plan.id)?.part(*part);
                    old.scales_of_neurons(*part, plan.kept(), *width)
                };
                let name = || checkpoint.spelling().expert(*layer, plan.id, *part);
                scales.map_err(|error| checkpoint.damaged(&name(), error))
            }
            Recipe::Shared { layer, part, width } => {
                let (name, matrix) = self.shared(*layer, *part)?;
                let scales = matrix.scales_of_neurons(*part, None, *width);
                scales.map_err(|error| self.checkpoint.damaged(&name, error))
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
