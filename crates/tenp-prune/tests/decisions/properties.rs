//! Properties that hold for every shape, share and seed.

use proptest::prelude::*;
use tenp_checkpoint::plan::Plan;
use tenp_prune::allocate::{
    Shape, budget, divisors, global_widths, trapezoid_widths, whole_experts,
    whole_experts_per_layer,
};
use tenp_prune::score::expert_scores;
use tenp_prune::{Allocation, ExpertScore, Method, NeuronScore, PlanRequest, PruneError};

use crate::synthetic::{Case, Numbers, Tables};

fn shapes() -> impl Strategy<Value = (Shape, usize)> {
    (
        1_usize..9,
        1_usize..20,
        1_usize..100,
        any::<prop::sample::Index>(),
    )
        .prop_map(|(num_layers, num_experts, expert_width, quantum)| {
            let divisors = divisors(expert_width);
            (
                Shape {
                    num_layers,
                    num_experts,
                    expert_width,
                },
                divisors[quantum.index(divisors.len())],
            )
        })
}

fn small_shapes() -> impl Strategy<Value = Shape> {
    (
        1_usize..5,
        2_usize..8,
        prop::sample::select(vec![4_usize, 12, 24, 31]),
    )
        .prop_map(|(num_layers, num_experts, expert_width)| Shape {
            num_layers,
            num_experts,
            expert_width,
        })
}

fn random_scores(shape: Shape, seed: u64) -> Vec<Vec<f64>> {
    let mut numbers = Numbers(seed);
    (0..shape.num_layers)
        .map(|_| (0..shape.num_experts).map(|_| numbers.next()).collect())
        .collect()
}

