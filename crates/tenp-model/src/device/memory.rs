//! What the buffers of a block of tokens hold at most: those of its largest step, as [`super::DevicePass`] asks for them.

use tenp_checkpoint::ModelConfig;
use tenp_checkpoint::config::{Attention, QkNorm};
use tenp_kernels::device::Tile;
use tenp_kernels::device::attention::Pitches;
use tenp_kernels::device::geometry::partial_stride;
use tenp_kernels::device::moe_direction::{ROW_DOTS, TOKEN_DOTS};
use tenp_kernels::params::{TENP_NUM_ACTIVATION_SUMS, TENP_NUM_CONTRIBUTION_SUMS};

use crate::attention::attention_shape;

const BF16: usize = 2;
const F32: usize = 4;
const F64: usize = 8;

/// Bytes of a block of `tokens` tokens, with the calibration's sums or without.
pub(super) fn block_bytes(config: &ModelConfig, tokens: usize, with_sums: bool) -> usize {
    let mut most = tokens * attention(config).max(between(config));
    if config.moe_layers.len() < config.num_layers {
        most = most.max(tokens * dense(config, config.dense_width, BF16));
    }
    if !config.moe_layers.is_empty() {
        let shared = dense(config, config.moe.shared_width, BF16 + F32);
        let shared = tokens * (shared + routing(config));
        most = most.max(shared).max(experts(config, tokens, with_sums));
    }
    most
}

/// Of a token: queries, then keys and values, then their product and its projection.
fn attention(config: &ModelConfig) -> usize {
    let (shape, _) = attention_shape(config, 0, 1.0);
    let pitches = Pitches::dense(&shape);
    let cached = BF16 * (pitches.k + pitches.v);
    // A projection, then with its bias or its norm beside it.
    let (query, key) = match &config.attention {
        Attention::Mla {
            q_lora_rank,
            kv_lora_rank,
            num_heads,
            nope_dim,
            rope_dim,
            v_dim,
            ..
        } => {
            let low = (F32 + BF16) * q_lora_rank.unwrap_or(0);
            let compressed = F32 * (kv_lora_rank + rope_dim) + BF16 * kv_lora_rank;
            let expanded = F32 * num_heads * (nope_dim + v_dim);
            (low + F32 * pitches.q, compressed + expanded)
        }
        Attention::Gqa {
            qkv_bias, qk_norm, ..
        } => {
            let forms = 1 + usize::from(*qkv_bias || !matches!(qk_norm, QkNorm::None));
            // The values' projection comes while the keys' is still there.
            let values = F32 * pitches.v;
            (
                forms * F32 * pitches.q,
                F32 * pitches.k + values.max((forms - 1) * F32 * pitches.k),
            )
        }
    };
    let queries = BF16 * pitches.q;
    let turned = (F32 + BF16) * pitches.q;
    let keys = queries + cached + key;
    let output = queries + cached + BF16 * pitches.out + F32 * config.hidden_size;
    BF16 * config.hidden_size + query.max(turned).max(keys).max(output)
}

/// Of a token: the attention's output and what the experts read, in both forms.
fn between(config: &ModelConfig) -> usize {
    (F32 + BF16 + F32) * config.hidden_size
}

/// Of a token: a dense block of some width, beside inputs of `input` bytes an element.
fn dense(config: &ModelConfig, width: usize, input: usize) -> usize {
    (input + F32) * config.hidden_size + (2 * F32 + BF16) * width
}

/// Of a token: the experts chosen with their weights, and where its rows are.
fn routing(config: &ModelConfig) -> usize {
    5 * F32 * config.moe.top_k
}

/// The routed experts, beside the shared one's output.
fn experts(config: &ModelConfig, tokens: usize, with_sums: bool) -> usize {
    let (hidden, moe) = (config.hidden_size, &config.moe);
    let shared = if moe.shared_width > 0 {
        F32 * hidden
    } else {
        0
    };
    let token = (BF16 + F32) * hidden + shared + routing(config);
    // h, and y for the combine.
    let row = BF16 * (moe.expert_width + hidden);
    if !with_sums {
        return tokens * (token + moe.top_k * row);
    }
    let rows = tokens * moe.top_k;
    let tile = Tile::choose(true, tokens, moe.top_k, moe.num_experts).with_sums();
    let partials = partial_stride(
        rows,
        tile,
        moe.expert_width,
        moe.num_experts * moe.expert_width,
    );
    let sums = TENP_NUM_ACTIVATION_SUMS.max(TENP_NUM_CONTRIBUTION_SUMS) as usize;
    // y in f32 too, what is made of the rows' directions, and the outputs together.
    let row = row + F32 * hidden + ROW_DOTS * F64 + 2 * F32;
    let token = token + F32 * hidden + TOKEN_DOTS * F64;
    tokens * token + rows * row + sums * F32 * partials
}
