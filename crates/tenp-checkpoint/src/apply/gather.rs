//! The bytes of output tensors: rows and columns of kept neurons, zeros after them.

use super::layout::{OutputTensor, Recipe};
use super::rewrite::Rewritten;
use crate::atomic::Sink;
use crate::names::Part;
use crate::plan::ExpertPlan;
use crate::{Checkpoint, CheckpointError, ExpertTensors, Matrix};

/// Bytes handed to the sink at once when a tensor is copied whole.
const CHUNK_BYTES: usize = 16 << 20;

pub(super) fn write(
    (checkpoint, rewritten): (&Checkpoint, Option<&Rewritten>),
    output: &OutputTensor<'_>,
    sink: &mut Sink<'_>,
) -> Result<(), CheckpointError> {
    let hidden = checkpoint.config().hidden_size;
    let source = Source {
        checkpoint,
        rewritten,
    };
    match &output.recipe {
        Recipe::Copy(tensor) => tensor
            .bytes
            .chunks(CHUNK_BYTES)
            .try_for_each(|chunk| sink.write(chunk)),
        Recipe::KeptExperts(tensor, layer) => {
            if let Some(rewritten) = rewritten
                && tensor.name == checkpoint.spelling().router(layer.layer)
                && let Some(router) = rewritten.router(layer.layer)?
            {
                return sink.write(&router);
            }
            let stride = tensor.bytes.len() / layer.experts.len().max(1);
            layer
                .kept()
                .try_for_each(|expert| sink.write(&tensor.bytes[expert.id * stride..][..stride]))
        }
        Recipe::Expert {
            layer,
            plan,
            part,
            width,
        } => sink.write(&source.expert(*layer, plan, *part, *width)?),
        Recipe::FusedGateUp { plan, width } => plan.kept().try_for_each(|own| {
            sink.write(&source.expert(plan.layer, own, Part::Gate, *width)?)?;
            sink.write(&source.expert(plan.layer, own, Part::Up, *width)?)
        }),
        Recipe::FusedDown { plan, width } => plan
            .kept()
            .try_for_each(|own| sink.write(&source.expert(plan.layer, own, Part::Down, *width)?)),
        Recipe::Shared { layer, part, width } => {
            let old = checkpoint.config().moe.shared_width;
            let name = checkpoint.spelling().shared(*layer, *part);
            let (rows, cols) = match part {
                Part::Gate | Part::Up => (old, hidden),
                Part::Down => (hidden, old),
            };
            let matrix = checkpoint.matrix(&name, rows, cols)?;
            sink.write(&neurons(&matrix, *part, None, *width))
        }
    }
}

/// Where experts come from.
struct Source<'a> {
    checkpoint: &'a Checkpoint,
    rewritten: Option<&'a Rewritten>,
}

impl Source<'_> {
    /// A matrix of an expert's kept neurons, as it is or as it was rewritten, zero-padded to `width`.
    fn expert(
        &self,
        layer: usize,
        plan: &ExpertPlan,
        part: Part,
        width: usize,
    ) -> Result<Vec<u8>, CheckpointError> {
        let expert = self.checkpoint.expert(layer, plan.id)?;
        let old = matrix(&expert, part);
        let new = match self.rewritten {
            Some(rewritten) => rewritten.expert(layer, plan.id, part)?,
            None => None,
        };
        let Some(bytes) = new else {
            return Ok(neurons(&old, part, kept(plan), width));
        };
        let (rows, cols) = match part {
            Part::Gate | Part::Up => (plan.width, old.cols),
            Part::Down => (old.rows, plan.width),
        };
        let new = Matrix {
            dtype: old.dtype,
            rows,
            cols,
            bytes: &bytes,
        };
        Ok(neurons(&new, part, None, width))
    }
}

fn matrix<'a>(expert: &ExpertTensors<'a>, part: Part) -> Matrix<'a> {
    match part {
        Part::Gate => expert.gate,
        Part::Up => expert.up,
        Part::Down => expert.down,
    }
}

/// Kept neuron ids; `None` when all are kept.
fn kept(plan: &ExpertPlan) -> Option<&[u32]> {
    match &plan.neurons {
        Some(neurons) => Some(neurons),
        None if plan.width == 0 => Some(&[]),
        None => None,
    }
}

/// A matrix of the kept neurons (rows of gate and up, columns of down), zero-padded to `width`.
fn neurons(matrix: &Matrix<'_>, part: Part, kept: Option<&[u32]>, width: usize) -> Vec<u8> {
    match part {
        Part::Gate | Part::Up => rows(matrix, kept, width),
        Part::Down => columns(matrix, kept, width),
    }
}

fn rows(matrix: &Matrix<'_>, kept: Option<&[u32]>, width: usize) -> Vec<u8> {
    let length = width * matrix.cols * matrix.dtype.size();
    let mut bytes = Vec::with_capacity(length);
    match kept {
        None => bytes.extend_from_slice(matrix.bytes),
        Some(ids) => {
            for id in ids {
                bytes.extend_from_slice(matrix.row(*id as usize));
            }
        }
    }
    bytes.resize(length, 0);
    bytes
}

fn columns(matrix: &Matrix<'_>, kept: Option<&[u32]>, width: usize) -> Vec<u8> {
    let size = matrix.dtype.size();
    let stride = width * size;
    let mut bytes = vec![0; matrix.rows * stride];
    if stride == 0 {
        return bytes;
    }
    for (row, target) in bytes.chunks_exact_mut(stride).enumerate() {
        let source = matrix.row(row);
        match (kept, size) {
            (None, _) => target[..source.len()].copy_from_slice(source),
            (Some(ids), 2) => select::<2>(source, ids, target),
            (Some(ids), 4) => select::<4>(source, ids, target),
            (Some(ids), 8) => select::<8>(source, ids, target),
            (Some(ids), _) => select::<1>(source, ids, target),
        }
    }
    bytes
}

/// Elements of `SIZE` bytes, by index.
fn select<const SIZE: usize>(source: &[u8], ids: &[u32], target: &mut [u8]) {
    let source = source.as_chunks::<SIZE>().0;
    let target = target.as_chunks_mut::<SIZE>().0;
    for (target, id) in target.iter_mut().zip(ids) {
        *target = source[*id as usize];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    fn matrix(bytes: &[u8], rows: usize, cols: usize) -> Matrix<'_> {
        Matrix {
            dtype: Dtype::F16,
            rows,
            cols,
            bytes,
        }
    }

    #[test]
    fn rows_and_columns_of_two_byte_elements() {
        let bytes: Vec<u8> = (0..12).collect();
        let matrix = matrix(&bytes, 2, 3);
        assert_eq!(
            columns(&matrix, Some(&[0, 2]), 2),
            [0, 1, 4, 5, 6, 7, 10, 11]
        );
        assert_eq!(columns(&matrix, Some(&[1]), 2), [2, 3, 0, 0, 8, 9, 0, 0]);
        assert_eq!(columns(&matrix, None, 4)[6..10], [0, 0, 6, 7]);
        assert_eq!(
            rows(&matrix, Some(&[1]), 2),
            [6, 7, 8, 9, 10, 11, 0, 0, 0, 0, 0, 0]
        );
        assert!(columns(&matrix, Some(&[]), 0).is_empty());
        assert!(rows(&matrix, Some(&[]), 0).is_empty());
    }
}
