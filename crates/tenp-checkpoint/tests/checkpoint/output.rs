//! Output folders: what is in them, what is refused, and that nothing is left behind.

use serde_json::json;
use tenp_checkpoint::{ApplyOptions, ApplyOutcome, Checkpoint, OutputForm, apply};

use crate::fixture::{Fixture, Keep, json as read_json, plan, ragged, snapshot};

#[test]
fn an_output_folder_is_complete() {
    let fixture = Fixture::new("qwen3_moe");
    let source = fixture.open();
    let mut report = serde_json::Map::new();
    report.insert("command".to_owned(), json!("prune"));
    let options = ApplyOptions {
        shard_bytes: 100_000,
        extra_files: vec![("README.md".to_owned(), b"card".to_vec())],
        report,
        ..ApplyOptions::default()
    };
    let mut calls = Vec::new();
    let plan = ragged(&source);
    let outcome = apply(
        &source,
        &plan,
        &fixture.out(),
        &options,
        &mut |done, total| {
            calls.push((done, total));
        },
    );
    let Ok(ApplyOutcome::Written {
        bytes,
        tensors,
        shards,
        resumed_shards: 0,
        identical: false,
    }) = outcome
    else {
        panic!("{outcome:?}");
    };
    assert!(shards > 1 && tensors > 50);
    let (first, last) = (calls[0], calls[calls.len() - 1]);
    assert!(first.0 == 0 && last.0 == last.1 && last.1 <= bytes);
    let files = snapshot(&fixture.out());
    for name in [
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "report.json",
        "tenp_plan.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        assert!(files.contains_key(name), "{name}");
    }
    assert!(files.contains_key(&format!("model-00001-of-{shards:05}.safetensors")));
    assert_eq!(files.len(), 9 + shards);
    let report = read_json(&fixture.out().join("report.json"));
    assert_eq!(report["command"], "prune");
    assert_eq!(report["size"]["bytes_after"], json!(bytes));
    assert_eq!(report["source"]["fingerprint"], source.fingerprint());
    let saved = tenp_checkpoint::Plan::read(&fixture.out().join("tenp_plan.json")).unwrap();
    assert_eq!(saved, plan);
    assert_eq!(fixture.names(), ["input", "out"]);
}

#[test]
fn the_reference_reader_accepts_every_shard() {
    let fixture = Fixture::new("deepseek_v3");
    fixture
        .apply(&ragged(&fixture.open()), OutputForm::Ragged)
        .unwrap();
    for (name, bytes) in snapshot(&fixture.out()) {
        if name.ends_with(".safetensors") {
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            for (tensor, view) in file.tensors() {
                let offset = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
                let size = view.dtype().bitsize() / 8;
                assert_eq!(offset % size, 0, "{tensor} is not aligned");
            }
        }
    }
}

#[test]
fn the_same_run_gives_the_same_bytes() {
    let fixture = Fixture::sharded("deepseek_v3");
    let source = fixture.open();
    let plan = ragged(&source);
    let again = fixture.root().join("again");
    fixture.apply(&plan, OutputForm::Ragged).unwrap();
    apply(
        &source,
        &plan,
        &again,
        &ApplyOptions::default(),
        &mut |_, _| (),
    )
    .unwrap();
    assert_eq!(snapshot(&fixture.out()), snapshot(&again));
}

#[test]
fn a_finished_run_is_not_done_again() {
    let fixture = Fixture::new("olmoe");
    let source = fixture.open();
    let plan = ragged(&source);
    fixture.apply(&plan, OutputForm::Ragged).unwrap();
    let before = snapshot(&fixture.out());
    let outcome = fixture.apply(&plan, OutputForm::Ragged).unwrap();
    assert_eq!(outcome, ApplyOutcome::AlreadyFinished);
    assert_eq!(snapshot(&fixture.out()), before);
    let error = fixture
        .apply(&plan, OutputForm::Padded)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("not empty") && error.contains("--force"),
        "{error}"
    );
    assert_eq!(snapshot(&fixture.out()), before);
    // A finished run of which something is gone is not finished.
    let shard = fixture.out().join("model-00001-of-00001.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    let error = fixture.apply(&plan, OutputForm::Ragged).unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
    std::fs::write(&shard, &bytes).unwrap();
    let options = ApplyOptions {
        form: OutputForm::Padded,
        force: true,
        ..ApplyOptions::default()
    };
    apply(&source, &plan, &fixture.out(), &options, &mut |_, _| ()).unwrap();
    assert_eq!(
        Checkpoint::open(&fixture.out()).unwrap().config().widths,
        None
    );
    assert_eq!(fixture.names(), ["input", "out"]);
}

