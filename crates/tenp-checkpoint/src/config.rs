//! `config.json` in every dialect we read, normalised into one description of the model.

mod attention;
mod family;
mod fields;
mod moe;
mod parse;

pub(crate) use parse::{ConfigFile, RAGGED_PREFIX, has_scales_of_powers_of_two};

/// Model family, decided by `model_type` (with or without the `tenp_` prefix of a ragged checkpoint).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// `deepseek`: DeepSeek-MoE-16B (llama attention, half-split rotary).
    Deepseek,
    /// `deepseek_v2`: DeepSeek-V2 and V2-Lite (MLA).
    DeepseekV2,
    /// `deepseek_v3`: DeepSeek-V3, R1, Moonlight (MLA, sigmoid router with correction bias).
    DeepseekV3,
    /// `glm4_moe`: GLM-4.5, 4.6 (grouped-query attention, the router of DeepSeek-V3).
    Glm4Moe,
    /// `qwen2_moe`: Qwen1.5-MoE, Qwen2-57B-A14B.
    Qwen2Moe,
    /// `qwen3_moe`: Qwen3-30B-A3B and larger.
    Qwen3Moe,
    /// `mixtral`: Mixtral-8x7B, 8x22B.
    Mixtral,
    /// `olmoe`: OLMoE-1B-7B.
    Olmoe,
}

/// What a checkpoint's `config.json` says, whatever its dialect.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Model family.
    pub family: Family,
    /// Hidden size H.
    pub hidden_size: usize,
    /// Number of decoder layers (an MTP layer does not count).
    pub num_layers: usize,
    /// Vocabulary size.
    pub vocab_size: usize,
    /// Epsilon of the layers' RMS norms.
    pub rms_norm_eps: f64,
    /// The output head is the embedding matrix; there is no `lm_head.weight`.
    pub tie_word_embeddings: bool,
    /// Width of the dense MLP layers (`intermediate_size`); unused by families without dense layers.
    pub dense_width: usize,
    /// Attention of every layer.
    pub attention: Attention,
    /// Rotary embedding of every layer.
    pub rope: Rope,
    /// The MoE layers' shape and router.
    pub moe: Moe,
    /// Indices of the MoE layers, ascending; the others are dense.
    pub moe_layers: Vec<usize>,
    /// Ragged checkpoints: width of every expert, `[moe layer in depth order][expert]`; the lists may differ in length.
    pub widths: Option<Vec<Vec<usize>>>,
    /// Multi-token-prediction layers that the config announces (tensors may be absent).
    pub num_mtp_layers: usize,
    /// `max_position_embeddings`.
    pub max_positions: usize,
    /// Beginning-of-sequence token id, when the config has one.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence token ids (the config may have none, one or a list).
    pub eos_token_ids: Vec<u32>,
}

/// Shape and router of the MoE layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// Routed experts per layer, N; the most of any layer where a ragged checkpoint's layers differ
    /// ([`ModelConfig::num_experts`]).
    pub num_experts: usize,
    /// Experts chosen per token.
    pub top_k: usize,
    /// Width K of a routed expert before pruning.
    pub expert_width: usize,
    /// Width of the shared expert (all shared experts as one), 0 when the family has none.
    pub shared_width: usize,
    /// The shared expert's output is multiplied by `sigmoid(shared_expert_gate · x)` (`qwen2_moe`).
    pub shared_gate: bool,
    /// Router arithmetic.
    pub router: Router,
}

/// How router logits become chosen experts and weights. Arithmetic is f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Router {
    /// Score function over the logits.
    pub score: RouterScore,
    /// `e_score_correction_bias` is added for the selection (not for the weights).
    pub correction_bias: bool,
    /// Group-limited selection.
    pub groups: Option<RouterGroups>,
    /// Weights of the chosen experts are divided by their sum (+ 1e-20 for sigmoid scores).
    pub normalise: bool,
    /// `routed_scaling_factor`, applied last.
    pub scaling: f64,
}

/// Score function of a router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterScore {
    /// Softmax over all experts.
    Softmax,
    /// Element-wise sigmoid.
    Sigmoid,
}

/// Group-limited routing: only experts of the best groups can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterGroups {
    /// Number of equal groups of consecutive experts.
    pub num_groups: usize,
    /// Groups that stay in play for a token.
    pub top_groups: usize,
    /// How a group is scored.
    pub score: GroupScore,
}

/// Score of a group of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// The best expert's score (DeepSeek-V2).
    Max,
    /// The sum of the best two (DeepSeek-V3).
    TopTwoSum,
}

/// Attention of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Attention {
    /// Multi-head latent attention (DeepSeek-V2, V3).
    Mla {
        /// Query heads.
        num_heads: usize,
        /// Rank of the query compression, none for V2-Lite.
        q_lora_rank: Option<usize>,
        /// Rank of the key/value compression.
        kv_lora_rank: usize,
        /// Head size without position.
        nope_dim: usize,
        /// Head size with rotary position.
        rope_dim: usize,
        /// Value head size.
        v_dim: usize,
        /// `attention_bias`: biases on `q_a`, `kv_a` and o projections.
        bias: bool,
    },
    /// Grouped-query attention (every other family).
    Gqa {
        /// Query heads.
        num_heads: usize,
        /// Key/value heads.
        num_kv_heads: usize,
        /// Head size.
        head_dim: usize,
        /// Elements at the beginning of a head that have a rotary position; all but in `glm4_moe`.
        rotary_dim: usize,
        /// Biases on q, k and v projections.
        qkv_bias: bool,
        /// Bias on the output projection.
        o_bias: bool,
        /// RMS norm on queries and keys.
        qk_norm: QkNorm,
        /// Sliding window in tokens, per layer (`None`: full attention).
        sliding_window: Vec<Option<usize>>,
        /// Clamp of q, k and v to `[-c, c]` (OLMoE's `clip_qkv`).
        clip_qkv: Option<f64>,
    },
}

/// RMS norm on queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Over each head (`qwen3_moe`, `glm4_moe`).
    PerHead,
    /// Over the whole projection (olmoe).
    WholeProjection,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base.
    pub theta: f64,
    /// Pairs are neighbours (`true`: MLA families) or half a head apart (`false`).
    pub interleaved: bool,
    /// Frequency scaling.
    pub scaling: RopeScaling,
}

/// Frequency scaling of a rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Plain.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Context extension factor.
        factor: f64,
        /// Correction range, fast end.
        beta_fast: f64,
        /// Correction range, slow end.
        beta_slow: f64,
        /// `mscale`, when given.
        mscale: Option<f64>,
        /// `mscale_all_dim`, when given: its square also scales the softmax (DeepSeek).
        mscale_all_dim: Option<f64>,
        /// `attention_factor`, when given: overrides the mscale of cos and sin.
        attention_factor: Option<f64>,
        /// Context length before extension.
        original_max_positions: usize,
    },
}
