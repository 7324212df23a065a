//! DERN: dropped experts merged into the others.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::plans::demo_statistics;
use crate::support::fixtures::{
    GOLDEN, adopt, assert_same_files, copy, demo, demo_file, edit_json, golden, overwrite, place,
    read_json,
};
use crate::support::json::{list, number};
use crate::support::{Scratch, tenp};

/// Files that say how a checkpoint was made, not what it computes.
pub(crate) const ABOUT: [&str; 5] = [
    "README.md",
    "report.html",
    "report.json",
    "tenp_plan.json",
    "config.json",
];

/// A checkpoint with statistics.
pub(crate) struct Case {
    pub(crate) scratch: Scratch,
    pub(crate) model: PathBuf,
    stats: PathBuf,
}

impl Case {
    /// A golden checkpoint, its config changed.
    pub(crate) fn golden(name: &str, change: &[(&str, u64)]) -> Self {
        let scratch = Scratch::new();
        let model = copy(&golden(name), &scratch.join("model"));
        if !change.is_empty() {
            edit_json(&model.join("config.json"), |config| {
                for (field, value) in change {
                    config.insert((*field).to_owned(), json!(value));
                }
            });
        }
        let stats = scratch.join("stats.safetensors");
        let ids = model.join("golden.safetensors");
        tenp("calibrate {} --data {} -o {}", &[&model, &ids, &stats]).ok();
        Self {
            scratch,
            model,
            stats,
        }
    }

    pub(crate) fn plan(&self, options: &str) -> PathBuf {
        let plan = self
            .scratch
            .join(&format!("{options}.json").replace(' ', "_"));
        let line = format!("plan {{}} --stats {{}} {options} -o {{}}");
        tenp(&line, &[&self.model, &self.stats, &plan]).ok();
        plan
    }

    pub(crate) fn apply(&self, plan: &Path, threads: u32) -> PathBuf {
        let name = plan.file_stem().unwrap().to_string_lossy();
        let out = self.scratch.join(&format!("{name}-{threads}"));
        let line = format!("apply {{}} --plan {{}} -o {{}} --threads {threads}");
        tenp(&line, &[&self.model, plan, &out]).ok();
        out
    }

    pub(crate) fn prune(&self, options: &str) -> PathBuf {
        self.apply(&self.plan(options), 2)
    }

    fn logits(&self, model: &Path) -> Vec<u8> {
        let (ids, out) = (
            self.model.join("golden.safetensors"),
            self.scratch.join("logits.safetensors"),
        );
        tenp("logits {} --input {} --output {}", &[model, &ids, &out]).ok();
        std::fs::read(out).unwrap()
    }

    /// Norm of the difference of two models' logits, relative to the second's.
    pub(crate) fn distance(&self, model: &Path, reference: &Path) -> f64 {
        let logits = |model: &Path| {
            let bytes = self.logits(model);
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let data = file.tensor("logits").unwrap().data().to_vec();
            let values = data.as_chunks::<4>().0.iter();
            values
                .map(|b| f64::from(f32::from_le_bytes(*b)))
                .collect::<Vec<_>>()
        };
        let (a, b) = (logits(model), logits(reference));
        let difference: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
        (difference / b.iter().map(|b| b * b).sum::<f64>()).sqrt()
    }
}

/// Ids of the experts that a plan's layer keeps, and drops.
fn kept(layer: &Value) -> (Vec<usize>, Vec<usize>) {
    let dropped = |id: &usize| layer["experts"][*id]["dropped"] == true;
    let (out, stay) = (0..list(&layer["experts"]).len()).partition(dropped);
    (stay, out)
}

