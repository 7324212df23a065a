//! Damaged and malicious folders: an error that names the culprit, never a panic.

use serde_json::{Map, Value, json};
use tenp_checkpoint::Checkpoint;

use crate::fixture::{Fixture, edit_shard, json as read_json, snapshot, write_shard};

const EXPERT: &str = "model.layers.1.mlp.experts.2.up_proj.weight";
const INDEX: &str = "model.safetensors.index.json";

fn refused(fixture: &Fixture, parts: &[&str]) {
    let before = snapshot(&fixture.input());
    let error = Checkpoint::open(&fixture.input()).unwrap_err().to_string();
    for part in parts {
        assert!(error.contains(part), "`{error}` should contain `{part}`");
    }
    assert_eq!(snapshot(&fixture.input()), before);
    assert_eq!(fixture.names(), ["input"]);
}

fn edit_index(fixture: &Fixture, edit: impl FnOnce(&mut Map<String, Value>)) {
    let path = fixture.input().join(INDEX);
    let mut index = read_json(&path);
    edit(index["weight_map"].as_object_mut().unwrap());
    std::fs::write(path, serde_json::to_vec(&index).unwrap()).unwrap();
}

#[test]
fn files_that_break_the_format() {
    type Damage = fn(Vec<u8>) -> Vec<u8>;
    let table: [(Damage, &str); 7] = [
        (|_| Vec::new(), "only 0 bytes long"),
        (|file| file[..5].to_vec(), "only 5 bytes long"),
        (|file| file[..file.len() - 1].to_vec(), "truncated"),
        (|file| file[..100].to_vec(), "goes beyond the file"),
        (
            |mut file| {
                file[..8].copy_from_slice(&u64::MAX.to_le_bytes());
                file
            },
            "goes beyond the file",
        ),
        (
            |mut file| {
                file[8] = b'x';
                file
            },
            "the header is not valid",
        ),
        (
            |mut file| {
                file.push(0);
                file
            },
            "1 bytes after the last tensor",
        ),
    ];
    for (damage, message) in table {
        let fixture = Fixture::new("olmoe");
        let path = fixture.shard();
        std::fs::write(&path, damage(std::fs::read(&path).unwrap())).unwrap();
        refused(
            &fixture,
            &["model-00001-of-00001.safetensors", message, "download"],
        );
    }
}

#[test]
fn headers_that_lie() {
    type Damage = fn(&mut Value, usize);
    let table: [(Damage, &str); 8] = [
        (|info, _| info["data_offsets"][0] = json!(0), "overlaps"),
        (|info, end| info["data_offsets"][1] = json!(end + 2), "of"),
        (
            |info, _| info["data_offsets"] = json!([9, 3]),
            "before its start",
        ),
        (|info, _| info["data_offsets"] = json!([0, u64::MAX]), "of"),
        (
            |info, _| info["shape"] = json!([u64::MAX, u64::MAX]),
            "does not fit",
        ),
        (|info, _| info["shape"] = json!([48, 65]), "does not fit"),
        (|info, _| info["dtype"] = json!("F32"), "does not fit"),
        (|info, _| info["dtype"] = json!("Q9"), "Q9"),
    ];
    for (damage, message) in table {
        let fixture = Fixture::new("olmoe");
        edit_shard(&fixture.shard(), |header, data| {
            damage(&mut header[EXPERT], data.len());
        });
        refused(
            &fixture,
            &["model-00001-of-00001.safetensors", EXPERT, message],
        );
    }
}

#[test]
fn a_name_twice_in_one_header() {
    let fixture = Fixture::new("olmoe");
    let header = br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    write_shard(&fixture.shard(), header, &[0, 0]);
    refused(&fixture, &["`a` appears twice"]);
}

/// Also where the parser only skips.
#[test]
fn a_header_that_is_not_text() {
    let fixture = Fixture::new("olmoe");
    let header =
        b"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"more\":\"\xff\"}}";
    write_shard(&fixture.shard(), header, &[0]);
    refused(&fixture, &["the header is not valid", "utf-8"]);
}

#[test]
fn tensors_that_are_not_what_the_config_asks_for() {
    let fixture = Fixture::new("olmoe");
    edit_shard(&fixture.shard(), |header, _| {
        let info = header.shift_remove(EXPERT).unwrap();
        header.insert("renamed".to_owned(), info);
    });
    refused(&fixture, &[EXPERT, INDEX, "is not in it"]);
    edit_index(&fixture, |map| drop(map.shift_remove(EXPERT)));
    refused(&fixture, &[EXPERT, "[48, 64]", "is missing", "incomplete"]);

    let fixture = Fixture::new("olmoe");
    edit_shard(&fixture.shard(), |header, _| {
        header[EXPERT]["shape"] = json!([64, 48]);
    });
    refused(&fixture, &[EXPERT, "[64, 48]", "[48, 64]", "model-00001"]);

    let fixture = Fixture::new("olmoe");
    edit_shard(&fixture.shard(), |header, _| {
        header[EXPERT]["dtype"] = json!("I16");
    });
    refused(&fixture, &[EXPERT, "i16", "convert it to bf16"]);
}

