//! Requests and statistics that are refused, and what the message names.

use std::collections::BTreeMap;

use tenp_checkpoint::config::{GroupScore, RouterGroups};
use tenp_prune::{Allocation, ExpertScore, Method, NeuronScore, PlanRequest, PruneError};

use crate::synthetic::{Case, DEMO, FINGERPRINT, TINY, config};

fn refused(case: &Case, request: &PlanRequest, names: &[&str]) {
    let message = case.plan(request).unwrap_err().to_string();
    for name in names {
        assert!(message.contains(name), "`{name}` is not in: {message}");
    }
}

#[test]
fn shares_out_of_range() {
    let case = Case::new(TINY, 1);
    for keep in [0.0, -0.5, 1.5, f64::NAN, f64::INFINITY] {
        refused(
            &case,
            &PlanRequest {
                keep,
                ..PlanRequest::default()
            },
            &["--keep", "0.6"],
        );
    }
    for alpha in [-0.1, 0.7, f64::NAN] {
        refused(
            &case,
            &PlanRequest {
                alpha: Some(alpha),
                ..PlanRequest::default()
            },
            &["--alpha", "(0.6)"],
        );
    }
    for slope in [-1.1, 2.0, f64::NAN] {
        refused(
            &case,
            &PlanRequest {
                slope,
                ..PlanRequest::default()
            },
            &["--slope", "-1 to 1"],
        );
    }
    let multiple = PlanRequest {
        width_multiple: Some(3),
        ..PlanRequest::default()
    };
    refused(
        &case,
        &multiple,
        &["--width-multiple 3", "width 8", "1, 2, 4, 8"],
    );
    for method in [Method::Tenp, Method::Enp] {
        let nothing = PlanRequest {
            method,
            keep: 0.001,
            ..PlanRequest::default()
        };
        refused(&case, &nothing, &["no neuron", "0.001"]);
    }
}

#[test]
fn options_without_effect() {
    let case = Case::new(TINY, 2);
    let refuse = |option: &str, method, change: &dyn Fn(&mut PlanRequest)| {
        let mut request = PlanRequest {
            method,
            ..PlanRequest::default()
        };
        change(&mut request);
        refused(
            &case,
            &request,
            &[option, "no effect", &format!("--method {method}")],
        );
    };
    let file = || Some(Allocation::File(vec![vec![4; 4]; 2]));
    refuse("--allocation", Method::Reap, &|r| {
        r.allocation = Some(Allocation::Uniform);
    });
    refuse("--neuron-score", Method::Reap, &|r| {
        r.neuron_score = Some(NeuronScore::Energy);
    });
    refuse("--width-multiple", Method::Reap, &|r| {
        r.width_multiple = Some(8);
    });
    refuse("--normalise domains", Method::Reap, &|r| {
        r.normalise_domains = true;
    });
    refuse("--alpha", Method::Enp, &|r| r.alpha = Some(0.1));
    refuse("--slope", Method::Enp, &|r| r.slope = 0.0);
    refuse("--expert-score", Method::Enp, &|r| {
        r.expert_score = Some(ExpertScore::Reap);
    });
    refuse("--protect-super", Method::Enp, &|r| r.protect_super = true);
    refuse("--normalise domains", Method::RandomNeurons, &|r| {
        r.normalise_domains = true;
    });
    refuse("--exact", Method::Tenp, &|r| r.exact = true);
    refuse("--normalise layer", Method::Tenp, &|r| {
        r.normalise_layer = true;
    });
    refuse("--width-multiple", Method::Tenp, &|r| {
        (r.width_multiple, r.allocation) = (Some(4), file());
    });
    refuse("--protect-super", Method::Tenp, &|r| {
        (r.protect_super, r.allocation) = (true, file());
    });
    refuse("--normalise domains", Method::Tenp, &|r| {
        (r.normalise_domains, r.allocation) = (true, Some(Allocation::Global));
    });
}

#[test]
fn the_expert_score_decides_the_leftovers_of_exact_widths() {
    let case = Case::new(TINY, 2);
    let request = PlanRequest {
        method: Method::Enp,
        expert_score: Some(ExpertScore::Ean),
        exact: true,
        ..PlanRequest::default()
    };
    assert_eq!(case.plan(&request).unwrap().options["expert_score"], "ean");
}

