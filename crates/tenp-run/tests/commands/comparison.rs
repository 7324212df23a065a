//! `compare`: cells, files, going on where an earlier run stopped, refusals.

use std::path::Path;

use crate::support::fixtures::{demo, demo_file, read_json};
use crate::support::json::{keys, list, number};
use crate::support::{Scratch, tenp};

const LINE: &str = "compare {} --data arith={} --samples 8 --tasks {} --methods tenp,random-neurons:exact \
                    --keep 0.75,0.5 --seeds 2 --device cpu --json -o {}";

/// The first questions of a task.
fn few_questions(scratch: &Scratch) -> std::path::PathBuf {
    let path = scratch.join("few.jsonl");
    let all = std::fs::read_to_string(demo_file("tasks", "arith")).unwrap();
    let lines: Vec<&str> = all.lines().take(10).collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

#[test]
fn every_cell_is_measured_once() {
    let scratch = Scratch::new();
    let (tasks, out) = (few_questions(&scratch), scratch.join("out"));
    let data = demo_file("calibration", "arith");
    let demo = demo();
    let paths: &[&Path] = &[&demo, &data, &tasks, &out];
    let run = tenp(LINE, paths).ok();
    let results = run.json();
    assert_eq!(keys(&results), ["model", "full", "cells"]);
    let cells = list(&results["cells"]);
    assert_eq!(cells.len(), 8);
    for cell in cells {
        let (keep, e) = (
            number(&cell["key"]["keep"]),
            number(&cell["accounting"]["E"]),
        );
        assert!((e - keep).abs() < 0.005, "{cell}");
        assert!(number(&cell["kl"]) > 0.0 && number(&cell["top1"]) <= 1.0);
        assert_eq!(list(&cell["layers"]).len(), 7);
        assert_eq!(list(&cell["widths"]).len(), 7);
    }
    // Draws differ in their samples, and random scores in their seeds.
    assert_ne!(cells[0]["kl"], cells[4]["kl"]);

    for name in ["results.json", "results.csv", "results.md", "index.html"] {
        assert!(out.join(name).metadata().unwrap().len() > 500, "{name}");
    }
    let csv = std::fs::read_to_string(out.join("results.csv")).unwrap();
    let columns: Vec<usize> = csv.lines().map(|l| l.split(',').count()).collect();
    assert_eq!(columns.len(), 9);
    assert!(columns.iter().all(|c| *c == columns[0]), "{csv}");
    let page = std::fs::read_to_string(out.join("index.html")).unwrap();
    assert!(page.matches("<svg").count() >= 4 && !page.contains("src="));
    for plot in ["accuracy", "kl", "layer-error", "widths-tenp-0.5-0"] {
        for kind in ["svg", "png"] {
            assert!(
                out.join("plots").join(format!("{plot}.{kind}")).exists(),
                "{plot}.{kind}"
            );
        }
    }
    let hidden = std::fs::read_dir(&out).unwrap();
    let hidden = hidden.filter(|e| {
        e.as_ref()
            .unwrap()
            .file_name()
            .to_string_lossy()
            .starts_with('.')
    });
    assert_eq!(hidden.count(), 0, "no pruned checkpoint is left behind");

    // A cell that is gone is measured again, to the same figures; the others are read.
    let gone = out.join("cells/tenp-0.5-1.json");
    let before = read_json(&gone);
    std::fs::remove_file(&gone).unwrap();
    let again = tenp(LINE, paths).ok();
    again.check(again.stderr.contains("6/8"), "one cell is run");
    again.check(!again.stderr.contains("5/8"), "and no other");
    let after = read_json(&gone);
    for key in ["figures", "kl", "layers", "accounting", "widths"] {
        assert_eq!(before[key], after[key], "{key}");
    }

    // Other inputs are not mixed with these.
    let other = LINE.replace("--samples 8", "--samples 9");
    tenp(&other, paths).refused(2, &["--output", "calibration"]);
}

#[test]
fn merging_within_experts_is_a_method_like_others() {
    let scratch = Scratch::new();
    let (tasks, out) = (few_questions(&scratch), scratch.join("out"));
    let (demo, data) = (demo(), demo_file("calibration", "arith"));
    let run = tenp(
        "compare {} --data {} --samples 8 --tasks {} --methods tenp,tenp+dern,tenp+dern:threshold=0.999 --keep 0.5 \
         --seeds 1 --device cpu --json -o {}",
        &[&demo, &data, &tasks, &out],
    )
    .ok();
    let results = run.json();
    let [plain, merged, nothing] = list(&results["cells"]) else {
        panic!("three cells: {results}");
    };
    assert_eq!(plain["widths"], merged["widths"]);
    assert_eq!(plain["accounting"], merged["accounting"]);
    assert_eq!(
        plain["kl"], nothing["kl"],
        "nothing is so alike, so nothing changes"
    );
    assert_ne!(plain["kl"], merged["kl"]);
    assert!(out.join("plots/widths-tenp_dern-0.5-0.svg").exists());
}

#[test]
fn what_cannot_be_compared_is_refused_before_any_work() {
    let scratch = Scratch::new();
    let (tasks, out) = (few_questions(&scratch), scratch.join("out"));
    let (demo, data) = (demo(), demo_file("calibration", "arith"));
    let paths: &[&Path] = &[&demo, &data, &tasks, &out];
    for (change, needles) in [
        ("--methods tenp,tenpp", &["--methods tenpp", "tenpp"][..]),
        (
            "--methods tenp:colour=red",
            &["--methods tenp:colour=red", "--colour"],
        ),
        ("--methods tenp,enp,tenp", &["--methods", "twice"]),
        ("--methods reap:recover=rescale", &["--recover", "reap"]),
        (
            "--methods tenp+dern:recover=rescale",
            &["--recover", "tenp+dern"],
        ),
        ("--methods enp --keep 0.5,1.5", &["--keep", "1.5"]),
    ] {
        let line = format!("compare {{}} --data {{}} --tasks {{}} -o {{}} {change}");
        tenp(&line, paths).refused(2, needles);
        assert!(!out.exists());
    }
    tenp("compare {} --data {} -o {}", &[&demo, &data, &out]).refused(2, &["--tasks", "--text"]);
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("mine.txt"), "mine").unwrap();
    tenp("compare {} --data {} --tasks {} -o {}", paths).refused(2, &["--output", "not empty"]);
}

