//! A model in fp8 is the model of its dequantised weights: to the bit where both are read in f32, and as the public
//! `transformers` library has it (`tests/compat/make_fp8.py`).

// `cargo test -- --nocapture` lists the errors.
#![allow(clippy::print_stdout)]

#[path = "../../tenp-checkpoint/tests/support/fp8.rs"]
mod fp8;
mod support;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use sha2::{Digest, Sha256};
use support::{golden, golden_dir, overwrite, relative_error};
use tempfile::TempDir;
use tenp_checkpoint::{
    Accounting, ApplyOptions, Checkpoint, Dtype, ExpertPlan, LayerPlan, LayerRewriter, OutputDtype,
    Part, Plan, SynthesiseOptions, apply_rewritten, synthesise,
};
use tenp_kernels::Compute;
use tenp_model::calibrate::calibrate;
use tenp_model::device::DeviceModel;
use tenp_model::rewrite::{LeastSquares, RecoverOptions, Rescale};
use tenp_model::{Model, ModelError, Sequences};

/// A folder in fp8, and the same numbers in f32.
struct Folders {
    root: TempDir,
}

impl Folders {
    fn of(source: &Path) -> Self {
        let root = tempfile::tempdir().expect("a folder");
        let folders = Self { root };
        fp8::quantise(source, &folders.fp8());
        fp8::dequantise(&folders.fp8(), &folders.wide());
        folders
    }

    /// Of a model whose matrices have several blocks, with tails both ways.
    fn wide_model() -> Self {
        let source = tempfile::tempdir().expect("a folder");
        let tiny = "../tenp-checkpoint/tests/data/tiny/deepseek_v3.json";
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join(tiny);
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(tiny).expect("config")).expect("JSON");
        config["hidden_size"] = 264.into();
        config["moe_intermediate_size"] = 200.into();
        config["intermediate_size"] = 300.into();
        let path = source.path().join("wide.json");
        std::fs::write(&path, config.to_string()).expect("written");
        let folder = source.path().join("bf16");
        std::fs::create_dir(&folder).expect("a folder");
        synthesise(&path, &folder, SynthesiseOptions::default(), &mut |_, _| ()).expect("made");
        let folders = Self {
            root: tempfile::tempdir().expect("a folder"),
        };
        fp8::quantise_unevenly(&folder, &folders.fp8());
        fp8::dequantise(&folders.fp8(), &folders.wide());
        folders
    }

    fn fp8(&self) -> PathBuf {
        self.root.path().join("fp8")
    }

    fn wide(&self) -> PathBuf {
        self.root.path().join("wide")
    }
}

fn sequences(ids: &[Vec<u32>]) -> Sequences {
    let mut sequences = Sequences::default();
    for ids in ids {
        sequences.push(ids, 0);
    }
    sequences
}

fn ids() -> Vec<Vec<u32>> {
    golden(&golden_dir().join("deepseek_v3")).0
}

fn logits(model: &Model<'_>) -> Vec<f32> {
    let hidden = model.hidden_states(&sequences(&ids()), &()).expect("runs");
    model.head().expect("head").logits(&hidden).expect("logits")
}

#[test]
fn logits_are_those_of_the_dequantised_weights_to_the_bit() {
    let golden = ["deepseek_v3", "qwen3_moe"].map(|family| Folders::of(&golden_dir().join(family)));
    for folders in golden.iter().chain([&Folders::wide_model()]) {
        let (fp8, wide) = (folders.fp8(), folders.wide());
        let fp8 = Checkpoint::open(&fp8).expect("opens");
        let wide = Checkpoint::open(&wide).expect("opens");
        assert!(fp8.is_fp8() && !wide.is_fp8());
        for compute in [Compute::F32, Compute::Bf16] {
            let got = logits(&Model::new(&fp8, compute));
            assert_eq!(got, logits(&Model::new(&wide, compute)), "{compute:?}");
        }
    }
}