#[test]
fn a_plan_records_what_decides_the_merging() {
    let scratch = Scratch::new();
    let plan = scratch.join("plan.json");
    tenp(
        "plan {} --stats {} --method dern --experts 12 -o {}",
        &[&demo(), demo_statistics(), &plan],
    )
    .ok();
    let plan = read_json(&plan);
    assert_eq!(plan["method"], "dern");
    assert_eq!(plan["options"]["experts"], 12);
    assert_eq!(plan["options"]["experts_kept"], 12);
    let dern = &plan["dern"];
    assert_eq!(dern["lambda"], json!([0.0, 0.5, 0.5]));
    assert_eq!(dern["threshold"], 0.4);
    for (key, value) in [
        ("router", "transfer"),
        ("initialisation", "peak"),
        ("merge_weights", "router"),
    ] {
        assert_eq!(dern[key], value, "{key}");
    }
    assert_eq!(dern["rounds"], 30);
    assert!(dern.get("seed").is_none());
    for (layer, scores) in list(&plan["layers"]).iter().zip(list(&dern["S"])) {
        let score = |id: &usize| number(&scores[*id]);
        let (kept, dropped) = kept(layer);
        assert_eq!((kept.len(), dropped.len()), (12, 4));
        let least = kept.iter().map(score).fold(f64::INFINITY, f64::min);
        assert!(
            dropped.iter().all(|d| score(d) <= least),
            "the router's favourites stay"
        );
        let sum: f64 = list(scores).iter().map(number).sum();
        assert!((sum - 1.0).abs() < 1e-9);
        assert!(
            list(&layer["experts"])
                .iter()
                .all(|e| e.get("neurons").is_none())
        );
    }
}

#[test]
fn experts_are_merged_and_the_output_is_stock() {
    let scratch = Scratch::new();
    let data = demo_file("calibration", "lists");
    let out = scratch.join("out");
    let run = tenp(
        "prune {} --data {} --samples 40 --method dern --experts 12 --threshold 0.1 -o {} --json",
        &[&demo(), &data, &out],
    )
    .ok();
    assert_eq!(run.json()["accounting"]["E"], 0.75);
    let config = read_json(&out.join("config.json"));
    assert_eq!(config["n_routed_experts"], 12);
    assert_eq!(config["model_type"], "deepseek_v2");
    assert_eq!(config["architectures"], json!(["DeepseekV2ForCausalLM"]));
    let report = &read_json(&out.join("report.json"))["dern"];
    let (moved, discarded) = (number(&report["moved"]), number(&report["discarded"]));
    assert!(moved > 0.0, "{report}");
    assert_eq!(
        moved + discarded,
        (7 * 4 * 96) as f64,
        "every dropped neuron"
    );
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains(&format!("{moved} were merged")), "{card}");
    let text = demo_file("text", "facts");
    let eval = tenp(
        "eval {} --reference {} --text {} --json",
        &[&out, &demo(), &text],
    )
    .ok();
    assert!(number(&eval.json()["reference"]["kl"]) > 0.0);
    let again = tenp(
        "prune {} --data {} --samples 40 --method dern --experts 12 --threshold 0.1 -o {}",
        &[&demo(), &data, &out],
    )
    .ok();
    again.check(again.stderr.contains("nothing to do"), "the run is known");
    tenp(
        "prune {} --data {} --samples 40 --method dern --experts 12 --threshold 0.2 -o {}",
        &[&demo(), &data, &out],
    )
    .refused(2, &["--force"]);
}

