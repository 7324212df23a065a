//! Pruning fp8 checkpoints: what is copied, what is scaled anew, and what leaves fp8.

use tenp_checkpoint::{
    ApplyOptions, ApplyOutcome, Checkpoint, CheckpointError, Dtype, OutputDtype, OutputForm, Part,
    Plan, apply, output_bytes, verify, weight_of_scale,
};

use crate::fixture::{Fixture, Keep, dropping, edit_shard, json, plan, snapshot};
use crate::support::quantization_config;

/// Expert 0 whole, expert 1 of width 0, expert 2 an aligned run and the short last block, the others scattered.
fn mixed(checkpoint: &Checkpoint) -> Plan {
    plan(checkpoint, |_, expert| match expert {
        0 => Keep::All,
        1 => Keep::Neurons(Vec::new()),
        2 => Keep::Neurons((128..300).collect()),
        _ => Keep::Neurons((0..300).filter(|id| id % expert as u32 != 1).collect()),
    })
}

fn write(fixture: &Fixture, plan: &Plan, form: OutputForm, dtype: OutputDtype) -> Checkpoint {
    let options = ApplyOptions {
        form,
        dtype,
        ..ApplyOptions::default()
    };
    let input = fixture.open();
    let needed = output_bytes(&input, plan, &options).unwrap();
    apply(&input, plan, &fixture.out(), &options, &mut |_, _| ()).unwrap();
    let output = Checkpoint::open(&fixture.out()).unwrap();
    let bytes: usize = output.tensors().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(needed, bytes as u64);
    assert_eq!(output.is_fp8(), dtype == OutputDtype::Same);
    output
}

/// Values of an expert's neurons, `[width][3 · H]`.
fn neurons(checkpoint: &Checkpoint, layer: usize, expert: usize) -> Vec<Vec<f32>> {
    let expert = checkpoint.expert(layer, expert).unwrap();
    let [gate, up, down] = Part::ALL.map(|part| expert.part(part).to_f32());
    let (width, hidden) = (expert.gate.rows, expert.gate.cols);
    (0..width)
        .map(|neuron| {
            let rows = [&gate, &up].map(|rows| &rows[neuron * hidden..][..hidden]);
            let column = down.iter().skip(neuron).step_by(width).copied();
            rows.concat().into_iter().chain(column).collect()
        })
        .collect()
}

#[test]
fn aligned_runs_keep_bytes_and_scales() {
    let fixture = Fixture::fp8();
    let source = fixture.open();
    let output = write(
        &fixture,
        &mixed(&source),
        OutputForm::Ragged,
        OutputDtype::Same,
    );
    for layer in [1, 2] {
        let before = source.expert(layer, 2).unwrap();
        let after = output.expert(layer, 2).unwrap();
        // Hidden is 136, so rows of scales are two wide: blocks 1 and 2 of three stay.
        for (old, new) in [(before.gate, after.gate), (before.up, after.up)] {
            assert_eq!(new.bytes, &old.bytes[128 * 136..]);
            assert_eq!(new.scales, &old.scales[8..]);
        }
        let (old, new) = (before.down, after.down);
        assert_eq!((new.rows, new.cols), (136, 172));
        for row in 0..136 {
            assert_eq!(new.row(row), &old.row(row)[128..]);
        }
        assert_eq!(new.scales[..8], old.scales[4..12]);
        assert_eq!(new.scales[8..], old.scales[16..]);
        // Whole experts, whatever becomes of the others.
        let (before, after) = (source.expert(layer, 0), output.expert(layer, 0));
        let (before, after) = (before.unwrap(), after.unwrap());
        for part in Part::ALL {
            let (old, new) = (before.part(part), after.part(part));
            assert_eq!((old.bytes, old.scales), (new.bytes, new.scales));
        }
    }
}