#[test]
fn unacceptable_outputs_are_refused_and_the_input_stays() {
    let fixture = Fixture::new("mixtral");
    let root = fixture.root().to_path_buf();
    std::fs::write(root.join("file"), "x").unwrap();
    std::fs::create_dir_all(root.join("full/sub")).unwrap();
    std::os::unix::fs::symlink(fixture.input(), root.join("link")).unwrap();
    std::os::unix::fs::symlink(root.join("nowhere"), root.join("broken")).unwrap();
    let source = fixture.open();
    let (before, names) = (snapshot(&fixture.input()), fixture.names());
    for (out, force, message) in [
        ("input", true, "is the input folder"),
        ("link", true, "is the input folder"),
        ("input/../input", true, "is the input folder"),
        ("input/out", true, "inside the input folder"),
        (".", true, "contains the input folder"),
        ("file", true, "is a file"),
        ("broken", true, "symbolic link to nothing"),
        ("nowhere/out", true, "create that folder first"),
        ("file/out", true, "lies below a file"),
        ("full", false, "--force"),
        ("full", true, "remove it yourself"),
    ] {
        let options = ApplyOptions {
            force,
            ..ApplyOptions::default()
        };
        let error = apply(
            &source,
            &ragged(&source),
            &root.join(out),
            &options,
            &mut |_, _| (),
        )
        .unwrap_err()
        .to_string();
        assert!(error.contains(message), "{out}: {error}");
        assert!(error.contains(out), "{out}: {error}");
        assert_eq!(snapshot(&fixture.input()), before);
        assert_eq!(fixture.names(), names);
    }
    std::fs::create_dir(root.join("empty")).unwrap();
    let options = ApplyOptions::default();
    apply(
        &source,
        &ragged(&source),
        &root.join("empty"),
        &options,
        &mut |_, _| (),
    )
    .unwrap();
    assert!(root.join("empty/config.json").is_file());
}

#[test]
fn extra_files_cannot_replace_the_checkpoints_own() {
    let fixture = Fixture::new("mixtral");
    let source = fixture.open();
    for name in [
        "config.json",
        "report.json",
        "x.safetensors",
        "../x",
        "a/b",
        "",
        "..",
    ] {
        let options = ApplyOptions {
            extra_files: vec![(name.to_owned(), Vec::new())],
            ..ApplyOptions::default()
        };
        let error = apply(
            &source,
            &ragged(&source),
            &fixture.out(),
            &options,
            &mut |_, _| (),
        );
        assert!(error.unwrap_err().to_string().contains(name), "{name}");
        assert_eq!(fixture.names(), ["input"]);
    }
}

#[test]
fn a_read_only_parent_leaves_nothing() {
    use std::os::unix::fs::PermissionsExt as _;
    let fixture = Fixture::new("mixtral");
    let parent = fixture.root().join("locked");
    std::fs::create_dir(&parent).unwrap();
    std::fs::set_permissions(&parent, std::fs::Permissions::from_mode(0o555)).unwrap();
    let source = fixture.open();
    let options = ApplyOptions::default();
    let result = apply(
        &source,
        &ragged(&source),
        &parent.join("out"),
        &options,
        &mut |_, _| (),
    );
    std::fs::set_permissions(&parent, std::fs::Permissions::from_mode(0o755)).unwrap();
    // The superuser may write anywhere; there is nothing to refuse then.
    if let Err(error) = result {
        assert!(error.to_string().contains("locked"), "{error}");
        assert_eq!(std::fs::read_dir(&parent).unwrap().count(), 0);
    }
}

#[test]
fn a_pruned_checkpoint_is_not_pruned_again() {
    for form in [OutputForm::Ragged, OutputForm::Padded] {
        let fixture = Fixture::new("mixtral");
        fixture.apply(&ragged(&fixture.open()), form).unwrap();
        let pruned = Checkpoint::open(&fixture.out()).unwrap();
        let again = plan(&pruned, |_, _| Keep::All);
        let target = fixture.root().join("twice");
        let options = ApplyOptions::default();
        let error = apply(&pruned, &again, &target, &options, &mut |_, _| ()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("already pruned (from input"), "{message}");
        assert!(!target.exists());
    }
}

#[test]
fn only_references_to_remote_code_survive() {
    let fixture = Fixture::new("deepseek");
    fixture.edit_config(|config| {
        config["auto_map"] = json!({
            "AutoConfig": "configuration_deepseek.DeepseekConfig",
            "AutoModel": "owner/name--modeling_deepseek.DeepseekModel",
        });
    });
    fixture
        .apply(&ragged(&fixture.open()), OutputForm::Padded)
        .unwrap();
    let config = read_json(&fixture.out().join("config.json"));
    let expected = json!({"AutoModel": "owner/name--modeling_deepseek.DeepseekModel"});
    assert_eq!(config["auto_map"], expected);
}
