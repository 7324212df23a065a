//! Logits and calibration statistics of every family against the ones computed with the public `transformers` library
//! (`tests/golden/README.md`).

// `cargo test -- --nocapture` lists the errors.
#![allow(clippy::print_stdout)]

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;
use support::{FAMILIES, golden, golden_dir, relative_error, transformers_bf16_error};
use tenp_checkpoint::{Checkpoint, LayerStatistics};
use tenp_kernels::Compute;
use tenp_model::calibrate::calibrate;
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

/// A statistic, and what its differences are measured against: [`Scale`].
type Table = (&'static str, fn(&LayerStatistics) -> &[f64], Scale);

/// What a difference from the f64 value is relative to.
#[derive(Clone, Copy)]
enum Scale {
    /// The value, which is a sum of terms that are not negative, or the largest of such.
    Value,
    /// Of the signed sum `contribution`: `contribution_abs`, the sum of the terms' absolute values.
    AbsoluteTerms,
    /// Of the signed sum `mean`: `sqrt(tokens · second_moment)`, at least the sum of the terms' absolute values.
    RootMeanSquare,
}

const TABLES: [Table; 17] = [
    ("gate_sum", |s| &s.gate_sum, Scale::Value),
    (
        "normalised_gate_sum",
        |s| &s.normalised_gate_sum,
        Scale::Value,
    ),
    ("norm_sum", |s| &s.norm_sum, Scale::Value),
    ("norm_sq_sum", |s| &s.norm_sq_sum, Scale::Value),
    ("gated_norm_sum", |s| &s.gated_norm_sum, Scale::Value),
    ("direction", |s| &s.direction, Scale::Value),
    (
        "residual_direction",
        |s| &s.residual_direction,
        Scale::Value,
    ),
    ("output_peak", |s| &s.output_peak, Scale::Value),
    ("contribution", |s| &s.contribution, Scale::AbsoluteTerms),
    ("contribution_abs", |s| &s.contribution_abs, Scale::Value),
    ("activation_norm", |s| &s.activation_norm, Scale::Value),
    ("energy", |s| &s.energy, Scale::Value),
    ("peak", |s| &s.peak, Scale::Value),
    ("mean", |s| &s.mean, Scale::RootMeanSquare),
    ("second_moment", |s| &s.second_moment, Scale::Value),
    (
        "neuron_weight_norm_sq",
        |s| &s.neuron_weight_norm_sq,
        Scale::Value,
    ),
    ("down_norm_sq", |s| &s.down_norm_sq, Scale::Value),
];

/// A folder's statistics in f64, by layer, as `tests/compat/oracle_statistics.py` computed them.
struct Oracle(Vec<u8>);

impl Oracle {
    fn read(folder: &Path) -> Self {
        Self(std::fs::read(folder.join("oracle.safetensors")).expect("oracle.safetensors"))
    }

    fn words(&self, layer: usize, name: &str) -> Vec<[u8; 8]> {
        let file = SafeTensors::deserialize(&self.0).expect("valid safetensors");
        let tensor = file.tensor(&format!("layers.{layer}/{name}")).expect(name);
        tensor.data().as_chunks::<8>().0.to_vec()
    }

    fn counts(&self, layer: usize, name: &str) -> Vec<i64> {
        let words = self.words(layer, name);
        words.into_iter().map(i64::from_le_bytes).collect()
    }

    fn values(&self, layer: usize, name: &str) -> Vec<f64> {
        let words = self.words(layer, name);
        words.into_iter().map(f64::from_le_bytes).collect()
    }

    fn layers(&self) -> usize {
        let file = SafeTensors::deserialize(&self.0).expect("valid safetensors");
        let counts = file.names().into_iter().filter(|n| n.ends_with("/tokens"));
        counts.count()
    }

    /// What the differences of a table are relative to, entry by entry.
    fn scale(&self, layer: usize, name: &str, scale: Scale) -> Vec<f64> {
        match scale {
            Scale::Value => self.values(layer, name),
            Scale::AbsoluteTerms => self.values(layer, "contribution_abs"),
            Scale::RootMeanSquare => {
                let tokens = self.counts(layer, "tokens");
                let squares = self.values(layer, "second_moment");
                let width = squares.len() / tokens.len();
                let rows = squares.chunks(width).zip(tokens);
                rows.flat_map(|(row, n)| row.iter().map(move |s| (s * n as f64).sqrt()))
                    .collect()
            }
        }
    }
}

/// The largest difference of a table: of an expert's row by norm, and of an entry.
#[derive(Clone, Copy, Default)]
struct Difference {
    row: f64,
    entry: f64,
}

impl Difference {
    /// `scales` has a row for every expert. An entry is held against its own scale and the root mean square of its row:
    /// a neuron's own terms may be dot products that nearly cancel, and then f32 leaves them few digits.
    fn of(got: &[f64], want: &[f64], scales: &[f64], width: usize) -> Self {
        assert_eq!(got.len(), want.len());
        // The maximum below would pass over a NaN.
        assert!(got.iter().chain(want).all(|v| v.is_finite()));
        let mut worst = Self::default();
        let rows = got.chunks(width).zip(want.chunks(width));
        for ((got, want), scales) in rows.zip(scales.chunks(width)) {
            let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
            let scale = norm(&mut scales.iter().copied());
            if scale == 0.0 {
                assert_eq!(got, want, "an expert without tokens");
                continue;
            }
            let difference = norm(&mut got.iter().zip(want).map(|(g, w)| g - w));
            worst.row = worst.row.max(difference / scale);
            let rms = if width > 1 {
                scale / (width as f64).sqrt()
            } else {
                0.0
            };
            for ((g, w), own) in got.iter().zip(want).zip(scales) {
                worst.entry = worst.entry.max((g - w).abs() / (own + rms));
            }
        }
        worst
    }

    fn max(self, other: Self) -> Self {
        Self {
            row: self.row.max(other.row),
            entry: self.entry.max(other.entry),
        }
    }
}

/// What a table's rows and entries may differ by, from measurements (`docs/compat.md`).
fn tolerance(name: &str) -> Difference {
    match name {
        // Sums of squares in f64 of the weights, which both sides read exactly.
        "neuron_weight_norm_sq" | "down_norm_sq" => Difference {
            row: 1e-14,
            entry: 1e-14,
        },
        // A square has twice the relative error of what is squared.
        "energy" | "peak" | "second_moment" => Difference {
            row: 2e-6,
            entry: 3e-6,
        },
        "contribution" | "contribution_abs" | "activation_norm" | "mean" => Difference {
            row: 1e-6,
            entry: 2e-6,
        },
        _ => Difference {
            row: 1e-6,
            entry: 1e-6,
        },
    }
}

/// Calibrates a folder in f32 and compares every layer with the f64 statistics beside the checkpoint in `source`.
fn compare_with_oracle(folder: &str, source: &str, worst: &mut BTreeMap<&str, [Difference; 2]>) {
    let dir = golden_dir().join(folder);
    let checkpoint = Checkpoint::open(&dir).expect("opens");
    let model = Model::new(&checkpoint, Compute::F32);
    let domains = [("all".to_owned(), golden(&dir).0)];
    let statistics = calibrate(&model, &domains, &|_, _| ()).expect("calibrates");
    let oracle = Oracle::read(&golden_dir().join(source));
    let layers = &statistics.domains["all"];
    assert_eq!(layers.len(), oracle.layers(), "{folder}");
    for (depth, (&layer, got)) in layers.iter().enumerate() {
        let total = oracle.counts(layer, "total_tokens");
        assert_eq!([got.total_tokens], total[..], "{folder} layer {layer}");
        let tokens = oracle.counts(layer, "tokens");
        assert_eq!(got.tokens, tokens, "{folder} layer {layer}");
        for (name, get, scale) in TABLES {
            let want = oracle.values(layer, name);
            let scales = oracle.scale(layer, name, scale);
            let found = Difference::of(get(got), &want, &scales, want.len() / got.num_experts);
            let so_far = &mut worst.entry(name).or_default()[depth.min(1)];
            *so_far = so_far.max(found);
            let allowed = tolerance(name);
            let Difference { row, entry } = found;
            assert!(
                row <= allowed.row && entry <= allowed.entry,
                "{folder} layer {layer} {name}: {row:.2e} by row, {entry:.2e} by entry"
            );
        }
    }
}

#[test]
fn f32_statistics_agree_with_the_definitions_in_f64_for_every_family_and_spelling() {
    let mut worst = BTreeMap::new();
    for family in FAMILIES {
        compare_with_oracle(family, family, &mut worst);
    }
    for (variant, source) in [
        ("variants/mixtral_f16", "variants/mixtral_f16"),
        ("variants/olmoe_f32", "olmoe"),
        ("variants/qwen3_moe_fused", "qwen3_moe"),
        ("variants/deepseek_v2_lite_rope_scaling", "deepseek_v2_lite"),
    ] {
        compare_with_oracle(variant, source, &mut worst);
    }
    for (name, _, _) in TABLES {
        let [first, deeper] = worst[name];
        println!(
            "{name:22} first layer {:.1e} by row, {:.1e} by entry; deeper {:.1e}, {:.1e}",
            first.row, first.entry, deeper.row, deeper.entry
        );
    }
}

/// A token's hidden states do not depend on what runs with it: the demo's samples in one pass of many blocks, in another
/// order with other blocks, and one by one.
#[test]
fn hidden_states_do_not_depend_on_the_batch() {
    let checkpoint = Checkpoint::open(&support::repository().join("demo")).expect("opens");
    let vocab = checkpoint.config().vocab_size as u32;
    let lengths = (0..60).map(|i| 1 + (i * 37) % 150);
    let samples: Vec<Vec<u32>> = lengths
        .enumerate()
        .map(|(i, len)| {
            (0..len)
                .map(|t| (i as u32 * 7919 + t * 104_729) % vocab)
                .collect()
        })
        .collect();
    for compute in [Compute::F32, Compute::Bf16] {
        let model = Model::new(&checkpoint, compute);
        let run = |order: &[usize]| -> BTreeMap<usize, Vec<u32>> {
            let mut sequences = Sequences::default();
            for &i in order {
                sequences.push(&samples[i], i % 3);
            }
            let hidden = model.hidden_states(&sequences, &()).expect("runs");
            let width = checkpoint.config().hidden_size;
            let spans = sequences.spans().iter().zip(order);
            spans
                .map(|(span, &i)| {
                    let rows = &hidden[span.rows.start * width..span.rows.end * width];
                    (i, rows.iter().map(|v| v.to_bits()).collect())
                })
                .collect()
        };
        let all: Vec<usize> = (0..samples.len()).collect();
        let together = run(&all);
        let backwards: Vec<usize> = all.iter().rev().copied().collect();
        assert!(run(&backwards) == together, "{compute:?}");
        for i in [0, 7, 59] {
            assert!(
                run(&[i])[&i] == together[&i],
                "{compute:?}, sample {i} alone"
            );
        }
    }
}