/// Kept neurons of every expert, whole experts written out.
fn kept(plan: &Plan, width: usize) -> Vec<Vec<Vec<u32>>> {
    let expert = |expert: &tenp_checkpoint::plan::ExpertPlan| match &expert.neurons {
        Some(neurons) => neurons.clone(),
        None if expert.dropped => Vec::new(),
        None => (0..width as u32).collect(),
    };
    plan.layers
        .iter()
        .map(|layer| layer.experts.iter().map(expert).collect())
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_trapezoid_meets_the_budget(
        (shape, quantum) in shapes(),
        keep in 0.001_f64..=1.0,
        alpha_of_keep in 0.0_f64..=1.0,
        slope in -1.0_f64..=1.0,
        seed: u64,
    ) {
        let alpha = alpha_of_keep * keep;
        let total = budget(shape, quantum, keep);
        let whole = whole_experts(shape, total, alpha);
        let per_layer = whole_experts_per_layer(shape, whole, alpha, slope);
        prop_assert_eq!(per_layer.iter().sum::<usize>(), whole);
        prop_assert!(per_layer.iter().all(|&count| count <= shape.num_experts));
        if slope > 0.0 {
            prop_assert!(per_layer.is_sorted(), "{:?}", per_layer);
        }
        let unguarded = vec![vec![false; shape.num_experts]; shape.num_layers];
        let scores = random_scores(shape, seed);
        let widths = trapezoid_widths(shape, quantum, total, &per_layer, &scores, &unguarded).unwrap();
        prop_assert_eq!(widths.iter().flatten().sum::<usize>(), total);
        let narrow: Vec<usize> =
            widths.iter().flatten().copied().filter(|&width| width < shape.expert_width).collect();
        prop_assert!(widths.iter().flatten().all(|&width| width.is_multiple_of(quantum) && width <= shape.expert_width));
        if let (Some(least), Some(most)) = (narrow.iter().min(), narrow.iter().max()) {
            prop_assert!(most - least <= quantum);
        }
        for (layer, &whole) in per_layer.iter().enumerate() {
            prop_assert!(widths[layer].iter().filter(|&&width| width == shape.expert_width).count() >= whole);
        }
    }

    #[test]
    fn decimal_shares_meet_their_count((shape, _) in shapes(), hundredths in 1_usize..=100) {
        let keep = hundredths as f64 / 100.0;
        let neurons = shape.num_neurons();
        prop_assert_eq!(budget(shape, 1, keep), (neurons * hundredths + 50) / 100);
    }

    #[test]
    fn the_global_allocation_meets_the_budget(
        (shape, quantum) in shapes(),
        keep in 0.001_f64..=1.0,
        seed: u64,
    ) {
        let mut numbers = Numbers(seed);
        let scores: Vec<Vec<Vec<f64>>> = random_scores(shape, seed)
            .into_iter()
            .map(|layer| {
                layer.into_iter().map(|_| (0..shape.expert_width).map(|_| numbers.next() - 0.3).collect()).collect()
            })
            .collect();
        let total = budget(shape, quantum, keep);
        let unguarded = vec![vec![false; shape.num_experts]; shape.num_layers];
        let widths = global_widths(shape, quantum, total, &scores, &unguarded).unwrap();
        prop_assert_eq!(widths.iter().flatten().sum::<usize>(), total);
        prop_assert!(widths.iter().flatten().all(|&width| width.is_multiple_of(quantum) && width <= shape.expert_width));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn kept_neurons_are_ascending_and_as_many_as_the_width(
        shape in small_shapes(),
        keep in 0.3_f64..=1.0,
        seed: u64,
        method in prop::sample::select(Method::ALL.to_vec()),
    ) {
        let case = Case::new(shape, seed);
        let request = PlanRequest { method, keep, seed, ..PlanRequest::default() };
        let plan = case.plan(&request);
        if let Err(PruneError::TopKUnreachable { top_k, num_experts, .. }) = plan {
            // Each token chooses every expert: none can be dropped.
            prop_assert_eq!(top_k, num_experts);
            return Ok(());
        }
        let plan = plan.unwrap();
        prop_assert_eq!(&plan, &case.plan(&request).unwrap());
        for expert in plan.layers.iter().flat_map(|layer| &layer.experts) {
            match &expert.neurons {
                None => prop_assert!(expert.width == shape.expert_width || expert.dropped),
                Some(neurons) => {
                    prop_assert_eq!(neurons.len(), expert.width);
                    prop_assert!(neurons.is_sorted_by(|a, b| a < b));
                    prop_assert!(neurons.iter().all(|&neuron| (neuron as usize) < shape.expert_width));
                }
            }
        }
        let accounting = &plan.accounting;
        for share in [accounting.E, accounting.A, accounting.f, accounting.model] {
            prop_assert!((0.0..=1.0).contains(&share));
        }
    }

    #[test]
    fn permuting_neurons_permutes_the_plan(
        shape in small_shapes(),
        keep in 0.2_f64..0.95,
        seed: u64,
        allocation in prop::sample::select(vec![Allocation::Trapezoid, Allocation::Uniform, Allocation::Global]),
        score in prop::sample::select(NeuronScore::ALL[..6].to_vec()),
    ) {
        let mut case = Case::with_domains(shape, seed, &["a", "b"]);
        let request = PlanRequest {
            keep,
            allocation: Some(allocation),
            neuron_score: Some(score),
            width_multiple: Some(1),
            ..PlanRequest::default()
        };
        let before = kept(&case.plan(&request).unwrap(), shape.expert_width);
        // Neuron j of every expert moves to place K − 1 − j.
        for layers in case.statistics.domains.values_mut() {
            for layer in layers.values_mut() {
                for table in layer.neuron_sums() {
                    table.chunks_mut(shape.expert_width).for_each(<[f64]>::reverse);
                }
                for table in layer.weight_norms() {
                    table.chunks_mut(shape.expert_width).for_each(<[f64]>::reverse);
                }
            }
        }
        let mut after = kept(&case.plan(&request).unwrap(), shape.expert_width);
        let last = shape.expert_width as u32 - 1;
        for neurons in after.iter_mut().flatten() {
            for neuron in neurons.iter_mut() { *neuron = last - *neuron; }
            neurons.reverse();
        }
        prop_assert_eq!(before, after);
    }

    #[test]
    fn scaling_one_domain_leaves_the_ranking_of_experts(
        shape in small_shapes(),
        seed: u64,
        doublings in -8_i32..8,
        score in prop::sample::select(ExpertScore::ALL.to_vec()),
    ) {
        let mut case = Case::with_domains(shape, seed, &["a", "b"]);
        let before = expert_scores(&case.calibration(), score, seed);
        for layer in case.statistics.domains.get_mut("a").unwrap().values_mut() {
            for table in layer.expert_tables() {
                // Powers of two scale without rounding.
                for value in table.iter_mut() { *value *= f64::from(doublings).exp2(); }
            }
        }
        prop_assert_eq!(before, expert_scores(&case.calibration(), score, seed));
    }

    #[test]
    fn executed_share_follows_from_the_whole_experts(
        shape in small_shapes(),
        keep in 0.2_f64..=1.0,
        seed: u64,
    ) {
        let case = Case::new(shape, seed);
        let uniform = case.plan(&PlanRequest { method: Method::Enp, keep, ..PlanRequest::default() });
        if let Ok(plan) = uniform {
            prop_assert!((plan.accounting.A - plan.accounting.E).abs() < 1e-12);
        }
        let plan = case.plan(&PlanRequest { keep, ..PlanRequest::default() }).unwrap();
        let quantum = plan.options["width_multiple"].as_u64().unwrap() as f64;
        let widths: Vec<f64> =
            plan.layers.iter().flat_map(|layer| &layer.experts).map(|expert| expert.width as f64).collect();
        let full = shape.expert_width as f64;
        let narrow: Vec<f64> = widths.into_iter().filter(|&width| width < full).collect();
        let beta = narrow.iter().sum::<f64>() / (full * narrow.len().max(1) as f64);
        let accounting = &plan.accounting;
        let expected = accounting.f + (1.0 - accounting.f) * beta;
        prop_assert!((accounting.A - expected).abs() <= (1.0 - accounting.f) * quantum / full + 1e-12);
    }
}
