//! The op beside candle's own operations, on every MoE layer of a checkpoint.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor, bail};
use tenp_kernels::Compute;

use crate::layer::{Checkpoint, MoeLayer};

/// Enough for every expert to get some.
const NUM_WORDS: usize = 96;

/// One layer's result.
#[derive(Debug)]
pub struct Comparison {
    /// The model's number of the layer.
    pub layer: usize,
    /// Precision of the op's products.
    pub compute: Compute,
    /// Width of every routed expert.
    pub widths: Vec<usize>,
    /// Largest difference of an output, relative to the largest output.
    pub difference: f32,
}

/// The difference that is allowed: f32 sums in another order; bf16 roundings of x and h.
pub fn tolerance(compute: Compute) -> f32 {
    match compute {
        Compute::F32 => 1e-5,
        Compute::Bf16 => 1e-2,
    }
}

impl Comparison {
    /// Whether the difference is one of roundings; never for NaN.
    pub fn is_same(&self) -> bool {
        self.difference <= tolerance(self.compute)
    }
}

/// Largest difference of `got` from `want`, relative to the largest of `want`.
///
/// # Errors
/// Shapes that differ.
pub fn difference(got: &Tensor, want: &Tensor) -> Result<f32> {
    let size = want.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    let values = (got - want)?.abs()?.flatten_all()?.to_vec1::<f32>()?;
    // `max` of candle may pass NaN over.
    if values.iter().any(|v| v.is_nan()) {
        return Ok(f32::NAN);
    }
    Ok(values.into_iter().fold(0.0, f32::max) / size)
}

/// What the layers are given: the first words of the model, as if they came straight from the embedding.
///
/// # Errors
/// There is no embedding.
pub fn words(tensors: &HashMap<String, Tensor>, device: &Device) -> Result<Tensor> {
    let Some(words) = tensors.get("model.embed_tokens.weight") else {
        bail!("the checkpoint has no model.embed_tokens.weight");
    };
    let words = words.narrow(0, 0, words.dim(0)?.min(NUM_WORDS))?;
    words.to_dtype(DType::F32)?.to_device(device)
}

/// The MoE layers of a checkpoint.
pub fn moe_layers(tensors: &HashMap<String, Tensor>) -> Vec<usize> {
    let mut layers: Vec<usize> = tensors
        .keys()
        .filter_map(|name| {
            let layer = name.strip_prefix("model.layers.")?;
            layer.strip_suffix(".mlp.gate.weight")?.parse().ok()
        })
        .collect();
    layers.sort_unstable();
    layers
}

/// Runs every MoE layer both ways; on a GPU in bf16 alone.
///
/// # Errors
/// No MoE layer, a tensor that is missing or has another shape.
pub fn compare(checkpoint: &Checkpoint, device: &Device) -> Result<Vec<Comparison>> {
    let words = words(&checkpoint.tensors, device)?;
    let mut comparisons = Vec::new();
    for number in moe_layers(&checkpoint.tensors) {
        for compute in [Compute::F32, Compute::Bf16] {
            if device.is_cuda() && compute == Compute::F32 {
                continue;
            }
            let moe = MoeLayer::new(checkpoint, number, compute, device)?;
            let x = moe.normed(&words)?;
            comparisons.push(Comparison {
                layer: number,
                compute,
                widths: moe.widths(),
                difference: difference(&moe.forward(&x)?, &moe.forward_plain(&x)?)?,
            });
        }
    }
    if comparisons.is_empty() {
        bail!("the checkpoint has no MoE layer of DeepSeek-V2's names");
    }
    Ok(comparisons)
}
