//! `verify`: outputs that are what they should be, and every way in which one may not be.

use std::path::{Path, PathBuf};

use tenp_checkpoint::{Dtype, SynthesiseOptions, synthesise};

use crate::fp8_folder::quantise;
use crate::plans::demo_statistics;
use crate::support::fixtures::{
    copy, demo, demo_file, edit_header, edit_json, golden, names, overwrite, place, read_json,
};
use crate::support::json::{list, number};
use crate::support::{Outcome, Scratch, tenp};

/// Two experts of the demo's first MoE layer.
const EXPERT: &str = "model.layers.1.mlp.experts.1.gate_proj.weight";
const OTHER: &str = "model.layers.1.mlp.experts.2.gate_proj.weight";

fn verify(out: &Path, model: &Path) -> Outcome {
    tenp("verify {} --against {} --json", &[out, model])
}

#[track_caller]
fn assert_good(out: &Path, model: &Path, computed: bool) {
    let value = verify(out, model).ok().json();
    assert!(list(&value["differences"]).is_empty());
    assert!(number(&value["tensors"]) > 20.0 && number(&value["bytes_compared"]) > 1000.0);
    assert_eq!(number(&value["checked_only_for_shape"]) > 0.0, computed);
}

/// Exit code 4, and a difference at this place with these words.
#[track_caller]
fn assert_found(out: &Path, model: &Path, place: &str, words: &str) {
    let run = verify(out, model);
    run.check(run.code == Some(4), "it must end with exit code 4");
    let value = run.json();
    let found = list(&value["differences"]).iter().any(|difference| {
        difference["place"] == place && difference["problem"].as_str().unwrap().contains(words)
    });
    run.check(found, &format!("{place} must be among the differences"));
}

/// A pruned demo, by options of `plan` and of `apply`.
fn pruned(scratch: &Scratch, options: &str, writing: &str) -> PathBuf {
    let plan = scratch.join("plan.json");
    let out = scratch.join(&format!("{options}{writing}").replace(' ', "_"));
    let line = format!("plan {{}} --stats {{}} {options} -o {{}}");
    tenp(&line, &[&demo(), demo_statistics(), &plan]).ok();
    let line = format!("apply {{}} --plan {{}} -o {{}} --shard-size 2MB {writing}");
    tenp(&line, &[&demo(), &plan, &out]).ok();
    out
}

#[test]
fn outputs_of_every_form_are_what_they_should_be() {
    let scratch = Scratch::new();
    for (options, writing, computed) in [
        ("--keep 0.6", "", false),
        ("--keep 0.6", "--form padded", false),
        ("--method enp --keep 0.6", "--form uniform", false),
        ("--method reap --keep 0.5", "", false),
        ("--keep 1", "", false),
        ("--method dern --experts 12", "", true),
        ("--method tenp+dern --keep 0.6", "--form padded", true),
    ] {
        assert_good(&pruned(&scratch, options, writing), &demo(), computed);
    }
    let data = demo_file("calibration", "lists");
    for kind in ["rescale", "least-squares"] {
        let out = scratch.join(kind);
        let line =
            format!("prune {{}} --data {{}} --samples 20 --keep 0.6 --recover {kind} -o {{}}");
        tenp(&line, &[&demo(), &data, &out]).ok();
        assert_good(&out, &demo(), true);
        let text = tenp("verify {} --against {}", &[&out, &demo()]).ok();
        text.check(
            text.stdout.contains("checked only for shape"),
            "people see what was not compared",
        );
    }
}

#[test]
fn fp8_and_layers_for_multi_token_prediction_are_compared_too() {
    let scratch = Scratch::new();
    let ids = golden("deepseek_v3").join("golden.safetensors");
    let (fp8, mtp) = (scratch.join("fp8"), scratch.join("mtp"));
    quantise(&golden("deepseek_v3"), &fp8);
    std::fs::create_dir(&mtp).unwrap();
    let options = SynthesiseOptions {
        dtype: Dtype::F8E4M3,
        mtp: true,
        ..SynthesiseOptions::default()
    };
    let config = golden("deepseek_v3").join("config.json");
    synthesise(&config, &mtp, options, &mut |_, _| ()).unwrap();
    for (model, flags, computed) in [
        (&fp8, "", false),
        (&fp8, "--dtype bf16 --form padded", false),
        (&fp8, "--recover rescale", true),
        (&mtp, "", false),
        (&mtp, "--dtype bf16", false),
        (&mtp, "--mtp keep", false),
        (&mtp, "--mtp drop", false),
        (&mtp, "--recover rescale", true),
    ] {
        let out = scratch.join("out");
        let line = format!("prune {{}} --data all={{}} --keep 0.6 --force -o {{}} {flags}");
        tenp(&line, &[model, &ids, &out]).ok();
        assert_good(&out, model, computed);
    }
    let fused = scratch.join("fused");
    std::fs::create_dir(&fused).unwrap();
    let options = SynthesiseOptions {
        fused: true,
        ..SynthesiseOptions::default()
    };
    let config = golden("qwen3_moe").join("config.json");
    synthesise(&config, &fused, options, &mut |_, _| ()).unwrap();
    for (flags, computed) in [("", false), ("--form padded --recover rescale", true)] {
        let out = scratch.join("out");
        let line = format!("prune {{}} --data all={{}} --keep 0.6 --force -o {{}} {flags}");
        tenp(&line, &[&fused, &ids, &out]).ok();
        assert_good(&out, &fused, computed);
    }
}

