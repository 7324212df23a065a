//! What `eval`, `generate`, `demo` and `--help` print.

use std::path::Path;

use serde_json::json;

use crate::support::fixtures::{DOMAINS, demo, demo_file, golden};
use crate::support::json::{keys, list, number};
use crate::support::{Scratch, command, tenp};

#[test]
fn eval_prints_the_promised_json() {
    let text = demo_file("text", "code");
    let run = tenp(
        "eval {} --reference {} --tasks {} --text {} --json",
        &[&demo(), &demo(), &demo().join("tasks"), &text],
    )
    .ok();
    let value = run.json();
    assert_eq!(
        keys(&value),
        ["tasks", "mean_accuracy", "text", "reference"]
    );
    assert_eq!(keys(&value["tasks"]), DOMAINS);
    let mut sum = 0.0;
    for domain in DOMAINS {
        let task = &value["tasks"][domain];
        assert_eq!(
            keys(task),
            ["n", "accuracy", "stderr", "exact_match", "nll"]
        );
        let (n, accuracy) = (number(&task["n"]), number(&task["accuracy"]));
        assert_eq!(n, 250.0);
        let stderr = (accuracy * (1.0 - accuracy) / n).sqrt();
        assert!((number(&task["stderr"]) - stderr).abs() < 1e-12);
        assert!(number(&task["exact_match"]) <= accuracy && number(&task["nll"]) > 0.0);
        sum += accuracy;
    }
    let mean = number(&value["mean_accuracy"]);
    assert!((mean - sum / 4.0).abs() < 1e-12);
    // The demo's own README says .878.
    assert!((mean - 0.878).abs() < 0.01, "{mean}");
    let text = &value["text"]["code"];
    assert_eq!(keys(text), ["tokens", "nll", "perplexity"]);
    let (nll, perplexity) = (number(&text["nll"]), number(&text["perplexity"]));
    assert!((nll.exp() - perplexity).abs() < 1e-9 * perplexity);

    // A model is no distance from itself.
    let reference = &value["reference"];
    assert_eq!(keys(reference), ["kl", "top1", "layers"]);
    assert_eq!(
        (number(&reference["kl"]), number(&reference["top1"])),
        (0.0, 1.0)
    );
    let layers = list(&reference["layers"]);
    assert_eq!(layers.len(), 7);
    for (layer, index) in layers.iter().zip(1..) {
        assert_eq!(
            *layer,
            json!({"layer": index, "output_error": 0.0, "routing_shift": 0.0})
        );
    }
}

#[test]
fn eval_leaves_out_what_was_not_asked_for() {
    let ids = golden("olmoe").join("golden.safetensors");
    let run = tenp("eval {} --text {} --json", &[&golden("olmoe"), &ids]).ok();
    assert_eq!(keys(&run.json()), ["text"]);
    assert_eq!(run.json()["text"]["golden"]["tokens"], 2 * 95);
    let facts = demo_file("tasks", "facts");
    let run = tenp("eval {} --tasks {} --json", &[&demo(), &facts]).ok();
    assert_eq!(keys(&run.json()), ["tasks", "mean_accuracy"]);
    let people = tenp("eval {} --tasks {}", &[&demo(), &facts]).ok();
    people.check(people.stdout.contains("accuracy"), "people see a table");
    people.check(!people.stdout.contains("tokens/s"), "progress is not data");
    people.check(
        people.stderr.contains("tokens/s"),
        "progress goes to stderr",
    );
}

#[test]
fn eval_gives_the_same_bytes_for_any_number_of_threads() {
    let line = |threads: u16| {
        format!("--threads {threads} eval {{}} --tasks {{}} --reference {{}} --json")
    };
    let facts = demo_file("tasks", "facts");
    let run = |threads| {
        tenp(&line(threads), &[&demo(), &facts, &demo()])
            .ok()
            .stdout
    };
    assert_eq!(run(1), run(2));
}

#[test]
fn generate_continues_the_prompt_and_repeats() {
    let generate = |more: &str| {
        let mut words: Vec<String> = ["generate", "--prompt", "max [0 8 5 6 7] ->"]
            .map(str::to_owned)
            .to_vec();
        words.push(demo().display().to_string());
        words.extend(more.split_whitespace().map(str::to_owned));
        crate::support::run(&mut command(&words), &words).ok()
    };
    let run = generate("--max-tokens 6");
    run.check(
        run.stdout.starts_with("max [0 8 5 6 7] -> [8]"),
        "it knows the answer",
    );
    run.check(run.stderr.contains("tokens/s"), "the rate goes to stderr");
    assert_eq!(run.stdout, generate("--max-tokens 6 --threads 1").stdout);
    let warm =
        |seed: u8| generate(&format!("--max-tokens 30 --temperature 9 --seed {seed}")).stdout;
    assert_eq!(warm(1), warm(1));
    assert_ne!(warm(1), warm(2));
    assert_eq!(generate("--max-tokens 0").stdout, "max [0 8 5 6 7] ->\n");
}

#[test]
fn demo_tells_the_whole_story() {
    let run = tenp("demo --folder {} --json", &[&demo()]).ok();
    let value = run.json();
    let names: Vec<&str> = list(&value["models"])
        .iter()
        .map(|m| m["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "full model",
            "TENP",
            "recommended",
            "uniform ENP",
            "expert dropping (REAP)",
            "random neurons",
            "random experts"
        ]
    );
    let nll = |i: usize| value["models"][i]["answer_nll"].as_f64().unwrap();
    assert!(
        nll(2) <= nll(0) + 0.01,
        "recommended {}, full {}",
        nll(2),
        nll(0)
    );
    assert_eq!(list(&value["tenp_widths"]).len(), 7);
}

#[test]
fn help_has_an_example_for_every_command() {
    for name in [
        "inspect",
        "calibrate",
        "stats",
        "stats merge",
        "stats show",
        "plan",
        "apply",
        "prune",
        "eval",
        "logits",
        "generate",
        "demo",
    ] {
        let run = tenp(&format!("{name} --help"), &[]).ok();
        run.check(run.stdout.contains("Example"), "help has an example");
        run.check(
            run.stdout.contains(&format!("tenp-run {name}")),
            "of this command",
        );
    }
    tenp("--version", &[]).ok();
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let scratch = Scratch::new();
    let stats = scratch.join("stats");
    let data = demo_file("calibration", "facts");
    tenp(
        "calibrate {} --data {} --samples 4 -o {}",
        &[&demo(), &data, &stats],
    )
    .ok();
    let cases: [(&str, &[&Path]); 5] = [
        ("inspect {}", &[&demo()]),
        ("inspect {} --json", &[&demo()]),
        ("stats show {} --json", &[&stats]),
        ("generate {} --prompt max --max-tokens 8", &[&demo()]),
        ("--help", &[]),
    ];
    for (line, paths) in cases {
        let words = crate::support::words(line, paths);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let child = command(&words)
            .stdout(writer)
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() == Some(0) && !stderr.contains("panicked"),
            "{line}: {:?}\n{stderr}",
            output.status
        );
    }
}
