//! Recovery: what narrowed experts put out, brought back towards the whole ones.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::fixtures::{
    adopt, assert_same_files, demo, demo_file, golden, overwrite, place, read_json, tensor,
    write_ids,
};
use crate::support::json::{list, number};
use crate::support::{Scratch, tenp};

const ABOUT: [&str; 3] = ["README.md", "report.html", "report.json"];

fn recovery(out: &Path) -> Value {
    read_json(&out.join("report.json"))["recovery"].clone()
}

/// A golden checkpoint's plan.
fn plan(scratch: &Scratch, name: &str, options: &str) -> PathBuf {
    let (stats, plan) = (scratch.join("stats.safetensors"), scratch.join("plan.json"));
    let ids = golden(name).join("golden.safetensors");
    tenp(
        "calibrate {} --data {} -o {}",
        &[&golden(name), &ids, &stats],
    )
    .ok();
    let line = format!("plan {{}} --stats {{}} {options} -o {{}}");
    tenp(&line, &[&golden(name), &stats, &plan]).ok();
    plan
}

#[test]
fn the_fit_is_never_worse_and_repeats_on_any_number_of_threads() {
    let scratch = Scratch::new();
    let data = demo_file("calibration", "lists");
    let at = |name: &str| scratch.join(name);
    let (one, two, cut) = (at("1"), at("2"), at("cut"));
    let prune = "prune {} --data {} --samples 40 --keep 0.6";
    for (threads, out) in [("1", &one), ("2", &two)] {
        let line = format!("{prune} --recover least-squares -o {{}} --threads {threads}");
        tenp(&line, &[&demo(), &data, out]).ok();
    }
    assert_same_files(&one, &two, &ABOUT);
    let report = recovery(&one);
    assert_eq!(report["method"], "least-squares");
    assert_eq!(list(&report["layers"]).len(), 7);
    let mut fitted = 0.0;
    for layer in list(&report["layers"]) {
        let of = |key: &str| number(&layer[key]);
        assert!(of("error_recovered") < of("error_cut"), "{layer}");
        assert!(
            of("held_out_error_recovered") <= of("held_out_error_cut"),
            "{layer}"
        );
        assert!(of("error_cut") > 0.0 && of("error_cut") < 1.0, "{layer}");
        fitted += of("fitted");
    }
    assert!(
        fitted > 50.0,
        "most of the {} narrow experts are fitted",
        7 * 13
    );
    let card = std::fs::read_to_string(one.join("README.md")).unwrap();
    assert!(
        card.contains("## Recovery") && card.contains("| layer | cut |"),
        "{card}"
    );
    // Nothing but down projections changes.
    tenp(&format!("{prune} -o {{}}"), &[&demo(), &data, &cut]).ok();
    let index = read_json(&cut.join("model.safetensors.index.json"));
    let mut changed = 0;
    for name in index["weight_map"].as_object().unwrap().keys() {
        let bytes = |dir: &Path| {
            let (path, range) = place(dir, name);
            std::fs::read(path).unwrap()[range].to_vec()
        };
        if bytes(&one) != bytes(&cut) {
            assert!(
                name.contains(".experts.") && name.contains("down_proj"),
                "{name}"
            );
            changed += 1;
        }
    }
    assert!(
        f64::from(changed) <= fitted && changed > 50,
        "{changed} {fitted}"
    );
    // The run is known by its options.
    let again = tenp(
        &format!("{prune} --recover least-squares -o {{}}"),
        &[&demo(), &data, &one],
    )
    .ok();
    again.check(again.stderr.contains("nothing to do"), "the run is known");
    for other in [
        "--recover rescale",
        "--recover least-squares --recover-gates ungated",
        "--recover least-squares --recover-inputs original",
    ] {
        tenp(&format!("{prune} {other} -o {{}}"), &[&demo(), &data, &one]).refused(2, &["--force"]);
    }
}

