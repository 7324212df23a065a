//! The tensors a model of a given config consists of: one list, used for the check at open and to synthesise checkpoints.

use crate::config::{Attention, ModelConfig, QkNorm};
use crate::names::{Part, Spelling, dense};

/// What a tensor is for; decides how a synthesised checkpoint fills it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Token embedding.
    Embedding,
    /// Output head, and the projection that joins the two inputs of an MTP layer: what is never fp8.
    Head,
    /// A projection; rows are outputs, except in fused tensors where the last axis is the input.
    Projection,
    /// Weight of an RMS norm.
    Norm,
    /// Bias of a projection.
    Bias,
    /// Router, one row per expert.
    Router,
    /// Score correction bias of a router.
    CorrectionBias,
}

/// One tensor a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Name.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Purpose.
    pub role: Role,
}

/// Every tensor of the model, in the order of computation. MTP layers are not among them.
///
/// They are made a layer at a time, as a small config can promise millions.
pub fn expected_tensors(
    config: &ModelConfig,
    spelling: Spelling,
) -> impl Iterator<Item = ExpectedTensor> {
    let hidden = config.hidden_size;
    let (mut first, mut last) = (List::default(), List::default());
    first.add(
        "model.embed_tokens.weight",
        &[config.vocab_size, hidden],
        Role::Embedding,
    );
    let of_layer = move |layer| {
        let widths = config.moe_index(layer).map(|index| {
            let experts = 0..config.num_experts(index);
            experts.map(|expert| config.width(index, expert)).collect()
        });
        let mut list = List::default();
        decoder_layer(&mut list, config, spelling, layer, widths);
        list.0
    };
    last.add("model.norm.weight", &[hidden], Role::Norm);
    if !config.tie_word_embeddings {
        last.add("lm_head.weight", &[config.vocab_size, hidden], Role::Head);
    }
    let layers = (0..config.num_layers).flat_map(of_layer);
    first.0.into_iter().chain(layers).chain(last.0)
}

/// Every tensor of the MTP layers that the config announces, at the experts' full width, as DeepSeek-V3 names them. A
/// checkpoint may lack them.
pub fn mtp_tensors(
    config: &ModelConfig,
    spelling: Spelling,
) -> impl Iterator<Item = ExpectedTensor> {
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let layers = config.num_layers..config.num_layers + config.num_mtp_layers;
    layers.flat_map(move |layer| {
        let mut list = List::default();
        let name = |tensor: &str| format!("model.layers.{layer}.{tensor}.weight");
        list.add(name("embed_tokens"), &[vocab, hidden], Role::Embedding);
        list.add(name("enorm"), &[hidden], Role::Norm);
        list.add(name("hnorm"), &[hidden], Role::Norm);
        list.add(name("eh_proj"), &[hidden, 2 * hidden], Role::Head);
        let widths = vec![config.moe.expert_width; config.moe.num_experts];
        decoder_layer(&mut list, config, spelling, layer, Some(widths));
        list.add(name("shared_head.norm"), &[hidden], Role::Norm);
        list.add(name("shared_head.head"), &[vocab, hidden], Role::Head);
        list.0
    })
}

/// A layer with experts of these widths, or a dense one.
fn decoder_layer(
    list: &mut List,
    config: &ModelConfig,
    spelling: Spelling,
    layer: usize,
    widths: Option<Vec<usize>>,
) {
    let hidden = config.hidden_size;
    let prefix = format!("model.layers.{layer}");
    list.add(
        format!("{prefix}.input_layernorm.weight"),
        &[hidden],
        Role::Norm,
    );
    attention(list, config, &prefix);
    list.add(
        format!("{prefix}.post_attention_layernorm.weight"),
        &[hidden],
        Role::Norm,
    );
    match widths {
        Some(widths) => moe(list, config, spelling, layer, &widths),
        None => {
            for part in Part::ALL {
                list.mlp(dense(layer, part), part, config.dense_width, hidden);
            }
        }
    }
}

#[derive(Default)]
struct List(Vec<ExpectedTensor>);

impl List {
    fn add(&mut self, name: impl Into<String>, shape: &[usize], role: Role) {
        self.0.push(ExpectedTensor {
            name: name.into(),
            shape: shape.to_vec(),
            role,
        });
    }