#[test]
fn every_family_merges_the_same_on_any_number_of_threads() {
    for name in GOLDEN {
        let groups = ["deepseek_v2_group", "deepseek_v3"].contains(&name);
        // Two groups of four, so that something can go.
        let change: &[(&str, u64)] = match name {
            "deepseek_v2_group" => &[("n_group", 2), ("topk_group", 1)],
            "deepseek_v3" => &[("n_group", 2), ("topk_group", 2)],
            _ => &[],
        };
        let case = Case::golden(name, change);
        let options = "--method dern --keep 0.75 --threshold 0 --sign-canonical";
        let plan = case.plan(options);
        for layer in list(&read_json(&plan)["layers"]) {
            let (kept, _) = kept(layer);
            let first = kept.iter().filter(|e| **e < 4).count();
            assert!(
                !groups || first == 3,
                "{name}: as many in each group: {kept:?}"
            );
        }
        let (one, two) = (case.apply(&plan, 1), case.apply(&plan, 2));
        assert_same_files(&one, &two, &["README.md", "report.html", "report.json"]);
        let report = read_json(&one.join("report.json"));
        assert!(number(&report["dern"]["moved"]) > 0.0, "{name}: {report}");
        let dropped = case.prune("--method gating --expert-score gating-share --keep 0.75");
        assert!(
            case.logits(&one) != case.logits(&dropped),
            "{name}: merging does something"
        );
        // The same by lot, repeatably.
        let random = "--method dern --keep 0.75 --threshold 0 --init random --seed 3";
        let (plan, seed) = (case.plan(random), read_json(&case.plan(random)));
        assert_eq!(seed["dern"]["seed"], 3);
        assert_same_files(
            &case.apply(&plan, 1),
            &case.apply(&plan, 2),
            &["README.md", "report.html", "report.json"],
        );
    }
}

#[test]
fn where_nothing_is_received_every_byte_is_that_of_dropping() {
    for name in ["olmoe", "mixtral", "variants/qwen3_moe_fused"] {
        let case = Case::golden(name, &[]);
        let merged = case.prune("--method dern --keep 0.75 --threshold 0.9999");
        let report = read_json(&merged.join("report.json"));
        assert_eq!(report["dern"]["moved"], 0, "{name}");
        let dropped = case.prune("--method gating --expert-score gating-share --keep 0.75");
        assert_same_files(&merged, &dropped, &ABOUT);
    }
}

#[test]
fn a_duplicate_of_a_kept_expert_changes_nothing() {
    for name in ["olmoe", "variants/olmoe_f32"] {
        let case = Case::golden(name, &[]);
        let options = "--method dern --experts 6 --threshold 0.99 --router keep";
        let plan = case.plan(options);
        let drop = case.plan("--method gating --expert-score gating-share --experts 6");
        for layer in list(&read_json(&plan)["layers"]) {
            let (kept, dropped) = kept(layer);
            for part in ["gate_proj", "up_proj", "down_proj"] {
                let tensor = |e: usize| {
                    format!(
                        "model.layers.{}.mlp.experts.{e}.{part}.weight",
                        layer["layer"]
                    )
                };
                let (path, range) = place(&case.model, &tensor(kept[1]));
                let bytes = std::fs::read(path).unwrap()[range].to_vec();
                overwrite(&case.model, &tensor(dropped[0]), &bytes);
            }
        }
        for plan in [&plan, &drop] {
            adopt(plan, &case.model);
        }
        let (merged, dropped) = (case.apply(&plan, 2), case.apply(&drop, 2));
        let report = read_json(&merged.join("report.json"));
        assert!(number(&report["dern"]["moved"]) > 0.0, "{name}: {report}");
        let error = case.distance(&merged, &dropped);
        assert!(error < 1e-5, "{name}: {error:e}");
    }
}

#[test]
fn neurons_without_weight_change_nothing() {
    let case = Case::golden("qwen2_moe", &[]);
    let plan = case.plan("--method dern --experts 6 --threshold 0 --router keep");
    edit_json(&plan, |plan| {
        let layers = list(&plan["layers"]).to_vec();
        for (index, layer) in layers.iter().enumerate() {
            for id in kept(layer).1 {
                plan["dern"]["S"][index][id] = json!(0.0);
            }
        }
    });
    let merged = case.apply(&plan, 2);
    let report = read_json(&merged.join("report.json"));
    assert!(number(&report["dern"]["moved"]) > 0.0, "{report}");
    let dropped = case.prune("--method gating --expert-score gating-share --experts 6");
    assert_same_files(&merged, &dropped, &ABOUT);
}

#[test]
fn keeping_every_expert_is_a_copy() {
    let case = Case::golden("mixtral", &[]);
    let out = case.prune("--method dern --keep 1.0");
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
