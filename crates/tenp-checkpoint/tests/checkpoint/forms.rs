//! What comes out of every form, compared with the source neuron by neuron.

use serde_json::json;
use tenp_checkpoint::{
    ApplyOptions, ApplyOutcome, Checkpoint, ExpertTensors, Matrix, Mtp, OutputForm, Part, Plan,
    Spelling,
};

use crate::fixture::{
    Fixture, Keep, TINY, dropping, json as read_json, plan, ragged, snapshot, some_neurons,
};

/// Row of gate or up, column of down, of one neuron.
fn neuron(expert: &ExpertTensors<'_>, id: usize) -> [Vec<u8>; 3] {
    let size = expert.down.dtype.size();
    let column = (0..expert.down.rows)
        .flat_map(|row| expert.down.row(row)[id * size..][..size].to_vec())
        .collect();
    [
        expert.gate.row(id).to_vec(),
        expert.up.row(id).to_vec(),
        column,
    ]
}

/// Every kept neuron of the plan stands in the output, in order, and nothing but zeros follows.
fn assert_kept(source: &Checkpoint, output: &Checkpoint, plan: &Plan, name: &str) {
    for layer in &plan.layers {
        for (id, own) in layer.kept().enumerate() {
            let before = source.expert(layer.layer, own.id).unwrap();
            let after = output.expert(layer.layer, id).unwrap();
            let all: Vec<u32> = (0..own.width as u32).collect();
            let neurons = own.neurons.as_ref().unwrap_or(&all);
            for (position, neuron_id) in neurons.iter().enumerate() {
                assert_eq!(
                    neuron(&after, position),
                    neuron(&before, *neuron_id as usize),
                    "{name}, layer {}, expert {id}, neuron {position}",
                    layer.layer
                );
            }
            for position in neurons.len()..after.gate.rows {
                let bytes = neuron(&after, position).concat();
                assert!(bytes.iter().all(|byte| *byte == 0), "{name}: padding");
            }
        }
    }
}

/// Everything but routed experts is byte for byte the source's.
fn assert_rest(source: &Checkpoint, output: &Checkpoint, except: &[&str]) {
    for tensor in source.tensors() {
        if tensor.name.contains(".experts.") || except.iter().any(|part| tensor.name.contains(part))
        {
            continue;
        }
        assert_eq!(
            output.tensor(tensor.name).unwrap().bytes,
            tensor.bytes,
            "{}",
            tensor.name
        );
    }
}

#[test]
fn ragged_output_holds_the_kept_neurons() {
    for name in TINY {
        let fixture = Fixture::sharded(name);
        let source = fixture.open();
        let plan = ragged(&source);
        fixture.apply(&plan, OutputForm::Ragged).unwrap();
        let output = Checkpoint::open(&fixture.out()).unwrap();
        assert_eq!(output.config().widths, Some(plan.widths()));
        assert_eq!(output.config().family, source.config().family);
        assert_eq!(output.config().moe, source.config().moe, "{name}");
        assert_kept(&source, &output, &plan, name);
        assert_rest(&source, &output, &[]);
        let empty = output.expert(source.config().moe_layers[0], 1).unwrap();
        assert_eq!(
            (empty.gate.rows, empty.down.cols, empty.up.bytes.len()),
            (0, 0, 0)
        );
        let config = read_json(&fixture.out().join("config.json"));
        let architecture = config["architectures"][0].as_str().unwrap();
        assert!(architecture.starts_with("Tenp"), "{architecture}");
        assert!(config["model_type"].as_str().unwrap().starts_with("tenp_"));
        assert_eq!(config["tenp"]["source_fingerprint"], source.fingerprint());
        assert!(config.get("auto_map").is_none());
        let original = output.pruned_from().unwrap();
        assert_eq!(original.fingerprint.as_deref(), Some(source.fingerprint()));
        assert_eq!(original.source.as_deref(), Some("input"));
    }
}

#[test]
fn padded_output_ends_in_zeros() {
    for name in TINY {
        let fixture = Fixture::new(name);
        let source = fixture.open();
        let plan = ragged(&source);
        fixture.apply(&plan, OutputForm::Padded).unwrap();
        let output = Checkpoint::open(&fixture.out()).unwrap();
        assert_eq!(output.config(), source.config(), "{name}");
        assert_kept(&source, &output, &plan, name);
        assert_rest(&source, &output, &[]);
        let model_type = &read_json(&fixture.out().join("config.json"))["model_type"];
        assert_eq!(model_type, &source.config_json()["model_type"]);
        let original = output.pruned_from().unwrap();
        assert_eq!(original.fingerprint.as_deref(), Some(source.fingerprint()));
        assert_ne!(output.fingerprint(), source.fingerprint());
    }
}

fn narrow(checkpoint: &Checkpoint, width: usize) -> Plan {
    plan(checkpoint, |layer, expert| {
        let first = (layer + expert) as u32 % 5;
        Keep::Neurons((first..first + width as u32).collect())
    })
}

