//! cp.async: arrives late, and for its own thread only.

use simt::{Buffer, Executor, Fault, FaultKind, Schedule};

use crate::fault_of;

#[repr(C)]
#[derive(Clone, Copy)]
struct CopyParams {
    input: *mut f32,
    out: *mut f32,
}

fn run(entry: &str, schedule: Schedule) -> Result<Vec<f32>, Fault> {
    let values: Vec<f32> = (0..256).map(|i| i as f32).collect();
    let input = Buffer::in_out("in", &values);
    let out = Buffer::output("out", 256);
    let params = CopyParams {
        input: input.mut_ptr(),
        out: out.mut_ptr(),
    };
    Executor::new(schedule).launch(entry, [1; 3], [64, 1, 1], 1024, &params)?;
    out.written()
}

#[test]
fn right_kernels_pass() {
    for schedule in Schedule::UNLIKE {
        let doubled: Vec<f32> = (0..256).map(|i| 2.0 * i as f32).collect();
        assert_eq!(run("test_copy", schedule).unwrap(), doubled);
        let filled = run("test_copy_zero_fill", schedule).unwrap();
        assert_eq!(filled[..128], doubled[..128]);
        assert_eq!(filled[128..], [0.0; 128]);
    }
}

#[test]
fn missing_waits() {
    for entry in [
        "test_copy_no_wait",
        "test_copy_wait_too_few",
        "test_copy_no_commit",
    ] {
        let fault = fault_of(entry, FaultKind::PendingCopy, run);
        assert!(
            fault.detail.contains("no wait has completed"),
            "{entry}: {fault}"
        );
    }
}

#[test]
fn a_wait_is_not_a_barrier() {
    // Depending on the schedule the bytes are still on their way, or there with nothing to order them.
    for entry in ["test_copy_no_barrier", "test_copy_barrier_before_wait"] {
        for schedule in Schedule::UNLIKE {
            let fault = run(entry, schedule).expect_err(entry);
            assert!(
                matches!(
                    fault.kind,
                    FaultKind::PendingCopy | FaultKind::Race | FaultKind::Uninitialised
                ),
                "{entry}: {fault}"
            );
        }
    }
}

#[test]
fn a_slot_filled_while_it_is_read() {
    let fault = fault_of("test_copy_refill_too_soon", FaultKind::Race, |entry, s| {
        // Some schedules meet the refill first as a reader, some as the one who refills.
        run(entry, s).map_err(|mut fault| {
            if fault.kind == FaultKind::PendingCopy {
                fault.kind = FaultKind::Race;
            }
            fault
        })
    });
    assert_eq!(fault.places.len(), 2, "{fault}");
}

#[test]
fn a_store_to_what_is_on_its_way() {
    let fault = fault_of("test_copy_and_store", FaultKind::Race, run);
    assert!(
        fault.detail.contains("while an asynchronous copy"),
        "{fault}"
    );
}

#[test]
fn a_source_that_changes_on_the_way() {
    let fault = fault_of("test_copy_source_changes", FaultKind::Race, run);
    assert!(fault.detail.contains("`in`"), "{fault}");
}

#[test]
fn addresses() {
    fault_of("test_copy_misaligned", FaultKind::Misaligned, run);
    let fault = fault_of("test_copy_out_of_bounds", FaultKind::OutOfBounds, run);
    // A copy that is not valid reads nothing, wherever it points.
    assert_eq!(fault.thread, Some(1), "{fault}");
}
