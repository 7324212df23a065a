//! The pass of the GPU (`tests/passes`), run by the executor of the `simt` crate from the kernels' own sources.

// `cargo test -- --nocapture` lists the errors.
#![allow(clippy::print_stdout)]

#[path = "../../tenp-checkpoint/tests/support/fp8.rs"]
mod fp8;
mod passes;
mod support;

use simt::{Schedule, Simulated};

fn place(i: usize) -> Simulated {
    Simulated::new(Schedule::UNLIKE[i % 4])
}

/// With the products of sm_90.
fn hopper(i: usize) -> Simulated {
    place(i).with_wgmma()
}

/// One, then the other.
fn either(i: usize) -> Simulated {
    match i % 2 {
        0 => place(i),
        _ => hopper(i),
    }
}

#[test]
fn logits_of_every_family() {
    passes::logits_of_every_family(&either);
}

#[test]
fn calibration_has_the_sums_of_the_cpu() {
    passes::calibration_has_the_sums_of_the_cpu(&either);
}

#[test]
fn branches_and_cached_tokens_have_the_logits_of_the_whole_sequence() {
    passes::branches_and_cached_tokens_have_the_logits_of_the_whole_sequence(&place);
}

#[test]
fn damaged_weights_are_named() {
    passes::damaged_weights_are_named(&place);
}

#[test]
fn calibration_has_the_same_bits() {
    passes::calibration_has_the_same_bits(&hopper, 2);
}

#[test]
fn continuations_are_the_same() {
    passes::continuations_are_the_same(&place);
}

#[test]
fn prompts_are_completed_together_as_alone() {
    passes::prompts_are_completed_together_as_alone(&place);
}

#[test]
fn layers_with_fewer_experts() {
    passes::layers_with_fewer_experts(&place);
}

#[test]
fn neurons_are_merged_as_on_the_cpu() {
    passes::merging::neurons_are_merged_as_on_the_cpu(&hopper);
}

#[test]
fn experts_are_fitted_as_on_the_cpu() {
    passes::recovery::experts_are_fitted_as_on_the_cpu(&place);
}

#[test]
fn a_stopped_calibration_goes_on_with_the_same_bits() {
    passes::resuming::a_stopped_calibration_goes_on_with_the_same_bits(&place);
}

#[test]
fn statistics_that_are_let_go_of_are_written() {
    passes::resuming::statistics_that_are_let_go_of_are_written(&place);
}

#[test]
fn shares_merge_to_the_whole() {
    passes::sharing::shares_merge_to_the_whole(&either);
}

#[test]
fn logits_of_fp8_weights() {
    passes::fp8::logits_of_fp8_weights(&either);
}
