//! What becomes of the layers for multi-token prediction.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tenp_checkpoint::{
    ApplyOptions, ApplyOutcome, Checkpoint, Dtype, Mtp, OutputDtype, OutputForm, Part, Plan,
    SynthesiseOptions, apply, layer_of, output_bytes, weight_of_scale,
};

use crate::fixture::{Fixture, Keep, dropping, json as read_json, plan, ragged};

/// The MTP layer of the tiny model.
const LAYER: usize = 3;

fn fixture(fp8: bool) -> Fixture {
    Fixture::with(
        "deepseek_v3",
        SynthesiseOptions {
            dtype: if fp8 { Dtype::F8E4M3 } else { Dtype::BF16 },
            mtp: true,
            shard_bytes: 60_000,
            ..SynthesiseOptions::default()
        },
    )
}

fn options(form: OutputForm, mtp: Mtp) -> ApplyOptions {
    ApplyOptions {
        form,
        mtp,
        ..ApplyOptions::default()
    }
}

fn write(fixture: &Fixture, plan: &Plan, options: &ApplyOptions) -> (Checkpoint, ApplyOutcome) {
    let input = fixture.open();
    let needed = output_bytes(&input, plan, options).unwrap();
    let outcome = apply(&input, plan, &fixture.out(), options, &mut |_, _| ()).unwrap();
    let output = Checkpoint::open(&fixture.out()).unwrap();
    let bytes: usize = output.tensors().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(needed, bytes as u64);
    (output, outcome)
}

fn config(fixture: &Fixture) -> Value {
    Value::Object(read_json(&fixture.out().join("config.json")))
}

fn report(fixture: &Fixture) -> Value {
    read_json(&fixture.out().join("report.json"))["mtp"].clone()
}

/// Values of an expert's matrix in the MTP layer, by its name: such a layer is not read by the library.
fn matrix(checkpoint: &Checkpoint, expert: usize, part: Part) -> Vec<Vec<f32>> {
    let name = checkpoint.spelling().expert(LAYER, expert, part);
    let shape = checkpoint.tensor(&name).unwrap().shape;
    let values = checkpoint
        .matrix(&name, shape[0], shape[1])
        .unwrap()
        .to_f32();
    match part {
        Part::Gate | Part::Up => values.chunks(shape[1]).map(<[f32]>::to_vec).collect(),
        Part::Down => (0..shape[1])
            .map(|col| values.iter().skip(col).step_by(shape[1]).copied().collect())
            .collect(),
    }
}

/// Gate row, up row and down column of every neuron.
fn neurons(checkpoint: &Checkpoint, expert: usize) -> Vec<Vec<f32>> {
    let [gate, up, down] = Part::ALL.map(|part| matrix(checkpoint, expert, part));
    let rows = gate.into_iter().zip(up).zip(down);
    rows.map(|((gate, up), down)| [gate, up, down].concat())
        .collect()
}

fn weight(neuron: &[f32]) -> f64 {
    neuron.iter().map(|value| f64::from(*value).powi(2)).sum()
}

#[test]
fn pruned_layers_have_the_widths_of_the_last_one_and_their_heaviest_neurons() {
    for fp8 in [false, true] {
        let fixture = fixture(fp8);
        let source = fixture.open();
        let plan = ragged(&source);
        let (output, _) = write(&fixture, &plan, &options(OutputForm::Ragged, Mtp::Prune));
        let widths = |checkpoint: &Checkpoint| -> Vec<usize> {
            let experts = 0..8;
            experts
                .map(|e| matrix(checkpoint, e, Part::Gate).len())
                .collect()
        };
        let total = |e: usize| neurons(&source, e).iter().map(|n| weight(n)).sum::<f64>();
        let mut ranking: Vec<usize> = (0..8).collect();
        ranking.sort_by(|a, b| total(*b).total_cmp(&total(*a)));
        let mut by_width = plan.layers.last().unwrap().widths();
        by_width.sort_by(|a, b| b.cmp(a));
        let got = widths(&output);
        assert_eq!(
            ranking.iter().map(|e| got[*e]).collect::<Vec<_>>(),
            by_width
        );
        assert_eq!(config(&fixture)["tenp"]["mtp_widths"], json!([got]));

        for (expert, &width) in got.iter().enumerate() {
            let before = neurons(&source, expert);
            let after = neurons(&output, expert);
            let mut order: Vec<usize> = (0..before.len()).collect();
            order.sort_by(|a, b| {
                weight(&before[*b])
                    .total_cmp(&weight(&before[*a]))
                    .then(a.cmp(b))
            });
            order.truncate(width);
            order.sort_unstable();
            let want: Vec<&Vec<f32>> = order.iter().map(|id| &before[*id]).collect();
            // One block of 128: fp8 keeps its bytes.
            assert_eq!(after.iter().collect::<Vec<_>>(), want, "expert {expert}");
            let planned = &report(&fixture)["plans"][0]["experts"][expert];
            assert_eq!(planned["width"], width);
            if width < 48 {
                assert_eq!(planned["neurons"], json!(order));
            }
        }
        assert_eq!(report(&fixture)["mode"], "prune");
        assert_eq!(report(&fixture)["layers"], json!([LAYER]));
        // Everything else of the layer is as it was.
        for tensor in source.tensors().filter(|t| layer_of(t.name) == Some(LAYER)) {
            if !tensor.name.contains(".experts.") {
                assert_eq!(output.tensor(tensor.name).unwrap().bytes, tensor.bytes);
            }
        }
    }
}

