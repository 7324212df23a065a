//! `__syncthreads`: missing, and missed.

use simt::{Buffer, Executor, Fault, FaultKind, Schedule};

use crate::fault_of;

#[repr(C)]
#[derive(Clone, Copy)]
struct RowParams {
    input: *const f32,
    out: *mut f32,
}

fn run(entry: &str, schedule: Schedule) -> Result<Vec<f32>, Fault> {
    let values: Vec<f32> = (0..64).map(|i| i as f32).collect();
    let input = Buffer::input("in", &values);
    let out = Buffer::output("out", 64);
    let params = RowParams {
        input: input.ptr(),
        out: out.mut_ptr(),
    };
    Executor::new(schedule).launch(entry, [1; 3], [64, 1, 1], 256, &params)?;
    out.written()
}

#[test]
fn a_right_kernel_passes() {
    let reversed: Vec<f32> = (0..64).rev().map(|i| i as f32).collect();
    for schedule in Schedule::UNLIKE {
        assert_eq!(run("test_reverse", schedule).unwrap(), reversed);
    }
}

#[test]
fn missing_before_a_read() {
    // Whoever comes first finds nothing there yet.
    let fault = fault_of("test_reverse_no_barrier", FaultKind::Uninitialised, run);
    assert!(
        fault.detail.contains("byte 252 of shared memory"),
        "{fault}"
    );
    assert_eq!(fault.thread, Some(0));
}

#[test]
fn missing_before_the_next_round() {
    let fault = fault_of("test_reuse_no_barrier", FaultKind::Race, run);
    let lines = fault.source_lines();
    assert_eq!(lines.len(), 2);
    assert!(lines[0].starts_with("barriers.cu:34"), "{fault}");
    assert!(lines[1].starts_with("barriers.cu:32"), "{fault}");
}

#[test]
fn missing_behind_a_read() {
    fault_of("test_write_while_other_warp_reads", FaultKind::Race, run);
}

#[test]
fn missed_by_some() {
    let fault = fault_of("test_barrier_in_branch", FaultKind::BarrierDivergence, run);
    assert!(
        fault
            .detail
            .starts_with("threads 0-31 wait at __syncthreads (barriers.cu:"),
        "{fault}"
    );
    assert!(fault.detail.ends_with("threads 32-63 have exited"));
    fault_of(
        "test_barrier_in_both_branches",
        FaultKind::BarrierDivergence,
        run,
    );
    let fault = fault_of(
        "test_exit_before_barrier",
        FaultKind::BarrierDivergence,
        run,
    );
    assert!(fault.detail.ends_with("thread 63 has exited"), "{fault}");
}
