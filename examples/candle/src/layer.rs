//! A MoE layer of a `DeepSeek-V2` checkpoint: softmax router, greedy top-k, routed and shared experts.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{D, DType, Device, Error, Result, Tensor, bail, safetensors};
use serde_json::Value;
use tenp_kernels::Compute;

use crate::op::{Expert, RaggedExperts};

/// gate, up and down of an expert, in f32: what candle's own operations multiply with.
#[derive(Debug)]
struct Plain {
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

impl Plain {
    /// `down(silu(gate x) · (up x))`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = (x.matmul(&self.gate.t()?)?.silu()? * x.matmul(&self.up.t()?)?)?;
        h.matmul(&self.down.t()?)
    }
}

/// One layer, with its experts twice: for candle's operations, and for the op.
#[derive(Debug)]
pub struct MoeLayer {
    norm: Tensor,
    norm_eps: f64,
    router: Tensor,
    top_k: usize,
    plain: Vec<Plain>,
    shared: Plain,
    ragged: RaggedExperts,
}

/// What of a checkpoint its MoE layers need.
#[derive(Debug)]
pub struct Checkpoint {
    /// All of its tensors, on the CPU.
    pub tensors: HashMap<String, Tensor>,
    /// Experts of a token.
    pub top_k: usize,
    /// What the norms add to the mean square.
    pub norm_eps: f64,
}

impl Checkpoint {
    /// Reads a folder's safetensors files and its config.json.
    ///
    /// # Errors
    /// A file that is missing or not readable, a config without what is needed.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let wrong = |why: &dyn std::fmt::Display| Error::Msg(format!("{}: {why}", path.display()));
        let text = std::fs::read_to_string(&path).map_err(|e| wrong(&e))?;
        let config: Value = serde_json::from_str(&text).map_err(|e| wrong(&e))?;
        let number = |name: &str| {
            let found = config.get(name).filter(|v| v.is_number());
            found.ok_or_else(|| wrong(&format!("{name} is not a number")))
        };
        let top_k = number("num_experts_per_tok")?.as_u64();
        let norm_eps = number("rms_norm_eps")?.as_f64();
        let (Some(top_k), Some(norm_eps)) = (top_k, norm_eps) else {
            return Err(wrong(&"num_experts_per_tok is not a count"));
        };
        Ok(Self {
            tensors: read_folder(folder)?,
            top_k: top_k as usize,
            norm_eps,
        })
    }
}

fn read_folder(folder: &Path) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            tensors.extend(safetensors::load(path, &Device::Cpu)?);
        }
    }
    if tensors.is_empty() {
        bail!("{}: no safetensors files", folder.display());
    }
    Ok(tensors)
}

impl MoeLayer {
    /// Takes layer `layer` out of a checkpoint. The experts' widths are those of their tensors.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn new(
        checkpoint: &Checkpoint,
        layer: usize,
        compute: Compute,
        device: &Device,
    ) -> Result<Self> {
        let get = |name: &str| {
            let name = format!("model.layers.{layer}.{name}.weight");
            let found = checkpoint.tensors.get(&name);
            found.ok_or_else(|| Error::Msg(format!("the checkpoint has no {name}")))
        };
        let f32s = |name: &str| get(name)?.to_dtype(DType::F32)?.to_device(device);
        let plain = |name: &str| {
            Ok::<_, Error>(Plain {
                gate: f32s(&format!("{name}.gate_proj"))?,
                up: f32s(&format!("{name}.up_proj"))?,
                down: f32s(&format!("{name}.down_proj"))?,
            })
        };
        let router = f32s("mlp.gate")?;
        let (num_experts, hidden) = router.dims2()?;
        let top_k = checkpoint.top_k;
        if top_k == 0 || top_k > num_experts {
            bail!("layer {layer}: {top_k} of {num_experts} experts a token");
        }
        let names: Vec<String> = (0..num_experts)
            .map(|e| format!("mlp.experts.{e}"))
            .collect();
        let experts = names.iter().map(|name| {
            Expert::new(
                get(&format!("{name}.gate_proj"))?,
                get(&format!("{name}.up_proj"))?,
                get(&format!("{name}.down_proj"))?,
            )
        });
        let experts = experts.collect::<Result<Vec<_>>>()?;
        Ok(Self {
            norm: f32s("post_attention_layernorm")?,
            norm_eps: checkpoint.norm_eps,
            router,
            top_k,
            plain: names
                .iter()
                .map(|name| plain(name))
                .collect::<Result<_>>()?,
            shared: plain("mlp.shared_experts")?,
            ragged: RaggedExperts::new(hidden, experts, compute, device)?,
        })
    }

    /// Width of every routed expert.
    pub fn widths(&self) -> Vec<usize> {
        self.ragged.widths()
    }

    /// The layer's norm: x / √(mean x² + ε) · weight, of every row.
    ///
    /// # Errors
    /// Rows of another length.
    pub fn normed(&self, x: &Tensor) -> Result<Tensor> {
        let size = (x.sqr()?.mean_keepdim(D::Minus1)? + self.norm_eps)?.sqrt()?;
        x.broadcast_div(&size)?.broadcast_mul(&self.norm)
    }

    /// The chosen experts and their weights, both `[tokens, top_k]`.
    fn route(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let logits = x.matmul(&self.router.t()?)?;
        let exp = logits
            .broadcast_sub(&logits.max_keepdim(D::Minus1)?)?
            .exp()?;
        let scores = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
        let (scores, ids) = scores.sort_last_dim(false)?;
        Ok((
            ids.narrow(D::Minus1, 0, self.top_k)?.contiguous()?,
            scores.narrow(D::Minus1, 0, self.top_k)?.contiguous()?,
        ))
    }

    /// The layer's output for `x` `[tokens, H]`, with the op.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (ids, weights) = self.route(x)?;
        self.ragged.forward(x, &ids, &weights)? + self.shared.forward(x)?
    }

    /// The same with candle's operations, expert by expert.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn forward_plain(&self, x: &Tensor) -> Result<Tensor> {
        let (ids, weights) = self.route(x)?;
        let mut out = self.shared.forward(x)?;
        for (id, expert) in self.plain.iter().enumerate() {
            if expert.gate.dim(0)? == 0 {
                continue;
            }
            // Of every token the expert's weight, 0 where it was not chosen.
            let is_chosen = ids.eq(id as u32)?.to_dtype(DType::F32)?;
            let weight = (is_chosen * &weights)?.sum_keepdim(D::Minus1)?;
            out = (out + expert.forward(x)?.broadcast_mul(&weight)?)?;
        }
        Ok(out)
    }
}
