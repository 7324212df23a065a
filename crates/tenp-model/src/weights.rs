//! A checkpoint's tensors as the kernels take them.

use tenp_checkpoint::{
    Checkpoint, Dtype, ExpertTensors, Matrix, SharedTensors, holds_nan, weight_of_scale,
};
use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::{KernelError, MatrixView};

use crate::ModelError;

/// A checkpoint matrix as a kernel operand.
pub(crate) fn view<'a>(matrix: &Matrix<'a>) -> Result<MatrixView<'a>, KernelError> {
    let dtype = match matrix.dtype {
        Dtype::F32 => tenp_kernels::Dtype::F32,
        Dtype::F16 => tenp_kernels::Dtype::F16,
        Dtype::BF16 => tenp_kernels::Dtype::Bf16,
        Dtype::F8E4M3 => {
            return MatrixView::from_fp8(matrix.rows, matrix.cols, matrix.bytes, matrix.scales);
        }
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

/// Why a routed expert's outputs or norms are not finite: scans its own tensors, or those of all experts where they are
/// stored as one.
pub(crate) fn non_finite_expert(
    checkpoint: &Checkpoint,
    layer: usize,
    expert: usize,
) -> ModelError {
    let own = format!(".experts.{expert}.");
    non_finite(
        checkpoint,
        format!("layer {layer}, expert {expert}"),
        |name| {
            tenp_checkpoint::layer_of(name) == Some(layer)
                && (name.contains(&own)
                    || name.ends_with(".experts.gate_up_proj")
                    || name.ends_with(".experts.down_proj"))
        },
    )
}

/// Why activations at `place` are not finite: scans the tensors accepted by `wanted`, the only ones that came in after
/// the activations were last seen finite.
pub(crate) fn non_finite(
    checkpoint: &Checkpoint,
    place: String,
    wanted: impl Fn(&str) -> bool,
) -> ModelError {
    let cause = match find_non_finite(checkpoint, wanted) {
        Some(name) => format!(
            "tensor {name} in {} holds a NaN or an infinity: the checkpoint is damaged; download or convert it again",
            checkpoint.shard_of(&name).unwrap_or_default()
        ),
        None => "its tensors are all finite, but sums over them overflow; use other text, or a checkpoint whose weights are not scaled this large".to_owned(),
    };
    ModelError::NonFinite { place, cause }
}

/// Name of the first tensor accepted by `wanted`, or of the first scales of one, that holds a NaN or an infinity.
fn find_non_finite(checkpoint: &Checkpoint, wanted: impl Fn(&str) -> bool) -> Option<String> {
    checkpoint
        .tensors()
        .filter(|t| wanted(weight_of_scale(t.name).unwrap_or(t.name)))
        .find_map(|tensor| {
            let mut values = vec![0f32; 4096];
            let size = tensor.dtype.size();
            tensor.bytes.chunks(4096 * size).find_map(|chunk| {
                let values = &mut values[..chunk.len() / size];
                let damaged = if tensor.dtype == Dtype::F8E4M3 {
                    holds_nan(chunk)
                } else {
                    tensor.dtype.widen(chunk, values) && values.iter().any(|v| !v.is_finite())
                };
                damaged.then(|| tensor.name.to_owned())
            })
        })
}
