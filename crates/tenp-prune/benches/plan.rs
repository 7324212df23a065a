//! Planning from random statistics of DeepSeek-V2-Lite's size (26 layers, 64 experts of 1408 neurons).

#![allow(missing_docs)]

use std::path::Path;

use criterion::{Criterion, criterion_group, criterion_main};
use tenp_checkpoint::{Checkpoint, SynthesiseOptions, synthesise, synthesise_statistics};
use tenp_prune::{Allocation, Method, ModelSize, NeuronScore, PlanRequest, plan};

fn planning(criterion: &mut Criterion) {
    let config = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tenp-checkpoint/tests/data/configs/deepseek-v2-lite.json");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let options = SynthesiseOptions {
        holes: true,
        ..SynthesiseOptions::default()
    };
    synthesise(&config, folder.path(), options, &mut |_, _| ()).expect("headers are written");
    let checkpoint = Checkpoint::open(folder.path()).expect("just written");
    let statistics = synthesise_statistics(&checkpoint, 0);
    let size = ModelSize::default();
    let requests = [
        ("tenp", PlanRequest::default()),
        (
            "tenp-energy",
            PlanRequest {
                neuron_score: Some(NeuronScore::Energy),
                ..PlanRequest::default()
            },
        ),
        (
            "global",
            PlanRequest {
                allocation: Some(Allocation::Global),
                ..PlanRequest::default()
            },
        ),
        (
            "dern",
            PlanRequest {
                method: Method::Dern,
                ..PlanRequest::default()
            },
        ),
    ];
    let mut group = criterion.benchmark_group("plan/deepseek-v2-lite");
    group.sample_size(10);
    for (name, request) in requests {
        group.bench_function(name, |b| {
            let (config, print) = (checkpoint.config(), checkpoint.fingerprint());
            b.iter(|| plan(config, &size, print, &statistics, &request).expect("plans"));
        });
    }
    group.finish();
}

criterion_group!(benches, planning);
criterion_main!(benches);
