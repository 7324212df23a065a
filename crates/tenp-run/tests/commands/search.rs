//! `--alpha search`: what it tries, and that the figures are those of the checkpoints it does not write.

use crate::support::fixtures::{demo, demo_file, read_json};
use crate::support::json::{list, number};
use crate::support::{Scratch, tenp};

#[test]
fn the_best_pair_on_held_out_text_is_taken() {
    let scratch = Scratch::new();
    let all = std::fs::read_to_string(demo_file("calibration", "arith")).unwrap();
    let part = |name: &str, chosen: &dyn Fn(usize) -> bool| {
        let path = scratch.join(name);
        let lines = all.lines().take(24).enumerate();
        let lines: Vec<&str> = lines.filter(|(i, _)| chosen(*i)).map(|l| l.1).collect();
        std::fs::write(&path, lines.join("\n")).unwrap();
        path
    };
    let (data, fit, held) = (
        part("all.jsonl", &|_| true),
        part("fit.jsonl", &|i| i % 4 != 3),
        part("held.jsonl", &|i| i % 4 == 3),
    );
    let out = scratch.join("out");
    let line = "prune {} --data {} --keep 0.4 --alpha search --device cpu -o {}";
    tenp(line, &[&demo(), &data, &out]).ok();
    let options = &read_json(&out.join("tenp_plan.json"))["options"];
    let tried = list(&options["alphas_tried"]);
    assert_eq!(tried.len(), 26);
    let nll = |t: &serde_json::Value| number(&t["nll"]);
    let best = tried
        .iter()
        .min_by(|a, b| nll(a).total_cmp(&nll(b)))
        .unwrap();
    assert!(tried.iter().any(|t| nll(t) > nll(best)), "pairs differ");
    for key in ["alpha", "slope"] {
        assert_eq!(options[key], best[key], "{key}");
    }

    // Two of them, the long way round.
    let stats = scratch.join("fit.safetensors");
    let line = "calibrate {} --data {} --device cpu -o {}";
    tenp(line, &[&demo(), &fit, &stats]).ok();
    for (index, tried) in [best, &tried[0]].into_iter().enumerate() {
        let (plan, model) = (scratch.join("plan.json"), scratch.join(&index.to_string()));
        let line = format!(
            "plan {{}} --stats {{}} --keep 0.4 --alpha {} --slope {} -o {{}}",
            tried["alpha"], tried["slope"]
        );
        tenp(&line, &[&demo(), &stats, &plan]).ok();
        tenp("apply {} --plan {} -o {}", &[&demo(), &plan, &model]).ok();
        let run = tenp("eval {} --text {} --device cpu --json", &[&model, &held]).ok();
        let found = number(&run.json()["text"]["held"]["nll"]);
        assert!((found - nll(tried)).abs() < 1e-9, "{found}, {tried}");
    }
}

#[test]
fn a_search_needs_text_to_hold_out() {
    let scratch = Scratch::new();
    let (out, stats) = (scratch.join("out"), scratch.join("stats"));
    let data = demo_file("calibration", "arith");
    let line = "prune {} --data {} --samples 1 --keep 0.6 --alpha search -o {}";
    tenp(line, &[&demo(), &data, &out]).refused(2, &["--alpha search", "at least two"]);
    let line = "prune {} --data {} --keep 0.6 --alpha search --method enp -o {}";
    tenp(line, &[&demo(), &data, &out]).refused(2, &["--alpha", "trapezoid"]);
    let line = "prune {} --data {} --keep 0.6 --alpha much -o {}";
    tenp(line, &[&demo(), &data, &out]).refused(2, &["--alpha", "much", "search"]);
    let line = "calibrate {} --data {} --samples 2 -o {}";
    tenp(line, &[&demo(), &data, &stats]).ok();
    let line = "plan {} --stats {} --keep 0.6 --alpha search -o {}";
    tenp(line, &[&demo(), &stats, &out]).refused(2, &["--alpha search", "--data"]);
    assert!(!out.exists());
}