#[test]
fn indices_that_lie() {
    for name in ["../input2/x.safetensors", "/etc/passwd", "a\\b", ".."] {
        let fixture = Fixture::new("olmoe");
        edit_index(&fixture, |map| map[EXPERT] = json!(name));
        refused(&fixture, &[INDEX, name, "plain name"]);
    }
    let fixture = Fixture::sharded("olmoe");
    edit_index(&fixture, |map| {
        map["model.norm.weight"] = map[EXPERT].clone();
    });
    refused(&fixture, &["model.norm.weight", "but it is in model-0"]);

    let fixture = Fixture::new("olmoe");
    edit_index(&fixture, |map| {
        drop(map.insert("x".into(), json!("model-00009-of-00009.safetensors")));
    });
    refused(
        &fixture,
        &["model-00009-of-00009.safetensors is missing", "1 of 2"],
    );

    let fixture = Fixture::new("olmoe");
    edit_index(&fixture, Map::clear);
    refused(&fixture, &[INDEX, "names no tensor"]);

    let fixture = Fixture::new("olmoe");
    std::fs::write(fixture.input().join(INDEX), "{").unwrap();
    refused(&fixture, &[INDEX, "EOF"]);

    let fixture = Fixture::new("olmoe");
    std::fs::remove_file(fixture.input().join(INDEX)).unwrap();
    refused(
        &fixture,
        &["neither model.safetensors.index.json nor model.safetensors"],
    );
}

#[test]
fn a_tensor_in_two_shards() {
    let fixture = Fixture::new("olmoe");
    let copy = fixture.input().join("stale.safetensors");
    std::fs::copy(fixture.shard(), copy).unwrap();
    edit_index(&fixture, |map| {
        drop(map.insert("x".into(), json!("stale.safetensors")));
    });
    refused(
        &fixture,
        &[
            "model.embed_tokens.weight",
            "stale.safetensors",
            "model-00001",
        ],
    );
}

#[test]
fn configs_that_cannot_be_used() {
    let fixture = Fixture::new("olmoe");
    fixture.edit_config(|config| config["model_type"] = json!("gpt_neox"));
    refused(&fixture, &["config.json", "gpt_neox", "qwen3_moe"]);
    fixture.edit_config(|config| config["model_type"] = json!("gpt_oss"));
    refused(
        &fixture,
        &[
            "config.json",
            "model_type",
            "gpt_oss",
            "mxfp4",
            "another model",
        ],
    );

    let fixture = Fixture::new("olmoe");
    std::fs::write(fixture.input().join("config.json"), "[1]").unwrap();
    refused(&fixture, &["config.json"]);
    std::fs::remove_file(fixture.input().join("config.json")).unwrap();
    refused(&fixture, &["config.json", "read"]);
}

/// Every ragged width is checked against the tensor's true shape.
#[test]
fn ragged_widths_that_do_not_fit() {
    let fixture = Fixture::new("olmoe");
    fixture.edit_config(|config| {
        config["model_type"] = json!("tenp_olmoe");
        config.insert(
            "tenp".to_owned(),
            json!({"version": 1, "widths": vec![vec![40; 8]; 3]}),
        );
    });
    refused(
        &fixture,
        &["model.layers.0.mlp.experts.0.gate_proj.weight", "[40, 64]"],
    );
    fixture.edit_config(|config| config["tenp"]["widths"] = json!(vec![vec![49; 8]; 3]));
    refused(&fixture, &["tenp.widths", "at most 48"]);
    fixture.edit_config(|config| config["tenp"]["widths"] = json!([[1]]));
    refused(&fixture, &["tenp.widths", "has 1 layers"]);
    fixture.edit_config(|config| config["tenp"]["version"] = json!(2));
    refused(&fixture, &["tenp.version", "newer version"]);
}

#[test]
fn quantisations_that_are_not_read() {
    for (field, value, words) in [
        ("quant_method", json!("gptq"), "quantised with gptq"),
        ("quant_method", json!(null), "quantised with unknown"),
        (
            "weight_block_size",
            json!([64, 64]),
            "weight_block_size [64, 64]",
        ),
        ("weight_block_size", json!(null), "weight_block_size null"),
        ("fmt", json!("e5m2"), "fmt e5m2"),
        ("scale_fmt", json!("e5m10"), "scale_fmt e5m10"),
        (
            "activation_scheme",
            json!("static"),
            "activation_scheme static",
        ),
    ] {
        let fixture = Fixture::fp8();
        fixture.edit_config(|config| config["quantization_config"][field] = value);
        refused(
            &fixture,
            &["config.json", "quantization_config", words, "original"],
        );
    }
    let fixture = Fixture::fp8();
    fixture.edit_config(|config| drop(config.shift_remove("quantization_config")));
    refused(
        &fixture,
        &["`quantization_config` is missing", "is fp8", "download"],
    );
}

