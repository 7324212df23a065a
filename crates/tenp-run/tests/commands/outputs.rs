//! Output folders: what is in them, that they repeat, and what a dry run leaves alone.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::plans::demo_statistics;
use crate::support::fixtures::{
    assert_same_files, demo, demo_file, golden, names, read_json, snapshot,
};
use crate::support::json::{keys, list, number, widths};
use crate::support::{Scratch, tenp};

/// A plan of the demo.
fn plan(scratch: &Scratch, options: &str) -> PathBuf {
    let plan = scratch.join(&format!("{}.json", options.replace(' ', "_")));
    let line = format!("plan {{}} --stats {{}} {options} -o {{}}");
    tenp(&line, &[&demo(), demo_statistics(), &plan]).ok();
    plan
}

#[test]
fn a_ragged_folder_explains_itself() {
    let scratch = Scratch::new();
    let (plan, out) = (plan(&scratch, "--keep 0.6"), scratch.join("out"));
    let run = tenp("apply {} --plan {} -o {} --json", &[&demo(), &plan, &out]).ok();
    let outcome = run.json();
    assert_eq!(
        keys(&outcome),
        [
            "accounting",
            "uncalibrated",
            "bytes",
            "tensors",
            "shards",
            "resumed_shards",
            "identical"
        ]
    );
    assert_eq!(outcome["identical"], false);
    assert_eq!(
        names(&out),
        [
            "README.md",
            "config.json",
            "generation_config.json",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "report.html",
            "report.json",
            "tenp_plan.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    );
    assert_eq!(
        std::fs::read(out.join("tenp_plan.json")).unwrap(),
        std::fs::read(&plan).unwrap()
    );
    let config = read_json(&out.join("config.json"));
    assert_eq!(
        config["architectures"],
        json!(["TenpDeepseekV2ForCausalLM"])
    );
    assert_eq!(config["model_type"], "tenp_deepseek_v2");
    let report = read_json(&out.join("report.json"));
    let layers = list(&report["layers"]);
    let reported: Vec<_> = layers.iter().map(|l| l["widths"].clone()).collect();
    assert_eq!(json!(reported), json!(widths(&read_json(&plan))));
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    for part in [
        "base_model: \"demo\"",
        "tenp-run apply",
        "routed-expert parameters kept",
    ] {
        assert!(card.contains(part), "the card lacks `{part}`:\n{card}");
    }
    let bytes = number(&outcome["accounting"]["bytes_after"]);
    let written = std::fs::metadata(out.join("model-00001-of-00001.safetensors"));
    let written = written.unwrap().len() as f64;
    assert!(
        written >= bytes && written < bytes + 100_000.0,
        "{written} {bytes}"
    );
}

#[test]
fn every_form_runs_every_command() {
    let scratch = Scratch::new();
    let ids = golden("olmoe").join("golden.safetensors");
    let text = demo_file("text", "facts");
    for (options, form) in [
        ("--keep 0.6", "ragged"),
        ("--keep 0.6", "padded"),
        ("--method enp --keep 0.6", "uniform"),
        ("--method random-neurons --keep 0.6", "uniform"),
        ("--method frequency --keep 0.6", "ragged"),
        ("--keep 0.3 --allocation global", "ragged"),
        ("--keep 1", "padded"),
    ] {
        let plan = plan(&scratch, options);
        let out = scratch.join(&format!("{}-{form}", options.replace(' ', "_")));
        let line = format!("apply {{}} --plan {{}} --form {form} --shard-size 2MB -o {{}}");
        tenp(&line, &[&demo(), &plan, &out]).ok();
        let logits = scratch.join("logits.safetensors");
        tenp("inspect {} --json", &[&out]).ok().json();
        tenp("logits {} --input {} --output {}", &[&out, &ids, &logits]).ok();
        let eval = tenp(
            "eval {} --reference {} --text {} --json",
            &[&out, &demo(), &text],
        )
        .ok();
        let kl = number(&eval.json()["reference"]["kl"]);
        eval.check(
            (options == "--keep 1") == (kl == 0.0),
            "KL 0 only where nothing is cut",
        );
        let run = tenp("generate {} --prompt first --max-tokens 8", &[&out]).ok();
        run.check(
            run.stdout.starts_with("first"),
            "the text goes on from the prompt",
        );
        run.check(run.stdout.ends_with('\n'), "the text ends its line");
    }
}

#[test]
fn prune_is_calibrate_plan_and_apply() {
    let scratch = Scratch::new();
    let data = demo_file("calibration", "lists");
    let at = |name: &str| scratch.join(name);
    let (stats, plan, three, one) = (at("s"), at("p"), at("three"), at("one"));
    tenp(
        "calibrate {} --data {} --samples 40 -o {}",
        &[&demo(), &data, &stats],
    )
    .ok();
    tenp(
        "plan {} --stats {} --keep 0.55 -o {}",
        &[&demo(), &stats, &plan],
    )
    .ok();
    tenp("apply {} --plan {} -o {}", &[&demo(), &plan, &three]).ok();
    let kept = at("kept");
    let run = tenp(
        "prune {} --data {} --samples 40 --keep 0.55 --save-stats {} -o {} --json",
        &[&demo(), &data, &kept, &one],
    )
    .ok();
    run.json();
    assert_same_files(&three, &one, &["README.md", "report.html", "report.json"]);
    assert!(std::fs::read(&stats).unwrap() == std::fs::read(&kept).unwrap());
    let report = |dir: &Path| {
        let mut report = read_json(&dir.join("report.json"));
        let report = report.as_object_mut().unwrap();
        // Only `prune` knows the calibration text.
        for about in ["calibration", "coverage"] {
            assert_eq!(report.remove(about).is_some(), dir == one);
        }
        report.remove("command");
        report.clone()
    };
    assert_eq!(report(&three), report(&one));
    let card = |dir: &Path| {
        let card = std::fs::read_to_string(dir.join("README.md")).unwrap();
        let lines = card.lines().filter(|l| !l.starts_with("    tenp-run "));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(card(&three), card(&one));
}

#[test]
fn a_second_identical_run_does_nothing() {
    let scratch = Scratch::new();
    let (plan, out) = (plan(&scratch, "--keep 0.6"), scratch.join("out"));
    let apply = "apply {} --plan {} -o {}";
    tenp(apply, &[&demo(), &plan, &out]).ok();
    let before = snapshot(&out);
    let again = tenp(apply, &[&demo(), &plan, &out]).ok();
    again.check(again.stderr.contains("nothing to do"), "it says so");
    let json = tenp("apply {} --plan {} -o {} --json", &[&demo(), &plan, &out]).ok();
    assert_eq!(json.json()["already_finished"], true);
    assert!(snapshot(&out) == before);

    let data = demo_file("calibration", "lists");
    let pruned = scratch.join("pruned");
    let prune = "prune {} --data {} --samples 20 --keep 0.6 -o {}";
    tenp(prune, &[&demo(), &data, &pruned]).ok();
    let again = tenp(prune, &[&demo(), &data, &pruned]).ok();
    again.check(again.stderr.contains("nothing to do"), "it says so");
    let other = tenp(
        "prune {} --data {} --samples 20 --keep 0.5 -o {}",
        &[&demo(), &data, &pruned],
    );
    other.refused(2, &["--force"]);
    tenp(
        "prune {} --data {} --samples 20 --keep 0.5 -o {} --force",
        &[&demo(), &data, &pruned],
    )
    .ok();
    assert_eq!(
        read_json(&pruned.join("report.json"))["options"]["keep"],
        0.5
    );
}

#[test]
fn a_dry_run_writes_nothing() {
    let scratch = Scratch::new();
    let data = demo_file("calibration", "lists");
    let (out, stats) = (scratch.join("out"), scratch.join("stats"));
    let run = tenp(
        "prune {} --data {} --keep 0.6 --save-stats {} -o {} --dry-run --json",
        &[&demo(), &data, &stats, &out],
    )
    .ok();
    let value = run.json();
    for key in [
        "tokens",
        "bytes_before",
        "bytes_after",
        "memory_bytes",
        "disk_bytes",
        "kept_bytes",
        "compute_seconds",
        "bytes_read",
    ] {
        assert!(number(&value[key]) > 0.0, "{key}");
    }
    let text = tenp(
        "prune {} --data {} --keep 0.6 -o {} --dry-run",
        &[&demo(), &data, &out],
    )
    .ok();
    text.check(
        text.stdout.contains("disk needed"),
        "people see what it takes",
    );
    assert_eq!(names(scratch.path()), [""; 0]);
    // What it foretells is what comes.
    tenp(
        "prune {} --data {} --keep 0.6 -o {}",
        &[&demo(), &data, &out],
    )
    .ok();
    let report = read_json(&out.join("report.json"));
    let came = number(&report["accounting"]["bytes_after"]);
    assert_eq!(number(&value["bytes_after"]), came);
}

#[test]
fn outputs_do_not_depend_on_the_threads() {
    let scratch = Scratch::new();
    let data = demo_file("calibration", "code");
    let ids = golden("olmoe").join("golden.safetensors");
    let (one, two) = (scratch.join("1"), scratch.join("2"));
    for (threads, out) in [("1", &one), ("2", &two)] {
        let line =
            format!("--threads {threads} prune {{}} --data {{}} --samples 20 --keep 0.6 -o {{}}");
        tenp(&line, &[&demo(), &data, out]).ok();
        let logits = out.with_extension("safetensors");
        let line = format!("logits {{}} --input {{}} --output {{}} --threads {threads}");
        tenp(&line, &[out, &ids, &logits]).ok();
    }
    assert_same_files(&one, &two, &["README.md", "report.html", "report.json"]);
    let logits = |dir: &Path| std::fs::read(dir.with_extension("safetensors")).unwrap();
    assert!(logits(&one) == logits(&two));
}

/// File names are bytes; the model card shows them as well as it can.
#[cfg(target_os = "linux")]
#[test]
fn names_need_not_be_utf8() {
    use std::os::unix::ffi::OsStrExt as _;
    let scratch = Scratch::new();
    let plan = plan(&scratch, "--keep 0.6");
    let out = scratch
        .path()
        .join(std::ffi::OsStr::from_bytes(b"half-\xff-price"));
    let words = crate::support::words("apply {} --plan {} -o", &[&demo(), &plan]);
    let mut command = crate::support::command(&words);
    crate::support::run(command.arg(&out), &words).ok();
    assert!(out.join("README.md").exists());
}

#[test]
fn the_folder_may_be_given_in_any_way() {
    let scratch = Scratch::new();
    let plan = plan(&scratch, "--keep 0.6");
    let words = |line: &str| crate::support::words(line, &[&demo(), &plan]);
    for (line, out) in [
        ("apply {} --plan {} -o relative", "relative"),
        ("apply {}/ --plan {} -o ./with/../slash/", "slash"),
    ] {
        std::fs::create_dir_all(scratch.join("with")).unwrap();
        let words = words(line);
        let mut command = crate::support::command(&words);
        crate::support::run(command.current_dir(scratch.path()), &words).ok();
        tenp("inspect {}", &[&scratch.join(out)]).ok();
    }
}

#[test]
fn every_dry_run_tells_its_steps_and_passes() {
    let scratch = Scratch::new();
    let data = demo_file("calibration", "lists");
    let (stats, plan) = (scratch.join("stats"), scratch.join("plan.json"));
    let named = |said: &serde_json::Value, what: &str| -> Vec<String> {
        let all = said[what].as_array().unwrap().iter();
        all.map(|each| each["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let line = "calibrate {} --data {} --samples 20 -o {}";
    let said = tenp(
        &format!("{line} --dry-run --json"),
        &[&demo(), &data, &stats],
    )
    .ok()
    .json();
    assert!(!stats.exists());
    assert_eq!(named(&said, "steps"), ["calibrate"]);
    assert_eq!(named(&said, "passes"), ["calibrate"]);
    let step = &said["steps"][0];
    let parts = step["parts"].as_object().unwrap().values().map(number);
    assert_eq!(parts.sum::<f64>(), number(&step["memory_bytes"]));
    tenp(line, &[&demo(), &data, &stats]).ok();
    let written = number(&said["disk_bytes"]) / stats.metadata().unwrap().len() as f64;
    assert!((0.7..1.0).contains(&written), "all but headers: {written}");

    tenp(
        "plan {} --stats {} --keep 0.6 -o {}",
        &[&demo(), &stats, &plan],
    )
    .ok();
    let out = scratch.join("out");
    let apply = |options: &str| {
        let line = format!("apply {{}} --plan {{}} --dry-run --json {options} -o {{}}");
        let run = tenp(&line, &[&demo(), &plan, &out]).ok();
        assert!(!out.exists());
        run.json()
    };
    assert_eq!(named(&apply(""), "passes"), ["write"]);
    let fitted = apply(&format!(
        "--recover least-squares --data {}",
        data.display()
    ));
    assert_eq!(
        named(&fitted, "steps"),
        ["fit a layer", "run the pruned layer", "write"]
    );
    assert_eq!(number(&fitted["passes"][0]["passes"]), 2.0);

    let line = "prune {} --data {} --samples 20 --keep 0.6 --alpha search --allocation trapezoid --answers generate \
                --answer-tokens 3 --dry-run --json -o {}";
    let said = tenp(line, &[&demo(), &data, &out]).ok().json();
    let passes = [
        "generate answers",
        "calibrate",
        "calibrate on three quarters",
        "try α",
        "write",
    ];
    assert_eq!(named(&said, "passes"), passes);
    assert_eq!(
        number(&said["passes"][0]["passes"]),
        4.0,
        "the prompts and three tokens"
    );
}
