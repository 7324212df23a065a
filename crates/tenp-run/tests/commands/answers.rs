//! Calibration on answers that the full model gives itself.

use std::path::{Path, PathBuf};

use serde_json::json;
use tenp_checkpoint::Checkpoint;
use tenp_kernels::Compute;
use tenp_model::Model;
use tenp_model::generate::{Generator, Limits, arg_max, complete};
use tenp_model::text::Tokenizer;

use crate::support::fixtures::{demo, demo_file, read_json, tensors, write_ids};
use crate::support::{Scratch, tenp};

const LIMITS: Limits = Limits {
    new_tokens: 8,
    len: 20,
};

/// Lines that have a prompt and no answer; prompts of unequal lengths.
fn prompts(scratch: &Scratch) -> (PathBuf, Vec<String>) {
    let mut prompts = Vec::new();
    for domain in ["facts", "arith", "lists"] {
        let text = std::fs::read_to_string(demo_file("calibration", domain)).unwrap();
        for line in text.lines().take(4) {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            prompts.push(value["prompt"].as_str().unwrap().to_owned());
        }
    }
    let lines = prompts.iter().map(|p| json!({"prompt": p}).to_string());
    let path = scratch.join("prompts.jsonl");
    std::fs::write(&path, lines.collect::<Vec<_>>().join("\n")).unwrap();
    (path, prompts)
}

/// What `generate` says to one prompt alone.
fn alone(model: Model<'_>, prompt: &[u32]) -> Vec<u32> {
    let mut generator = Generator::new(model);
    let mut answer = Vec::new();
    let mut logits = generator.feed(prompt).unwrap();
    while answer.len() < LIMITS.new_tokens && prompt.len() + answer.len() < LIMITS.len {
        let next = arg_max(&logits);
        if model.config().eos_token_ids.contains(&next) {
            break;
        }
        answer.push(next);
        logits = generator.feed(&[next]).unwrap();
    }
    answer
}

#[test]
fn generated_answers_are_those_of_each_prompt_alone_and_calibrate_as_such() {
    let scratch = Scratch::new();
    let (path, prompts) = prompts(&scratch);
    let checkpoint = Checkpoint::open(&demo()).unwrap();
    let tokenizer = Tokenizer::open(&checkpoint).unwrap();
    let model = Model::new(&checkpoint, Compute::F32);
    let ids: Vec<Vec<u32>> = prompts
        .iter()
        .map(|p| tokenizer.sequence(p).unwrap())
        .collect();
    let slices: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
    let together = complete(&model, &slices, LIMITS, &|_| ()).unwrap();
    let lengths: std::collections::BTreeSet<usize> = together.iter().map(Vec::len).collect();
    assert!(
        lengths.len() > 1,
        "none ends before the others: {lengths:?}"
    );
    let (mut words, mut files) = (String::new(), Vec::new());
    for (index, (prompt, answer)) in ids.iter().zip(&together).enumerate() {
        assert_eq!(*answer, alone(model, prompt), "{}", prompts[index]);
        let whole = prompt.iter().chain(answer).map(|id| i64::from(*id));
        let file = scratch.join(&format!("{index}.safetensors"));
        files.push(write_ids(&file, &[whole.collect()]));
        words.push_str(" {}");
    }
    let (own, given) = (scratch.join("own"), scratch.join("given"));
    let line = "calibrate {} --data {} --device cpu --answers generate --answer-tokens 8 --seq-len 20 -o {}";
    tenp(line, &[&demo(), &path, &own]).ok();
    let model = demo();
    let mut paths: Vec<&Path> = vec![&model];
    paths.extend(files.iter().map(PathBuf::as_path));
    paths.push(&given);
    tenp(
        &format!("calibrate {{}} --data{words} --device cpu -o {{}}"),
        &paths,
    )
    .ok();
    assert!(tensors(&own) == tensors(&given));
}

#[test]
fn a_report_says_whose_answers_they_are() {
    let scratch = Scratch::new();
    let (path, _) = prompts(&scratch);
    let report = |options: &str, data: &Path, name: &str| {
        let out = scratch.join(name);
        let line = format!("prune {{}} --data {{}} --keep 0.6 --samples 4 {options} -o {{}}");
        let first = tenp(&line, &[&demo(), data, &out]).ok();
        let again = tenp(&line, &[&demo(), data, &out]).ok();
        again.check(
            again.stderr.contains("already the finished output")
                && !again.stderr.contains("generate answers"),
            "a finished run is found without generating again",
        );
        assert_eq!(
            first.stderr.contains("generate answers"),
            options.contains("generate")
        );
        read_json(&out.join("report.json"))["calibration"].clone()
    };
    let most = report("--answers generate --answer-tokens 2", &path, "generated");
    assert_eq!(most["answers"], "generated");
    let generated = most["generated_tokens"].as_u64().unwrap();
    assert!((1..=8).contains(&generated), "{most}");
    let given = report("", &demo_file("calibration", "facts"), "given");
    assert_eq!(given["answers"], "given");
    assert_eq!(given.get("generated_tokens"), None);
    assert_ne!(given["inputs"], most["inputs"]);
}

#[test]
fn chats_are_answered_behind_their_last_question() {
    let scratch = Scratch::new();
    let model = crate::support::fixtures::copy(&demo(), &scratch.join("model"));
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} A:{% endif %}";
    std::fs::write(model.join("chat_template.jinja"), template).unwrap();
    let question = json!({"role": "user", "content": "Q: What is the founder of Raleki?"});
    let answer = json!({"role": "assistant", "content": " never read"});
    let file = |name: &str, line: serde_json::Value| {
        let path = scratch.join(name);
        std::fs::write(&path, line.to_string()).unwrap();
        path
    };
    let files = [
        file("asked.jsonl", json!({"messages": [question]})),
        file("answered.jsonl", json!({"messages": [question, answer]})),
    ];
    let statistics = files.map(|file| {
        let out = scratch.join("statistics");
        let line = "calibrate {} --data {} --answers generate --answer-tokens 4 -o {}";
        tenp(line, &[&model, &file, &out]).ok();
        std::fs::read(out).unwrap()
    });
    assert!(statistics[0] == statistics[1]);
}
