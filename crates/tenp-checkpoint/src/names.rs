//! Tensor names of every family, in both spellings of the experts.

use crate::config::Family;

/// Which matrix of a SwiGLU MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Gate projection, `[width, H]`.
    Gate,
    /// Up projection, `[width, H]`.
    Up,
    /// Down projection, `[H, width]`.
    Down,
}

impl Part {
    /// Gate, up, down.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];
}

/// How a checkpoint spells its MoE tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spelling {
    family: Family,
    /// All experts of a layer in one tensor: `gate_up_proj [E,2I,H]` and `down_proj [E,H,I]`.
    pub fused: bool,
    block: &'static str,
}

impl Spelling {
    /// One tensor per expert matrix, as the family's original checkpoints have it.
    pub fn classic(family: Family) -> Self {
        Self {
            family,
            fused: false,
            block: match family {
                Family::Mixtral => "block_sparse_moe",
                _ => "mlp",
            },
        }
    }

    /// All experts of a layer in two tensors.
    pub fn fused(family: Family) -> Self {
        Self {
            fused: true,
            ..Self::classic(family)
        }
    }

    /// Finds the spelling from which tensors exist in `layer`, a MoE layer.
    pub(crate) fn detect(family: Family, layer: usize, contains: impl Fn(&str) -> bool) -> Self {
        // Newer libraries rename Mixtral's block to `mlp` in memory; a checkpoint saved from there may carry it.
        for block in [Self::classic(family).block, "mlp"] {
            let fused = Self {
                block,
                ..Self::fused(family)
            };
            if contains(&fused.fused_gate_up(layer)) {
                return fused;
            }
        }
        Self::classic(family)
    }

    /// Name of one matrix of an expert, in the per-expert spelling.
    pub fn expert(&self, layer: usize, expert: usize, part: Part) -> String {
        let block = self.block;
        let matrix = match (self.family, part) {
            (Family::Mixtral, Part::Gate) => "w1",
            (Family::Mixtral, Part::Up) => "w3",
            (Family::Mixtral, Part::Down) => "w2",
            (_, Part::Gate) => "gate_proj",
            (_, Part::Up) => "up_proj",
            (_, Part::Down) => "down_proj",
        };
        format!("model.layers.{layer}.{block}.experts.{expert}.{matrix}.weight")
    }

    /// Name of a layer's fused gate and up projections, `[E,2I,H]`, rows 0..I gate.
    pub fn fused_gate_up(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}.experts.gate_up_proj", self.block)
    }

    /// Name of a layer's fused down projections, `[E,H,I]`.
    pub fn fused_down(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}.experts.down_proj", self.block)
    }

    /// Name of a layer's router, `[N,H]`.
    pub fn router(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}.gate.weight", self.block)
    }

    /// Name of a layer's score correction bias, `[N]`.
    pub fn correction_bias(&self, layer: usize) -> String {
        format!(
            "model.layers.{layer}.{}.gate.e_score_correction_bias",
            self.block
        )
    }

    /// Name of one matrix of the shared expert.
    pub fn shared(&self, layer: usize, part: Part) -> String {
        let expert = match self.family {
            Family::Qwen2Moe => "shared_expert",
            _ => "shared_experts",
        };
        let matrix = dense_matrix(part);
        format!(
            "model.layers.{layer}.{}.{expert}.{matrix}.weight",
            self.block
        )
    }

    /// Name of the shared expert's gate, `[1,H]`.
    pub fn shared_gate(&self, layer: usize) -> String {
        format!(
            "model.layers.{layer}.{}.shared_expert_gate.weight",
            self.block
        )
    }
}

/// Name of one matrix of a dense layer's MLP.
pub fn dense(layer: usize, part: Part) -> String {
    format!("model.layers.{layer}.mlp.{}.weight", dense_matrix(part))
}

fn dense_matrix(part: Part) -> &'static str {
    match part {
        Part::Gate => "gate_proj",
        Part::Up => "up_proj",
        Part::Down => "down_proj",
    }
}

/// The layer a tensor belongs to, from its name.
pub fn layer_of(name: &str) -> Option<usize> {
    let (layer, _) = name.strip_prefix("model.layers.")?.split_once('.')?;
    layer.parse().ok()
}
