//! What every config says once read.

use std::path::Path;

use serde_json::{Map, Value, json};
use tenp_checkpoint::config::{
    Attention, GroupScore, QkNorm, RopeScaling, RouterGroups, RouterScore,
};
use tenp_checkpoint::{Family, ModelConfig, Spelling, expected_tensors};

use crate::fixture::{TINY, data, json};

fn parse(json: &Map<String, Value>) -> Result<ModelConfig, String> {
    ModelConfig::from_json(Path::new("config.json"), json).map_err(|error| error.to_string())
}

fn config(path: &str) -> ModelConfig {
    parse(&json(&data(path))).unwrap()
}

fn edited(path: &str, field: &str, value: Value) -> Result<ModelConfig, String> {
    let mut json = json(&data(path));
    json.insert(field.to_owned(), value);
    parse(&json)
}

fn billions(config: &ModelConfig) -> f64 {
    let tensors = expected_tensors(config, Spelling::classic(config.family));
    let parameters: usize = tensors.map(|it| it.shape.iter().product::<usize>()).sum();
    parameters as f64 / 1e9
}

#[test]
fn published_models_have_their_published_size() {
    for (name, family, layers, moe_layers, published) in [
        ("deepseek-moe-16b", Family::Deepseek, 28, 27, 16.4),
        ("deepseek-v2-lite", Family::DeepseekV2, 27, 26, 15.7),
        ("deepseek-v2", Family::DeepseekV2, 60, 59, 235.7),
        ("deepseek-v3", Family::DeepseekV3, 61, 58, 671.0),
        ("mixtral-8x7b", Family::Mixtral, 32, 32, 46.7),
        ("olmoe-1b-7b", Family::Olmoe, 16, 16, 6.9),
        ("qwen1.5-moe-a2.7b", Family::Qwen2Moe, 24, 24, 14.3),
        ("qwen3-30b-a3b", Family::Qwen3Moe, 48, 48, 30.5),
    ] {
        let config = config(&format!("configs/{name}.json"));
        assert_eq!(config.family, family, "{name}");
        assert_eq!(config.num_layers, layers, "{name}");
        assert_eq!(config.moe_layers.len(), moe_layers, "{name}");
        assert!(
            (billions(&config) - published).abs() < 0.06,
            "{name}: {}",
            billions(&config)
        );
    }
}

#[test]
fn deepseek_v2_lite_in_its_own_dialect() {
    let config = config("configs/deepseek-v2-lite.json");
    assert_eq!(config.moe.shared_width, 2816);
    assert_eq!(config.moe.router.groups, None);
    assert_eq!(config.dense_width, 10944);
    assert_eq!(config.moe_layers.first(), Some(&1));
    assert!(config.rope.interleaved);
    assert_eq!(
        config.rope.scaling,
        RopeScaling::Yarn {
            factor: 40.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: Some(0.707),
            mscale_all_dim: Some(0.707),
            attention_factor: None,
            original_max_positions: 4096,
        }
    );
    assert!(matches!(
        config.attention,
        Attention::Mla {
            num_heads: 16,
            q_lora_rank: None,
            kv_lora_rank: 512,
            ..
        }
    ));
}

#[test]
fn routers_of_every_family() {
    let groups = |num_groups, top_groups, score| {
        Some(RouterGroups {
            num_groups,
            top_groups,
            score,
        })
    };
    for (name, score, normalise, scaling, expected) in [
        ("deepseek", RouterScore::Softmax, false, 1.0, None),
        (
            "deepseek_v2_group",
            RouterScore::Softmax,
            false,
            16.0,
            groups(4, 2, GroupScore::Max),
        ),
        ("deepseek_v2_lite", RouterScore::Softmax, false, 1.0, None),
        (
            "deepseek_v3",
            RouterScore::Sigmoid,
            true,
            2.5,
            groups(4, 2, GroupScore::TopTwoSum),
        ),
        ("glm4_moe", RouterScore::Sigmoid, true, 2.5, None),
        ("mixtral", RouterScore::Softmax, true, 1.0, None),
        ("olmoe", RouterScore::Softmax, false, 1.0, None),
        ("qwen2_moe", RouterScore::Softmax, false, 1.0, None),
        ("qwen3_moe", RouterScore::Softmax, true, 1.0, None),
    ] {
        let config = config(&format!("tiny/{name}.json"));
        let router = &config.moe.router;
        assert_eq!(router.score, score, "{name}");
        assert_eq!(router.normalise, normalise, "{name}");
        assert_eq!(router.scaling, scaling, "{name}");
        assert_eq!(router.groups, expected, "{name}");
        let sigmoid = score == RouterScore::Sigmoid;
        assert_eq!(router.correction_bias, sigmoid, "{name}");
        assert_eq!(config.moe.shared_gate, name == "qwen2_moe", "{name}");
        assert_eq!(config.rope.interleaved, name.contains("_v"), "{name}");
    }
}

