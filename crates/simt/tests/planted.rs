//! Mistakes planted into the kernels for sm_90 (`build/planted.rs`): the executor or a comparison finds every one.

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};

use bytemuck::Pod;
use half::bf16;
use simt::{Buffer, Schedule};
use support::moe::Batch;
use support::products::{contribution, down, gate_up};
use support::{Sim, bytes_of};
use tenp_kernels::device::{Product, Tile};

fn sim(schedule: Schedule, planted: Option<&'static str>) -> Sim {
    Sim {
        planted,
        multiprocessors: 1,
        ..Sim::new(schedule)
    }
}

/// Experts around the tile's edges, and enough tiles that every stage and room is used again.
fn batch() -> Batch {
    Batch::awkward(7, 136, 60)
}

fn written<T: Pod>(buffer: &Buffer<T>) -> (Vec<usize>, Vec<u8>) {
    (buffer.unwritten(), bytes_of(buffer))
}

type Written = (Vec<usize>, Vec<u8>);

/// h, by gathered and by ordered rows.
fn h_of(sim: Sim) -> Written {
    written(&gate_up(&batch(), Product::gate_up(Tile::W64), sim).0)
}

/// h without anything planted.
fn right_h(batch: &Batch) -> Buffer<bf16> {
    gate_up(
        batch,
        Product::gate_up(Tile::N64),
        Sim::new(Schedule::Forward),
    )
    .0
}

fn y_of(sim: Sim) -> Written {
    let batch = batch();
    let h = right_h(&batch);
    written(&down(&batch, &h, Product::down(Tile::W64), sim).y_f32)
}

fn contributions_of(sim: Sim) -> Written {
    let batch = batch();
    let h = right_h(&batch);
    let y = down(
        &batch,
        &h,
        Product::down(Tile::N64),
        Sim::new(Schedule::Forward),
    )
    .y_bf16;
    let inverse = Buffer::input("row_inverse", &vec![0.5; batch.num_rows()]);
    let product = Product::contribution(Tile::W64);
    written(&contribution(&batch, (&h, &y, &inverse), product, sim).values)
}

/// What the executor says of a run, or that its results are others than those of the right kernel.
fn found(run: impl Fn(Sim) -> Written, schedule: Schedule, planted: &'static str) -> String {
    let right = run(sim(schedule, None));
    match catch_unwind(AssertUnwindSafe(|| run(sim(schedule, Some(planted))))) {
        Ok(got) if got == right => "nothing".into(),
        Ok(_) => "other results".into(),
        Err(panic) => match panic.downcast::<String>() {
            Ok(text) => *text,
            Err(_) => "a panic without words".into(),
        },
    }
}

/// Under every schedule one of `signs` is in what was found.
fn check(run: impl Fn(Sim) -> Written, planted: &'static str, signs: &[&str]) {
    for schedule in Schedule::UNLIKE {
        let found = found(&run, schedule, planted);
        assert!(
            signs.iter().any(|sign| found.contains(sign)),
            "{planted} {schedule:?}: found {found}"
        );
    }
}

#[test]
fn stages_given_back_too_soon() {
    let signs = ["still reads it", "Race", "PendingCopy"];
    check(h_of, "early_release", &signs);
    // Where the other half's arrivals come before the next wait, the barrier is a phase too far, and no one goes on.
    let signs = [&signs[..], &["BarrierDivergence"]].concat();
    check(h_of, "half_the_arrivals", &signs);
}

#[test]
fn tiles_that_straddle_two_experts() {
    check(
        h_of,
        "straddling",
        &["Race", "OutOfBounds", "other results"],
    );
}

#[test]
fn gathered_rows_without_a_fence() {
    check(h_of, "no_proxy_fence", &["fence.proxy.async"]);
}

#[test]
fn rooms_used_again_too_soon() {
    check(h_of, "epilogue_reused", &["Race"]);
    check(contributions_of, "no_syncwarp", &["Race"]);
}

#[test]
fn barriers_that_not_all_come_to() {
    check(h_of, "block_barrier_in_epilogue", &["BarrierDivergence"]);
    check(h_of, "empty_parity", &["BarrierDivergence"]);
    check(h_of, "gather_too_far_ahead", &["BarrierDivergence"]);
}

#[test]
fn operands_and_rows_from_the_wrong_place() {
    check(y_of, "transposed_step", &["other results"]);
    check(contributions_of, "foreign_rows_counted", &["other results"]);
}
