//! Plans: every method and mixture, their JSON, their budget.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::support::fixtures::{calibrate_demo, demo, demo_file, read_json};
use crate::support::json::{keys, list, number, widths};
use crate::support::{Scratch, tenp};

const DROPPING: [&str; 8] = [
    "frequency",
    "gating",
    "ean",
    "reap",
    "man",
    "msan",
    "easy-ep",
    "random-experts",
];

/// Statistics of the demo, made once.
pub(crate) fn demo_statistics() -> &'static Path {
    static STATS: OnceLock<(Scratch, PathBuf)> = OnceLock::new();
    let (_, path) = STATS.get_or_init(|| {
        let scratch = Scratch::new();
        let path = scratch.join("stats.safetensors");
        calibrate_demo(32, &path);
        (scratch, path)
    });
    path
}

/// Plans the demo and checks what every plan has.
fn plan(options: &str) -> Value {
    let scratch = Scratch::new();
    let path = scratch.join("plan.json");
    let line = format!("plan {{}} --stats {{}} {options} --json -o {{}}");
    let run = tenp(&line, &[&demo(), demo_statistics(), &path]).ok();
    let (printed, plan) = (run.json(), read_json(&path));
    assert_eq!(
        keys(&printed),
        ["method", "options", "accounting", "uncalibrated"]
    );
    for key in keys(&printed) {
        assert_eq!(printed[key], plan[key], "{options}: {key}");
    }
    check_shape(&plan, options);
    plan
}

fn check_shape(plan: &Value, options: &str) {
    assert_eq!(
        keys(plan),
        [
            "format",
            "version",
            "method",
            "options",
            "fingerprint",
            "layers",
            "accounting",
            "uncalibrated"
        ]
    );
    assert_eq!(
        (&plan["format"], &plan["version"]),
        (&json!("tenp-plan"), &json!(1))
    );
    let accounting = &plan["accounting"];
    assert_eq!(
        keys(accounting),
        ["E", "A", "f", "model", "bytes_before", "bytes_after"]
    );
    for key in ["E", "A", "f", "model"] {
        let share = number(&accounting[key]);
        assert!((0.0..=1.0).contains(&share), "{options}: {key} is {share}");
    }
    let layers = list(&plan["layers"]);
    let of = |layer: &Value| layer["layer"].as_u64().unwrap();
    assert_eq!(
        layers.iter().map(of).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5, 6, 7]
    );
    for layer in layers {
        assert_eq!(keys(layer), ["layer", "experts"]);
        for (id, expert) in list(&layer["experts"]).iter().enumerate() {
            check_expert(expert, id, options);
        }
    }
}

/// `neurons` where the expert is narrowed, `dropped` where it leaves, neither where it stays whole.
fn check_expert(expert: &Value, id: usize, options: &str) {
    assert_eq!(expert["id"], id, "{options}");
    let width = expert["width"].as_u64().unwrap();
    match keys(expert)[..] {
        ["id", "width"] => assert_eq!(width, 96, "{options}"),
        ["id", "width", "dropped"] => {
            assert_eq!((width, &expert["dropped"]), (0, &json!(true)), "{options}");
        }
        ["id", "width", "neurons"] => {
            let neurons: Vec<u64> = list(&expert["neurons"])
                .iter()
                .map(|n| n.as_u64().unwrap())
                .collect();
            assert_eq!(neurons.len() as u64, width, "{options}");
            assert!(
                width < 96 && neurons.is_sorted_by(|a, b| a < b),
                "{options}"
            );
            assert!(neurons.iter().all(|n| *n < 96), "{options}");
        }
        ref other => panic!("{options}: an expert with {other:?}"),
    }
}

fn kept(plan: &Value) -> u64 {
    widths(plan).iter().flatten().sum()
}