/// The weights are quantised as `PyTorch` does it, and the library's logits of them are ours.
#[test]
fn logits_agree_with_transformers() {
    let folders = Folders::of(&golden_dir().join("deepseek_v3"));
    let checkpoint = Checkpoint::open(&folders.fp8()).expect("opens");
    let mut names: Vec<&str> = checkpoint
        .tensors()
        .filter(|tensor| tensor.dtype == Dtype::F8E4M3)
        .map(|tensor| tensor.name)
        .collect();
    names.sort_unstable();
    let mut hash = Sha256::new();
    for name in names {
        hash.update(checkpoint.tensor(name).expect("codes").bytes);
        let scales = checkpoint.tensor(&format!("{name}_scale_inv"));
        hash.update(scales.expect("scales").bytes);
    }
    let hash = hash
        .finalize()
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
    let bytes = std::fs::read(golden_dir().join("fp8.safetensors")).expect("golden file");
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("valid safetensors");
    let metadata = header.metadata().clone().expect("metadata");
    assert_eq!(hash, metadata["sha256"], "codes and scales");

    let file = SafeTensors::deserialize(&bytes).expect("valid safetensors");
    let want = file.tensor("logits").expect("logits");
    let want = want.data().as_chunks::<4>().0.iter();
    let want: Vec<f32> = want.map(|b| f32::from_le_bytes(*b)).collect();
    let error = relative_error(&logits(&Model::new(&checkpoint, Compute::F32)), &want);
    println!("deepseek_v3 in fp8: f32 {error:.2e}");
    assert!(error <= 1e-4, "relative error {error:.2e}");
}

#[test]
fn calibration_has_the_bits_of_the_dequantised_weights() {
    let folders = Folders::wide_model();
    let domains = [("all".to_owned(), ids())];
    let statistics = |folder: &Path| {
        let checkpoint = Checkpoint::open(folder).expect("opens");
        let model = Model::new(&checkpoint, Compute::F32);
        calibrate(&model, &domains, &|_, _| ())
            .expect("runs")
            .domains
    };
    assert_eq!(statistics(&folders.fp8()), statistics(&folders.wide()));
}

/// With every layer kept, and with none: then its memory is another layer's soon.
#[test]
fn the_device_path_has_the_bits_of_the_dequantised_weights() {
    let golden = Folders::of(&golden_dir().join("deepseek_v3"));
    let place = simt::Simulated::new(simt::Schedule::UNLIKE[0]);
    for (folders, place) in [
        (&golden, place.with_wgmma()),
        (&golden, place.with_free_bytes(0)),
        (&Folders::wide_model(), place.with_free_bytes(0)),
    ] {
        let logits = |folder: &Path| {
            let checkpoint = Checkpoint::open(folder).expect("opens");
            let device = DeviceModel::new(&checkpoint, place).expect("found");
            logits(&Model::on(&device))
        };
        assert_eq!(logits(&folders.fp8()), logits(&folders.wide()));
    }
}

#[test]
fn damaged_codes_and_scales_are_named() {
    let weight = "model.layers.1.mlp.shared_experts.up_proj.weight";
    for (name, bytes) in [
        (weight.to_owned(), vec![0x7f]),
        (weight.to_owned(), vec![0xff]),
        (
            format!("{weight}_scale_inv"),
            f32::NAN.to_le_bytes().to_vec(),
        ),
        (
            format!("{weight}_scale_inv"),
            f32::INFINITY.to_le_bytes().to_vec(),
        ),
    ] {
        let folders = Folders::of(&golden_dir().join("deepseek_v3"));
        overwrite(&folders.fp8(), &name, &bytes);
        let checkpoint = Checkpoint::open(&folders.fp8()).expect("opens");
        let model = Model::new(&checkpoint, Compute::F32);
        let error = model.hidden_states(&sequences(&ids()), &()).err();
        let Some(error @ ModelError::NonFinite { .. }) = error else {
            panic!("{name}: {error:?}");
        };
        let text = error.to_string();
        assert!(text.contains(&format!("tensor {name} in model-")), "{text}");
        assert!(
            text.contains("layer 1") && text.contains("download"),
            "{text}"
        );
    }
}

