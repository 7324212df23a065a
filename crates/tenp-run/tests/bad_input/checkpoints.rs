//! Folders that are no sound checkpoint.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{FAILED, Place, USAGE};
use crate::support::fixtures::{edit_header, edit_json, golden};

const SHARD: &str = "model-00002-of-00003.safetensors";
const TENSOR: &str = "model.layers.1.mlp.experts.3.up_proj.weight";

/// Damages a copy and expects every command, `inspect` too, to name it.
#[track_caller]
fn damaged(damage: impl FnOnce(&Path), needles: &[&str]) {
    let place = Place::golden("deepseek");
    damage(&place.model);
    place.refuses("inspect {} --json", &[&place.model], FAILED, needles);
    place.refuses_everywhere(needles);
}

fn bytes(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

/// The shard of [`TENSOR`].
fn shard(model: &Path) -> PathBuf {
    crate::support::fixtures::place(model, TENSOR).0
}

fn edit_index(model: &Path, tensor: &str, shard: &str) {
    edit_json(&model.join("model.safetensors.index.json"), |index| {
        index["weight_map"][tensor] = json!(shard);
    });
}

#[test]
fn a_truncated_shard() {
    for length in [0, 5, 100, 150_000] {
        damaged(
            |model| bytes(&model.join(SHARD), |b| b.truncate(length)),
            &[SHARD, "download"],
        );
    }
}

#[test]
fn a_corrupt_header() {
    damaged(
        |model| bytes(&model.join(SHARD), |b| b[8..12].copy_from_slice(b"{{{{")),
        &[SHARD, "header", "download"],
    );
    damaged(
        |model| {
            bytes(&model.join(SHARD), |b| {
                b[9..11].copy_from_slice(&[0xff, 0xfe]);
            });
        },
        &[SHARD, "header", "download"],
    );
}

#[test]
fn a_header_length_beyond_the_file() {
    for length in [300_000_u64, u64::MAX, u64::MAX - 7] {
        damaged(
            |model| {
                bytes(&model.join(SHARD), |b| {
                    b[..8].copy_from_slice(&length.to_le_bytes());
                });
            },
            &[SHARD, "header", "download"],
        );
    }
}

#[test]
fn offsets_that_overlap_or_leave_the_file() {
    for offsets in [
        json!([0, 6144]),
        json!([10_000_000, 10_006_144]),
        json!([u64::MAX - 6144, u64::MAX]),
        json!([6144, 0]),
    ] {
        damaged(
            |model| {
                edit_header(&shard(model), |header| {
                    header[TENSOR]["data_offsets"] = offsets.clone();
                });
            },
            &["model-0000", ".safetensors", "tensor", "download"],
        );
    }
    damaged(
        |model| {
            edit_header(&shard(model), |header| {
                header[TENSOR]["shape"] = json!([u64::MAX, 64]);
            });
        },
        &["model-0000", TENSOR, "download"],
    );
}

#[test]
fn a_missing_tensor() {
    damaged(
        |model| {
            let file = shard(model);
            edit_header(&file, |header| {
                let entry = header[TENSOR].clone();
                header.remove(TENSOR);
                header.insert("stray".to_owned(), entry);
            });
            edit_json(&model.join("model.safetensors.index.json"), |index| {
                let map = index["weight_map"].as_object_mut().unwrap();
                let file = map.remove(TENSOR).unwrap();
                map.insert("stray".to_owned(), file);
            });
        },
        &[TENSOR, "[48, 64]", "missing", "download"],
    );
    damaged(
        |model| {
            edit_header(&shard(model), |header| {
                let entry = header[TENSOR].clone();
                header.remove(TENSOR);
                header.insert("stray".to_owned(), entry);
            });
        },
        &[TENSOR, "index", "download again"],
    );
}

#[test]
fn a_wrong_shape_or_dtype() {
    damaged(
        |model| {
            edit_header(&shard(model), |header| {
                header[TENSOR]["shape"] = json!([64, 48]);
            });
        },
        &[TENSOR, "[64, 48]", "[48, 64]", "config.json"],
    );
    damaged(
        |model| {
            edit_header(&shard(model), |header| {
                header[TENSOR]["dtype"] = json!("I16");
            });
        },
        &[TENSOR, "i16", "bf16"],
    );
    damaged(
        |model| edit_json(&model.join("config.json"), |c| c["hidden_size"] = json!(32)),
        &["[320, 64]", "[320, 32]", "config.json"],
    );
}

#[test]
fn an_index_that_names_a_file_outside() {
    for name in [
        "../model/model-00001-of-00003.safetensors",
        "/etc/passwd",
        "a/b",
        "..",
    ] {
        damaged(
            |model| edit_index(model, TENSOR, name),
            &["model.safetensors.index.json", name, "do not trust"],
        );
    }
    damaged(
        |model| std::fs::write(model.join("model.safetensors.index.json"), "{").unwrap(),
        &["model.safetensors.index.json", "download"],
    );
}

#[test]
fn a_config_of_another_kind() {
    for (kind, words) in [
        ("llama", ["deepseek_v2", "mixtral"]),
        ("gpt_oss", ["mxfp4", "use another model"]),
    ] {
        let [first, second] = words;
        damaged(
            |model| {
                edit_json(&model.join("config.json"), |c| {
                    c["model_type"] = json!(kind);
                });
            },
            &["config.json", kind, first, second],
        );
    }
    damaged(
        |model| {
            edit_json(&model.join("config.json"), |c| {
                c.remove("n_routed_experts");
            });
        },
        &["config.json", "n_routed_experts"],
    );
    damaged(
        |model| std::fs::write(model.join("config.json"), "not json").unwrap(),
        &["config.json", "download"],
    );
    damaged(
        |model| {
            edit_json(&model.join("config.json"), |c| {
                c["num_experts_per_tok"] = json!(9);
            });
        },
        &["config.json", "num_experts_per_tok"],
    );
}

#[test]
fn a_missing_shard() {
    let place = Place::golden("deepseek");
    std::fs::remove_file(place.model.join(SHARD)).unwrap();
    place.refuses_everywhere(&[SHARD, "1 of 3", "download"]);
}

#[test]
fn no_folder_at_all() {
    let place = Place::golden("deepseek");
    let gone = place.join("gone");
    let ids = golden("olmoe").join("golden.safetensors");
    let out = place.join("out");
    place.refuses("inspect {}", &[&gone], FAILED, &["gone", "folder"]);
    place.refuses(
        "calibrate {} --data {} -o {}",
        &[&gone, &ids, &out],
        FAILED,
        &["gone", "folder"],
    );
    place.refuses(
        "inspect {}",
        &[&ids],
        FAILED,
        &["golden.safetensors", "folder"],
    );
    place.refuses(
        "inspect {}",
        &[place.scratch.path()],
        FAILED,
        &["config.json", "folder"],
    );
    std::fs::remove_file(place.model.join("model.safetensors.index.json")).unwrap();
    place.refuses(
        "inspect {}",
        &[&place.model],
        FAILED,
        &["model.safetensors", "Hugging Face"],
    );
    place.refuses("inspect", &[], USAGE, &["MODEL", "Usage"]);
    place.refuses("forget {}", &[&place.model], USAGE, &["forget"]);
}

#[test]
fn a_tensor_in_two_shards() {
    damaged(
        |model| {
            std::fs::copy(shard(model), model.join("stale.safetensors")).unwrap();
            edit_index(model, "stray", "stale.safetensors");
        },
        &["in both", "stale.safetensors", "model-0000", "stale shards"],
    );
}

/// One way and the other: what the config promises and is not there, and what is there and is not promised.
#[test]
fn a_config_of_other_counts() {
    for (field, value, needles) in [
        (
            "num_hidden_layers",
            4,
            &["model.layers.3.", "is missing", "config.json"][..],
        ),
        (
            "num_hidden_layers",
            2,
            &["num_hidden_layers", "is 2", "model.layers.2.", "download"],
        ),
        (
            "n_routed_experts",
            4,
            &["model.layers.1.mlp.gate.weight", "[4, 64]", "download"],
        ),
        (
            "n_routed_experts",
            9,
            &["model.layers.1.mlp.gate.weight", "[9, 64]", "download"],
        ),
        (
            "first_k_dense_replace",
            2,
            &["model.layers.1.mlp.gate_proj.weight", "is missing"],
        ),
        (
            "first_k_dense_replace",
            0,
            &["model.layers.0.mlp.gate.weight", "is missing"],
        ),
        (
            "n_shared_experts",
            1,
            &["model.layers.1.mlp.shared_experts", "[48, 64]", "download"],
        ),
        (
            "moe_intermediate_size",
            32,
            &["mlp.experts.0.gate_proj.weight", "[32, 64]", "download"],
        ),
        (
            "vocab_size",
            319,
            &["model.embed_tokens.weight", "[319, 64]", "download"],
        ),
    ] {
        damaged(
            |model| edit_json(&model.join("config.json"), |c| c[field] = json!(value)),
            needles,
        );
    }
}

/// A few bytes that promise millions of tensors cost neither memory nor time.
#[test]
fn a_config_that_promises_too_much() {
    for (field, value) in [
        ("num_hidden_layers", 513_u64),
        ("n_routed_experts", 2049),
        ("hidden_size", 1 << 28),
        ("vocab_size", u64::MAX),
    ] {
        damaged(
            |model| edit_json(&model.join("config.json"), |c| c[field] = json!(value)),
            &["config.json", field, &value.to_string()],
        );
    }
    damaged(
        |model| {
            edit_json(&model.join("config.json"), |c| {
                c["num_hidden_layers"] = json!(512);
                c["n_routed_experts"] = json!(2048);
                let most = json!((1 << 28) - 1);
                c.insert("num_nextn_predict_layers".to_owned(), most);
            });
        },
        &["model.layers.1.mlp.gate.weight", "[2048, 64]"],
    );
}