#[test]
fn apply_recovers_as_prune_does() {
    for recover in ["least-squares", "rescale"] {
        let scratch = Scratch::new();
        let plan = plan(&scratch, "qwen2_moe", "--keep 0.6");
        let ids = golden("qwen2_moe").join("golden.safetensors");
        let (one, two) = (scratch.join("one"), scratch.join("two"));
        let line = format!("apply {{}} --plan {{}} --recover {recover} --data {{}} -o {{}}");
        tenp(&line, &[&golden("qwen2_moe"), &plan, &ids, &one]).ok();
        let line = format!("prune {{}} --data {{}} --keep 0.6 --recover {recover} -o {{}}");
        tenp(&line, &[&golden("qwen2_moe"), &ids, &two]).ok();
        assert_same_files(&one, &two, &ABOUT);
        assert_eq!(recovery(&one), recovery(&two));
    }
}

#[test]
fn every_form_and_family_takes_the_fit() {
    for (name, method, form) in [
        ("deepseek_v3", "tenp", "padded"),
        ("variants/qwen3_moe_fused", "enp", "uniform"),
        ("variants/mixtral_f16", "tenp", "ragged"),
        ("variants/olmoe_f32", "tenp", "ragged"),
    ] {
        let scratch = Scratch::new();
        let (model, out) = (golden(name), scratch.join("out"));
        let ids = model.join("golden.safetensors");
        let line = format!(
            "prune {{}} --data {{}} --method {method} --keep 0.5 --form {form} --recover least-squares -o {{}}"
        );
        tenp(&line, &[&model, &ids, &out]).ok();
        let mut fitted = 0.0;
        for layer in list(&recovery(&out)["layers"]) {
            assert!(number(&layer["error_recovered"]) <= number(&layer["error_cut"]));
            fitted += number(&layer["fitted"]);
        }
        assert!(fitted > 0.0, "{name}");
        let logits = scratch.join("logits.safetensors");
        tenp("logits {} --input {} --output {}", &[&out, &ids, &logits]).ok();
    }
}

#[test]
fn rescaling_multiplies_what_is_kept() {
    let scratch = Scratch::new();
    let name = "variants/olmoe_f32";
    let plan = plan(&scratch, name, "--keep 0.5");
    let ids = golden(name).join("golden.safetensors");
    let (cut, out) = (scratch.join("cut"), scratch.join("out"));
    tenp("apply {} --plan {} -o {}", &[&golden(name), &plan, &cut]).ok();
    let line = "apply {} --plan {} --recover rescale --data {} -o {}";
    tenp(line, &[&golden(name), &plan, &ids, &out]).ok();
    let factors = recovery(&out)["factors"].clone();
    let mut other = 0;
    for (layer, experts) in list(&read_json(&plan)["layers"]).iter().zip(list(&factors)) {
        for (expert, factor) in list(experts).iter().map(number).enumerate() {
            assert!((0.5..=2.0).contains(&factor));
            other += usize::from(factor != 1.0);
            let tensor_name = format!(
                "model.layers.{}.mlp.experts.{expert}.down_proj.weight",
                layer["layer"]
            );
            let values = |dir: &Path| tensor(&place(dir, &tensor_name).0, &tensor_name).1;
            for (a, b) in values(&cut).iter().zip(values(&out)) {
                assert!((a * factor - b).abs() <= 1e-6 * b.abs(), "{a} {factor} {b}");
            }
        }
    }
    assert!(other > 8, "{factors}");
}

