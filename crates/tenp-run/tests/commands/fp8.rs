//! fp8 models and layers for multi-token prediction through the program.

use crate::fp8_folder::quantise;
use crate::support::fixtures::{golden, read_json, tensor};
use crate::support::{Scratch, tenp};
use tenp_checkpoint::{Dtype, SynthesiseOptions, synthesise};

#[test]
fn an_fp8_model_is_pruned_in_its_own_type_or_leaves_it() {
    let scratch = Scratch::new();
    let model = scratch.join("model");
    quantise(&golden("deepseek_v3"), &model);
    let value = tenp("inspect {} --json", &[&model]).ok().json();
    assert_eq!(value["dtype"], "f8e4m3");
    let before = tenp("inspect {} --json", &[&golden("deepseek_v3")])
        .ok()
        .json();
    assert_eq!(
        value["parameters"], before["parameters"],
        "scales are not parameters"
    );

    let ids = golden("deepseek_v3").join("golden.safetensors");
    let mut sizes = Vec::new();
    for (name, flag) in [("same", ""), ("wide", " --dtype bf16")] {
        let out = scratch.join(name);
        let line = format!("prune {{}} --data all={{}} --keep 0.6 -o {{}} --json{flag}");
        let dry = tenp(&format!("{line} --dry-run"), &[&model, &ids, &out])
            .ok()
            .json();
        assert!(!out.exists());
        tenp(&line, &[&model, &ids, &out]).ok();
        let index = read_json(&out.join("model.safetensors.index.json"));
        assert_eq!(
            dry["bytes_after"], index["metadata"]["total_size"],
            "{name}"
        );
        let config = read_json(&out.join("config.json"));
        assert_eq!(config.get("quantization_config").is_some(), name == "same");
        let logits = scratch.join("logits.safetensors");
        tenp("logits {} --input {} --output {}", &[&out, &ids, &logits]).ok();
        assert!(
            tensor(&logits, "logits")
                .1
                .iter()
                .all(|value| value.is_finite())
        );
        sizes.push(dry["bytes_after"].as_u64().unwrap());
        let again = tenp(&line, &[&model, &ids, &out]).ok();
        again.check(again.json()["already_finished"] == true, "nothing to do");
    }
    assert!(sizes[0] < sizes[1]);

    let stats = scratch.join("stats");
    let plan = scratch.join("plan.json");
    tenp("calibrate {} --data all={} -o {}", &[&model, &ids, &stats]).ok();
    tenp(
        "plan {} --stats {} --keep 0.6 -o {}",
        &[&model, &stats, &plan],
    )
    .ok();
    let out = scratch.join("applied");
    let line = "apply {} --plan {} -o {} --dtype bf16 --recover rescale --data all={}";
    tenp(line, &[&model, &plan, &out, &ids]).ok();
    assert_eq!(
        tenp("inspect {} --json", &[&out]).ok().json()["dtype"],
        "bf16"
    );
}

#[test]
fn a_type_without_effect_is_refused() {
    let scratch = Scratch::new();
    let (model, out) = (golden("deepseek_v3"), scratch.join("out"));
    let ids = model.join("golden.safetensors");
    let line = "prune {} --data all={} --keep 0.6 -o {} --dtype bf16";
    let words = [
        "--dtype bf16",
        "no weight of the model is fp8",
        "leave it out",
    ];
    tenp(line, &[&model, &ids, &out]).refused(2, &words);
    assert!(!out.exists());
}

#[test]
fn layers_for_multi_token_prediction_are_never_passed_over() {
    let scratch = Scratch::new();
    let model = scratch.join("model");
    std::fs::create_dir(&model).unwrap();
    let config = golden("deepseek_v3").join("config.json");
    let options = SynthesiseOptions {
        dtype: Dtype::F8E4M3,
        mtp: true,
        ..SynthesiseOptions::default()
    };
    synthesise(&config, &model, options, &mut |_, _| ()).unwrap();
    let ids = golden("deepseek_v3").join("golden.safetensors");
    for (mode, flag) in [
        ("prune", ""),
        ("keep", " --mtp keep"),
        ("drop", " --mtp drop"),
    ] {
        let out = scratch.join(mode);
        let line = format!("prune {{}} --data all={{}} --keep 0.6 -o {{}} --json{flag}");
        let dry = tenp(&format!("{line} --dry-run"), &[&model, &ids, &out])
            .ok()
            .json();
        tenp(&line, &[&model, &ids, &out]).ok();
        let index = read_json(&out.join("model.safetensors.index.json"));
        // Which layers get the last quanta of width is not known before the calibration.
        let [foreseen, came] = [&dry["bytes_after"], &index["metadata"]["total_size"]]
            .map(|bytes| bytes.as_f64().unwrap());
        let tolerance = if mode == "prune" { 0.01 } else { 0.0 };
        assert!((foreseen - came).abs() <= tolerance * came, "{mode}");
        let report = read_json(&out.join("report.json"));
        assert_eq!(report["mtp"]["mode"], mode);
        let layers = read_json(&out.join("config.json"))["num_nextn_predict_layers"].clone();
        assert_eq!(layers, u32::from(mode != "drop"));
        let logits = scratch.join("logits.safetensors");
        tenp("logits {} --input {} --output {}", &[&out, &ids, &logits]).ok();
    }
    let out = scratch.join("refused");
    let line = "prune {} --data all={} --method enp --keep 0.6 --form uniform --mtp keep -o {}";
    tenp(line, &[&model, &ids, &out]).refused(2, &["uniform", "MTP", "--mtp prune"]);
    let model = golden("olmoe");
    let line = "prune {} --data all={} --keep 0.6 --mtp drop -o {}";
    let words = ["--mtp has no effect", "leave it out"];
    tenp(line, &[&model, &ids, &out]).refused(2, &words);
    assert!(!out.exists());
}