#[test]
fn errors_are_measured_once_for_all_budgets_of_a_draw() {
    let scratch = Scratch::new();
    let (tasks, out) = (few_questions(&scratch), scratch.join("out"));
    let line = "compare {} --data arith={} --samples 8 --tasks {} --methods enp:exact,tenp:allocation=sensitivity \
                --keep 0.75,0.5 --seeds 1 --device cpu --json -o {}";
    let data = demo_file("calibration", "arith");
    let run = tenp(line, &[&demo(), &data, &tasks, &out]).ok();
    let passes = run.stderr.matches("measure errors: ").count();
    run.check(passes == 1, "one pass for both budgets");
    let results = run.json();
    for cell in list(&results["cells"]) {
        let (keep, e) = (
            number(&cell["key"]["keep"]),
            number(&cell["accounting"]["E"]),
        );
        assert!((e - keep).abs() < 0.005, "{cell}");
    }
}

#[test]
fn what_a_comparison_takes_is_said_before_it() {
    let scratch = Scratch::new();
    let (tasks, out) = (few_questions(&scratch), scratch.join("out"));
    let (demo, data) = (demo(), demo_file("calibration", "arith"));
    let line = "compare {} --data {} --samples 8 --tasks {} --methods tenp:alpha=search,enp:recover=least-squares,dern \
                --keep 0.75,0.5 --seeds 2 --device cpu --dry-run --json -o {}";
    let run = tenp(line, &[&demo, &data, &tasks, &out]).ok();
    let said = run.json();
    let steps = list(&said["steps"]).iter();
    let steps: Vec<&str> = steps.map(|of| of["name"].as_str().unwrap()).collect();
    let expected = [
        "calibrate",
        "try plans",
        "plan",
        "write",
        "measure",
        "compare with the full model",
        "fit a layer",
        "run the pruned layer",
        "merge a layer",
    ];
    assert_eq!(steps, expected);
    // By draw, by draw and budget, or by cell: two draws, two budgets, three methods.
    let passes = list(&said["passes"]).iter();
    let passes = passes.map(|of| (of["name"].as_str().unwrap(), number(&of["passes"])));
    let expected = [
        ("measure the full model", 1.0),
        ("calibrate", 2.0),
        ("calibrate on three quarters", 2.0),
        ("try α", 4.0),
        ("write", 12.0),
        ("measure pruned models", 12.0),
        ("compare with the full model", 12.0),
        ("fit, and run what was fitted", 8.0),
        ("merge", 4.0),
    ];
    assert_eq!(passes.collect::<Vec<_>>(), expected);
    assert!(number(&said["memory_bytes"]) > 1e6 && number(&said["seconds"]) > 0.0);
    assert!(!out.exists());
    // Of one pruned model at a time and the statistics of both draws.
    let [one, two] = [1, 2].map(|seeds| {
        let line = line.replace("--seeds 2", &format!("--seeds {seeds}"));
        let run = tenp(&line, &[&demo, &data, &tasks, &out]).ok();
        number(&run.json()["disk_bytes"])
    });
    // 7 layers, 16 experts, 9 tables of f64; the file has a little more.
    let config = read_json(&demo.join("config.json"));
    let width = number(&config["moe_intermediate_size"]);
    let experts = number(&config["n_routed_experts"]);
    assert_eq!(two - one, 7.0 * experts * width * 9.0 * 8.0);
}
