//! Each bug planted in `tests/kernels` is found, under every schedule, and the right version beside it passes.

use simt::{Buffer, Executor, Fault, FaultKind, Schedule};

#[repr(C)]
#[derive(Clone, Copy)]
struct RowParams {
    input: *const f32,
    out: *mut f32,
}

/// Runs one of the row kernels of `barriers.cu` on 64 threads.
fn run_row(entry: &str, schedule: Schedule) -> Result<Vec<f32>, Fault> {
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

fn row_fault(entry: &str, schedule: Schedule) -> Fault {
    run_row(entry, schedule).expect_err("the bug is found")
}

#[test]
fn a_right_kernel_passes() {
    for schedule in Schedule::UNLIKE {
        let reversed: Vec<f32> = (0..64).rev().map(|i| i as f32).collect();
        assert_eq!(run_row("test_reverse", schedule).unwrap(), reversed);
    }
}

#[test]
fn missing_barriers() {
    for schedule in Schedule::UNLIKE {
        // The first reader finds nothing there.
        let fault = row_fault("test_reverse_no_barrier", schedule);
        assert_eq!(fault.kind, FaultKind::Uninitialised, "{fault}");
        let fault = row_fault("test_reuse_no_barrier", schedule);
        assert_eq!(fault.kind, FaultKind::Race, "{fault}");
        assert_eq!(fault.places.len(), 2);
    }
}