#[test]
fn uniform_output_carries_one_width() {
    for name in TINY {
        let fixture = Fixture::new(name);
        let source = fixture.open();
        let plan = narrow(&source, 40);
        fixture.apply(&plan, OutputForm::Uniform).unwrap();
        let output = Checkpoint::open(&fixture.out()).unwrap();
        let (before, after) = (&source.config().moe, &output.config().moe);
        assert_eq!(after.expert_width, 40, "{name}");
        assert_eq!(output.config().widths, None);
        assert_kept(&source, &output, &plan, name);
        assert_rest(&source, &output, &["shared_experts"]);
        if !source.config().family.follows_deepseek() {
            assert_eq!(after.shared_width, before.shared_width, "{name}");
            continue;
        }
        // 96 shared neurons need three experts of 40, 48 need two.
        let count = before.shared_width.div_ceil(40);
        assert_eq!(after.shared_width, 40 * count, "{name}");
        let config = read_json(&fixture.out().join("config.json"));
        assert_eq!(config["n_shared_experts"], json!(count));
        for layer in &source.config().moe_layers {
            let old = source.shared_expert(*layer).unwrap().unwrap();
            let new = output.shared_expert(*layer).unwrap().unwrap();
            assert_padded(&old.gate, &new.gate);
            assert_padded(&old.up, &new.up);
            for row in 0..old.down.rows {
                let own = old.down.row(row);
                let (kept, rest) = new.down.row(row).split_at(own.len());
                assert_eq!(kept, own);
                assert!(rest.iter().all(|byte| *byte == 0));
            }
        }
    }
}

fn assert_padded(old: &Matrix<'_>, new: &Matrix<'_>) {
    assert_eq!(new.bytes[..old.bytes.len()], *old.bytes);
    assert!(new.bytes[old.bytes.len()..].iter().all(|byte| *byte == 0));
}

#[test]
fn uniform_form_refuses_several_widths() {
    let fixture = Fixture::new("mixtral");
    let error = fixture
        .apply(&ragged(&fixture.open()), OutputForm::Uniform)
        .unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("--method enp") && message.contains("0 to 96"),
        "{message}"
    );
    assert_eq!(fixture.names(), ["input"]);
    let none = plan(&fixture.open(), |_, _| Keep::Neurons(Vec::new()));
    let error = fixture.apply(&none, OutputForm::Uniform).unwrap_err();
    assert!(error.to_string().contains("width 0"), "{error}");
}

#[test]
fn dropped_experts_leave_the_router() {
    for name in TINY {
        for form in [OutputForm::Ragged, OutputForm::Padded, OutputForm::Uniform] {
            let fixture = Fixture::new(name);
            // Groups of two experts cannot lose one each where a group's score is a sum of two.
            if name == "deepseek_v3" {
                fixture.edit_config(|config| {
                    config.insert("n_group".to_owned(), json!(2));
                });
            }
            if name == "deepseek_v2_group" {
                fixture.edit_config(|config| {
                    config.insert("n_group".to_owned(), json!(2));
                    config.insert("topk_group".to_owned(), json!(1));
                });
            }
            let source = fixture.open();
            let plan = dropping(&source);
            let kept = plan.layers[0].kept().count();
            assert!(kept < source.config().moe.num_experts, "{name}");
            fixture.apply(&plan, form).unwrap();
            let output = Checkpoint::open(&fixture.out()).unwrap();
            assert_eq!(output.config().moe.num_experts, kept);
            assert_eq!(
                output.config().widths,
                None,
                "{name}: a stock checkpoint in any form"
            );
            assert_kept(&source, &output, &plan, name);
            assert_rest(
                &source,
                &output,
                &["gate.weight", "e_score_correction_bias"],
            );
            for layer in &plan.layers {
                let before = source.router(layer.layer).unwrap();
                let after = output.router(layer.layer).unwrap();
                for (id, expert) in layer.kept().enumerate() {
                    assert_eq!(after.weight.row(id), before.weight.row(expert.id));
                    if let (Some(after), Some(before)) =
                        (&after.correction_bias, &before.correction_bias)
                    {
                        assert_eq!(after[id], before[expert.id]);
                    }
                }
            }
        }
    }
}

#[test]
fn dropping_and_narrowing_together() {
    for form in [OutputForm::Ragged, OutputForm::Padded] {
        for fixture in [Fixture::new("qwen2_moe"), Fixture::fused("qwen2_moe")] {
            let source = fixture.open();
            let plan = plan(&source, |layer, expert| match expert {
                2 | 5 => Keep::Drop,
                0 => Keep::All,
                _ => Keep::Neurons(some_neurons(48, layer + expert)),
            });
            fixture.apply(&plan, form).unwrap();
            let output = Checkpoint::open(&fixture.out()).unwrap();
            assert_eq!(output.config().moe.num_experts, 6);
            assert_eq!(output.config().widths.is_some(), form == OutputForm::Ragged);
            assert_kept(&source, &output, &plan, "qwen2_moe");
            let row = source.router(1).unwrap().weight.row(7);
            assert_eq!(output.router(1).unwrap().weight.row(5), row);
        }
    }
}