/// Every kept number is off by half a step at most, of codes made with the very scale that is stored; returns how many
/// are not what they were.
fn assert_half_steps(source: &Checkpoint, output: &Checkpoint, plan: &Plan) -> u32 {
    let mut rounded = 0;
    for layer in &plan.layers {
        for expert in &layer.experts {
            let old = neurons(source, layer.layer, expert.id);
            let new = neurons(output, layer.layer, expert.id);
            let all: Vec<u32> = (0..expert.width as u32).collect();
            let kept = expert.neurons.as_ref().unwrap_or(&all);
            assert_eq!(new.len(), kept.len());
            // The largest scale of the output bounds the step of what is next to nothing.
            let parts = output.expert(layer.layer, expert.id).unwrap();
            let scales = Part::ALL
                .iter()
                .flat_map(|part| parts.part(*part).scales.as_chunks().0);
            let largest = scales.map(|s| f32::from_le_bytes(*s)).fold(0.0, f32::max);
            for (new, id) in new.iter().zip(kept) {
                for (got, want) in new.iter().zip(&old[*id as usize]) {
                    let bound = want.abs().max(largest / 64.0) / 16.0;
                    assert!((got - want).abs() <= bound * 1.000_01, "{got} {want}");
                    rounded += u32::from(got.to_bits() != want.to_bits());
                }
            }
        }
    }
    rounded
}

#[test]
fn other_neurons_are_off_by_half_a_step_at_most() {
    let fixture = Fixture::fp8();
    let source = fixture.open();
    let plan = mixed(&source);
    let output = write(&fixture, &plan, OutputForm::Ragged, OutputDtype::Same);
    let rounded = assert_half_steps(&source, &output, &plan);
    assert!(rounded > 0, "some blocks are scaled anew");
}

#[test]
fn everything_else_and_the_config_stay() {
    let fixture = Fixture::fp8();
    let source = fixture.open();
    let output = write(
        &fixture,
        &mixed(&source),
        OutputForm::Ragged,
        OutputDtype::Same,
    );
    for tensor in source
        .tensors()
        .filter(|tensor| !tensor.name.contains(".experts."))
    {
        let after = output.tensor(tensor.name).unwrap();
        assert_eq!((after.dtype, after.bytes), (tensor.dtype, tensor.bytes));
    }
    let config = json(&fixture.out().join("config.json"));
    assert_eq!(config["quantization_config"], quantization_config());
    let size = output.size();
    let routed: usize = output
        .tensors()
        .filter(|tensor| tensor.name.contains(".mlp.experts."))
        .map(|tensor| tensor.bytes.len())
        .sum();
    assert_eq!(size.bytes_routed, routed as u64);
    let parameters: usize = output
        .tensors()
        .filter(|tensor| weight_of_scale(tensor.name).is_none())
        .map(|tensor| tensor.shape.iter().product::<usize>())
        .sum();
    assert_eq!(size.parameters_total, parameters as u64);
}

#[test]
fn leaving_fp8_rounds_every_weight_once() {
    for form in [OutputForm::Ragged, OutputForm::Padded] {
        let fixture = Fixture::fp8();
        let source = fixture.open();
        let plan = mixed(&source);
        let output = write(&fixture, &plan, form, OutputDtype::Bf16);
        let config = json(&fixture.out().join("config.json"));
        assert!(!config.contains_key("quantization_config"));
        let round = |value: &f32| half::bf16::from_f32(*value).to_f32();
        for layer in &plan.layers {
            for expert in &layer.experts {
                let old = neurons(&source, layer.layer, expert.id);
                let mut new = neurons(&output, layer.layer, expert.id);
                let rest = new.split_off(expert.width);
                let all: Vec<u32> = (0..expert.width as u32).collect();
                let kept = expert.neurons.as_ref().unwrap_or(&all).iter();
                let want = kept.map(|id| old[*id as usize].iter().map(round).collect());
                assert_eq!(new, want.collect::<Vec<Vec<f32>>>());
                assert!(rest.concat().iter().all(|value| value.to_bits() == 0));
            }
        }
        for tensor in source
            .tensors()
            .filter(|tensor| !tensor.name.contains(".experts."))
        {
            let Some(weight) = weight_of_scale(tensor.name) else {
                let after = output.tensor(tensor.name).unwrap();
                assert_eq!(after.shape, tensor.shape);
                assert_eq!(after.dtype == tensor.dtype, tensor.dtype != Dtype::F8E4M3);
                continue;
            };
            assert!(!output.contains(tensor.name));
            let (rows, cols) = {
                let shape = source.tensor(weight).unwrap().shape;
                (shape[0], shape[1])
            };
            let [old, new] = [&source, &output].map(|c| c.matrix(weight, rows, cols).unwrap());
            let want: Vec<f32> = old.to_f32().iter().map(round).collect();
            assert_eq!(new.to_f32(), want, "{weight}");
        }
    }
}