#[test]
fn tenp_keeps_the_worked_example() {
    // Methods, section 3: N 16, L 7, K 96, q 8, ρ .6.
    let plan = plan("--method tenp --keep 0.6");
    assert_eq!(kept(&plan), 6448);
    let count = |width: u64| {
        widths(&plan)
            .iter()
            .flatten()
            .filter(|w| **w == width)
            .count()
    };
    assert_eq!((count(96), count(48), count(56)), (22, 88, 2));
    let whole = |layer: &Vec<u64>| layer.iter().filter(|w| **w == 96).count();
    assert_eq!(
        widths(&plan).iter().map(whole).collect::<Vec<_>>(),
        [2, 2, 3, 3, 4, 4, 4]
    );
    let a = &plan["accounting"];
    let (alpha, beta) = (number(&a["f"]), 0.5);
    let executed = alpha + (1.0 - alpha) * beta;
    assert!((number(&a["A"]) - executed).abs() <= (1.0 - alpha) * 8.0 / 96.0);
    assert!((number(&a["E"]) - 6448.0 / (7.0 * 16.0 * 96.0)).abs() < 1e-12);
}

#[test]
fn every_mixture_of_allocation_and_scores_meets_its_budget() {
    let neuron_scores = [
        "contribution",
        "contribution-abs",
        "activation-norm",
        "energy",
        "wifv",
        "weight-norm",
        "random",
    ];
    let expert_scores = [
        "direction",
        "frequency",
        "gating",
        "ean",
        "reap",
        "man",
        "msan",
        "easy-ep",
        "random",
    ];
    let mut chosen = std::collections::HashSet::new();
    for allocation in ["trapezoid", "uniform", "global"] {
        for neuron_score in neuron_scores {
            let options =
                format!("--keep 0.6 --allocation {allocation} --neuron-score {neuron_score}");
            let plan = plan(&options);
            let expected = if allocation == "uniform" {
                7 * 16 * 56
            } else {
                6448
            };
            assert_eq!(kept(&plan), expected, "{options}");
            assert!(
                chosen.insert(plan["layers"].to_string()),
                "{options} is like another"
            );
        }
    }
    chosen.clear();
    for expert_score in expert_scores {
        let options = format!("--keep 0.6 --expert-score {expert_score}");
        let plan = plan(&options);
        assert_eq!(kept(&plan), 6448, "{options}");
        assert_eq!(plan["options"]["expert_score"], expert_score);
        chosen.insert(plan["layers"].to_string());
    }
    assert!(
        chosen.len() > 5,
        "expert scores decide little: {}",
        chosen.len()
    );
}

#[test]
fn dropping_keeps_whole_experts_and_the_same_number_everywhere() {
    for method in DROPPING {
        let plan = plan(&format!("--method {method} --keep 0.6"));
        for layer in widths(&plan) {
            assert_eq!(layer.iter().filter(|w| **w == 96).count(), 10, "{method}");
            assert_eq!(layer.iter().sum::<u64>(), 960, "{method}");
        }
        assert_eq!(plan["accounting"]["f"], 1.0, "{method}");
    }
}

#[test]
fn options_do_what_they_say() {
    let uniform = plan("--method enp --keep 0.6");
    assert!(widths(&uniform).iter().flatten().all(|w| *w == 56));
    let exact = plan("--method enp --keep 0.6 --exact");
    assert_eq!(kept(&exact), 6448);
    let random = plan("--method random-neurons --keep 0.6 --seed 3");
    assert_eq!(widths(&random), widths(&uniform));
    assert_eq!(random["options"]["seed"], 3);
    assert_ne!(
        random["layers"],
        plan("--method random-neurons --keep 0.6 --seed 4")["layers"]
    );
    let q = plan("--keep 0.5 --width-multiple 12 --alpha 0 --slope -0.5");
    assert!(widths(&q).iter().flatten().all(|w| w % 12 == 0));
    assert_eq!(q["options"]["width_multiple"], 12);
    let inverted = plan("--keep 0.6 --slope -1");
    let whole = |layer: &Vec<u64>| layer.iter().filter(|w| **w == 96).count();
    let (first, last) = (whole(&widths(&inverted)[0]), whole(&widths(&inverted)[6]));
    assert!(first > last, "{first} {last}");
    let weighted = plan("--keep 0.6 --domain-weight facts=0 --domain-weight code=2.5");
    assert_eq!(weighted["options"]["domain_weights"]["facts"], 0.0);
    assert_eq!(weighted["options"]["domain_weights"]["code"], 2.5);
    plan("--keep 0.6 --normalise domains");
    plan("--keep 0.6 --allocation global --normalise layer");
    plan("--keep 0.6 --protect-super");
}