#[test]
fn attention_of_the_grouped_query_families() {
    for (name, dim, biased, norm) in [
        ("deepseek", 16, false, QkNorm::None),
        ("glm4_moe", 16, true, QkNorm::PerHead),
        ("mixtral", 16, false, QkNorm::None),
        ("olmoe", 16, false, QkNorm::WholeProjection),
        ("qwen2_moe", 16, true, QkNorm::None),
        ("qwen3_moe", 24, false, QkNorm::PerHead),
    ] {
        let config = config(&format!("tiny/{name}.json"));
        let Attention::Gqa {
            head_dim,
            rotary_dim,
            qkv_bias,
            o_bias,
            qk_norm,
            sliding_window,
            ..
        } = config.attention
        else {
            panic!("{name} is not GQA");
        };
        assert_eq!(
            (head_dim, qkv_bias, o_bias, qk_norm),
            (dim, biased, false, norm),
            "{name}"
        );
        let part = if name == "glm4_moe" { 2 } else { 1 };
        assert_eq!(rotary_dim, head_dim / part, "{name}");
        assert_eq!(sliding_window, vec![None; 3], "{name}");
    }
}

#[test]
fn partial_rotary_factors() {
    let dim = |config: ModelConfig| match config.attention {
        Attention::Gqa { rotary_dim, .. } => rotary_dim,
        Attention::Mla { .. } => panic!("not GQA"),
    };
    let with = |value| edited("tiny/glm4_moe.json", "partial_rotary_factor", value);
    assert_eq!(dim(with(json!(1.0)).unwrap()), 16);
    assert_eq!(dim(with(json!(0.25)).unwrap()), 4);
    assert_eq!(dim(with(json!(null)).unwrap()), 8, "the family's default");
    let parameters =
        json!({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75});
    let newer = edited("tiny/glm4_moe.json", "rope_parameters", parameters);
    assert_eq!(dim(newer.unwrap()), 12);
    for wrong in [0.0, 1.5, -0.5, 0.2, 0.01] {
        let text = with(json!(wrong)).unwrap_err();
        assert!(text.contains("`partial_rotary_factor` is"), "{text}");
    }
}

#[test]
fn sliding_windows() {
    let windows = |config: ModelConfig| match config.attention {
        Attention::Gqa { sliding_window, .. } => sliding_window,
        Attention::Mla { .. } => panic!("not GQA"),
    };
    let mixtral = edited("tiny/mixtral.json", "sliding_window", json!(32)).unwrap();
    assert_eq!(windows(mixtral), vec![Some(32); 3]);
    let mut qwen = json(&data("tiny/qwen2_moe.json"));
    qwen.insert("sliding_window".to_owned(), json!(16));
    assert_eq!(windows(parse(&qwen).unwrap()), vec![None; 3]);
    qwen.insert("use_sliding_window".to_owned(), json!(true));
    assert_eq!(
        windows(parse(&qwen).unwrap()),
        vec![None; 3],
        "layer_types decide"
    );
    qwen.insert(
        "layer_types".to_owned(),
        json!(["full_attention", "sliding_attention", "full_attention"]),
    );
    assert_eq!(windows(parse(&qwen).unwrap()), vec![None, Some(16), None]);
    qwen.shift_remove("layer_types");
    qwen.insert("max_window_layers".to_owned(), json!(2));
    assert_eq!(windows(parse(&qwen).unwrap()), vec![None, None, Some(16)]);
}

