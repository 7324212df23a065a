//! Statistics: whole, merged, shown, and the same for any number of threads.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::fixtures::{DOMAINS, demo, demo_file, golden, names, tensors, write_ids};
use crate::support::json::{keys, list, number};
use crate::support::{Scratch, tenp};

/// The lines of a demo file in `range`, written beside the test.
fn lines(scratch: &Scratch, domain: &str, range: std::ops::Range<usize>) -> PathBuf {
    let text = std::fs::read_to_string(demo_file("calibration", domain)).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let path = scratch.join(&format!("{domain}-{}.jsonl", range.start));
    std::fs::write(&path, lines[range].join("\n")).unwrap();
    path
}

#[test]
fn two_halves_merge_into_the_whole() {
    let scratch = Scratch::new();
    let stats = |name: &str| scratch.join(&format!("{name}.safetensors"));
    let (first, second, whole) = (stats("first"), stats("second"), stats("whole"));
    let calibrate = |range: std::ops::Range<usize>, out: &Path| {
        let paths = [
            lines(&scratch, "facts", range.clone()),
            lines(&scratch, "lists", range),
        ];
        tenp(
            "calibrate {} --data facts={} lists={} -o {}",
            &[&demo(), &paths[0], &paths[1], out],
        )
        .ok();
    };
    calibrate(0..20, &first);
    calibrate(20..50, &second);
    calibrate(0..50, &whole);
    let merged = stats("merged");
    let run = tenp("stats merge {} {} -o {}", &[&first, &second, &merged]).ok();
    run.check(run.stdout.is_empty(), "the data went into the file");
    assert_near(&merged, &whole);
    assert_eq!(
        tenp("stats show {} --json", &[&stats("merged")])
            .ok()
            .json()["domains"],
        tenp("stats show {} --json", &[&stats("whole")]).ok().json()["domains"]
    );
}

#[test]
fn domains_calibrated_apart_merge_into_the_same_statistics() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.join("a"), scratch.join("b"));
    let (both, merged) = (scratch.join("both"), scratch.join("merged"));
    let (x, y) = (
        demo_file("calibration", "facts"),
        demo_file("calibration", "code"),
    );
    let calibrate = "calibrate {} --samples 16 --data";
    let one = |domain: &str| format!("{calibrate} {domain}={{}} -o {{}}");
    tenp(&one("facts"), &[&demo(), &x, &a]).ok();
    tenp(&one("code"), &[&demo(), &y, &b]).ok();
    let line = format!("{calibrate} facts={{}} --data code={{}} -o {{}}");
    tenp(&line, &[&demo(), &x, &y, &both]).ok();
    for order in [[&b, &a], [&a, &b]] {
        tenp("stats merge {} {} -o {}", &[order[0], order[1], &merged]).ok();
        assert!(tensors(&merged) == tensors(&both));
    }
}

#[test]
fn samples_count_per_domain_over_its_files() {
    let scratch = Scratch::new();
    let halves = [
        lines(&scratch, "facts", 0..10),
        lines(&scratch, "facts", 10..30),
    ];
    let (split, whole) = (scratch.join("split"), scratch.join("whole"));
    tenp(
        "calibrate {} --samples 25 --data f={} --data f={} -o {}",
        &[&demo(), &halves[0], &halves[1], &split],
    )
    .ok();
    let all = demo_file("calibration", "facts");
    tenp(
        "calibrate {} --samples 25 --data f={} -o {}",
        &[&demo(), &all, &whole],
    )
    .ok();
    assert!(std::fs::read(split).unwrap() == std::fs::read(whole).unwrap());
}