/// Every second expert loses two neurons in five.
fn plan(checkpoint: &Checkpoint) -> Plan {
    let config = checkpoint.config();
    let full = config.moe.expert_width as u32;
    let expert = |id: usize| {
        let neurons: Vec<u32> = (0..full).filter(|neuron| neuron % 5 < 3).collect();
        ExpertPlan {
            id,
            width: if id.is_multiple_of(2) {
                full as usize
            } else {
                neurons.len()
            },
            neurons: (id % 2 == 1).then_some(neurons),
            dropped: false,
        }
    };
    let layers = config.moe_layers.iter().map(|&layer| LayerPlan {
        layer,
        experts: (0..config.moe.num_experts).map(expert).collect(),
    });
    Plan {
        format: "tenp-plan".to_owned(),
        version: 1,
        method: "by hand".to_owned(),
        options: serde_json::Map::new(),
        fingerprint: checkpoint.fingerprint().to_owned(),
        dern: None,
        layers: layers.collect(),
        accounting: Accounting::default(),
        uncalibrated: Vec::new(),
    }
}

/// The down projections of the narrowed experts after a rewriter has been at work on a folder.
fn rewritten(folder: &Path, fit: bool, dtype: OutputDtype) -> Vec<(Vec<f32>, Vec<u8>)> {
    let checkpoint = Checkpoint::open(folder).expect("opens");
    let plan = plan(&checkpoint);
    let sequences = sequences(&ids());
    let mut rewriter: Box<dyn LayerRewriter> = if fit {
        let options = RecoverOptions {
            on_pruned: false,
            ..RecoverOptions::default()
        };
        let nothing = Box::new(|_| ());
        let fit = LeastSquares::new(
            &Model::new(&checkpoint, Compute::F32),
            &sequences,
            options,
            nothing,
        );
        Box::new(fit.expect("a pass"))
    } else {
        let factors = plan
            .layers
            .iter()
            .map(|layer| vec![1.37; layer.experts.len()]);
        Box::new(Rescale::new(&checkpoint, factors.collect()))
    };
    let root = tempfile::tempdir().expect("a folder");
    let out = root.path().join("out");
    let options = ApplyOptions {
        dtype,
        ..ApplyOptions::default()
    };
    let rewriter = Some(&mut *rewriter as &mut dyn LayerRewriter);
    apply_rewritten(&checkpoint, &plan, &out, &options, rewriter, &mut |_, _| ()).expect("written");
    let output = Checkpoint::open(&out).expect("opens");
    assert_eq!(
        output.is_fp8(),
        checkpoint.is_fp8() && dtype == OutputDtype::Same
    );
    let narrowed = plan.layers.iter().flat_map(|layer| {
        let narrow = layer
            .experts
            .iter()
            .filter(|expert| expert.neurons.is_some());
        narrow.map(|expert| (layer.layer, expert.id))
    });
    narrowed
        .map(|(layer, id)| {
            let down = output.expert(layer, id).expect("there").part(Part::Down);
            (down.to_f32(), down.scales.to_vec())
        })
        .collect()
}

#[test]
fn rewritten_weights_are_computed_in_f32_and_rounded_once() {
    let folders = Folders::wide_model();
    for fit in [false, true] {
        let want = rewritten(&folders.wide(), fit, OutputDtype::Same);
        let fp8 = rewritten(&folders.fp8(), fit, OutputDtype::Same);
        let bf16 = rewritten(&folders.fp8(), fit, OutputDtype::Bf16);
        for (((want, _), (fp8, scales)), (bf16, none)) in want.iter().zip(&fp8).zip(&bf16) {
            assert!(none.is_empty());
            let rounded = want.iter().map(|v| half::bf16::from_f32(*v).to_f32());
            assert_eq!(*bf16, rounded.collect::<Vec<_>>());
            let scales = scales.as_chunks().0.iter().map(|s| f32::from_le_bytes(*s));
            let largest = scales.fold(0.0, f32::max);
            for (got, want) in fp8.iter().zip(want) {
                let bound = want.abs().max(largest / 64.0) / 16.0;
                assert!((got - want).abs() <= bound * 1.000_01, "{got} {want}");
            }
        }
    }
}
