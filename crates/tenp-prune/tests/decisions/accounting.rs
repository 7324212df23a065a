//! Shares and bytes of plans whose values are known.

use tenp_prune::{Allocation, Method, PlanRequest};

use crate::synthetic::{Case, TINY};

#[test]
fn shares_of_a_plan_by_hand() {
    let mut case = Case::new(TINY, 1);
    case.layer("default", 0).tokens = vec![10, 20, 30, 40];
    case.layer("default", 1).tokens = vec![100, 0, 0, 0];
    let widths = vec![vec![8, 4, 4, 0], vec![4, 8, 8, 8]];
    let plan = case
        .plan(&PlanRequest {
            allocation: Some(Allocation::File(widths)),
            ..PlanRequest::default()
        })
        .unwrap();
    let accounting = &plan.accounting;
    assert_eq!(accounting.E, 44.0 / 64.0);
    assert_eq!(accounting.A, (10.0 + 10.0 + 15.0 + 50.0) / 200.0);
    assert_eq!(accounting.f, 10.0 / 200.0);
    // 64 neurons of 48 parameters and 10000 others.
    assert_eq!(
        accounting.model,
        (44.0 * 48.0 + 10_000.0) / (64.0 * 48.0 + 10_000.0)
    );
    assert_eq!(accounting.bytes_before, 2 * (64 * 48 + 10_000));
    assert_eq!(accounting.bytes_after, 2 * (44 * 48 + 10_000));
}

#[test]
fn dropping_saves_memory_but_no_arithmetic() {
    let case = Case::new(TINY, 2);
    let plan = case
        .plan(&PlanRequest {
            method: Method::Reap,
            keep: 0.5,
            ..PlanRequest::default()
        })
        .unwrap();
    let accounting = &plan.accounting;
    assert_eq!([accounting.E, accounting.A, accounting.f], [0.5, 1.0, 1.0]);
    // Two experts of each layer go, with a router row of 16 parameters each.
    assert_eq!(accounting.bytes_after, 2 * (32 * 48 + 10_000 - 4 * 16));
    let after = 32.0 * 48.0 + 10_000.0 - 64.0;
    assert_eq!(accounting.model, after / (64.0 * 48.0 + 10_000.0));
}

#[test]
fn statistics_without_a_token_still_give_shares() {
    let mut case = Case::new(TINY, 3);
    for layer in 0..2 {
        for expert in 0..4 {
            case.silence("default", layer, expert);
        }
    }
    let plan = case
        .plan(&PlanRequest {
            keep: 0.5,
            ..PlanRequest::default()
        })
        .unwrap();
    assert_eq!(plan.uncalibrated.len(), 8);
    assert_eq!((plan.accounting.E, plan.accounting.A), (0.5, 0.5));
}