#[test]
fn keeping_everything_copies_the_folder_or_only_leaves_fp8() {
    let fixture = Fixture::fp8();
    let everything = plan(&fixture.open(), |_, _| Keep::All);
    let outcome = fixture.apply(&everything, OutputForm::Ragged).unwrap();
    assert!(matches!(
        outcome,
        ApplyOutcome::Written {
            identical: true,
            ..
        }
    ));
    let (before, after) = (snapshot(&fixture.input()), snapshot(&fixture.out()));
    for (name, bytes) in before {
        assert_eq!(after[&name], bytes, "{name}");
    }
    let fixture = Fixture::fp8();
    let output = write(
        &fixture,
        &everything_of(&fixture),
        OutputForm::Ragged,
        OutputDtype::Bf16,
    );
    assert_eq!(output.config().widths, None, "a stock checkpoint");
}

fn everything_of(fixture: &Fixture) -> Plan {
    plan(&fixture.open(), |_, _| Keep::All)
}

#[test]
fn experts_that_stay_whole_are_copied_with_their_scales() {
    let fixture = Fixture::fp8();
    let source = fixture.open();
    // Groups of two must stay whole: one of the layers' experts is not enough to drop, so none is, but one is narrow.
    let plan = plan(&source, |layer, expert| match (layer, expert) {
        (2, 7) => Keep::Neurons((0..300).step_by(3).collect()),
        _ => Keep::All,
    });
    let output = write(&fixture, &plan, OutputForm::Ragged, OutputDtype::Same);
    for tensor in source
        .tensors()
        .filter(|tensor| !tensor.name.contains(".2.mlp.experts.7."))
    {
        assert_eq!(
            output.tensor(tensor.name).unwrap().bytes,
            tensor.bytes,
            "{}",
            tensor.name
        );
    }
}

#[test]
fn dropped_experts_take_their_scales_with_them() {
    let fixture = Fixture::fp8();
    fixture.edit_config(|config| {
        config["n_group"] = 1.into();
        config["topk_group"] = 1.into();
    });
    let source = fixture.open();
    let plan = dropping(&source);
    let output = write(&fixture, &plan, OutputForm::Ragged, OutputDtype::Same);
    for layer in &plan.layers {
        for (new, old) in layer.kept().enumerate() {
            let before = source.expert(layer.layer, old.id).unwrap();
            let after = output.expert(layer.layer, new).unwrap();
            for part in Part::ALL {
                let (old, new) = (before.part(part), after.part(part));
                assert_eq!((old.bytes, old.scales), (new.bytes, new.scales));
            }
        }
    }
    let scales = |c: &Checkpoint| {
        c.tensors()
            .filter(|t| weight_of_scale(t.name).is_some())
            .count()
    };
    assert_eq!(scales(&source) - scales(&output), 2 * 3);
}

#[test]
fn padding_is_zero_and_scaled_by_one() {
    let fixture = Fixture::fp8();
    let source = fixture.open();
    let output = write(
        &fixture,
        &mixed(&source),
        OutputForm::Padded,
        OutputDtype::Same,
    );
    let empty = output.expert(1, 1).unwrap();
    for part in Part::ALL {
        let matrix = empty.part(part);
        assert!(matrix.bytes.iter().all(|byte| *byte == 0));
        assert!(
            matrix
                .scales
                .as_chunks()
                .0
                .iter()
                .all(|s| f32::from_le_bytes(*s) == 1.0)
        );
    }
    let ragged = Fixture::fp8();
    let narrow = write(
        &ragged,
        &mixed(&ragged.open()),
        OutputForm::Ragged,
        OutputDtype::Same,
    );
    for expert in 0..8 {
        let mut padded = neurons(&output, 2, expert);
        let narrow = neurons(&narrow, 2, expert);
        let rest = padded.split_off(narrow.len());
        assert_eq!(padded, narrow);
        assert!(rest.concat().iter().all(|value| value.to_bits() == 0));
    }
    // One width: the shared expert is padded to a multiple of it.
    let fixture = Fixture::fp8();
    let plan = plan(&fixture.open(), |_, _| {
        Keep::Neurons((0..300).filter(|id| id % 3 > 0).collect())
    });
    let output = write(&fixture, &plan, OutputForm::Uniform, OutputDtype::Same);
    assert_eq!(output.config().moe.expert_width, 200);
    let shared = output.shared_expert(1).unwrap().unwrap();
    let old = fixture.open();
    let old = old.shared_expert(1).unwrap().unwrap();
    assert_eq!((old.gate.rows, shared.gate.rows), (600, 600));
    assert_eq!(shared.down.bytes, old.down.bytes);
}

