//! Every family through every command that needs no tokenizer.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::fixtures::{GOLDEN, copy, golden, names, read_json, tensor};
use crate::support::json::{keys, list, number, widths};
use crate::support::{Scratch, tenp};

const INSPECT: [&str; 10] = [
    "family",
    "layers",
    "moe_layers",
    "experts",
    "top_k",
    "expert_width",
    "parameters",
    "dtype",
    "bytes",
    "missing_shards",
];

fn inspect(model: &Path) -> Value {
    let run = tenp("inspect {} --json", &[model]).ok();
    run.check(run.stderr.is_empty(), "nothing to tell beside the data");
    run.json()
}

#[test]
fn inspect_prints_the_promised_fields() {
    for name in GOLDEN {
        let value = inspect(&golden(name));
        assert_eq!(keys(&value), INSPECT, "{name}");
        assert_eq!(keys(&value["parameters"]), ["total", "routed", "active"]);
        let of = |key: &str| value["parameters"][key].as_u64().unwrap();
        assert!(
            of("total") > of("routed") && of("total") > of("active"),
            "{name}"
        );
        assert!(of("routed") > 0 && value["bytes"].as_u64().unwrap() > of("total"));
        assert_eq!(value["missing_shards"], json!([]));
        let family = value["family"].as_str().unwrap();
        let folder = name.rsplit('/').next().unwrap();
        assert!(folder.starts_with(family), "{name} is called {family}");
        let text = tenp("inspect {}", &[&golden(name)]).ok();
        text.check(text.stdout.contains(family), "people see the family too");
    }
}

#[test]
fn inspect_names_a_missing_shard_and_other_commands_refuse() {
    let scratch = Scratch::new();
    let model = copy(&golden("deepseek"), &scratch.join("model"));
    std::fs::remove_file(model.join("model-00002-of-00003.safetensors")).unwrap();
    let value = inspect(&model);
    assert_eq!(keys(&value), INSPECT);
    assert_eq!(
        value["missing_shards"],
        json!(["model-00002-of-00003.safetensors"])
    );
    let text = tenp("inspect {}", &[&model]).ok();
    text.check(
        text.stdout.contains("model-00002-of-00003.safetensors"),
        "people see the missing shard too",
    );
}

#[test]
fn logits_agree_with_the_reference() {
    let scratch = Scratch::new();
    for name in GOLDEN {
        let ids = golden(name).join("golden.safetensors");
        let out = scratch.join("logits.safetensors");
        let run = tenp(
            "logits {} --input {} --output {}",
            &[&golden(name), &ids, &out],
        )
        .ok();
        run.check(run.stdout.is_empty(), "the data went into the file");
        let (shape, ours) = tensor(&out, "logits");
        let (expected_shape, theirs) = tensor(&ids, "logits");
        assert_eq!(shape, expected_shape, "{name}");
        let difference: f64 = ours.iter().zip(&theirs).map(|(a, b)| (a - b).powi(2)).sum();
        let norm: f64 = theirs.iter().map(|v| v * v).sum();
        let error = (difference / norm).sqrt();
        assert!(error <= 1e-4, "{name}: relative error {error:e}");
    }
}

/// A tiny checkpoint with its statistics.
struct Calibrated {
    model: PathBuf,
    ids: PathBuf,
    stats: PathBuf,
    scratch: Scratch,
}

impl Calibrated {
    fn new(name: &str) -> Self {
        let scratch = Scratch::new();
        let (model, stats) = (golden(name), scratch.join("stats.safetensors"));
        let ids = model.join("golden.safetensors");
        let run = tenp("calibrate {} --data {} -o {}", &[&model, &ids, &stats]).ok();
        run.check(run.stdout.is_empty(), "the data went into the file");
        run.check(run.stderr.contains("192 tokens"), "it says what it ran");
        Self {
            model,
            ids,
            stats,
            scratch,
        }
    }

