//! A different number of experts in different layers: `--experts` with a count for each.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::dern::Case;
use crate::support::fixtures::{
    DOMAINS, assert_same_files, copy, demo, demo_file, edit_json, names, overwrite, place,
    read_json,
};
use crate::support::json::{list, number};
use crate::support::{Scratch, tenp};

/// Every tensor of a checkpoint: shape and bytes.
fn tensors(model: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for name in names(model).iter().filter(|n| n.starts_with("model")) {
        if !name.ends_with(".safetensors") {
            continue;
        }
        let bytes = std::fs::read(model.join(name)).unwrap();
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let value = (tensor.shape().to_vec(), tensor.data().to_vec());
            all.insert(name.to_owned(), value);
        }
    }
    all
}

/// The model's own indices of the MoE layers.
fn layers(plan: &Value) -> Vec<u64> {
    let index = |layer: &Value| layer["layer"].as_u64().unwrap();
    list(&plan["layers"]).iter().map(index).collect()
}

#[test]
fn each_layer_is_that_of_its_count() {
    for (name, possible) in [
        ("olmoe", [6, 5, 8]),
        ("mixtral", [3, 2, 4]),
        ("deepseek_v2_lite", [6, 5, 8]),
    ] {
        for method in ["gating", "dern --threshold 0"] {
            let case = Case::golden(name, &[]);
            let plan = case.plan(&format!("--method {method} --experts {}", possible[0]));
            let layers = layers(&read_json(&plan));
            let counts: Vec<usize> = (0..layers.len()).map(|i| possible[i % 3]).collect();
            let text: Vec<String> = counts.iter().map(ToString::to_string).collect();
            let mixed = case.prune(&format!("--method {method} --experts {}", text.join(",")));
            let whole = possible.map(|count| {
                let out = case.prune(&format!("--method {method} --experts {count}"));
                (count, tensors(&out))
            });
            let whole = BTreeMap::from(whole);
            let mixed = tensors(&mixed);
            assert!(!mixed.is_empty());
            let mut seen = vec![0; layers.len()];
            for (tensor, value) in &mixed {
                let layer = layers
                    .iter()
                    .position(|l| tensor.starts_with(&format!("model.layers.{l}.")));
                let count = layer.map_or(possible[0], |layer| counts[layer]);
                assert!(*value == whole[&count][tensor], "{name}: {tensor}");
                if let Some(layer) = layer {
                    seen[layer] += usize::from(tensor.contains(".experts."));
                }
            }
            let expected: Vec<usize> = counts.iter().map(|count| 3 * count).collect();
            assert_eq!(seen, expected, "{name}: three matrices an expert");
        }
    }
}

/// Dropping experts must do the same as never choosing them: DeepSeek-V3's correction bias can say so, and nothing else
/// in its router looks at an expert that is not chosen.
#[test]
fn logits_are_those_of_a_router_that_never_chooses_what_is_gone() {
    for groups in [[1, 1], [2, 1], [2, 2]] {
        let change = [("n_group", groups[0]), ("topk_group", groups[1])];
        let case = Case::golden("deepseek_v3", &change);
        let config = read_json(&case.model.join("config.json"));
        assert_eq!(config["n_routed_experts"], 8);
        let plan = case.plan("--method gating --experts 8");
        let layers = layers(&read_json(&plan));
        let counts: Vec<&str> = (0..layers.len()).map(|i| ["6", "8"][i % 2]).collect();
        let plan = case.plan(&format!("--method gating --experts {}", counts.join(",")));
        let pruned = case.apply(&plan, 2);
        assert_eq!(
            read_json(&pruned.join("config.json"))["model_type"],
            "tenp_deepseek_v3"
        );
        let barred = copy(&case.model, &case.scratch.join("barred"));
        for layer in list(&read_json(&plan)["layers"]) {
            let name = format!(
                "model.layers.{}.mlp.gate.e_score_correction_bias",
                layer["layer"]
            );
            let (path, range) = place(&barred, &name);
            let mut bytes = std::fs::read(path).unwrap()[range].to_vec();
            let size = bytes.len() / 8;
            for (id, expert) in list(&layer["experts"]).iter().enumerate() {
                if expert["dropped"] == true {
                    // −16384 has the same first bytes in bf16 and in f32.
                    let value = (-16384_f32).to_le_bytes();
                    bytes[id * size..(id + 1) * size].copy_from_slice(&value[4 - size..]);
                }
            }
            overwrite(&barred, &name, &bytes);
        }
        let error = case.distance(&pruned, &barred);
        assert!(error < 1e-6, "{groups:?}: {error:e}");
        assert!(case.distance(&pruned, &case.model) > 1e-4, "{groups:?}");
    }
}