#[test]
fn damaged_tensors_are_found() {
    let scratch = Scratch::new();
    let whole = pruned(&scratch, "--keep 0.6", "");
    let damaged = |name: &str| copy(&whole, &scratch.join(name));

    let out = damaged("one byte");
    let (shard, range) = place(&out, EXPERT);
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[range.start + 77] ^= 1;
    std::fs::write(&shard, &bytes).unwrap();
    assert_found(&out, &demo(), EXPERT, "byte 77");
    let found = verify(&out, &demo()).json();
    assert_eq!(list(&found["differences"]).len(), 1);

    let out = damaged("swapped");
    let read = |name| {
        let (shard, range) = place(&out, name);
        std::fs::read(shard).unwrap()[range].to_vec()
    };
    let (one, other) = (read(EXPERT), read(OTHER));
    assert_eq!(one.len(), other.len(), "narrow experts of one width");
    overwrite(&out, EXPERT, &other);
    overwrite(&out, OTHER, &one);
    assert_found(&out, &demo(), EXPERT, "differs");
    assert_found(&out, &demo(), OTHER, "differs");

    let out = damaged("renamed");
    let (shard, _) = place(&out, EXPERT);
    edit_header(&shard, |header| {
        let entry = header.remove(EXPERT).unwrap();
        header.insert("stranger".to_owned(), entry);
    });
    assert_found(&out, &demo(), EXPERT, "is missing");
    assert_found(&out, &demo(), "stranger", "should not be there");

    let out = damaged("shape");
    let (shard, _) = place(&out, EXPERT);
    edit_header(&shard, |header| {
        let shape = header[EXPERT]["shape"].as_array_mut().unwrap();
        shape.reverse();
    });
    assert_found(&out, &demo(), EXPERT, "but should be");

    let out = damaged("without a shard");
    std::fs::remove_file(place(&out, EXPERT).0).unwrap();
    assert_found(&out, &demo(), EXPERT, "is missing");

    let out = damaged("in two shards");
    let (shard, _) = place(&out, EXPERT);
    let other = names(&out).into_iter().map(|name| out.join(name));
    let mut other = other.filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
    let other = other.find(|path| *path != shard).unwrap();
    std::fs::copy(&shard, &other).unwrap();
    assert_found(&out, &demo(), EXPERT, "is in model-0000");

    let out = damaged("truncated");
    let (shard, _) = place(&out, EXPERT);
    let length = std::fs::metadata(&shard).unwrap().len();
    let file = std::fs::File::options().write(true).open(&shard).unwrap();
    file.set_len(length - 100).unwrap();
    let name = shard.file_name().unwrap().to_str().unwrap();
    assert_found(&out, &demo(), name, "truncated");
    assert_found(&out, &demo(), EXPERT, "is missing");
}

#[test]
fn computed_weights_must_be_finite() {
    let scratch = Scratch::new();
    let out = pruned(&scratch, "--method dern --experts 12", "");
    overwrite(&out, EXPERT, &[0xc0, 0x7f]);
    assert_found(&out, &demo(), EXPERT, "not finite");
}

#[test]
fn another_plan_config_or_model_is_found() {
    let scratch = Scratch::new();
    let out = pruned(&scratch, "--keep 0.6", "");
    let other = pruned(&scratch, "--keep 0.6 --neuron-score energy", "");
    let plan = other.join("tenp_plan.json");
    let line = "verify {} --against {} --plan {}";
    let run = tenp(line, &[&out, &demo(), &plan]);
    run.check(run.code == Some(4), "another plan");
    for words in [
        "tenp_plan.json: is another plan",
        "differs from its byte",
        "more",
    ] {
        run.check(run.stdout.contains(words), words);
    }
    assert_eq!(
        run.stdout.lines().count(),
        22,
        "the first 20, a count, a sum"
    );
    run.check(run.stderr.contains("--force"), "what to do");

    let line = "verify {} --against {}";
    tenp(line, &[&out, &golden("olmoe")]).refused(1, &["made for checkpoint"]);
    edit_json(&out.join("config.json"), |config| {
        let width = &mut config["tenp"]["widths"][2][3];
        *width = (width.as_u64().unwrap() + 8).into();
    });
    assert_found(&out, &demo(), "config.json", "tenp.widths");
    let index = out.join("model.safetensors.index.json");
    let shard = read_json(&index)["weight_map"][EXPERT].clone();
    let elsewhere = ["model-00001", "model-00002"].map(|start| {
        let name = shard.as_str().unwrap();
        format!("{start}{}", &name[start.len()..])
    });
    let elsewhere = elsewhere.iter().find(|name| shard != **name).unwrap();
    edit_json(&index, |index| {
        index["weight_map"][EXPERT] = elsewhere.as_str().into();
    });
    assert_found(&out, &demo(), EXPERT, "by the index");
    std::fs::write(out.join("config.json"), "{\"model_type\": ").unwrap();
    assert_found(&out, &demo(), "config.json", "EOF");
    std::fs::remove_file(out.join("report.json")).unwrap();
    verify(&out, &demo()).refused(1, &["report.json"]);
    verify(&scratch.join("none"), &demo()).refused(1, &["does not exist"]);
}