#[test]
fn dense_layers() {
    let layers = |path: &str, field: &str, value| edited(path, field, value).unwrap().moe_layers;
    assert_eq!(
        layers("tiny/deepseek_v3.json", "first_k_dense_replace", json!(2)),
        [2]
    );
    assert_eq!(
        layers("tiny/deepseek_v3.json", "moe_layer_freq", json!(2)),
        [2]
    );
    assert_eq!(
        layers("tiny/qwen3_moe.json", "decoder_sparse_step", json!(2)),
        [1]
    );
    assert_eq!(
        layers("tiny/qwen3_moe.json", "mlp_only_layers", json!([0, 2])),
        [1]
    );
}

#[test]
fn token_ids_may_be_one_a_list_or_none() {
    assert_eq!(config("tiny/deepseek.json").eos_token_ids, [1, 2]);
    assert_eq!(config("tiny/mixtral.json").eos_token_ids, [1]);
    let none = edited("tiny/mixtral.json", "eos_token_id", Value::Null).unwrap();
    assert!(none.eos_token_ids.is_empty());
    assert_eq!(config("configs/olmoe-1b-7b.json").bos_token_id, None);
}

#[test]
fn every_family_gives_a_list_of_distinct_tensors() {
    for name in TINY {
        let config = config(&format!("tiny/{name}.json"));
        let tensors = expected_tensors(&config, Spelling::classic(config.family));
        let mut names: Vec<_> = tensors.map(|tensor| tensor.name).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all, "{name}");
    }
}

#[test]
fn contradictory_configs_name_the_field() {
    let v3 = "tiny/deepseek_v3.json";
    let mixtral = "tiny/mixtral.json";
    for (path, field, value, message) in [
        (
            v3,
            "num_experts_per_tok",
            json!(9),
            "more than the 8 experts",
        ),
        (v3, "num_experts_per_tok", json!(5), "hold only 4 experts"),
        (v3, "n_group", json!(3), "does not divide 8"),
        (v3, "n_group", json!(8), "groups hold one expert"),
        (v3, "topk_group", json!(5), "more than n_group"),
        (v3, "scoring_func", json!("softmax"), "not supported"),
        (v3, "hidden_act", json!("gelu"), "`gelu`"),
        (v3, "hidden_size", json!(0), "is 0"),
        (v3, "hidden_size", json!(u64::MAX), "below 2^28"),
        (v3, "hidden_size", json!("64"), "expected a whole number"),
        (v3, "num_hidden_layers", json!(100_000), "more than the 512"),
        (
            v3,
            "first_k_dense_replace",
            json!(3),
            "no Mixture-of-Experts layer",
        ),
        (mixtral, "num_key_value_heads", json!(3), "does not divide"),
        (
            mixtral,
            "rope_parameters",
            json!({"rope_type": "longrope"}),
            "`longrope`",
        ),
        (v3, "routed_scaling_factor", Value::Null, "is missing"),
        (v3, "n_group", Value::Null, "is missing"),
        (mixtral, "vocab_size", Value::Null, "is missing"),
        (mixtral, "eos_token_id", json!(-1), "expected token ids"),
        (
            mixtral,
            "model_type",
            json!("tenp_mixtral"),
            "`tenp` is missing",
        ),
        (
            mixtral,
            "model_type",
            json!("llama"),
            "`llama` is not supported; known: deepseek",
        ),
    ] {
        let error = edited(path, field, value.clone()).unwrap_err();
        assert!(error.contains(message), "{field} = {value}: {error}");
        assert!(error.contains("config.json"), "{error}");
    }
}

/// Any field replaced by any value: a config or an error, no panic.
#[test]
fn no_field_can_cause_a_panic() {
    let values = [
        json!(0),
        json!(1),
        json!(-1),
        json!(3),
        json!((1 << 28) - 1),
        json!(u64::MAX),
        json!(1e308),
        json!(0.5),
        json!(""),
        json!([]),
        json!([1, "x"]),
        json!({}),
        json!(true),
        Value::Null,
    ];
    for name in TINY {
        let original = json(&data(&format!("tiny/{name}.json")));
        for field in original.keys() {
            for value in &values {
                let mut json = original.clone();
                json.insert(field.clone(), value.clone());
                if let Ok(config) = parse(&json) {
                    expected_tensors(&config, Spelling::classic(config.family)).for_each(drop);
                    expected_tensors(&config, Spelling::fused(config.family)).for_each(drop);
                }
            }
        }
    }
}
