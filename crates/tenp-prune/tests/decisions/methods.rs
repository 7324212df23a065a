//! What each method makes of the same statistics.

use std::collections::BTreeMap;

use tenp_checkpoint::config::{GroupScore, RouterGroups};
use tenp_checkpoint::plan::Plan;
use tenp_prune::{Allocation, ExpertScore, Method, NeuronScore, PlanRequest};

use crate::synthetic::{Case, DEMO, TINY, config};

fn request(method: Method) -> PlanRequest {
    PlanRequest {
        method,
        ..PlanRequest::default()
    }
}

fn widths(plan: &Plan) -> Vec<Vec<usize>> {
    plan.layers
        .iter()
        .map(|layer| layer.experts.iter().map(|expert| expert.width).collect())
        .collect()
}

fn total(plan: &Plan) -> usize {
    widths(plan).iter().flatten().sum()
}

#[test]
fn tenp_on_the_worked_example() {
    let plan = Case::new(DEMO, 1).plan(&request(Method::Tenp)).unwrap();
    assert_eq!(
        (plan.format.as_str(), plan.version, plan.method.as_str()),
        ("tenp-plan", 1, "tenp")
    );
    let mut histogram = BTreeMap::new();
    for width in widths(&plan).into_iter().flatten() {
        *histogram.entry(width).or_insert(0) += 1;
    }
    assert_eq!(
        histogram.into_iter().collect::<Vec<_>>(),
        [(48, 88), (56, 2), (96, 22)]
    );
    let whole: Vec<usize> = widths(&plan)
        .iter()
        .map(|layer| layer.iter().filter(|&&width| width == 96).count())
        .collect();
    assert_eq!(whole, [2, 2, 3, 3, 4, 4, 4]);
    assert_eq!(
        plan.layers
            .iter()
            .map(|layer| layer.layer)
            .collect::<Vec<_>>(),
        [1, 2, 3, 4, 5, 6, 7]
    );
    assert_eq!(total(&plan), 6448);
}

#[test]
fn tenp_keeps_the_highest_direction_whole_and_the_highest_contributions() {
    let mut case = Case::new(TINY, 2);
    case.layer("default", 0).direction = vec![1.0, 9.0, 2.0, 9.0];
    case.layer("default", 1).direction = vec![5.0, 1.0, 1.0, 5.0];
    case.layer("default", 0).contribution[..8]
        .copy_from_slice(&[-9.0, 8.0, 0.0, 7.0, 6.0, -1.0, 6.0, 5.0]);
    let plan = case
        .plan(&PlanRequest {
            keep: 0.5,
            alpha: Some(0.25),
            slope: 0.0,
            ..request(Method::Tenp)
        })
        .unwrap();
    // B = 32, M = 2, R = 16 over 6: 2 each and 4 left, for (0,3), (1,3), (0,2), and (1,1) before (1,2).
    assert_eq!(widths(&plan), [[2, 8, 3, 3], [8, 3, 2, 3]]);
    let experts = &plan.layers[0].experts;
    assert_eq!(experts[0].neurons, Some(vec![1, 3]));
    assert_eq!(experts[1].neurons, None);
    assert!(
        plan.layers
            .iter()
            .flat_map(|layer| &layer.experts)
            .all(|expert| !expert.dropped)
    );
}

#[test]
fn enp_gives_every_expert_one_width() {
    let case = Case::new(DEMO, 3);
    for method in [Method::Enp, Method::RandomNeurons] {
        let plan = case.plan(&request(method)).unwrap();
        assert!(
            widths(&plan).iter().flatten().all(|&width| width == 56),
            "{method}"
        );
    }
    let exact = case
        .plan(&PlanRequest {
            exact: true,
            ..request(Method::Enp)
        })
        .unwrap();
    assert_eq!(total(&exact), 6448);
    assert!(
        widths(&exact)
            .iter()
            .flatten()
            .all(|&width| width == 56 || width == 64)
    );
}

