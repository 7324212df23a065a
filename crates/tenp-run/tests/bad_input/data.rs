//! Calibration and evaluation files that cannot be used.

use std::path::PathBuf;

use super::{FAILED, Place, USAGE};
use crate::support::fixtures::{demo_file, golden, write_ids};
use crate::support::tenp;

fn file(place: &Place, name: &str, text: &[u8]) -> PathBuf {
    let path = place.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// The file is refused as calibration text and as evaluation text.
#[track_caller]
fn refused(place: &Place, data: &std::path::Path, code: i32, needles: &[&str]) {
    let out = place.join("out");
    for line in [
        "calibrate {} --data {} -o {}",
        "calibrate {} --data math={} -o {}",
        "prune {} --data {} --keep 0.6 -o {}",
        "prune {} --data {} --keep 0.6 -o {} --dry-run",
    ] {
        place.refuses(line, &[&place.model, data, &out], code, needles);
    }
    place.refuses("eval {} --text {}", &[&place.model, data], code, needles);
}

#[test]
fn ids_outside_the_vocabulary() {
    let place = Place::golden("olmoe");
    let big = write_ids(&place.join("big.safetensors"), &[vec![1, 2, 320, 3]]);
    refused(
        &place,
        &big,
        FAILED,
        &["big.safetensors", "320", "vocabulary"],
    );
    let negative = write_ids(&place.join("negative.safetensors"), &[vec![1, -1]]);
    refused(
        &place,
        &negative,
        FAILED,
        &["negative.safetensors", "-1", "vocabulary"],
    );
    let out = place.join("out");
    place.refuses(
        "logits {} --input {} --output {}",
        &[&place.model, &big, &out],
        FAILED,
        &["big.safetensors", "320", "vocabulary"],
    );
    let empty = write_ids(&place.join("empty.safetensors"), &[vec![], vec![]]);
    refused(&place, &empty, FAILED, &["empty.safetensors", "no sample"]);
    let long = write_ids(&place.join("long.safetensors"), &[vec![1; 300]]);
    place.refuses(
        "calibrate {} --data {} --seq-len 2048 -o {}",
        &[&place.model, &long, &out],
        FAILED,
        &["300", "256", "--seq-len"],
    );
    // Left to itself the program cuts at the model's positions.
    tenp("calibrate {} --data {} -o {}", &[&place.model, &long, &out]).ok();
}

#[test]
fn files_of_another_kind() {
    let place = Place::golden("olmoe");
    let csv = file(&place, "data.csv", b"1,2,3");
    refused(
        &place,
        &csv,
        FAILED,
        &["data.csv", ".jsonl", ".txt", ".safetensors"],
    );
    let damaged = file(&place, "damaged.safetensors", b"no safetensors file");
    refused(
        &place,
        &damaged,
        FAILED,
        &["damaged.safetensors", "input_ids"],
    );
    let other = place.model.join("model-00001-of-00004.safetensors");
    refused(
        &place,
        &other,
        FAILED,
        &["model-00001-of-00004.safetensors", "input_ids"],
    );
    let gone = place.join("gone.jsonl");
    refused(&place, &gone, FAILED, &["gone.jsonl", "No such file"]);
}

#[test]
fn lines_that_are_no_samples() {
    let place = Place::demo();
    let empty = file(&place, "empty.jsonl", b"\n\n");
    refused(&place, &empty, FAILED, &["empty.jsonl", "no sample"]);
    let text = file(&place, "empty.txt", b"");
    refused(&place, &text, FAILED, &["empty.txt", "no sample"]);
    let fields = file(
        &place,
        "fields.jsonl",
        b"{\"text\": \"a\"}\n\n{\"question\": \"b\"}\n",
    );
    refused(
        &place,
        &fields,
        FAILED,
        &["fields.jsonl, line 3", "`text`", "`prompt`"],
    );
    let json = file(&place, "json.jsonl", b"{\"text\": \"a\"}\n{\"text\": \n");
    refused(&place, &json, FAILED, &["json.jsonl, line 2", "JSON"]);
    let binary = file(&place, "binary.jsonl", b"{\"text\": \"a\"}\n\xff\xfe\n");
    refused(&place, &binary, FAILED, &["binary.jsonl, line 2", "UTF-8"]);
    let chat = file(
        &place,
        "chat.jsonl",
        b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n",
    );
    refused(&place, &chat, FAILED, &["chat template", "`text`"]);
}

#[test]
fn samples_without_a_prompt_to_answer() {
    let place = Place::demo();
    let out = place.join("out");
    let ids = write_ids(&place.join("ids.safetensors"), &[vec![1, 2]]);
    let lines = b"{\"prompt\": \"a\"}\n\n{\"text\": \"a\"}\n";
    let own = b"{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}]}";
    let cases = [
        (file(&place, "text.jsonl", lines), "text.jsonl, line 3"),
        (file(&place, "lines.txt", b"\na\n"), "lines.txt, line 2"),
        (file(&place, "own.jsonl", own), "own.jsonl, line 1"),
        (ids, "ids.safetensors"),
    ];
    for (data, named) in &cases {
        let needles = [*named, "--answers generate", "`prompt`", "`messages`"];
        for line in [
            "calibrate {} --data {} --answers generate -o {}",
            "prune {} --data {} --keep 0.6 --answers generate -o {}",
        ] {
            place.refuses(line, &[&place.model, data, &out], USAGE, &needles);
        }
    }
    let line = "calibrate {} --data {} --answer-tokens 8 -o {}";
    place.refuses(
        line,
        &[&place.model, &cases[0].0, &out],
        USAGE,
        &["--answer-tokens", "--answers generate"],
    );
}

#[test]
fn tasks_that_are_no_questions() {
    let place = Place::demo();
    let cases: [(&str, &[u8], &[&str]); 6] = [
        (
            "prompt.jsonl",
            b"{\"choices\": [\"a\"], \"answer\": 0}",
            &["line 1", "`prompt`"],
        ),
        (
            "choices.jsonl",
            b"{\"prompt\": \"a\", \"answer\": 0}",
            &["line 1", "`choices`"],
        ),
        (
            "answer.jsonl",
            b"{\"prompt\": \"a\", \"choices\": [\"b\"], \"answer\": 1}",
            &["line 1", "`answer`"],
        ),
        (
            "blank.jsonl",
            b"{\"prompt\": \"a\", \"choices\": [\"\"], \"answer\": 0}",
            &["line 1", "no tokens"],
        ),
        ("none.jsonl", b"", &["no question"]),
        ("json.jsonl", b"[", &["line 1", "JSON"]),
    ];
    for (name, text, needles) in cases {
        let path = file(&place, name, text);
        let needles: Vec<&str> = needles.iter().copied().chain([name]).collect();
        place.refuses(
            "eval {} --tasks {}",
            &[&place.model, &path],
            FAILED,
            &needles,
        );
    }
    let folder = place.join("folder");
    std::fs::create_dir(&folder).unwrap();
    place.refuses(
        "eval {} --tasks {}",
        &[&place.model, &folder],
        USAGE,
        &["folder", ".jsonl"],
    );
    place.refuses("eval {}", &[&place.model], USAGE, &["--tasks", "--text"]);
    let facts = demo_file("tasks", "facts");
    std::fs::copy(&facts, folder.join("facts.jsonl")).unwrap();
    place.refuses(
        "eval {} --tasks {} {}",
        &[&place.model, &folder, &facts],
        USAGE,
        &["facts", "same name", "rename"],
    );
    let text = demo_file("text", "facts");
    place.refuses(
        "eval {} --text {} {}",
        &[&place.model, &text, &text],
        USAGE,
        &["facts", "same name", "rename"],
    );
}

#[test]
fn text_without_a_tokenizer() {
    let place = Place::golden("olmoe");
    let text = demo_file("calibration", "facts");
    refused(
        &place,
        &text,
        FAILED,
        &["tokenizer.json", "copy", "input_ids"],
    );
    place.refuses(
        "generate {} --prompt hello",
        &[&place.model],
        FAILED,
        &["tokenizer.json", "copy"],
    );
    std::fs::write(place.model.join("tokenizer.json"), "{}").unwrap();
    refused(&place, &text, FAILED, &["tokenizer.json", "base model"]);
}

#[test]
fn a_tokenizer_of_another_model() {
    let place = Place::golden("olmoe");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(
            crate::support::fixtures::demo().join(name),
            place.model.join(name),
        )
        .unwrap();
    }
    // Byte-level ids of 768 tokens, a vocabulary of 320.
    let text = demo_file("calibration", "facts");
    refused(&place, &text, FAILED, &["facts.jsonl", "320", "vocabulary"]);
    let tasks = demo_file("tasks", "facts");
    place.refuses(
        "eval {} --tasks {}",
        &[&place.model, &tasks],
        FAILED,
        &["facts", "320", "vocabulary"],
    );
}

#[test]
fn a_reference_of_another_shape() {
    let place = Place::golden("olmoe");
    let ids = golden("olmoe").join("golden.safetensors");
    let demo = crate::support::fixtures::demo();
    place.refuses(
        "eval {} --reference {} --text {}",
        &[&place.model, &demo, &ids],
        FAILED,
        &["reference", "layers"],
    );
}
