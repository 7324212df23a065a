//! The demo model's MoE layers in candle: whole, and with experts cut to widths of all kinds.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use tenp_candle::compare::{compare, difference, moe_layers, tolerance, words};
use tenp_candle::layer::{Checkpoint, MoeLayer};
use tenp_candle::{Expert, RaggedExperts};
use tenp_kernels::Compute;

const CPU: Device = Device::Cpu;

fn demo() -> Checkpoint {
    Checkpoint::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo")).unwrap()
}

/// Widths around the kernels' boundaries, one whole and one gone, turned by the layer.
fn width(layer: usize, expert: usize) -> usize {
    [96, 0, 1, 7, 8, 16, 31, 63, 64, 65, 95, 32, 48, 96, 2, 33][(expert + layer) % 16]
}

/// Which of 96 neurons an expert keeps: not the first ones, and in their order.
fn kept(layer: usize, expert: usize) -> Vec<u32> {
    let mut kept: Vec<u32> = (0..96).map(|j| (j * 35 + expert as u32) % 96).collect();
    kept.truncate(width(layer, expert));
    kept.sort_unstable();
    kept
}

/// Applies `edit` to gate, up and down of every expert, given the expert's kept neurons.
fn edited(edit: impl Fn(&Tensor, usize, &[u32]) -> Result<Tensor>) -> Result<Checkpoint> {
    let mut made = demo();
    for layer in moe_layers(&made.tensors) {
        for expert in 0..16 {
            for (name, dim) in [("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)] {
                let name = format!("model.layers.{layer}.mlp.experts.{expert}.{name}.weight");
                let cut = edit(&made.tensors[&name], dim, &kept(layer, expert))?;
                made.tensors.insert(name, cut);
            }
        }
    }
    Ok(made)
}

/// The neurons that are not kept are gone.
fn cut() -> Result<Checkpoint> {
    edited(|matrix, dim, kept| {
        if kept.is_empty() {
            return matrix.narrow(dim, 0, 0);
        }
        matrix.index_select(&Tensor::new(kept, &CPU)?, dim)
    })
}

/// The neurons that are not kept are zeros.
fn masked() -> Result<Checkpoint> {
    edited(|matrix, dim, kept| {
        let mut mask = [0f32; 96];
        for &neuron in kept {
            mask[neuron as usize] = 1.0;
        }
        let shape = if dim == 0 { (96, 1) } else { (1, 96) };
        let mask = Tensor::new(&mask, &CPU)?.reshape(shape)?;
        matrix.broadcast_mul(&mask.to_dtype(matrix.dtype())?)
    })
}

#[test]
fn every_layer_of_the_demo_model_is_the_same_with_the_op() {
    let comparisons = compare(&demo(), &CPU).unwrap();
    assert_eq!(comparisons.len(), 14);
    for comparison in comparisons {
        assert_eq!(comparison.widths, [96; 16]);
        assert!(comparison.is_same(), "{comparison:?}");
    }
}

#[test]
fn every_layer_with_ragged_experts_is_the_same_with_the_op() {
    let comparisons = compare(&cut().unwrap(), &CPU).unwrap();
    assert_eq!(comparisons.len(), 14);
    for comparison in comparisons {
        let widths: Vec<usize> = (0..16).map(|e| width(comparison.layer, e)).collect();
        assert_eq!(comparison.widths, widths);
        assert!(comparison.is_same(), "{comparison:?}");
    }
}

/// Cut neurons are as good as zeros, and not as good as the neurons that were there.
#[test]
fn cutting_neurons_is_masking_them() {
    let (whole, cut, masked) = (demo(), cut().unwrap(), masked().unwrap());
    let words = words(&whole.tensors, &CPU).unwrap();
    for number in moe_layers(&whole.tensors) {
        let of = |made| MoeLayer::new(made, number, Compute::F32, &CPU).unwrap();
        let x = of(&whole).normed(&words).unwrap();
        let got = of(&cut).forward(&x).unwrap();
        let want = of(&masked).forward_plain(&x).unwrap();
        let to_masked = difference(&got, &want).unwrap();
        assert!(
            to_masked <= tolerance(Compute::F32),
            "{number}: {to_masked}"
        );
        let want = of(&whole).forward_plain(&x).unwrap();
        let to_whole = difference(&got, &want).unwrap();
        assert!(
            to_whole > 10.0 * tolerance(Compute::Bf16),
            "{number}: {to_whole}"
        );
    }
}

fn matrix(rows: usize, cols: usize) -> Tensor {
    Tensor::ones((rows, cols), DType::BF16, &CPU).unwrap()
}

#[test]
fn what_does_not_fit_is_refused_with_its_name() {
    let wrong = Expert::new(&matrix(3, 8), &matrix(3, 8), &matrix(8, 4)).unwrap_err();
    assert!(wrong.to_string().contains("do not fit together"), "{wrong}");
    let expert = Expert::new(&matrix(3, 8), &matrix(3, 8), &matrix(8, 3)).unwrap();
    let none = RaggedExperts::new(8, Vec::new(), Compute::F32, &CPU).unwrap_err();
    assert!(none.to_string().contains("there are none"), "{none}");
    let other = RaggedExperts::new(16, vec![expert.clone()], Compute::F32, &CPU).unwrap_err();
    assert!(other.to_string().contains("expert 0"), "{other}");
    let op = RaggedExperts::new(8, vec![expert], Compute::F32, &CPU).unwrap();
    let x = Tensor::ones((2, 8), DType::F32, &CPU).unwrap();
    let weights = Tensor::ones((2, 1), DType::F32, &CPU).unwrap();
    let ids = |values: [u32; 2]| Tensor::new(&values, &CPU).unwrap().reshape((2, 1)).unwrap();
    let past = op.forward(&x, &ids([0, 1]), &weights).unwrap_err();
    assert!(
        past.to_string().contains("index 1 is out of range for 1"),
        "{past}"
    );
    let rows = op.forward(
        &x,
        &Tensor::zeros((3, 1), DType::U32, &CPU).unwrap(),
        &weights,
    );
    assert!(rows.unwrap_err().to_string().contains("expert ids [3, 1]"));
    // silu(8) · 8, three times.
    let out = op
        .forward(&x, &ids([0, 0]), &weights)
        .unwrap()
        .to_vec2::<f32>()
        .unwrap();
    let want = 3.0 * 64.0 / (1.0 + (-8f32).exp());
    assert!(
        out.iter().flatten().all(|y| (y - want).abs() < 1e-3),
        "{out:?}"
    );
}

/// The experts of a token are those of the config: another number gives another output, in both ways the same one.
#[test]
fn the_config_says_how_many_experts_a_token_has() {
    let (four, mut two) = (demo(), demo());
    assert_eq!(four.top_k, 4);
    two.top_k = 2;
    let x = words(&four.tensors, &CPU).unwrap();
    let number = moe_layers(&four.tensors)[0];
    let of = |made| MoeLayer::new(made, number, Compute::F32, &CPU).unwrap();
    let got = of(&two).forward(&x).unwrap();
    let same = difference(&got, &of(&two).forward_plain(&x).unwrap()).unwrap();
    let other = difference(&got, &of(&four).forward(&x).unwrap()).unwrap();
    assert!(
        same <= tolerance(Compute::F32) && other > 1e-3,
        "{same}, {other}"
    );
    two.top_k = 17;
    assert!(MoeLayer::new(&two, number, Compute::F32, &CPU).is_err());
}

#[test]
fn a_config_that_does_not_do_is_named() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("configs");
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("config.json");
    for (text, named) in [
        (r#"{"rms_norm_eps": 1e-6}"#, "num_experts_per_tok"),
        (
            r#"{"num_experts_per_tok": -1, "rms_norm_eps": 1e-6}"#,
            "num_experts_per_tok",
        ),
        (r#"{"num_experts_per_tok": 4}"#, "rms_norm_eps"),
        (
            r#"{"num_experts_per_tok": 4, "rms_norm_eps": 1e-6}"#,
            "no safetensors",
        ),
        ("{", "config.json"),
    ] {
        std::fs::write(&path, text).unwrap();
        let error = Checkpoint::read(&folder).unwrap_err().to_string();
        assert!(error.contains(named), "{text}: {error}");
    }
    std::fs::remove_file(&path).unwrap();
    let error = Checkpoint::read(&folder).unwrap_err().to_string();
    assert!(error.contains("config.json"), "{error}");
}
