//! `tenp_router` against the CPU's router.

mod around;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use simt::{Buffer, Schedule};
use tenp_kernels::cpu::router::{GroupLimit, RouterSpec, Routing};
use tenp_kernels::device::router::{Router, router};

fn spec(num_experts: usize, top_k: usize) -> RouterSpec {
    RouterSpec {
        num_experts,
        top_k,
        sigmoid: false,
        correction_bias: None,
        groups: None,
        normalise: false,
        scaling: 1.0,
    }
}

fn on_device(spec: &RouterSpec, logits: &[f32], schedule: Schedule) -> (Vec<i32>, Vec<f32>) {
    let tokens = logits.len() / spec.num_experts;
    let input = Buffer::input("logits", logits);
    let bias = spec
        .correction_bias
        .as_ref()
        .map(|b| Buffer::input("bias", b));
    let ids = Buffer::<i32>::output("expert_ids", tokens * spec.top_k);
    let weights = Buffer::<f32>::output("weights", tokens * spec.top_k);
    let call = router(Router {
        spec,
        logits: around::read(&input),
        correction_bias: bias.as_ref().map(around::read),
        expert_ids: around::write(&ids),
        weights: around::write(&weights),
        num_tokens: tokens,
    })
    .unwrap();
    around::run(schedule, &call);
    (ids.written().unwrap(), weights.written().unwrap())
}

/// Same experts in the same order, weights equal but for the order of the softmax's sum and the exponential's last bits.
fn check(spec: &RouterSpec, logits: &[f32], schedule: Schedule) -> Routing {
    let want = spec.route(&mut logits.to_vec()).unwrap();
    let (ids, weights) = on_device(spec, logits, schedule);
    let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
    assert_eq!(ids, want.expert_ids, "{spec:?}");
    for (i, (got, want)) in weights.iter().zip(&want.weights).enumerate() {
        let both_nan = got.is_nan() && want.is_nan();
        assert!(
            both_nan || got == want || (got - want).abs() <= 2e-6 * want.abs(),
            "{spec:?} slot {i}: {got} {want}"
        );
    }
    want
}

fn random(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-4.0..4.0)).collect()
}

/// Multiples of a half: many experts of a token have the same score.
fn tied(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count)
        .map(|_| rng.random_range(-4i32..5) as f32 * 0.5)
        .collect()
}

fn variants(num_experts: usize, top_k: usize) -> Vec<RouterSpec> {
    let mut all = Vec::new();
    for sigmoid in [false, true] {
        for normalise in [false, true] {
            let base = RouterSpec {
                sigmoid,
                normalise,
                scaling: if normalise { 2.5 } else { 1.0 },
                ..spec(num_experts, top_k)
            };
            let bias = (0..num_experts)
                .map(|e| (e * 7 % 5) as f32 * 0.25)
                .collect();
            let biased = RouterSpec {
                correction_bias: Some(bias),
                ..base.clone()
            };
            all.extend([base, biased]);
        }
    }
    all
}

#[test]
fn every_kind_of_router() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (i, (experts, top_k)) in [
        (1, 1),
        (4, 2),
        (8, 8),
        (31, 3),
        (32, 4),
        (33, 33),
        (64, 6),
        (128, 8),
        (300, 40),
    ]
    .into_iter()
    .enumerate()
    {
        for (j, spec) in variants(experts, top_k).iter().enumerate() {
            let schedule = Schedule::UNLIKE[(i + j) % 4];
            check(spec, &random(&mut rng, 9 * experts), schedule);
            check(spec, &tied(&mut rng, 9 * experts), schedule);
        }
    }
    // Few warps a block.
    check(
        &spec(1023, 10),
        &random(&mut rng, 7 * 1023),
        Schedule::Random(3),
    );
}

#[test]
fn groups_limit_the_choice() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for (experts, top_k, num_groups, top_groups) in [
        (8, 2, 8, 2),
        (6, 2, 2, 1),
        (64, 6, 8, 3),
        (160, 6, 8, 3),
        (256, 8, 8, 4),
        (80, 5, 40, 5),
    ] {
        for (i, top_two_sum) in [false, true].into_iter().enumerate() {
            for (j, mut spec) in variants(experts, top_k).into_iter().enumerate() {
                spec.groups = Some(GroupLimit {
                    num_groups,
                    top_groups,
                    top_two_sum,
                });
                let schedule = Schedule::UNLIKE[(i + j) % 4];
                let size = experts / num_groups;
                for logits in [random(&mut rng, 5 * experts), tied(&mut rng, 5 * experts)] {
                    let routing = check(&spec, &logits, schedule);
                    for ids in routing.expert_ids.chunks_exact(top_k) {
                        let mut groups: Vec<u32> = ids.iter().map(|&e| e / size as u32).collect();
                        groups.sort_unstable();
                        groups.dedup();
                        assert!(groups.len() <= top_groups);
                    }
                }
            }
        }
    }
}

#[test]
fn logits_that_are_no_numbers_give_experts_all_the_same() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (experts, top_k) = (40, 4);
    let poisons = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        -f32::NAN,
        1e30,
        -1e30,
    ];
    for mut spec in variants(experts, top_k) {
        for groups in [None, Some((8, 2, false)), Some((8, 2, true))] {
            spec.groups = groups.map(|(num_groups, top_groups, top_two_sum)| GroupLimit {
                num_groups,
                top_groups,
                top_two_sum,
            });
            let mut logits = random(&mut rng, 9 * experts);
            let clean = logits[..experts].to_vec();
            for (token, row) in logits.chunks_exact_mut(experts).enumerate().skip(1) {
                match token {
                    1..=6 => row[7 * token % experts] = poisons[token - 1],
                    7 => row.fill(f32::NAN),
                    _ => row.fill(f32::NEG_INFINITY),
                }
            }
            let routing = check(&spec, &logits, Schedule::Reversed);
            for ids in routing.expert_ids.chunks_exact(top_k) {
                let mut ids = ids.to_vec();
                ids.sort_unstable();
                ids.dedup();
                assert!(ids.len() == top_k && ids[top_k - 1] < experts as u32);
            }
            // The first token does not see the others.
            let (alone, weights) = on_device(&spec, &clean, Schedule::Forward);
            let (all, all_weights) = on_device(&spec, &logits, Schedule::Random(9));
            assert_eq!(alone, all[..top_k]);
            assert_eq!(weights, all_weights[..top_k]);
        }
    }
}