#[test]
fn kept_layers_stay_whole_where_the_form_can_say_so() {
    let fixture = fixture(true);
    let source = fixture.open();
    let keep = |form| options(form, Mtp::Keep);
    for form in [OutputForm::Ragged, OutputForm::Padded] {
        let run = fixture_of(&fixture);
        let (output, _) = write(&run, &ragged(&source), &keep(form));
        for tensor in source.tensors().filter(|t| layer_of(t.name) == Some(LAYER)) {
            assert_eq!(output.tensor(tensor.name).unwrap().bytes, tensor.bytes);
        }
        assert_eq!(report(&run), json!({"mode": "keep", "layers": [LAYER]}));
        if form == OutputForm::Ragged {
            assert_eq!(config(&run)["tenp"]["mtp_widths"], json!([vec![48; 8]]));
        }
    }
    let narrow = plan(&source, |_, _| Keep::Neurons((0..32).collect()));
    let refused = apply(
        &source,
        &narrow,
        &fixture.out(),
        &keep(OutputForm::Uniform),
        &mut |_, _| (),
    );
    let text = refused.unwrap_err().to_string();
    for words in ["uniform", "8 of width 32", "8 of 48", "--mtp prune"] {
        assert!(text.contains(words), "{text}");
    }
    let (output, _) = write(&fixture, &narrow, &options(OutputForm::Uniform, Mtp::Prune));
    assert!((0..8).all(|expert| matrix(&output, expert, Part::Gate).len() == 32));
}

/// The same input again, for another output.
fn fixture_of(source: &Fixture) -> Fixture {
    let fixture = fixture(true);
    assert_eq!(fixture.open().fingerprint(), source.open().fingerprint());
    fixture
}

#[test]
fn dropped_layers_are_gone_from_the_config_too() {
    for fp8 in [false, true] {
        for whole in [false, true] {
            let fixture = fixture(fp8);
            let source = fixture.open();
            let plan = if whole {
                plan(&source, |_, _| Keep::All)
            } else {
                ragged(&source)
            };
            let (output, outcome) = write(&fixture, &plan, &options(OutputForm::Ragged, Mtp::Drop));
            assert!(
                output
                    .tensors()
                    .all(|t| layer_of(t.name).is_none_or(|l| l < LAYER))
            );
            assert!(matches!(
                outcome,
                ApplyOutcome::Written {
                    identical: false,
                    ..
                }
            ));
            assert_eq!(output.config().num_mtp_layers, 0);
            assert_eq!(config(&fixture)["num_nextn_predict_layers"], 0);
            assert_eq!(output.config().widths.is_none(), whole);
            assert!(config(&fixture)["tenp"].get("mtp_widths").is_none());
            assert_eq!(report(&fixture), json!({"mode": "drop", "layers": [LAYER]}));
        }
    }
}