#[test]
fn global_meets_the_budget_and_follows_the_sums() {
    let mut case = Case::new(DEMO, 4);
    case.layer("default", 3).contribution.fill(1e6);
    let global = PlanRequest {
        allocation: Some(Allocation::Global),
        ..request(Method::Tenp)
    };
    let plan = case.plan(&global).unwrap();
    assert_eq!(total(&plan), 6448);
    assert!(widths(&plan)[3].iter().all(|&width| width == 96));
    let levelled = case
        .plan(&PlanRequest {
            normalise_layer: true,
            ..global
        })
        .unwrap();
    assert_eq!(total(&levelled), 6448);
    assert_ne!(levelled.layers, plan.layers);
}

#[test]
fn widths_of_a_file_are_used_as_they_are() {
    let case = Case::new(TINY, 5);
    let given = vec![vec![0, 8, 3, 1], vec![8, 8, 8, 7]];
    let plan = case
        .plan(&PlanRequest {
            allocation: Some(Allocation::File(given.clone())),
            ..request(Method::Tenp)
        })
        .unwrap();
    assert_eq!(widths(&plan), given);
    let first = &plan.layers[0].experts[0];
    assert_eq!(
        (first.neurons.as_deref(), first.dropped),
        (Some(&[][..]), false)
    );
    assert_eq!(plan.layers[1].experts[0].neurons, None);
    assert!(!plan.options.contains_key("keep"));
}

#[test]
fn dropping_keeps_the_same_number_in_every_layer() {
    let case = Case::new(DEMO, 6);
    let dropping = [
        Method::Frequency,
        Method::Gating,
        Method::Ean,
        Method::Reap,
        Method::Man,
        Method::Msan,
        Method::EasyEp,
        Method::RandomExperts,
    ];
    for method in dropping {
        let plan = case.plan(&request(method)).unwrap();
        for layer in &plan.layers {
            let kept = layer
                .experts
                .iter()
                .filter(|expert| !expert.dropped)
                .count();
            assert_eq!(kept, 10, "{method}");
            for expert in &layer.experts {
                assert_eq!(expert.width, if expert.dropped { 0 } else { 96 });
                assert_eq!(expert.neurons, None);
            }
        }
        assert_eq!(plan.options["experts_kept"], 10);
    }
}

#[test]
fn frequency_drops_the_experts_with_the_fewest_tokens() {
    let mut case = Case::new(TINY, 7);
    case.layer("default", 0).tokens = vec![5, 1, 9, 1];
    case.layer("default", 1).tokens = vec![3, 3, 3, 3];
    let plan = case
        .plan(&PlanRequest {
            keep: 0.75,
            ..request(Method::Frequency)
        })
        .unwrap();
    assert_eq!(widths(&plan), [[8, 8, 8, 0], [8, 8, 8, 0]]);
}

#[test]
fn router_groups_keep_the_same_number() {
    let mut case = Case::new(DEMO, 8);
    let groups = RouterGroups {
        num_groups: 4,
        top_groups: 1,
        score: GroupScore::TopTwoSum,
    };
    case.config = config(DEMO, Some(groups));
    let plan = case.plan(&request(Method::Reap)).unwrap();
    for layer in widths(&plan) {
        for group in layer.chunks(4) {
            assert_eq!(group.iter().filter(|&&width| width > 0).count(), 2);
        }
    }
}

#[test]
fn keeping_everything_lists_no_neuron() {
    let case = Case::new(DEMO, 9);
    for &method in Method::ALL {
        let plan = case
            .plan(&PlanRequest {
                keep: 1.0,
                ..request(method)
            })
            .unwrap();
        for expert in plan.layers.iter().flat_map(|layer| &layer.experts) {
            assert_eq!(
                (expert.width, &expert.neurons, expert.dropped),
                (96, &None, false),
                "{method}"
            );
        }
        let accounting = &plan.accounting;
        assert_eq!(
            [accounting.E, accounting.A, accounting.f, accounting.model],
            [1.0; 4],
            "{method}"
        );
        assert_eq!(accounting.bytes_after, accounting.bytes_before);
    }
}