/// Blocks that are copied are not looked into; those that are scaled anew are.
#[test]
fn damaged_blocks_are_named_when_they_are_scaled_anew() {
    let tensor = "model.layers.2.mlp.experts.5.down_proj.weight";
    let damages: [(&str, &[u8]); 2] = [
        (tensor, &[0xff]),
        (
            "model.layers.2.mlp.experts.5.down_proj.weight_scale_inv",
            &f32::INFINITY.to_le_bytes(),
        ),
    ];
    for (name, bytes) in damages {
        let fixture = Fixture::fp8();
        let shard = fixture.input().join(fixture.open().shard_of(name).unwrap());
        edit_shard(&shard, |header, data| {
            let start = header[name]["data_offsets"][0].as_u64().unwrap() as usize;
            data[start..start + bytes.len()].copy_from_slice(bytes);
        });
        for dtype in [OutputDtype::Same, OutputDtype::Bf16] {
            let options = ApplyOptions {
                dtype,
                ..ApplyOptions::default()
            };
            let input = fixture.open();
            let error = apply(
                &input,
                &mixed(&input),
                &fixture.out(),
                &options,
                &mut |_, _| (),
            );
            let error = error.unwrap_err();
            assert!(
                matches!(error, CheckpointError::NonFinite { .. }),
                "{error}"
            );
            let text = error.to_string();
            for words in [tensor, "model-", "row 0, column 0", "download"] {
                assert!(text.contains(words), "{text}");
            }
            assert_eq!(fixture.names(), ["input"], "nothing is left behind");
        }
    }
}

/// DeepSeek-V3.1 promises scales that are powers of two, which only copies keep.
#[test]
fn scales_that_have_to_be_powers_of_two_are_not_made_anew() {
    let fixture = Fixture::fp8();
    fixture.edit_config(|config| {
        config["n_group"] = 1.into();
        config["topk_group"] = 1.into();
        config["quantization_config"]["scale_fmt"] = "ue8m0".into();
    });
    let source = fixture.open();
    let refused = fixture.apply(&mixed(&source), OutputForm::Ragged);
    let text = refused.unwrap_err().to_string();
    assert!(
        text.contains("ue8m0") && text.contains("--dtype bf16"),
        "{text}"
    );
    assert_eq!(fixture.names(), ["input"]);
    write(
        &fixture,
        &dropping(&source),
        OutputForm::Ragged,
        OutputDtype::Same,
    );
    std::fs::remove_dir_all(fixture.out()).unwrap();
    write(
        &fixture,
        &mixed(&source),
        OutputForm::Ragged,
        OutputDtype::Bf16,
    );
}

#[test]
fn scales_in_bf16_stay_in_bf16() {
    let fixture = Fixture::fp8_with_bf16_scales();
    let source = fixture.open();
    let plan = mixed(&source);
    let output = write(&fixture, &plan, OutputForm::Ragged, OutputDtype::Same);
    let mut scales = 0;
    for tensor in output.tensors() {
        if weight_of_scale(tensor.name).is_some() {
            assert_eq!(tensor.dtype, Dtype::BF16, "{}", tensor.name);
            scales += 1;
        }
    }
    assert!(scales > 0);
    let anew = assert_half_steps(&source, &output, &plan);
    assert!(anew > 0, "some blocks are scaled anew");
    let verification = verify(&source, &plan, &fixture.out(), &mut |_, _| ()).unwrap();
    assert!(verification.differences.is_empty());
}
