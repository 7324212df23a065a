//! One MoE layer of DeepSeek-V2-Lite's shape on the CPU: the grouped experts alone, forward (router, experts, combine),
//! forward with every scoring sum, and the same at pruned widths. Rates count the useful FLOPs of the three expert
//! products (6·H·width per row). Then what it takes to pack a gate matrix of DeepSeek-V3 for the products, from bf16 and from
//! fp8: one row of activations goes through it, so that packing is nearly all the work.
//!
//! `TENP_BENCH_TOKENS` sets the tokens (4096 by default).

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tenp_kernels::cpu::direction::{ExpertSums, TokenContext, accumulate_expert_sums};
use tenp_kernels::cpu::linear::linear;
use tenp_kernels::cpu::moe::{ExpertActivations, ExpertWeights, combine, expert_forward};
use tenp_kernels::cpu::neuron::{NeuronSums, accumulate_neuron_sums};
use tenp_kernels::cpu::router::RouterSpec;
use tenp_kernels::{Compute, ExpertGroups, MatrixView, RaggedLayout};

const HIDDEN: usize = 2048;
const WIDTH: usize = 1408;
const EXPERTS: usize = 64;
const TOP_K: usize = 6;

struct Layer {
    weights: Vec<[Vec<bf16>; 3]>,
    widths: Vec<usize>,
}

impl Layer {
    fn random(widths: Vec<usize>) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let scale = 3f32.sqrt() / (HIDDEN as f32).sqrt();
        let weights = widths
            .iter()
            .map(|&w| {
                std::array::from_fn(|_| {
                    (0..w * HIDDEN)
                        .map(|_| bf16::from_f32(rng.random_range(-scale..scale)))
                        .collect()
                })
            })
            .collect();
        Self { weights, widths }
    }

    fn experts(&self) -> Vec<ExpertWeights<'_>> {
        let view =
            |rows, cols, w| MatrixView::from_bf16(rows, cols, w).expect("made with this shape");
        self.weights
            .iter()
            .zip(&self.widths)
            .map(|([gate, up, down], &w)| ExpertWeights {
                gate: view(w, HIDDEN, gate),
                up: view(w, HIDDEN, up),
                down: view(HIDDEN, w, down),
            })
            .collect()
    }
}

/// TENP's widths at keep 0.6 and α 0.2 (docs/methods.md, section 3, steps 1 to 4, with L = 1 and q = 32): 13 experts
/// whole, 47 of 704 neurons, 4 of 672; 60.01 % of the neurons.
fn sixty_percent() -> Vec<usize> {
    let narrow = [(WIDTH, 13), (704, 47), (672, 4)];
    let mut widths = vec![0; EXPERTS];
    // Spread over the layer, as important experts are.
    let mut places = (0..EXPERTS).map(|i| i * 5 % EXPERTS);
    for (width, count) in narrow {
        for place in places.by_ref().take(count) {
            widths[place] = width;
        }
    }
    widths
}

