//! What the report of a prune says about its calibration: how far the samples decide the plan, and who saw few of them.

use std::path::Path;

use serde_json::Value;

use crate::support::fixtures::{demo, demo_file, read_json};
use crate::support::json::{list, number};
use crate::support::{Scratch, tenp};

fn prune(data: &Path, options: &str, out: &Path) -> (Value, String) {
    let line = format!("prune {{}} --data {{}} --keep 0.6 {options} -o {{}}");
    let run = tenp(&line, &[&demo(), data, out]).ok();
    (read_json(&out.join("report.json")), run.stderr)
}

#[test]
fn a_report_says_what_other_samples_would_change() {
    let scratch = Scratch::new();
    let data = demo_file("calibration", "arith");
    let options = "--samples 32 --folds 4 --recover least-squares";
    let (report, _) = prune(&data, options, &scratch.join("a"));
    let stability = &report["stability"];
    let (mean, most) = (
        number(&stability["neurons_changed"]),
        number(&stability["neurons_changed_most"]),
    );
    assert!(0.0 < mean && mean < most && most < 0.3, "{stability}");
    assert_eq!(
        (&stability["groups"], &stability["replicates"]),
        (&4.into(), &20.into())
    );
    let layers = list(&stability["layers"]);
    assert_eq!(layers.len(), 7);
    for layer in layers {
        let correlation = number(&layer["expert_rank_correlation"]);
        assert!((0.5..=1.0).contains(&correlation), "{layer}");
    }
    let page = std::fs::read_to_string(scratch.join("a/report.html")).unwrap();
    assert!(page.matches("<svg").count() == 5 && !page.contains("src="));
    // Too little text for groups that cost nothing, and none asked for.
    let (report, _) = prune(&data, "--samples 32", &scratch.join("b"));
    assert_eq!(report["stability"], Value::Null);
}

#[test]
fn samples_that_are_all_alike_change_nothing() {
    let scratch = Scratch::new();
    let all = std::fs::read_to_string(demo_file("calibration", "arith")).unwrap();
    let data = scratch.join("same.jsonl");
    std::fs::write(&data, [all.lines().next().unwrap(); 8].join("\n")).unwrap();
    let (report, _) = prune(&data, "--folds 4", &scratch.join("out"));
    for figure in ["neurons_changed", "experts_changed"] {
        assert_eq!(number(&report["stability"][figure]), 0.0, "{figure}");
    }
    assert_eq!(number(&report["stability"]["expert_rank_correlation"]), 1.0);
}

#[test]
fn experts_with_few_tokens_are_listed() {
    let scratch = Scratch::new();
    let data = demo_file("calibration", "arith");
    let (report, stderr) = prune(&data, "--samples 2 --min-tokens 5", &scratch.join("out"));
    let (coverage, mut few) = (&report["coverage"], 0);
    for tokens in list(&coverage["tokens"]) {
        few += list(tokens).iter().filter(|n| number(n) < 5.0).count();
    }
    assert!(0 < few && few < 7 * 16, "{coverage}");
    assert_eq!(list(&coverage["below"]).len(), few);
    let said = format!("{few} experts saw fewer than 5 calibration tokens");
    assert!(stderr.contains(&said), "{stderr}");
}