#[test]
fn every_command_reads_it() {
    let scratch = Scratch::new();
    let (out, data) = (scratch.join("out"), demo_file("calibration", "facts"));
    let counts = "16,14,12,10,8,6,4";
    let line = format!(
        "prune {{}} --data {{}} --samples 16 --method dern --threshold 0.2 --experts {counts} -o {{}} --json"
    );
    let run = tenp(&line, &[&demo(), &data, &out]).ok();
    assert_eq!(run.json()["accounting"]["E"], 0.625);
    let plan = read_json(&out.join("tenp_plan.json"));
    let recorded = json!([16, 14, 12, 10, 8, 6, 4]);
    assert_eq!(plan["options"]["experts"], recorded);
    assert_eq!(plan["options"]["experts_kept"], recorded);
    let config = read_json(&out.join("config.json"));
    assert_eq!(config["model_type"], "tenp_deepseek_v2");
    assert_eq!(
        config["architectures"],
        json!(["TenpDeepseekV2ForCausalLM"])
    );
    let widths: Vec<usize> = list(&config["tenp"]["widths"])
        .iter()
        .map(|l| list(l).len())
        .collect();
    assert_eq!(json!(widths), recorded);
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("A different number of experts"), "{card}");

    let inspect = tenp("inspect {} --json", &[&out]).ok().json();
    assert_eq!(inspect["experts_per_layer"], recorded);
    let bytes: u64 = inspect["bytes"].as_u64().unwrap();
    assert_eq!(plan["accounting"]["bytes_after"].as_u64().unwrap(), bytes);
    let text = tenp("inspect {}", &[&out]).ok();
    text.check(text.stdout.contains("4 to 16 per layer"), "the counts");
    let eval = tenp(
        "eval {} --reference {} --tasks {} --json",
        &[&out, &demo(), &demo_file("tasks", DOMAINS[0])],
    )
    .ok()
    .json();
    assert!(number(&eval["reference"]["kl"]) > 0.0);
    for layer in list(&eval["reference"]["layers"]) {
        assert!(layer["routing_shift"].is_number(), "{layer}");
    }
    tenp("generate {} --prompt \"The\" --max-tokens 3", &[&out]).ok();
    let stats = scratch.join("stats.safetensors");
    tenp(
        "calibrate {} --data {} --samples 4 -o {}",
        &[&out, &data, &stats],
    )
    .ok();
    tenp("stats show {}", &[&stats]).ok();
}

#[test]
fn the_same_count_for_every_layer_is_the_stock_form() {
    let case = Case::golden("qwen3_moe", &[]);
    let one = case.plan("--method reap --experts 6");
    let num_layers = layers(&read_json(&one)).len();
    let all = case.plan(&format!(
        "--method reap --experts {}",
        vec!["6"; num_layers].join(",")
    ));
    assert_eq!(read_json(&one), read_json(&all));
    let (one, all) = (case.apply(&one, 2), case.apply(&all, 2));
    assert_same_files(&one, &all, &["README.md", "report.html", "report.json"]);
    assert_eq!(
        read_json(&all.join("config.json"))["model_type"],
        "qwen3_moe"
    );
}

#[test]
fn fused_experts_are_written_apart() {
    let case = Case::golden("variants/qwen3_moe_fused", &[]);
    let num_layers = layers(&read_json(&case.plan("--method reap --experts 6"))).len();
    let counts: Vec<&str> = (0..num_layers).map(|i| ["6", "5"][i % 2]).collect();
    let plan = case.plan(&format!("--method reap --experts {}", counts.join(",")));
    let out = case.apply(&plan, 2);
    assert!(
        tensors(&out)
            .keys()
            .all(|name| !name.contains("gate_up_proj"))
    );
    assert!(case.distance(&out, &case.model) > 1e-4);
}

#[test]
fn a_config_must_leave_each_router_its_choice() {
    let scratch = Scratch::new();
    let case = Case::golden("olmoe", &[]);
    let num_layers = layers(&read_json(&case.plan("--method reap --experts 6"))).len();
    let counts: Vec<&str> = (0..num_layers).map(|i| ["6", "5"][i % 2]).collect();
    let out = case.prune(&format!("--method reap --experts {}", counts.join(",")));
    for widths in [json!([48]), json!(vec![48; 9]), json!([])] {
        let bad = copy(&out, &scratch.join("bad"));
        edit_json(&bad.join("config.json"), |config| {
            config["tenp"]["widths"][1] = widths;
        });
        tenp("inspect {}", &[&bad]).refused(1, &["tenp.widths", "MoE layer number 1"]);
    }
}