#[test]
fn width_files_of_the_wrong_shape() {
    let case = Case::new(TINY, 3);
    let request = |widths| PlanRequest {
        allocation: Some(Allocation::File(widths)),
        ..PlanRequest::default()
    };
    refused(
        &case,
        &request(vec![vec![4; 4]]),
        &["1 layers", "2 MoE layers"],
    );
    refused(
        &case,
        &request(vec![vec![4; 4], vec![4; 3]]),
        &["3 widths", "layer 2", "4 experts"],
    );
    refused(
        &case,
        &request(vec![vec![4; 4], vec![4, 4, 9, 4]]),
        &["layer 2, expert 2", "width 9", "most 8"],
    );
}

#[test]
fn statistics_that_do_not_fit_the_model() {
    let plain = PlanRequest::default();
    let mut case = Case::new(TINY, 4);
    case.statistics.checkpoint = "sha256:other".to_owned();
    refused(&case, &plain, &["sha256:other", FINGERPRINT]);

    let mut case = Case::new(TINY, 4);
    case.statistics
        .domains
        .get_mut("default")
        .unwrap()
        .remove(&2);
    refused(&case, &plain, &["`default`", "lack layer 2"]);

    let mut case = Case::new(TINY, 4);
    case.layer("default", 0).num_experts = 5;
    refused(&case, &plain, &["layer 1", "num_experts is 5", "needs 4"]);

    let mut case = Case::new(TINY, 4);
    case.layer("default", 1).width = 7;
    refused(&case, &plain, &["layer 2", "width is 7", "needs 8"]);

    let mut case = Case::new(TINY, 4);
    case.layer("default", 1).contribution.pop();
    refused(
        &case,
        &plain,
        &["layer 2", "contribution is 31", "needs 32"],
    );

    let mut case = Case::new(TINY, 4);
    case.layer("default", 1).contribution[17] = f64::NAN;
    refused(&case, &plain, &["layer 2, expert 2", "contribution is NaN"]);

    let mut case = Case::new(TINY, 4);
    case.layer("default", 0).tokens[3] = -1;
    refused(&case, &plain, &["layer 1, expert 3", "tokens is -1"]);
}

#[test]
fn a_layer_beyond_the_moe_layers_is_ignored() {
    let mut case = Case::new(TINY, 5);
    let extra = case.layer("default", 0).clone();
    case.statistics
        .domains
        .get_mut("default")
        .unwrap()
        .insert(99, extra);
    assert_eq!(case.plan(&PlanRequest::default()).unwrap().layers.len(), 2);
}

#[test]
fn domains_that_are_not_there() {
    let mut case = Case::with_domains(TINY, 6, &["code", "prose"]);
    let weigh = |domain: &str, weight| PlanRequest {
        domain_weights: BTreeMap::from([(domain.to_owned(), weight)]),
        ..PlanRequest::default()
    };
    refused(&case, &weigh("maths", 1.0), &["`maths`", "code, prose"]);
    for weight in [-1.0, f64::NAN, f64::INFINITY] {
        refused(&case, &weigh("code", weight), &["`code`", "at least 0"]);
    }
    case.statistics.domains.remove("prose");
    refused(&case, &weigh("code", 0.0), &["no domain", "code"]);
    case.statistics.domains.clear();
    refused(&case, &PlanRequest::default(), &["no domain", "none"]);
}

#[test]
fn models_that_cannot_be_pruned() {
    let mut case = Case::new(TINY, 7);
    case.config.widths = Some(vec![vec![4; 4]; 2]);
    refused(
        &case,
        &PlanRequest::default(),
        &["already pruned", "original"],
    );
    let mut case = Case::new(TINY, 7);
    case.config.moe_layers.clear();
    refused(&case, &PlanRequest::default(), &["nothing to prune"]);
}

#[test]
fn routers_that_could_not_choose() {
    let mut case = Case::new(DEMO, 8);
    let groups = RouterGroups {
        num_groups: 16,
        top_groups: 4,
        score: GroupScore::TopTwoSum,
    };
    case.config = config(DEMO, Some(groups));
    refused(
        &case,
        &PlanRequest {
            method: Method::Ean,
            ..PlanRequest::default()
        },
        &["16 groups", "at least 2"],
    );
    assert!(case.plan(&PlanRequest::default()).is_ok());
}

#[test]
fn guarded_experts_that_do_not_fit() {
    let mut case = Case::new(TINY, 9);
    for layer in 0..2 {
        case.layer("default", layer).output_peak.fill(1.0);
    }
    case.layer("default", 1).output_peak[3] = 100.0;
    let tight = PlanRequest {
        keep: 0.1,
        alpha: Some(0.0),
        protect_super: true,
        ..PlanRequest::default()
    };
    assert_eq!(
        case.plan(&tight).unwrap_err(),
        PruneError::GuardedOverBudget {
            guarded: 1,
            needed: 8,
            budget: 6
        }
    );
}
