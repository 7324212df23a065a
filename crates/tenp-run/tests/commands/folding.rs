//! `tenp+dern`: what narrow experts lose, merged into what they keep.

use serde_json::{Value, json};

use crate::dern::{ABOUT, Case};
use crate::plans::demo_statistics;
use crate::support::fixtures::{
    GOLDEN, adopt, assert_same_files, demo, edit_json, overwrite, place, read_json,
};
use crate::support::json::{list, number};
use crate::support::{Scratch, tenp};

const TENP: &str = "--method tenp --keep 0.6";
const MERGED: &str = "--method tenp+dern --keep 0.6";

/// Layer, expert, kept neurons and width of every narrow expert that keeps some.
fn narrow(plan: &Value) -> Vec<(u64, usize, Vec<usize>)> {
    let mut found = Vec::new();
    for layer in list(&plan["layers"]) {
        for (id, expert) in list(&layer["experts"]).iter().enumerate() {
            if let Some(neurons) = expert.get("neurons").filter(|n| !list(n).is_empty()) {
                let neurons = list(neurons).iter().map(|n| number(n) as usize);
                found.push((layer["layer"].as_u64().unwrap(), id, neurons.collect()));
            }
        }
    }
    found
}

#[test]
fn widths_and_neurons_are_those_of_tenp() {
    let scratch = Scratch::new();
    let make = |options: &str, name: &str| {
        let path = scratch.join(name);
        let line = format!("plan {{}} --stats {{}} {options} --alpha 0.1 -o {{}}");
        tenp(&line, &[&demo(), demo_statistics(), &path]).ok();
        read_json(&path)
    };
    let (plain, merged) = (make(TENP, "plain.json"), make(MERGED, "merged.json"));
    for same in ["layers", "options", "accounting"] {
        assert_eq!(plain[same], merged[same], "{same}");
    }
    assert_eq!(merged["method"], "tenp+dern");
    let dern = &merged["dern"];
    for (key, value) in [
        ("scope", "neurons"),
        ("router", "keep"),
        ("initialisation", "kept"),
        ("merge_weights", "energy"),
    ] {
        assert_eq!(dern[key], value, "{key}");
    }
    assert_eq!(dern["threshold"], 0.0);
    assert!(dern.get("S").is_none());
    for (layer, weights) in list(&merged["layers"]).iter().zip(list(&dern["weights"])) {
        for (expert, weights) in list(&layer["experts"]).iter().zip(list(weights)) {
            let weights: Vec<f64> = list(weights).iter().map(number).collect();
            if expert.get("neurons").is_none() {
                assert!(weights.is_empty(), "whole experts are not merged");
                continue;
            }
            assert_eq!(weights.len(), 96);
            assert_eq!(weights.iter().copied().fold(0.0, f64::max), 1.0);
        }
    }
    let uniform = make(
        "--method tenp+dern --keep 0.6 --merge-weights uniform",
        "uniform.json",
    );
    assert!(uniform["dern"].get("weights").is_none());
}

#[test]
fn where_nothing_is_above_the_threshold_every_byte_is_that_of_tenp() {
    for name in ["olmoe", "mixtral", "variants/qwen3_moe_fused"] {
        let case = Case::golden(name, &[]);
        let merged = case.prune("--method tenp+dern --keep 0.6 --threshold 0.9999");
        let report = read_json(&merged.join("report.json"));
        assert_eq!(report["dern"]["moved"], 0, "{name}");
        assert!(number(&report["dern"]["discarded"]) > 0.0, "{name}");
        assert_same_files(&merged, &case.prune(TENP), &ABOUT);
    }
}

