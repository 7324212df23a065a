//! What a family is called and which config fields carry its counts.

use super::Family;

impl Family {
    /// Every family.
    pub const ALL: [Self; 8] = [
        Self::Deepseek,
        Self::DeepseekV2,
        Self::DeepseekV3,
        Self::Glm4Moe,
        Self::Qwen2Moe,
        Self::Qwen3Moe,
        Self::Mixtral,
        Self::Olmoe,
    ];

    /// `model_type` of the family's stock checkpoints.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Deepseek => "deepseek",
            Self::DeepseekV2 => "deepseek_v2",
            Self::DeepseekV3 => "deepseek_v3",
            Self::Glm4Moe => "glm4_moe",
            Self::Qwen2Moe => "qwen2_moe",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Mixtral => "mixtral",
            Self::Olmoe => "olmoe",
        }
    }

    /// `architectures[0]` of the family's stock checkpoints.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Deepseek => "DeepseekForCausalLM",
            Self::DeepseekV2 => "DeepseekV2ForCausalLM",
            Self::DeepseekV3 => "DeepseekV3ForCausalLM",
            Self::Glm4Moe => "Glm4MoeForCausalLM",
            Self::Qwen2Moe => "Qwen2MoeForCausalLM",
            Self::Qwen3Moe => "Qwen3MoeForCausalLM",
            Self::Mixtral => "MixtralForCausalLM",
            Self::Olmoe => "OlmoeForCausalLM",
        }
    }

    /// The family of a `model_type` (the `tenp_` prefix of ragged checkpoints is not part of it).
    pub fn from_model_type(model_type: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|family| family.model_type() == model_type)
    }

    /// DeepSeek's field names and shared experts, which GLM has taken over.
    pub fn follows_deepseek(self) -> bool {
        matches!(
            self,
            Self::Deepseek | Self::DeepseekV2 | Self::DeepseekV3 | Self::Glm4Moe
        )
    }

    /// Config field with the width of a routed expert.
    pub fn width_field(self) -> &'static str {
        match self {
            Self::Mixtral | Self::Olmoe => "intermediate_size",
            _ => "moe_intermediate_size",
        }
    }

    /// Config fields that may carry the number of routed experts, the family's own first.
    pub fn count_fields(self) -> [&'static str; 3] {
        match self {
            Self::Deepseek | Self::DeepseekV2 | Self::DeepseekV3 | Self::Glm4Moe => {
                ["n_routed_experts", "num_local_experts", "num_experts"]
            }
            Self::Mixtral => ["num_local_experts", "num_experts", "n_routed_experts"],
            Self::Qwen2Moe | Self::Qwen3Moe | Self::Olmoe => {
                ["num_experts", "num_local_experts", "n_routed_experts"]
            }
        }
    }
}