#[test]
fn fused_experts_stay_fused_where_the_form_allows() {
    for name in ["mixtral", "deepseek_v3", "olmoe"] {
        for (form, fused) in [(OutputForm::Padded, true), (OutputForm::Ragged, false)] {
            let fixture = Fixture::fused(name);
            let source = fixture.open();
            let plan = ragged(&source);
            fixture.apply(&plan, form).unwrap();
            let output = Checkpoint::open(&fixture.out()).unwrap();
            assert_eq!(output.spelling().fused, fused);
            assert_kept(&source, &output, &plan, name);
            assert_rest(&source, &output, &[]);
        }
        let fixture = Fixture::fused(name);
        let source = fixture.open();
        let plan = narrow(&source, 32);
        fixture.apply(&plan, OutputForm::Uniform).unwrap();
        let output = Checkpoint::open(&fixture.out()).unwrap();
        assert!(output.spelling().fused);
        assert_kept(&source, &output, &plan, name);
    }
    let fixture = Fixture::fused("mixtral");
    let source = fixture.open();
    let plan = dropping(&source);
    fixture.apply(&plan, OutputForm::Ragged).unwrap();
    let output = Checkpoint::open(&fixture.out()).unwrap();
    assert!(output.spelling().fused);
    assert_kept(&source, &output, &plan, "mixtral");
}

#[test]
fn keeping_everything_copies_every_byte() {
    for form in [OutputForm::Ragged, OutputForm::Padded, OutputForm::Uniform] {
        let fixture = Fixture::sharded("deepseek");
        let source = fixture.open();
        let plan = plan(&source, |_, expert| match expert {
            3 => Keep::Neurons((0..48).collect()),
            _ => Keep::All,
        });
        let outcome = fixture.apply(&plan, form).unwrap();
        assert!(matches!(
            outcome,
            ApplyOutcome::Written {
                identical: true,
                ..
            }
        ));
        let (before, after) = (snapshot(&fixture.input()), snapshot(&fixture.out()));
        for (name, bytes) in &before {
            if name.starts_with("model") || name == "config.json" {
                assert_eq!(after.get(name), Some(bytes), "{name}");
            }
        }
        let copy = Checkpoint::open(&fixture.out()).unwrap();
        assert_eq!(copy.fingerprint(), source.fingerprint());
        assert_eq!(copy.pruned_from(), None, "a copy can be planned from");
    }
}

#[test]
fn a_layer_beyond_the_config_is_not_passed_over() {
    let fixture = Fixture::new("deepseek_v3");
    let path = fixture.shard();
    let extra = "model.layers.3.mlp.experts.0.gate_proj.weight";
    let add = |name: &str| {
        crate::fixture::edit_shard(&path, |header, data| {
            let end = data.len();
            data.extend_from_slice(&[7; 16]);
            header.insert(
                name.to_owned(),
                json!({"dtype": "BF16", "shape": [2, 4], "data_offsets": [end, end + 16]}),
            );
        });
    };
    add(extra);
    // Of one more layer of the model, which the config does not promise, nothing is made.
    let error = Checkpoint::open(&fixture.input()).unwrap_err().to_string();
    for needle in ["num_hidden_layers", "is 3", extra, "download"] {
        assert!(error.contains(needle), "{error}");
    }
    add("model.layers.3.eh_proj.weight");
    let source = fixture.open();
    let error = fixture.apply(&ragged(&source), OutputForm::Ragged);
    let text = error.unwrap_err().to_string();
    assert!(text.contains(extra) && text.contains("[48, 64]"), "{text}");
    let options = ApplyOptions {
        mtp: Mtp::Keep,
        ..ApplyOptions::default()
    };
    let plan = ragged(&source);
    tenp_checkpoint::apply(&source, &plan, &fixture.out(), &options, &mut |_, _| ()).unwrap();
    let output = Checkpoint::open(&fixture.out()).unwrap();
    assert_eq!(output.tensor(extra).unwrap().bytes, [7; 16]);
    let report = read_json(&fixture.out().join("report.json"));
    assert_eq!(report["mtp"], json!({"mode": "keep", "layers": [3]}));
    assert_eq!(
        output.size().parameters_total + 16,
        output.size().bytes_total / 2 - 16
    );
}

#[test]
fn ragged_names_are_the_familys_classic_ones() {
    let fixture = Fixture::fused("mixtral");
    fixture
        .apply(&ragged(&fixture.open()), OutputForm::Ragged)
        .unwrap();
    let output = Checkpoint::open(&fixture.out()).unwrap();
    let name = Spelling::classic(output.config().family).expert(0, 2, Part::Gate);
    assert_eq!(name, "model.layers.0.block_sparse_moe.experts.2.w1.weight");
    assert!(output.contains(&name));
}
