//! Options out of range, or that do not go together.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::{ENVIRONMENT, FAILED, Place, USAGE};
use crate::support::fixtures::{demo, demo_file, golden};
use crate::support::{Scratch, tenp};

/// Statistics of the demo, made once.
pub(crate) fn statistics() -> &'static Path {
    static STATS: OnceLock<(Scratch, PathBuf)> = OnceLock::new();
    let (_, path) = STATS.get_or_init(|| {
        let scratch = Scratch::new();
        let path = scratch.join("stats.safetensors");
        let data = demo_file("calibration", "facts");
        tenp(
            "calibrate {} --data {} --samples 32 -o {}",
            &[&demo(), &data, &path],
        )
        .ok();
        (scratch, path)
    });
    path
}

/// The options are refused by `plan`, by `prune` before it calibrates, and by a dry run.
#[track_caller]
pub(crate) fn refused(options: &str, needles: &[&str]) {
    let place = Place::demo();
    let out = place.join("out");
    let data = demo_file("calibration", "facts");
    let line = format!("plan {{}} --stats {{}} {options} -o {{}}");
    place.refuses(&line, &[&place.model, statistics(), &out], USAGE, needles);
    let mut stages = Vec::new();
    for more in ["", "--dry-run"] {
        let line = format!("prune {{}} --data {{}} {options} {more} -o {{}}");
        let paths: &[&Path] = &[&place.model, &data, &out];
        place.refuses(&line, paths, USAGE, needles);
        stages.push(tenp(&line, paths));
    }
    for run in stages {
        run.check(
            !run.stderr.contains("tokens in"),
            "refused before the calibration, which may take hours",
        );
    }
}

#[test]
fn keep() {
    for keep in ["0", "1.5", "-0.1", "nan", "inf"] {
        refused(
            &format!("--keep={keep}"),
            &["--keep", "above 0 and at most 1"],
        );
    }
    refused("", &["--keep", "missing", "0.6"]);
    refused("--keep much", &["--keep", "much"]);
    refused("--keep 0.0001", &["--keep 0.0001", "--width-multiple"]);
}

#[test]
fn alpha_and_slope() {
    refused("--keep 0.3 --alpha 0.5", &["--alpha 0.5", "0.3"]);
    refused("--keep 0.3 --alpha nan", &["--alpha", "0.3"]);
    refused("--keep 0.3 --slope 2", &["--slope 2", "-1 to 1"]);
    refused(
        "--keep 0.3 --allocation uniform --alpha 0.1",
        &["--alpha", "trapezoid"],
    );
    refused(
        "--keep 0.3 --allocation global --slope 0.1",
        &["--slope", "trapezoid"],
    );
}

#[test]
fn width_multiple() {
    for multiple in ["7", "0", "97"] {
        refused(
            &format!("--keep 0.6 --width-multiple {multiple}"),
            &[
                "--width-multiple",
                "96",
                "1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96",
            ],
        );
    }
}

#[test]
fn names_that_do_not_exist() {
    refused(
        "--keep 0.6 --method best",
        &["best", "tenp", "enp", "easy-ep", "random-neurons"],
    );
    refused(
        "--keep 0.6 --expert-score best",
        &["best", "direction", "reap"],
    );
    refused(
        "--keep 0.6 --neuron-score best",
        &["best", "contribution", "wifv"],
    );
    refused(
        "--keep 0.6 --allocation best",
        &["best", "trapezoid", "file:PATH"],
    );
    refused("--keep 0.6 --domain-weight math=2", &["math", "default"]);
    refused(
        "--keep 0.6 --domain-weight default=-1",
        &["default", "-1", "at least 0"],
    );
    refused("--keep 0.6 --domain-weight default", &["DOMAIN=WEIGHT"]);
    refused("--keep 0.6 --normalise all", &["all", "layer", "domains"]);
}

#[test]
fn options_without_effect() {
    refused("--keep 0.6 --exact", &["--exact", "uniform"]);
    refused(
        "--keep 0.6 --normalise layer",
        &["--normalise layer", "global"],
    );
    refused(
        "--keep 0.6 --method reap --neuron-score random",
        &["--neuron-score", "reap"],
    );
    refused(
        "--keep 0.6 --method enp --expert-score reap",
        &["--expert-score", "enp"],
    );
    refused(
        "--keep 0.6 --method reap --allocation uniform",
        &["--allocation", "reap"],
    );
    refused(
        "--keep 0.6 --method enp --protect-super",
        &["--protect-super", "enp"],
    );
}

#[test]
fn width_files() {
    let scratch = Scratch::new();
    let write = |name: &str, text: &str| {
        let path = scratch.join(name);
        std::fs::write(&path, text).unwrap();
        format!("--allocation file:{}", path.display())
    };
    refused(&write("a.json", "{}"), &["a.json", "[[width, …], …]"]);
    refused(&write("b.json", "[[1,"), &["b.json"]);
    refused(&write("c.json", "[[96, 96]]"), &["1 layers", "7"]);
    let seven = |layer: &str| format!("[{}]", [layer; 7].join(","));
    refused(&write("d.json", &seven("[96]")), &["layer 1", "16"]);
    let wide = format!("[{}]", ["97"; 16].join(","));
    refused(
        &write("e.json", &seven(&wide)),
        &["layer 1, expert 0", "97", "96"],
    );
    let gone = format!("--allocation file:{}", scratch.join("gone.json").display());
    refused(&gone, &["gone.json", "No such file"]);
    let good = write("f.json", "[[96]]");
    refused(&format!("--keep 0.6 {good}"), &["--keep", "no effect"]);
}