#[test]
fn a_duplicate_of_a_kept_neuron_is_merged_and_changes_nothing() {
    for name in ["olmoe", "variants/olmoe_f32"] {
        let case = Case::golden(name, &[]);
        let (plan, plain) = (
            case.plan("--method tenp+dern --keep 0.6 --threshold 0.99"),
            case.plan(TENP),
        );
        let experts = narrow(&read_json(&plan));
        let config = read_json(&case.model.join("config.json"));
        let [width, hidden] =
            ["intermediate_size", "hidden_size"].map(|field| number(&config[field]) as usize);
        for (layer, expert, kept) in &experts {
            let gone = (0..width).find(|neuron| !kept.contains(neuron)).unwrap();
            let tensor =
                |part: &str| format!("model.layers.{layer}.mlp.experts.{expert}.{part}.weight");
            for part in ["gate_proj", "up_proj", "down_proj"] {
                let (path, range) = place(&case.model, &tensor(part));
                let mut bytes = std::fs::read(path).unwrap()[range].to_vec();
                let size = bytes.len() / (width * hidden);
                if part == "down_proj" {
                    for row in bytes.chunks_exact_mut(width * size) {
                        row.copy_within(kept[0] * size..(kept[0] + 1) * size, gone * size);
                    }
                } else {
                    let row = hidden * size;
                    bytes.copy_within(kept[0] * row..(kept[0] + 1) * row, gone * row);
                }
                overwrite(&case.model, &tensor(part), &bytes);
            }
        }
        for plan in [&plan, &plain] {
            adopt(plan, &case.model);
        }
        let (merged, plain) = (case.apply(&plan, 2), case.apply(&plain, 2));
        let report = read_json(&merged.join("report.json"));
        assert_eq!(report["dern"]["moved"], experts.len(), "{name}: {report}");
        let error = case.distance(&merged, &plain);
        assert!(error < 1e-5, "{name}: {error:e}");
    }
}

#[test]
fn neurons_without_weight_change_nothing() {
    let case = Case::golden("qwen2_moe", &[]);
    let plan = case.plan("--method tenp+dern --keep 0.6 --threshold 0");
    let kept = narrow(&read_json(&plan));
    edit_json(&plan, |plan| {
        let layers: Vec<u64> = list(&plan["layers"])
            .iter()
            .map(|l| l["layer"].as_u64().unwrap())
            .collect();
        for (layer, expert, kept) in &kept {
            let index = layers.iter().position(|l| l == layer).unwrap();
            let weights = plan["dern"]["weights"][index][*expert]
                .as_array_mut()
                .unwrap();
            for (neuron, weight) in weights.iter_mut().enumerate() {
                if !kept.contains(&neuron) {
                    *weight = json!(0.0);
                }
            }
        }
    });
    let merged = case.apply(&plan, 2);
    let report = read_json(&merged.join("report.json"));
    assert!(number(&report["dern"]["moved"]) > 0.0, "{report}");
    assert_same_files(&merged, &case.prune(TENP), &ABOUT);
}

#[test]
fn keeping_every_neuron_is_a_copy() {
    let case = Case::golden("mixtral", &[]);
    let out = case.prune("--method tenp+dern --keep 1.0");
    assert_same_files(
        &out,
        &case.model,
        &[
            "README.md",
            "report.html",
            "report.json",
            "tenp_plan.json",
            "golden.safetensors",
            "oracle.safetensors",
        ],
    );
}

#[test]
fn every_family_merges_the_same_on_any_number_of_threads_and_in_every_form() {
    for name in GOLDEN {
        let case = Case::golden(name, &[]);
        // So little that some experts keep no neuron at all.
        let plan = case.plan("--method tenp+dern --keep 0.2 --alpha 0.15 --threshold 0");
        let (one, two) = (case.apply(&plan, 1), case.apply(&plan, 2));
        assert_same_files(&one, &two, &["README.md", "report.html", "report.json"]);
        let report = read_json(&one.join("report.json"));
        assert!(number(&report["dern"]["moved"]) > 0.0, "{name}: {report}");
        let padded = case.scratch.join("padded");
        tenp(
            "apply {} --plan {} --form padded -o {}",
            &[&case.model, &plan, &padded],
        )
        .ok();
        let error = case.distance(&one, &padded);
        assert!(error < 1e-5, "{name}: {error:e}");
        let plain = case.prune("--method tenp --keep 0.2 --alpha 0.15");
        assert!(
            case.distance(&one, &plain) > 1e-6,
            "{name}: merging does something"
        );
    }
}
