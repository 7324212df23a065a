//! DERN's inner parts on the CPU in DeepSeek-V2-Lite's shape: the best matches of one dropped expert's segments among
//! the neurons of some kept ones, beside it dense products of as many FLOPs, and one k-means assignment. Rates count
//! 2·H FLOPs a pair of segments and part compared.
//!
//! A layer of 64 experts with 16 dropped is 16 · 48 pairs of experts: 192 times the four pairs measured here.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tenp_kernels::cpu::linear::linear;
use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::cpu::segments::{
    MeasuredExpert, Segments, Similarity, WeightedSegments, assign, best_matches,
};
use tenp_kernels::{Compute, MatrixView};

const HIDDEN: usize = 2048;
const WIDTH: usize = 1408;
const KEPT: usize = 4;

/// Gate, up and down of an expert.
type Weights = [Vec<bf16>; 3];

fn random(seed: u64) -> Weights {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    std::array::from_fn(|_| {
        (0..WIDTH * HIDDEN)
            .map(|_| bf16::from_f32(rng.random_range(-0.05..0.05)))
            .collect()
    })
}

fn view([gate, up, down]: &Weights) -> ExpertWeights<'_> {
    let view = |rows, cols, w| MatrixView::from_bf16(rows, cols, w).expect("made with this shape");
    ExpertWeights {
        gate: view(WIDTH, HIDDEN, gate),
        up: view(WIDTH, HIDDEN, up),
        down: view(HIDDEN, WIDTH, down),
    }
}

fn segments(c: &mut Criterion) {
    let dropped = random(0);
    let rows = Segments::of_expert(&view(&dropped)).expect("shapes fit");
    let kept: Vec<Weights> = (1..=KEPT as u64).map(random).collect();
    let views: Vec<ExpertWeights<'_>> = kept.iter().map(view).collect();
    let centres = Segments::of_expert(&views[0]).expect("shapes fit");
    let experts = MeasuredExpert::all(&views).expect("shapes fit");
    let points = WeightedSegments {
        segments: &rows,
        flipped: &[false; WIDTH],
        weights: &[1.0; WIDTH],
    };
    let dense: Vec<f32> = dropped[0].iter().map(|v| v.to_f32()).collect();
    let products = |parts: usize, experts: usize| {
        Throughput::Elements((2 * HIDDEN * parts * WIDTH * WIDTH * experts) as u64)
    };
    let mut group = c.benchmark_group("segments");
    group.sample_size(10);
    for compute in [Compute::F32, Compute::Bf16] {
        group.throughput(products(2, KEPT));
        group.bench_function(format!("similarity/{compute:?}"), |b| {
            b.iter(|| {
                let found = best_matches(compute, &rows, &experts, Similarity::default());
                black_box(found.expect("shapes fit"))
            });
        });
        group.bench_function(format!("dense product/{compute:?}"), |b| {
            let mut out = vec![0f32; WIDTH * WIDTH];
            b.iter(|| {
                for expert in &views {
                    for weight in [&expert.gate, &expert.up] {
                        linear(compute, &dense, weight, None, &mut out).expect("shapes fit");
                    }
                }
            });
        });
        group.throughput(products(3, 1));
        group.bench_function(format!("assign/{compute:?}"), |b| {
            b.iter(|| black_box(assign(compute, points, &centres).expect("shapes fit")));
        });
    }
    group.finish();
}

criterion_group!(benches, segments);
criterion_main!(benches);