    /// Plans and applies, and returns the output folder.
    fn prune(&self, options: &str, form: &str) -> PathBuf {
        let plan = self.scratch.join("plan.json");
        let line = format!("plan {{}} --stats {{}} {options} -o {{}}");
        tenp(&line, &[&self.model, &self.stats, &plan]).ok();
        let out = self
            .scratch
            .join(&format!("{options} {form}").replace(' ', "_"));
        let line = format!("apply {{}} --plan {{}} --form {form} -o {{}}");
        let run = tenp(&line, &[&self.model, &plan, &out]).ok();
        run.check(run.stdout.is_empty(), "the data went into the folder");
        out
    }

    fn logits(&self, model: &Path) -> Vec<u8> {
        let out = self.scratch.join("logits.safetensors");
        tenp(
            "logits {} --input {} --output {}",
            &[model, &self.ids, &out],
        )
        .ok();
        std::fs::read(out).unwrap()
    }
}

#[test]
fn every_family_is_pruned_into_every_form() {
    for name in GOLDEN {
        let run = Calibrated::new(name);
        let before = inspect(&run.model);
        let shown = tenp("stats show {} --json", &[&run.stats]).ok().json();
        assert_eq!(shown["experts"], before["experts"], "{name}");
        assert_eq!(shown["domains"][0]["tokens"], 192, "{name}");

        let ragged = run.prune("--method tenp --keep 0.6", "ragged");
        let padded = run.prune("--method tenp --keep 0.6", "padded");
        assert!(
            run.logits(&ragged) == run.logits(&padded),
            "{name}: ragged and padded logits differ in their bits"
        );
        let after = inspect(&ragged);
        assert_eq!(after["family"], before["family"], "{name}");
        let plan = read_json(&ragged.join("tenp_plan.json"));
        assert_eq!(after["widths"], json!(widths(&plan)), "{name}");
        let share =
            number(&after["parameters"]["routed"]) / number(&before["parameters"]["routed"]);
        assert!((share - 0.6).abs() < 0.03, "{name}: kept {share}");
        assert_eq!(
            inspect(&padded)["parameters"],
            before["parameters"],
            "{name}"
        );

        let uniform = run.prune("--method enp --keep 0.6", "uniform");
        let after = inspect(&uniform);
        assert_eq!(keys(&after), INSPECT, "{name}");
        assert!(number(&after["expert_width"]) < number(&before["expert_width"]));
        let same = run.prune("--method enp --keep 0.6", "ragged");
        assert!(
            run.logits(&uniform) == run.logits(&same),
            "{name}: uniform and ragged logits of one width differ in their bits"
        );

        // Four groups of two, top-3 out of two groups: every expert is needed.
        if name == "deepseek_v2_group" || name == "deepseek_v3" {
            let out = run.scratch.join("dropped.json");
            let line = "plan {} --stats {} --method reap --keep 0.75 -o {}";
            tenp(line, &[&run.model, &run.stats, &out])
                .refused(2, &["cannot choose 3 of 8", "narrows"]);
            continue;
        }
        let dropped = run.prune("--method reap --keep 0.75", "ragged");
        let after = inspect(&dropped);
        assert!(
            number(&after["experts"]) < number(&before["experts"]),
            "{name}"
        );
        assert_eq!(after["expert_width"], before["expert_width"], "{name}");
        run.logits(&dropped);
    }
}

#[test]
fn keeping_everything_copies_every_bit() {
    for name in GOLDEN {
        let run = Calibrated::new(name);
        for method in ["tenp", "enp", "reap"] {
            let out = run.prune(&format!("--method {method} --keep 1.0"), "ragged");
            for file in names(&out) {
                if ["README.md", "report.html", "report.json", "tenp_plan.json"]
                    .contains(&file.as_str())
                {
                    continue;
                }
                assert!(
                    std::fs::read(out.join(&file)).unwrap()
                        == std::fs::read(run.model.join(&file)).unwrap(),
                    "{name}, {method}: {file} differs"
                );
            }
            let weights = |dir: &Path| {
                let mut names = names(dir);
                names.retain(|n| n.starts_with("model") || n == "config.json");
                names
            };
            assert_eq!(weights(&out), weights(&run.model), "{name}");
            assert_eq!(list(&inspect(&out)["missing_shards"]).len(), 0);
        }
    }
}
