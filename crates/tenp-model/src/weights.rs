//! A checkpoint's tensors as the kernels take them.

use tenp_checkpoint::{Checkpoint, Dtype, ExpertTensors, Matrix, SharedTensors};
use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::{KernelError, MatrixView};

/// A checkpoint matrix as a kernel operand.
pub(crate) fn view<'a>(matrix: &Matrix<'a>) -> Result<MatrixView<'a>, KernelError> {
    let dtype = match matrix.dtype {
        Dtype::F32 => tenp_kernels::Dtype::F32,
        Dtype::F16 => tenp_kernels::Dtype::F16,
        Dtype::BF16 => tenp_kernels::Dtype::Bf16,
        other => {
            return Err(KernelError::Invalid {
                what: "weight dtype",
                why: format!("{other:?} has no matrix product"),
            });
        }
    };
    MatrixView::new(dtype, matrix.rows, matrix.cols, matrix.bytes)
}

/// A routed expert as a kernel operand.
pub(crate) fn expert<'a>(tensors: &ExpertTensors<'a>) -> Result<ExpertWeights<'a>, KernelError> {
    Ok(ExpertWeights {
        gate: view(&tensors.gate)?,
        up: view(&tensors.up)?,
        down: view(&tensors.down)?,
    })
}

/// A shared expert as a kernel operand.
pub(crate) fn shared<'a>(tensors: &SharedTensors<'a>) -> Result<ExpertWeights<'a>, KernelError> {
    Ok(ExpertWeights {
        gate: view(&tensors.gate)?,
        up: view(&tensors.up)?,
        down: view(&tensors.down)?,
    })
}

/// Name of the first tensor of a routed expert (of all experts, where they are stored as one) that holds a NaN or an
/// infinity.
pub fn damaged_expert(checkpoint: &Checkpoint, layer: usize, expert: usize) -> Option<String> {
    let own = format!(".experts.{expert}.");
    find_non_finite(checkpoint, |name| {
        tenp_checkpoint::layer_of(name) == Some(layer)
            && (name.contains(&own)
                || name.ends_with(".experts.gate_up_proj")
                || name.ends_with(".experts.down_proj"))
    })
}

/// Name of the first tensor accepted by `wanted` that holds a NaN or an infinity.
pub(crate) fn find_non_finite(
    checkpoint: &Checkpoint,
    wanted: impl Fn(&str) -> bool,
) -> Option<String> {
    checkpoint
        .tensors()
        .filter(|t| wanted(t.name))
        .find_map(|tensor| {
            let mut values = vec![0f32; 4096];
            let size = tensor.dtype.size();
            tensor.bytes.chunks(4096 * size).find_map(|chunk| {
                let values = &mut values[..chunk.len() / size];
                let readable = tensor.dtype.widen(chunk, values);
                (readable && values.iter().any(|v| !v.is_finite())).then(|| tensor.name.to_owned())
            })
        })
}