#[test]
fn a_form_that_cannot_hold_the_plan() {
    let place = Place::demo();
    let data = demo_file("calibration", "facts");
    let (out, plan) = (place.join("out"), place.join("plan.json"));
    let line = "prune {} --data {} --keep 0.6 --form uniform -o {}";
    let paths: &[&Path] = &[&place.model, &data, &out];
    place.refuses(line, paths, USAGE, &["uniform", "--method enp"]);
    let run = tenp(line, paths);
    run.check(
        !run.stderr.contains("tokens in"),
        "refused before the calibration",
    );
    tenp(
        "plan {} --stats {} --keep 0.6 -o {}",
        &[&place.model, statistics(), &plan],
    )
    .ok();
    place.refuses(
        "apply {} --plan {} --form uniform -o {}",
        &[&place.model, &plan, &out],
        USAGE,
        &["uniform", "--method enp"],
    );
}

#[test]
fn values_that_are_none() {
    let place = Place::demo();
    let (data, out) = (demo_file("calibration", "facts"), place.join("out"));
    let paths: &[&Path] = &[&place.model, &data, &out];
    for (options, needles) in [
        ("--compute f64", &["--compute", "f64", "f32", "bf16"][..]),
        ("--samples 0", &["--samples", "0"]),
        (
            "--device gpu",
            &["--device", "gpu", "auto", "cpu", "cuda:N"],
        ),
        ("--device cuda:x", &["--device", "cuda:x"]),
        (
            "--device cuda --compute f32",
            &["--compute f32", "bf16", "--device cpu"],
        ),
        ("--seq-len 0", &["--seq-len", "0"]),
        ("--threads 0", &["--threads", "0"]),
        ("--threads many", &["--threads", "many"]),
        ("--data =x.jsonl", &["[DOMAIN=]FILE"]),
        ("--data a/b=x.jsonl", &["[DOMAIN=]FILE"]),
        ("--colour red", &["--colour"]),
    ] {
        let line = format!("calibrate {{}} --data {{}} -o {{}} {options}");
        place.refuses(&line, paths, USAGE, needles);
    }
    for (options, needles) in [
        (
            "--form flat",
            &["--form", "ragged", "padded", "uniform"][..],
        ),
        ("--shard-size 5XB", &["--shard-size", "XB", "GB"]),
        ("--shard-size 0", &["--shard-size", "byte"]),
    ] {
        let line = format!("prune {{}} --data {{}} --keep 0.6 -o {{}} {options}");
        place.refuses(&line, paths, USAGE, needles);
    }
    place.refuses(
        "calibrate {} -o {}",
        &[&place.model, &out],
        USAGE,
        &["--data"],
    );
    place.refuses(
        "generate {} --prompt a --temperature=-1",
        &[&place.model],
        USAGE,
        &["--temperature", "at least 0"],
    );
    place.refuses("generate {}", &[&place.model], USAGE, &["--prompt"]);
    for keep in ["0", "nan", "2"] {
        let line = format!("demo --folder {{}} --keep {keep}");
        place.refuses(&line, &[&demo()], USAGE, &["--keep"]);
    }
    place.refuses("demo --folder {}", &[&place.model], FAILED, &["tasks"]);
}

/// What runs on the CPU does not pretend to run on a GPU.
#[test]
fn a_device_without_effect() {
    let place = Place::demo();
    let (plan, out) = (place.join("plan.json"), place.join("out"));
    tenp(
        "plan {} --stats {} --keep 0.6 -o {}",
        &[&place.model, statistics(), &plan],
    )
    .ok();
    let paths: &[&Path] = &[&place.model, &plan, &out];
    let line = "apply {} --plan {} -o {} --device cuda";
    place.refuses(line, paths, USAGE, &["--device cuda", "no effect"]);
    // Merging compares neurons there, so what is missing is the GPU.
    if !cfg!(feature = "cuda") {
        tenp(
            "plan {} --stats {} --method tenp+dern --keep 0.6 -o {}",
            &[&place.model, statistics(), &plan],
        )
        .ok();
        place.refuses(line, paths, ENVIRONMENT, &["--device", "--features cuda"]);
    }
}

/// A GPU that is not there: exit code 3 and what to do instead. Left to itself the program takes the CPU.
#[test]
fn no_gpu() {
    let place = Place::golden("olmoe");
    let ids = golden("olmoe").join("golden.safetensors");
    let out = place.join("stats.safetensors");
    let paths: &[&Path] = &[&place.model, &ids, &out];
    let line = "calibrate {} --data {} -o {}";
    let missing = "calibrate {} --data {} -o {} --device cuda:99";
    let needles = if cfg!(feature = "cuda") {
        &["--device cuda:99", "--device cpu"][..]
    } else {
        &["--device", "--features cuda"]
    };
    place.refuses(missing, paths, ENVIRONMENT, needles);
    tenp(line, paths).ok();
}

#[test]
fn text_to_measure_on() {
    let place = Place::demo();
    let (out, data) = (place.join("out"), demo_file("calibration", "facts"));
    place.refuses(
        "plan {} --stats {} --keep 0.6 --allocation sensitivity -o {}",
        &[&place.model, statistics(), &out],
        USAGE,
        &["--allocation sensitivity", "give --data"],
    );
    place.refuses(
        "plan {} --stats {} --keep 0.6 --data {} -o {}",
        &[&place.model, statistics(), &data, &out],
        USAGE,
        &["--data has no effect", "--allocation sensitivity"],
    );
    refused(
        "--keep 0.6 --error-scale residual",
        &["--error-scale has no effect", "--allocation sensitivity"],
    );
    let line = "prune {} --data {} --keep 0.6 --allocation sensitivity --alpha 0.1 -o {}";
    let paths: &[&Path] = &[&place.model, &data, &out];
    place.refuses(line, paths, USAGE, &["--alpha has no effect"]);
}
