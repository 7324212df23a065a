//! The demo model on its calibration text (the first 128 samples of each domain): the forward pass alone, and calibration
//! (forward and every statistic). Throughput is tokens through the whole model.
//!
//! The peer is `benches/baselines/transformers_forward.py` on the same text.

use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tenp_checkpoint::Checkpoint;
use tenp_kernels::Compute;
use tenp_model::calibrate::calibrate;
use tenp_model::text::{Tokenizer, read_samples};
use tenp_model::{Model, Sequences};

/// Runs on a thread of the pool, as the program does: parallel loops then start without waking it up.
fn in_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    let mut result = None;
    rayon::scope(|_| result = Some(f()));
    result.expect("the scope has run")
}

fn demo_model(c: &mut Criterion) {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo");
    let checkpoint = Checkpoint::open(&demo).expect("the demo checkpoint");
    let tokenizer = Tokenizer::open(&checkpoint).expect("its tokenizer");
    let domains: Vec<(String, Vec<Vec<u32>>)> = ["arith", "code", "facts", "lists"]
        .iter()
        .map(|domain| {
            let path = demo.join("calibration").join(format!("{domain}.jsonl"));
            let samples = read_samples(&path, 128, 2048, &mut || Ok(&tokenizer));
            ((*domain).to_owned(), samples.expect("calibration text"))
        })
        .collect();
    let mut sequences = Sequences::default();
    for (label, (_, samples)) in domains.iter().enumerate() {
        for sample in samples {
            sequences.push(sample, label);
        }
    }
    let mut group = c.benchmark_group("demo_model");
    group.throughput(Throughput::Elements(sequences.num_tokens() as u64));
    group.sample_size(20);
    for compute in [Compute::F32, Compute::Bf16] {
        let model = || Model::new(&checkpoint, compute);
        group.bench_function(format!("forward/{compute:?}"), |b| {
            b.iter(|| in_pool(|| model().hidden_states(&sequences, &()).expect("runs")));
        });
        group.bench_function(format!("calibrate/{compute:?}"), |b| {
            b.iter(|| in_pool(|| calibrate(&model(), &domains, &|_, _| ()).expect("runs")));
        });
    }
    group.finish();
}

criterion_group!(benches, demo_model);
criterion_main!(benches);