fn layer(c: &mut Criterion) {
    let tokens: usize = std::env::var("TENP_BENCH_TOKENS")
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(4096);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let x: Vec<f32> = (0..tokens * HIDDEN)
        .map(|_| rng.random_range(-1.7..1.7))
        .collect();
    let router: Vec<f32> = (0..EXPERTS * HIDDEN)
        .map(|_| rng.random_range(-0.04..0.04))
        .collect();
    let router = MatrixView::from_f32(EXPERTS, HIDDEN, &router).expect("made with this shape");
    let spec = RouterSpec {
        num_experts: EXPERTS,
        top_k: TOP_K,
        sigmoid: false,
        correction_bias: None,
        groups: None,
        normalise: false,
        scaling: 1.0,
    };
    let layers = [
        ("full", Layer::random(vec![WIDTH; EXPERTS])),
        ("kept 0.600", Layer::random(sixty_percent())),
    ];

    let mut group = c.benchmark_group("v2_lite_layer");
    group.sample_size(10);
    for (name, layer) in &layers {
        let experts = layer.experts();
        let rows: usize = layer.widths.iter().sum::<usize>() * tokens * TOP_K / EXPERTS;
        group.throughput(Throughput::Elements((rows * 6 * HIDDEN) as u64));
        for compute in [Compute::Bf16, Compute::F32] {
            let mut a = ExpertActivations::default();
            let mut out = vec![0f32; tokens * HIDDEN];
            let mut forward = |a: &mut ExpertActivations| {
                let mut logits = vec![0f32; tokens * EXPERTS];
                linear(Compute::F32, &x, &router, None, &mut logits).expect("shapes fit");
                let routing = spec.route(&mut logits).expect("valid router");
                let groups =
                    ExpertGroups::new(EXPERTS, TOP_K, &routing.expert_ids, &routing.weights)
                        .expect("valid");
                expert_forward(compute, &experts, &groups, &x, a).expect("shapes fit");
                combine(&groups, a.outputs(), HIDDEN, &mut out).expect("shapes fit");
                (groups, black_box(&out)[0])
            };
            let (groups, _) = forward(&mut a);
            group.bench_function(format!("experts/{compute:?}/{name}"), |b| {
                b.iter(|| {
                    expert_forward(compute, &experts, &groups, &x, &mut a).expect("shapes fit");
                });
            });
            group.bench_function(format!("forward/{compute:?}/{name}"), |b| {
                b.iter(|| forward(&mut a));
            });
            a.keep_packed_outputs(true);
            let mut sums = NeuronSums::new(RaggedLayout::new(layer.widths.clone()).expect("small"));
            let mut expert_sums = vec![ExpertSums::default(); EXPERTS];
            let combined = vec![0.5f32; tokens * HIDDEN];
            group.bench_function(format!("forward+statistics/{compute:?}/{name}"), |b| {
                b.iter(|| {
                    let (groups, _) = forward(&mut a);
                    let context = TokenContext {
                        x: &x,
                        residual: &x,
                        combined: &combined,
                    };
                    let norms = accumulate_expert_sums(
                        &groups,
                        context,
                        a.outputs(),
                        HIDDEN,
                        &mut expert_sums,
                    )
                    .expect("shapes fit");
                    accumulate_neuron_sums(&experts, &groups, &a, &norms, &mut sums)
                        .expect("shapes fit");
                });
            });
        }
    }
    group.finish();
}

/// A product with one row of activations: the rate is that of packing the weight.
fn packing(c: &mut Criterion) {
    const SHAPE: (usize, usize) = (2048, 7168);
    let (rows, cols) = SHAPE;
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let x: Vec<f32> = (0..cols).map(|_| rng.random_range(-1.0..1.0)).collect();
    let wide: Vec<bf16> = (0..rows * cols)
        .map(|_| bf16::from_f32(rng.random_range(-0.02..0.02)))
        .collect();
    // 0x7f and 0xff are NaN.
    let codes: Vec<u8> = (0..rows * cols)
        .map(|_| rng.random_range(0..0x7f) | (u8::from(rng.random_bool(0.5)) << 7))
        .collect();
    let scales: Vec<u8> = (0..rows / 128 * (cols / 128))
        .flat_map(|_| rng.random_range(1e-5f32..1e-4).to_le_bytes())
        .collect();
    let views = [
        ("bf16", MatrixView::from_bf16(rows, cols, &wide)),
        ("fp8", MatrixView::from_fp8(rows, cols, &codes, &scales)),
    ];
    let mut group = c.benchmark_group("v3_packing");
    group.throughput(Throughput::Elements((rows * cols) as u64));
    let mut out = vec![0f32; rows];
    for (name, view) in views {
        let view = view.expect("made with this shape");
        for compute in [Compute::Bf16, Compute::F32] {
            group.bench_function(format!("{name}/{compute:?}"), |b| {
                b.iter(|| linear(compute, &x, &view, None, &mut out).expect("shapes fit"));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, layer, packing);
criterion_main!(benches);