#[test]
fn super_experts_stay() {
    let mut case = Case::new(DEMO, 10);
    case.layer("default", 2).output_peak[5] = 1e9;
    case.layer("default", 2).direction[5] = 0.0;
    case.layer("default", 2).gated_norm_sum[5] = 0.0;
    let guarded = |method| PlanRequest {
        protect_super: true,
        ..request(method)
    };
    let plan = case.plan(&guarded(Method::Tenp)).unwrap();
    assert_eq!(plan.layers[2].experts[5].width, 96);
    assert_eq!(total(&plan), 6448);
    assert_eq!(plan.options["guarded"], serde_json::json!([[3, 5]]));
    assert_eq!(
        plan.options["whole_experts"],
        serde_json::json!([2, 2, 3, 3, 4, 4, 4])
    );
    assert_eq!(
        case.plan(&guarded(Method::Reap)).unwrap().layers[2].experts[5].width,
        96
    );
    assert!(case.plan(&request(Method::Reap)).unwrap().layers[2].experts[5].dropped);
    let exact = PlanRequest {
        exact: true,
        ..guarded(Method::Enp)
    };
    let plan = case.plan(&exact).unwrap();
    assert_eq!((plan.layers[2].experts[5].width, total(&plan)), (96, 6448));
}

#[test]
fn experts_without_tokens_are_listed_and_cut_by_weight_norm() {
    let mut case = Case::new(TINY, 11);
    case.silence("default", 1, 2);
    case.layer("default", 1).neuron_weight_norm_sq[16..24]
        .copy_from_slice(&[1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0]);
    let plan = case
        .plan(&PlanRequest {
            keep: 0.5,
            ..request(Method::Enp)
        })
        .unwrap();
    assert_eq!(plan.uncalibrated, [(2, 2)]);
    assert_eq!(plan.layers[1].experts[2].neurons, Some(vec![1, 3, 5, 7]));
}

#[test]
fn options_override_the_preset_and_are_recorded_in_order() {
    let case = Case::with_domains(DEMO, 12, &["code", "prose"]);
    let plan = case
        .plan(&PlanRequest {
            expert_score: Some(ExpertScore::Random),
            neuron_score: Some(NeuronScore::Energy),
            width_multiple: Some(16),
            domain_weights: BTreeMap::from([("code".to_owned(), 2.0)]),
            seed: 42,
            ..request(Method::Tenp)
        })
        .unwrap();
    let names: Vec<&str> = plan.options.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "keep",
            "allocation",
            "alpha",
            "slope",
            "width_multiple",
            "whole_experts",
            "expert_score",
            "neuron_score",
            "normalise_domains",
            "domain_weights",
            "protect_super",
            "seed",
        ]
    );
    assert_eq!(plan.options["neuron_score"], "energy");
    assert_eq!(
        plan.options["domain_weights"],
        serde_json::json!({"code": 2.0, "prose": 1.0})
    );
    let enp = case.plan(&request(Method::Enp)).unwrap();
    assert!(!enp.options.contains_key("seed") && !enp.options.contains_key("expert_score"));
}

#[test]
fn the_seed_decides_random_plans_and_nothing_else() {
    let case = Case::new(DEMO, 13);
    for &method in Method::ALL {
        let plan = |seed| {
            case.plan(&PlanRequest {
                seed,
                ..request(method)
            })
            .unwrap()
        };
        let random = matches!(method, Method::RandomExperts | Method::RandomNeurons);
        assert_eq!(plan(1), plan(1), "{method}");
        assert_eq!(plan(1).layers != plan(2).layers, random, "{method}");
    }
}