#[test]
fn every_kind_of_file_gives_its_samples() {
    let scratch = Scratch::new();
    let texts = ["89 - 56 = 33;", "86 - 45 = 41;"];
    let write = |name: &str, text: String| {
        let path = scratch.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let jsonl =
        |value: fn(&str) -> serde_json::Value| texts.map(|t| value(t).to_string()).join("\n");
    let text = write("text.jsonl", jsonl(|t| json!({"text": t})));
    let plain = write("plain.txt", texts.join("\n\n"));
    let out = |path: &Path| path.with_extension("stats");
    for path in [&text, &plain] {
        tenp("calibrate {} --data {} -o {}", &[&demo(), path, &out(path)]).ok();
    }
    assert!(std::fs::read(out(&text)).unwrap() == std::fs::read(out(&plain)).unwrap());

    // A golden folder has no tokenizer: ids are used as they are, and cut.
    let ids = write_ids(
        &scratch.join("ids.safetensors"),
        &[(0..40).collect(), (40..80).collect()],
    );
    let stats = scratch.join("stats");
    let run = tenp(
        "calibrate {} --data {} --seq-len 30 --samples 1 -o {}",
        &[&golden("olmoe"), &ids, &stats],
    )
    .ok();
    run.check(
        run.stderr.contains("30 tokens"),
        "one sample, cut at 30 tokens",
    );
}

#[test]
fn stats_show_says_what_is_in_the_file() {
    let scratch = Scratch::new();
    let stats = scratch.join("stats.safetensors");
    let files = DOMAINS.map(|d| demo_file("calibration", d));
    let [a, c, f, l] = files.each_ref().map(PathBuf::as_path);
    tenp(
        "calibrate {} --samples 4 --data arith={} code={} facts={} lists={} -o {}",
        &[&demo(), a, c, f, l, &stats],
    )
    .ok();
    let shown = tenp("stats show {} --json", &[&stats]).ok();
    shown.check(shown.stderr.is_empty(), "nothing to tell beside the data");
    let value = shown.json();
    assert_eq!(
        keys(&value),
        [
            "checkpoint",
            "version",
            "compute",
            "missing_shares",
            "experts",
            "expert_width",
            "domains"
        ]
    );
    assert_eq!(value["compute"], json!(["f32"]));
    assert_eq!(
        (&value["experts"], &value["expert_width"]),
        (&json!(16), &json!(96))
    );
    let domains = list(&value["domains"]);
    assert_eq!(domains.len(), 4);
    for (domain, name) in domains.iter().zip(DOMAINS) {
        assert_eq!(keys(domain), ["domain", "tokens", "layers", "unreached"]);
        assert_eq!(domain["domain"], name);
        assert_eq!(domain["layers"], json!([1, 2, 3, 4, 5, 6, 7]));
        assert!(number(&domain["tokens"]) >= 4.0);
        for pair in list(&domain["unreached"]) {
            assert_eq!(list(pair).len(), 2);
        }
    }
    let text = tenp("stats show {}", &[&stats]).ok();
    text.check(text.stdout.contains("facts"), "people see the domains too");
}

#[test]
fn statistics_do_not_depend_on_the_threads() {
    let scratch = Scratch::new();
    let mut files: Vec<Vec<u8>> = Vec::new();
    let x = demo_file("calibration", "code");
    for threads in [1, 2, 3] {
        let out = scratch.join(&format!("{threads}"));
        let line = format!("--threads {threads} calibrate {{}} --data {{}} --samples 64 -o {{}}");
        tenp(&line, &[&demo(), &x, &out]).ok();
        files.push(std::fs::read(out).unwrap());
    }
    assert!(files[0] == files[1] && files[1] == files[2]);
}

#[test]
fn bf16_statistics_say_so_and_are_near() {
    let scratch = Scratch::new();
    let (half, full) = (scratch.join("half"), scratch.join("full"));
    let ids = golden("qwen3_moe").join("golden.safetensors");
    for (compute, out) in [("bf16", &half), ("f32", &full)] {
        let line = format!("calibrate {{}} --data {{}} --compute {compute} -o {{}}");
        tenp(&line, &[&golden("qwen3_moe"), &ids, out]).ok();
    }
    let shown = tenp("stats show {} --json", &[&half]).ok().json();
    assert_eq!(shown["compute"], json!(["bf16"]));
    let sum = |path: &Path| -> f64 {
        let all = tensors(path);
        let norms = all.iter().filter(|(name, _)| name.ends_with("/norm_sum"));
        norms.flat_map(|(_, values)| values).sum()
    };
    let (half, full) = (sum(&half), sum(&full));
    assert!(
        half != full && (half - full).abs() < 0.02 * full,
        "{half} {full}"
    );
}

/// Shares of ragged samples, whose blocks end elsewhere than those of the whole.
#[test]
fn shares_merge_into_one_process() {
    let scratch = Scratch::new();
    let [facts, code] = ["facts", "code"].map(|name| demo_file("calibration", name));
    let demo = demo();
    let calibrate = |options: &str, name: &str| {
        let out = scratch.join(name);
        let line = format!("calibrate {{}} --data facts={{}} code={{}} {options} -o {{}}");
        (tenp(&line, &[&demo, &facts, &code, &out]), out)
    };
    let whole = calibrate("--samples 100", "whole").1;
    let shares = [1, 2, 3].map(|part| {
        let (run, out) = calibrate(
            &format!("--samples 100 --shard {part}/3"),
            &part.to_string(),
        );
        run.ok();
        out
    });
    let [first, second, third] = shares.each_ref().map(std::path::PathBuf::as_path);
    let (some, all, plan) = (
        scratch.join("some"),
        scratch.join("all"),
        scratch.join("plan"),
    );
    let run = tenp("stats merge {} {} -o {}", &[third, first, &some]).ok();
    run.check(
        run.stderr.contains("share(s) 2/3"),
        "it says what is missing",
    );
    let show = tenp("stats show {}", &[&some]).ok();
    show.check(
        show.stdout.contains("shares 2/3"),
        "it says what is missing",
    );
    let line = "plan {} --stats {} --keep 0.6 -o {}";
    for (stats, missing) in [(first, "2/3, 3/3"), (&some, "2/3")] {
        let refused = tenp(line, &[&demo, stats, &plan]);
        refused.refused(2, &[missing, "stats merge", "--partial-stats"]);
        let line = format!("{line} --partial-stats");
        tenp(&line, &[&demo, stats, &plan]).ok();
    }
    tenp("stats merge {} {} -o {}", &[&some, first, &all]).refused(1, &["share 1/3", "both"]);
    tenp("stats merge {} {} -o {}", &[&some, second, &all]).ok();
    tenp(line, &[&demo, &all, &plan]).ok();
    let line = format!("{line} --partial-stats");
    tenp(&line, &[&demo, &all, &plan]).refused(2, &["no effect", "--partial-stats"]);
    assert_near(&all, &whole);
    let (run, _) = calibrate("--samples 3 --shard 1/4", "few");
    run.refused(2, &["--shard 1/4", "facts", "only 3 sample(s)"]);
    for share in ["0/3", "4/3", "1", "a/b"] {
        let (run, _) = calibrate(&format!("--shard {share}"), "none");
        run.refused(2, &[share, "no share"]);
    }
    let (run, _) = calibrate("--shard 1/65537", "none");
    run.refused(2, &["--shard", "1/65537", "more than 65536"]);
}

/// Equal to within the rounding of sums.
fn assert_near(left: &Path, right: &Path) {
    let (left, right) = (tensors(left), tensors(right));
    assert!(left.keys().eq(right.keys()));
    for (name, values) in &left {
        let counts = name.ends_with("tokens");
        for (a, b) in values.iter().zip(&right[name]) {
            let near = (a - b).abs() <= 1e-12 * a.abs().max(b.abs());
            assert!(a == b || near && !counts, "{name}: {a} and {b}");
        }
    }
}

/// Also where it stops on the way, and for what recovery runs.
#[test]
fn hidden_states_in_a_file_change_nothing() {
    let scratch = Scratch::new();
    let (demo, facts) = (demo(), demo_file("calibration", "facts"));
    let (memory, file) = (scratch.join("memory"), scratch.join("file"));
    let line = "calibrate {} --data {} --samples 40 -o {}";
    tenp(line, &[&demo, &facts, &memory]).ok();
    let spilling = format!("{line} --keep-every 0 --hidden-memory 1kB");
    tenp(&spilling, &[&demo, &facts, &file]).ok();
    assert!(std::fs::read(&memory).unwrap() == std::fs::read(&file).unwrap());
    let prune = |options: &str| {
        let out = scratch.join("out");
        let line = format!(
            "prune {{}} --data {{}} --samples 20 --keep 0.6 --recover least-squares {options} -o {{}}"
        );
        tenp(&line, &[&demo, &facts, &out]).ok();
        let shard = std::fs::read(out.join("model-00001-of-00001.safetensors")).unwrap();
        std::fs::remove_dir_all(out).unwrap();
        shard
    };
    assert!(prune("--hidden-memory 1B") == prune(""));
    assert_eq!(names(scratch.path()), ["file", "memory"]);
    let line = "apply {} --plan plan.json --hidden-memory 1GB -o {}";
    tenp(line, &[&demo, &scratch.join("out")]).refused(2, &["--hidden-memory", "no effect"]);
    let dry = |options: &str| {
        let line = format!("prune {{}} --data {{}} --keep 0.6 --dry-run --json {options} -o {{}}");
        tenp(&line, &[&demo, &facts, &scratch.join("dry")])
            .ok()
            .json()
    };
    let (memory, file) = (dry(""), dry("--hidden-memory 1kB"));
    let moved = file["disk_bytes"].as_i64().unwrap() - memory["disk_bytes"].as_i64().unwrap();
    let hidden = |said: &Value| said["steps"][0]["parts"]["hidden states"].as_i64();
    assert_eq!((hidden(&memory), hidden(&file)), (Some(moved), None));
}