#[test]
fn a_removed_double_of_a_kept_neuron_is_recovered() {
    let scratch = Scratch::new();
    let name = "variants/olmoe_f32";
    let plan = plan(&scratch, name, "--method enp --keep 0.9");
    let model = crate::support::fixtures::copy(&golden(name), &scratch.join("model"));
    let ids = model.join("golden.safetensors");
    // Every removed neuron becomes the double of a kept one: the same gate and up rows.
    for layer in list(&read_json(&plan)["layers"]) {
        for expert in list(&layer["experts"]) {
            let kept: Vec<usize> = list(&expert["neurons"])
                .iter()
                .map(|n| usize::try_from(n.as_u64().unwrap()).unwrap())
                .collect();
            for part in ["gate_proj", "up_proj"] {
                let tensor = format!(
                    "model.layers.{}.mlp.experts.{}.{part}.weight",
                    layer["layer"], expert["id"]
                );
                let (shape, _) =
                    crate::support::fixtures::tensor(&place(&model, &tensor).0, &tensor);
                let (path, range) = place(&model, &tensor);
                let mut bytes = std::fs::read(path).unwrap()[range].to_vec();
                let stride = 4 * shape[1];
                for removed in (0..shape[0]).filter(|n| !kept.contains(n)) {
                    let from = kept[removed % kept.len()] * stride;
                    bytes.copy_within(from..from + stride, removed * stride);
                }
                overwrite(&model, &tensor, &bytes);
            }
        }
    }
    adopt(&plan, &model);
    let logits = |dir: &Path| {
        let out = scratch.join("logits.safetensors");
        tenp("logits {} --input {} --output {}", &[dir, &ids, &out]).ok();
        tensor(&out, "logits").1
    };
    // Far more tokens than neurons, so that the fit sees every direction.
    let mut state = 1_u64;
    let samples: Vec<Vec<i64>> = (0..30)
        .map(|_| {
            let mut next = |_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 33) as i64 % 320
            };
            (0..96).map(&mut next).collect()
        })
        .collect();
    let text = write_ids(&scratch.join("text.safetensors"), &samples);
    let whole = logits(&model);
    let distance = |recover: &str, out: &str| {
        let out = scratch.join(out);
        let line = format!("apply {{}} --plan {{}} {recover} -o {{}}");
        match recover {
            "" => tenp(&line, &[&model, &plan, &out]).ok(),
            _ => tenp(&line, &[&model, &plan, &text, &out]).ok(),
        };
        let difference: f64 = logits(&out)
            .iter()
            .zip(&whole)
            .map(|(a, b)| (a - b).powi(2))
            .sum();
        (difference / whole.iter().map(|b| b * b).sum::<f64>()).sqrt()
    };
    let cut = distance("", "cut");
    let recovered = distance("--recover least-squares --data {}", "out");
    assert!(recovered < 0.02 * cut, "{recovered} of {cut}");
}

#[test]
fn options_that_do_not_go_together() {
    let scratch = Scratch::new();
    let plan = plan(&scratch, "olmoe", "--keep 0.6");
    let (model, out) = (golden("olmoe"), scratch.join("out"));
    let ids = model.join("golden.safetensors");
    let prune = |options: &str, needles: &[&str]| {
        let line = format!("prune {{}} --data {{}} {options} -o {{}}");
        let run = tenp(&line, &[&model, &ids, &out]);
        run.refused(2, needles);
        run.check(!run.stderr.contains("tokens in"), "before the calibration");
    };
    prune(
        "--keep 0.6 --recover ridge",
        &["--recover", "least-squares"],
    );
    prune(
        "--keep 0.6 --recover-gates ungated",
        &["--recover-gates", "least-squares"],
    );
    prune(
        "--keep 0.6 --recover rescale --recover-inputs original",
        &["--recover-inputs"],
    );
    prune(
        "--method reap --keep 0.75 --recover rescale",
        &["narrows no expert", "reap"],
    );
    prune(
        "--method dern --keep 0.75 --recover least-squares",
        &["narrows no expert", "dern"],
    );
    prune(
        "--method tenp+dern --keep 0.6 --recover least-squares",
        &["--recover", "tenp+dern", "--method tenp with --recover"],
    );
    tenp(
        "apply {} --plan {} --recover rescale -o {}",
        &[&model, &plan, &out],
    )
    .refused(2, &["--recover", "--data"]);
    tenp(
        "apply {} --plan {} --data {} -o {}",
        &[&model, &plan, &ids, &out],
    )
    .refused(2, &["--data", "--recover"]);
    assert!(!out.exists());
    // A plan that keeps everything is a copy, whatever recovers.
    tenp(
        "prune {} --data {} --keep 1 --recover least-squares -o {}",
        &[&model, &ids, &out],
    )
    .ok();
}