#[test]
fn widths_come_from_a_file() {
    let scratch = Scratch::new();
    let tenp_widths = widths(&plan("--keep 0.6"));
    for (name, text) in [
        ("list.json", json!(tenp_widths)),
        ("object.json", json!({"widths": tenp_widths})),
        ("config.json", json!({"tenp": {"widths": tenp_widths}})),
    ] {
        let path = scratch.join(name);
        std::fs::write(&path, text.to_string()).unwrap();
        let options = format!("--allocation file:{}", path.display());
        let same = plan(&options);
        assert_eq!(widths(&same), tenp_widths);
        assert_eq!(same["layers"], plan("--keep 0.6")["layers"], "{name}");
        let random = plan(&format!("{options} --neuron-score random --seed 1"));
        assert_eq!(widths(&random), tenp_widths);
        assert_ne!(random["layers"], same["layers"]);
    }
}

#[test]
fn planning_twice_gives_the_same_bytes() {
    let scratch = Scratch::new();
    for options in ["--keep 0.6", "--method random-experts --keep 0.5 --seed 9"] {
        let (a, b) = (scratch.join("a"), scratch.join("b"));
        for (threads, out) in [(1, &a), (2, &b)] {
            let line = format!("plan {{}} --stats {{}} {options} --threads {threads} -o {{}}");
            let run = tenp(&line, &[&demo(), demo_statistics(), out]).ok();
            run.check(run.stdout.contains("(E)"), "people see the accounting");
        }
        assert!(std::fs::read(a).unwrap() == std::fs::read(b).unwrap());
    }
}

/// Measured errors give an exact budget and less error than TENP's widths; threads change no byte.
#[test]
fn the_sensitivity_allocation_is_measured_on_text() {
    let scratch = Scratch::new();
    let data = demo_file("calibration", "facts");
    let plan = |name: &str, options: &str| {
        let path = scratch.join(name);
        let line = format!(
            "plan {{}} --stats {{}} --data {{}} --samples 8 --keep 0.6 --allocation sensitivity {options} -o {{}}"
        );
        tenp(&line, &[&demo(), demo_statistics(), &data, &path]).ok();
        path
    };
    let (a, b) = (plan("a", "--threads 1"), plan("b", "--threads 2"));
    assert!(std::fs::read(&a).unwrap() == std::fs::read(b).unwrap());
    let made = read_json(&a);
    let total: u64 = widths(&made).iter().flatten().sum();
    assert_eq!(total, 6448);
    let measured = &made["options"]["sensitivity"];
    assert_eq!(keys(measured), ["widths", "layer_errors", "error", "bound"]);
    let (error, bound) = (number(&measured["error"]), number(&measured["bound"]));
    assert!(bound <= error && error < bound * 1.001 && error > 0.0);
    // One width of 56 for all experts keeps less than 0.6 and errs more than the widths chosen.
    let curves = list(&measured["layer_errors"]);
    let uniform: f64 = curves.iter().map(|layer| number(&layer[7])).sum();
    assert!(error < uniform, "{error} {uniform}");
    for layer in curves {
        assert!(number(&layer[0]) > 0.0 && number(&layer[12]) == 0.0);
    }
    let other = read_json(&plan("c", "--error-scale residual"));
    assert_ne!(widths(&other), widths(&made));
}
