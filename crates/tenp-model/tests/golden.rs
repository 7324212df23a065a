//! Logits of every family against the ones the public `transformers` library computed (`tests/golden/README.md`).

// `cargo test -- --nocapture` lists the errors.
#![allow(clippy::print_stdout)]

mod support;

use std::path::Path;

use support::{FAMILIES, golden, golden_dir, relative_error, transformers_bf16_error};
use tenp_checkpoint::Checkpoint;
use tenp_kernels::Compute;
use tenp_model::{Model, Sequences};

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
    for family in FAMILIES {
        let dir = golden_dir().join(family);
        let (ids, want) = golden(&dir);
        let error = relative_error(&logits(&dir, Compute::Bf16, &ids), &want);
        let theirs = transformers_bf16_error(family);
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
