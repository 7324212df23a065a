//! Logits of every family against the ones the public `transformers` library computed (`tests/golden/README.md`).

// `cargo test -- --nocapture` lists the errors.
#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use tenp_checkpoint::Checkpoint;
use tenp_kernels::Compute;
use tenp_model::{Model, Sequences};

const FAMILIES: [&str; 8] = [
    "deepseek",
    "deepseek_v2_group",
    "deepseek_v2_lite",
    "deepseek_v3",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
];

fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn golden(dir: &Path) -> (Vec<Vec<u32>>, Vec<f32>) {
    let bytes = std::fs::read(dir.join("golden.safetensors")).expect("golden file");
    let file = SafeTensors::deserialize(&bytes).expect("valid safetensors");
    let ids = file.tensor("input_ids").expect("input_ids");
    let len = ids.shape()[1];
    let ids: Vec<u32> = ids
        .data()
        .as_chunks::<8>()
        .0
        .iter()
        .map(|b| i64::from_le_bytes(*b) as u32)
        .collect();
    let logits = file.tensor("logits").expect("logits");
    let logits = logits
        .data()
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect();
    (ids.chunks(len).map(<[u32]>::to_vec).collect(), logits)
}

fn logits(dir: &Path, compute: Compute, ids: &[Vec<u32>]) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).expect("opens");
    let model = Model::new(&checkpoint, compute);
    let mut sequences = Sequences::default();
    for ids in ids {
        sequences.push(ids, 0);
    }
    let hidden = model.hidden_states(&sequences, &()).expect("runs");
    model.head().expect("head").logits(&hidden).expect("logits")
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let sum = |f: &dyn Fn(usize) -> f64| (0..got.len()).map(|i| f(i).powi(2)).sum::<f64>().sqrt();
    sum(&|i| f64::from(got[i]) - f64::from(want[i])) / sum(&|i| f64::from(want[i]))
}

#[test]
fn f32_logits_agree_with_transformers_for_every_family_and_spelling() {
    let variants = std::fs::read_dir(golden_dir().join("variants")).expect("variants");
    let variants = variants
        .map(|d| d.expect("entry").path())
        .filter(|p| p.is_dir());
    for dir in FAMILIES
        .iter()
        .map(|f| golden_dir().join(f))
        .chain(variants)
    {
        let (ids, want) = golden(&dir);
        let error = relative_error(&logits(&dir, Compute::F32, &ids), &want);
        println!(
            "{:40} f32 {error:.2e}",
            dir.file_name().expect("named").to_string_lossy()
        );
        assert!(
            error <= 1e-4,
            "{}: relative error {error:.2e}",
            dir.display()
        );
    }
}

#[test]
fn bf16_logits_are_no_worse_than_one_and_a_half_times_transformers_own_error() {
    let reference = std::fs::read(golden_dir().join("bf16_error.json")).expect("bf16_error.json");
    let reference: serde_json::Value = serde_json::from_slice(&reference).expect("JSON");
    for family in FAMILIES {
        let dir = golden_dir().join(family);
        let (ids, want) = golden(&dir);
        let error = relative_error(&logits(&dir, Compute::Bf16, &ids), &want);
        let theirs = reference[family]
            .as_f64()
            .unwrap_or_else(|| panic!("{family} in bf16_error.json"));
        println!("{family:40} bf16 {error:.2e}, transformers {theirs:.2e}");
        assert!(
            error <= 1.5 * theirs,
            "{family}: {error:.2e}, transformers {theirs:.2e}"
        );
    }
}

#[test]
fn a_branch_and_a_cached_token_have_the_bits_of_the_whole_sequence() {
    for family in ["deepseek_v2_lite", "qwen3_moe"] {
        let dir = golden_dir().join(family);
        let checkpoint = Checkpoint::open(&dir).expect("opens");
        let (ids, _) = golden(&dir);
        for compute in [Compute::F32, Compute::Bf16] {
            let model = Model::new(&checkpoint, compute);
            let whole = logits(&dir, compute, &ids[..1]);
            let vocab = checkpoint.config().vocab_size;

            let mut branched = Sequences::default();
            let stem = branched.push(&ids[0][..40], 0);
            branched.push_branch(&ids[0][40..70], stem);
            branched.push_branch(&ids[0][40..45], stem);
            let hidden = model.hidden_states(&branched, &()).expect("runs");
            let got = model.head().expect("head").logits(&hidden).expect("logits");
            assert_eq!(got[..70 * vocab], whole[..70 * vocab]);
            assert_eq!(got[70 * vocab..], whole[40 * vocab..45 * vocab]);

            let mut generator = tenp_model::generate::Generator::new(model);
            generator.feed(&ids[0][..30]).expect("prompt");
            for t in 30..33 {
                let got = generator.feed(&ids[0][t..=t]).expect("next token");
                assert_eq!(got, whole[t * vocab..(t + 1) * vocab], "{family} token {t}");
            }
        }
    }
}