#[test]
fn layers_with_fewer_experts_keep_the_heaviest() {
    let fixture = fixture(false);
    fixture.edit_config(|config| {
        config["n_group"] = 2.into();
        config["topk_group"] = 1.into();
    });
    let source = fixture.open();
    let plan = dropping(&source);
    let kept = plan.layers[0].kept().count();
    assert_eq!(kept, 6);
    let (output, _) = write(&fixture, &plan, &options(OutputForm::Ragged, Mtp::Prune));
    let total = |e: &usize| neurons(&source, *e).iter().map(|n| weight(n)).sum::<f64>();
    let mut stay: Vec<usize> = Vec::new();
    for group in [0..4, 4..8] {
        let lightest = group
            .clone()
            .min_by(|a, b| total(a).total_cmp(&total(b)))
            .unwrap();
        stay.extend(group.filter(|e| *e != lightest));
    }
    for (new, old) in stay.iter().enumerate() {
        assert_eq!(neurons(&output, new), neurons(&source, *old));
    }
    let rows = |checkpoint: &Checkpoint, name: &str| -> Vec<Vec<u8>> {
        let tensor = checkpoint.tensor(name).unwrap();
        let stride = tensor.bytes.len() / tensor.shape[0];
        tensor.bytes.chunks(stride).map(<[u8]>::to_vec).collect()
    };
    for name in [
        source.spelling().router(LAYER),
        source.spelling().correction_bias(LAYER),
    ] {
        let before = rows(&source, &name);
        let want: Vec<Vec<u8>> = stay.iter().map(|e| before[*e].clone()).collect();
        assert_eq!(rows(&output, &name), want);
    }
    let keep = options(OutputForm::Ragged, Mtp::Keep);
    assert!(
        output_bytes(&source, &plan, &keep).is_err(),
        "one number of experts for all"
    );
}

#[test]
fn nothing_is_cut_where_everything_stays() {
    let fixture = fixture(true);
    let everything = plan(&fixture.open(), |_, _| Keep::All);
    let (_, outcome) = write(&fixture, &everything, &ApplyOptions::default());
    assert!(matches!(
        outcome,
        ApplyOutcome::Written {
            identical: true,
            ..
        }
    ));
    assert_eq!(report(&fixture), json!({"mode": "keep", "layers": [LAYER]}));
}

#[test]
fn layers_leave_fp8_with_the_others() {
    let fixture = fixture(true);
    let options = ApplyOptions {
        dtype: OutputDtype::Bf16,
        ..ApplyOptions::default()
    };
    let (output, _) = write(&fixture, &ragged(&fixture.open()), &options);
    assert!(!output.is_fp8());
    assert!(
        output
            .tensors()
            .all(|tensor| weight_of_scale(tensor.name).is_none())
    );
}

/// DeepSeek-V3's own shapes, with fewer layers and experts.
#[test]
fn synthesised_checkpoints_have_the_names_of_deepseek_v3() {
    let root = tempfile::tempdir().unwrap();
    let config = crate::fixture::data("configs/deepseek-v3.json");
    let options = SynthesiseOptions {
        num_layers: Some(4),
        num_experts: Some(16),
        dtype: Dtype::F8E4M3,
        mtp: true,
        holes: true,
        shard_bytes: 1_000_000_000,
        ..SynthesiseOptions::default()
    };
    tenp_checkpoint::synthesise(&config, root.path(), options, &mut |_, _| ()).unwrap();
    let checkpoint = Checkpoint::open(root.path()).unwrap();
    assert!(checkpoint.is_fp8());
    let shape = |name: &str| checkpoint.tensor(name).map(|tensor| tensor.shape.to_vec());
    for (name, want) in [
        ("model.layers.4.enorm.weight", vec![7168]),
        ("model.layers.4.hnorm.weight", vec![7168]),
        ("model.layers.4.eh_proj.weight", vec![7168, 14336]),
        ("model.layers.4.embed_tokens.weight", vec![129_280, 7168]),
        ("model.layers.4.shared_head.norm.weight", vec![7168]),
        (
            "model.layers.4.shared_head.head.weight",
            vec![129_280, 7168],
        ),
        (
            "model.layers.4.mlp.experts.15.down_proj.weight",
            vec![7168, 2048],
        ),
        (
            "model.layers.4.mlp.experts.15.down_proj.weight_scale_inv",
            vec![56, 16],
        ),
        (
            "model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv",
            vec![5, 56],
        ),
        (
            "model.layers.0.mlp.gate_proj.weight_scale_inv",
            vec![144, 56],
        ),
    ] {
        assert_eq!(shape(name).unwrap(), want, "{name}");
    }
    let mut dtypes: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut apart = 0;
    for tensor in checkpoint.tensors() {
        let kind = match tensor.name {
            name if name.ends_with("_scale_inv") => "scale",
            name if name.contains("_proj.") || name.contains("_proj_") => "projection",
            _ => "other",
        };
        dtypes.entry(kind).or_default().push(tensor.name);
        if let Some(weight) = weight_of_scale(tensor.name) {
            apart += u32::from(checkpoint.shard_of(weight) != checkpoint.shard_of(tensor.name));
        }
    }
    // `eh_proj` has none.
    assert_eq!(dtypes["scale"].len(), dtypes["projection"].len() - 1);
    assert!(apart > 10, "{apart} scales are in another shard");
}