/// The shard that holds a tensor.
fn shard_of(fixture: &Fixture, tensor: &str) -> std::path::PathBuf {
    let shard = fixture.open().shard_of(tensor).unwrap().to_owned();
    fixture.input().join(shard)
}

/// Renames a tensor in its shard and in the index.
fn rename(fixture: &Fixture, tensor: &str, new: &str) {
    edit_shard(&shard_of(fixture, tensor), |header, _| {
        let entry = header.shift_remove(tensor).unwrap();
        header.insert(new.to_owned(), entry);
    });
    edit_index(fixture, |map| {
        let shard = map.shift_remove(tensor).unwrap();
        map.insert(new.to_owned(), shard);
    });
}

#[test]
fn fp8_matrices_and_scales_that_do_not_belong_together() {
    let scale = format!("{EXPERT}_scale_inv");
    let fixture = Fixture::fp8();
    rename(&fixture, &scale, "model.other");
    refused(
        &fixture,
        &[
            EXPERT,
            "model-",
            "its scales",
            "[3, 2] are missing",
            "download",
        ],
    );

    // These lie before their matrix, which then has none.
    let earlier = scale.replace("up_proj", "gate_proj");
    let fixture = Fixture::fp8();
    rename(&fixture, &earlier, "model.other.weight_scale_inv");
    refused(
        &fixture,
        &["no fp8 tensor model.other.weight", "model-", "download"],
    );

    // Scales of a tensor that is there, but in bf16.
    let fixture = Fixture::fp8();
    rename(&fixture, &earlier, "model.norm.weight_scale_inv");
    refused(&fixture, &["no fp8 tensor model.norm.weight"]);

    let fixture = Fixture::fp8();
    edit_shard(&shard_of(&fixture, &scale), |header, _| {
        header[scale.as_str()]["shape"] = json!([2, 3]);
    });
    refused(
        &fixture,
        &[
            &scale,
            "model-",
            "[2, 3]",
            "needs f32 of shape [3, 2]",
            "download",
        ],
    );

    let fixture = Fixture::fp8();
    edit_shard(&shard_of(&fixture, &scale), |header, _| {
        header[scale.as_str()]["dtype"] = json!("I32");
    });
    refused(&fixture, &[&scale, "i32 of shape [3, 2]", "needs f32"]);

    // One element of fp8 is a byte, of e5m2 too.
    let fixture = Fixture::fp8();
    edit_shard(&shard_of(&fixture, EXPERT), |header, _| {
        header[EXPERT]["dtype"] = json!("F8_E5M2");
    });
    refused(&fixture, &[EXPERT, "f8_e5m2", "convert it to bf16"]);

    let fixture = Fixture::fp8();
    edit_shard(&shard_of(&fixture, EXPERT), |header, _| {
        header[EXPERT]["dtype"] = json!("U8");
    });
    refused(&fixture, &[EXPERT, "u8 is not supported"]);
}

/// While its shard is missing nothing is known of a scale, nor of a matrix.
#[test]
fn scales_in_a_shard_that_is_missing() {
    let fixture = Fixture::fp8();
    let experts = ["experts.0", "experts.1", "experts.3"];
    let names = experts.map(|expert| EXPERT.replace("experts.2", expert));
    let mut pairs = names.iter().map(|name| {
        let scale = format!("{name}_scale_inv");
        (shard_of(&fixture, name), shard_of(&fixture, &scale))
    });
    let (_, scales) = pairs.find(|(matrix, scales)| matrix != scales).unwrap();
    std::fs::remove_file(scales).unwrap();
    assert!(Checkpoint::open_partial(&fixture.input()).unwrap().is_fp8());
    refused(&fixture, &["shard model-", "missing"]);
    let fixture = Fixture::fp8();
    std::fs::remove_file(shard_of(&fixture, EXPERT)).unwrap();
    assert!(Checkpoint::open_partial(&fixture.input()).is_ok());
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    /// Whatever byte of the header changes: an error or a checkpoint, no panic.
    #[test]
    fn any_damaged_header_byte_is_survived(position in 0_usize..4000, byte in 0_u8..=255) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.safetensors");
        let header = serde_json::to_vec(&json!({
            "d/layers.0/tokens": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
            "d/layers.0/contribution": {"dtype": "F64", "shape": [2, 3], "data_offsets": [16, 64]},
            "__metadata__": {"format": "tenp-statistics", "format_version": "1"},
        }))
        .unwrap();
        write_shard(&path, &header, &[0; 64]);
        let mut file = std::fs::read(&path).unwrap();
        let position = position % file.len();
        file[position] = byte;
        std::fs::write(&path, file).unwrap();
        proptest::prop_assert!(tenp_checkpoint::Statistics::read(&path).is_err());
    }
}