    fn mlp(&mut self, name: String, part: Part, width: usize, hidden: usize) {
        let shape = match part {
            Part::Gate | Part::Up => [width, hidden],
            Part::Down => [hidden, width],
        };
        self.add(name, &shape, Role::Projection);
    }

    fn linear(&mut self, name: &str, outputs: usize, inputs: usize, bias: bool) {
        self.add(
            format!("{name}.weight"),
            &[outputs, inputs],
            Role::Projection,
        );
        if bias {
            self.add(format!("{name}.bias"), &[outputs], Role::Bias);
        }
    }
}

fn attention(list: &mut List, config: &ModelConfig, prefix: &str) {
    let hidden = config.hidden_size;
    let name = |matrix: &str| format!("{prefix}.self_attn.{matrix}");
    match &config.attention {
        Attention::Mla {
            num_heads,
            q_lora_rank,
            kv_lora_rank,
            nope_dim,
            rope_dim,
            v_dim,
            bias,
        } => {
            let queries = num_heads * (nope_dim + rope_dim);
            match q_lora_rank {
                None => list.linear(&name("q_proj"), queries, hidden, false),
                Some(rank) => {
                    list.linear(&name("q_a_proj"), *rank, hidden, *bias);
                    list.add(name("q_a_layernorm.weight"), &[*rank], Role::Norm);
                    list.linear(&name("q_b_proj"), queries, *rank, false);
                }
            }
            let compressed = kv_lora_rank + rope_dim;
            list.linear(&name("kv_a_proj_with_mqa"), compressed, hidden, *bias);
            list.add(name("kv_a_layernorm.weight"), &[*kv_lora_rank], Role::Norm);
            let keys_and_values = num_heads * (nope_dim + v_dim);
            list.linear(&name("kv_b_proj"), keys_and_values, *kv_lora_rank, false);
            list.linear(&name("o_proj"), hidden, num_heads * v_dim, *bias);
        }
        Attention::Gqa {
            num_heads,
            num_kv_heads,
            head_dim,
            qkv_bias,
            o_bias,
            qk_norm,
            ..
        } => {
            let queries = num_heads * head_dim;
            let keys = num_kv_heads * head_dim;
            list.linear(&name("q_proj"), queries, hidden, *qkv_bias);
            list.linear(&name("k_proj"), keys, hidden, *qkv_bias);
            list.linear(&name("v_proj"), keys, hidden, *qkv_bias);
            list.linear(&name("o_proj"), hidden, queries, *o_bias);
            let norms = match qk_norm {
                QkNorm::None => None,
                QkNorm::PerHead => Some((*head_dim, *head_dim)),
                QkNorm::WholeProjection => Some((queries, keys)),
            };
            if let Some((query_norm, key_norm)) = norms {
                list.add(name("q_norm.weight"), &[query_norm], Role::Norm);
                list.add(name("k_norm.weight"), &[key_norm], Role::Norm);
            }
        }
    }
}

fn moe(list: &mut List, config: &ModelConfig, spelling: Spelling, layer: usize, widths: &[usize]) {
    let hidden = config.hidden_size;
    let (moe, num_experts) = (&config.moe, widths.len());
    list.add(spelling.router(layer), &[num_experts, hidden], Role::Router);
    if moe.router.correction_bias {
        list.add(
            spelling.correction_bias(layer),
            &[num_experts],
            Role::CorrectionBias,
        );
    }
    if spelling.fused {
        let width = moe.expert_width;
        list.add(
            spelling.fused_gate_up(layer),
            &[num_experts, 2 * width, hidden],
            Role::Projection,
        );
        list.add(
            spelling.fused_down(layer),
            &[num_experts, hidden, width],
            Role::Projection,
        );
    } else {
        for (expert, &width) in widths.iter().enumerate() {
            for part in Part::ALL {
                let name = spelling.expert(layer, expert, part);
                list.mlp(name, part, width, hidden);
            }
        }
    }
    if moe.shared_width > 0 {
        for part in Part::ALL {
            list.mlp(spelling.shared(layer, part), part, moe.shared_width, hidden);
        }
        if moe.shared_gate {
            list.add(spelling.shared_gate(layer), &[1, hidden], Role::Projection);
        }
    }
}
