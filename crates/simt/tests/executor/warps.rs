//! Shuffles, votes and `__syncwarp`.

use simt::{Buffer, Executor, Fault, FaultKind, Schedule};

use crate::fault_of;

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct WarpParams {
    pub(crate) input: *const i32,
    pub(crate) out: *mut i32,
}

fn launch(entry: &str, threads: u32, rows: usize, schedule: Schedule) -> Result<Vec<i32>, Fault> {
    let values: Vec<i32> = (1000..1032).collect();
    let input = Buffer::input("in", &values);
    let out = Buffer::output("out", rows * 32);
    let params = WarpParams {
        input: input.ptr(),
        out: out.mut_ptr(),
    };
    Executor::new(schedule).launch(entry, [1; 3], [threads, 1, 1], 256, &params)?;
    out.written()
}

fn run(entry: &str, schedule: Schedule) -> Result<Vec<i32>, Fault> {
    launch(entry, 32, 1, schedule)
}

#[test]
fn every_operation_gives_what_the_isa_says() {
    let row = |of: &dyn Fn(i32) -> i32| (0..32).map(of).collect::<Vec<i32>>();
    let segment = |lane: i32| lane / 8 * 8;
    let third = (0..32)
        .filter(|v| (1000 + v) % 3 == 0)
        .fold(0u32, |m, v| m | 1 << v);
    let want = [
        row(&|_| 1005),
        row(&|l| 1000 + (l + 3) % 32),
        row(&|l| 1000 + segment(l) + 2),
        row(&|l| 1000 + if l >= 3 { l - 3 } else { l }),
        row(&|l| 1000 + if l % 8 >= 3 { l - 3 } else { l }),
        row(&|l| 1000 + if l + 3 < 32 { l + 3 } else { l }),
        row(&|l| 1000 + if l % 8 + 3 < 8 { l + 3 } else { l }),
        row(&|l| 1000 + (l ^ 9)),
        // A lane of a later segment is out of reach, one of an earlier segment is not.
        row(&|l| {
            1000 + if (l ^ 0xc) <= segment(l) + 7 {
                l ^ 0xc
            } else {
                l
            }
        }),
        row(&|_| third as i32),
        row(&|_| 1),
        row(&|_| 1),
        row(&|l| (1000 + (l + 1).min(31)) * 4 + 1),
        row(&|l| if l < 8 { 0b1010_1010 } else { -1 }),
    ];
    for schedule in Schedule::UNLIKE {
        let out = launch("test_warp_operations", 32, 14, schedule).unwrap();
        for (i, (out, want)) in out.chunks(32).zip(&want).enumerate() {
            assert_eq!(out, want, "operation {i} under {schedule:?}");
        }
    }
}

#[test]
fn lanes_that_do_not_come() {
    let fault = fault_of("test_shuffle_exited", FaultKind::WarpDivergence, run);
    assert!(
        fault
            .detail
            .starts_with("threads 0-30 wait at __shfl_xor_sync (warps.cu:"),
        "{fault}"
    );
    assert!(
        fault
            .detail
            .ends_with("mask ffffffff); thread 31 has exited")
    );
    fault_of("test_shuffle_in_branch", FaultKind::WarpDivergence, run);
    let fault = fault_of("test_shuffle_outside_mask", FaultKind::WarpDivergence, run);
    assert!(
        fault
            .detail
            .contains("lane 15 reads lane 16, which is not in the mask 0000ffff"),
        "{fault}"
    );
    fault_of(
        "test_shuffle_not_in_own_mask",
        FaultKind::WarpDivergence,
        run,
    );
    fault_of("test_masks_disagree", FaultKind::WarpDivergence, run);
    // A block of 20 threads has no lanes 20 to 31.
    let fault = fault_of("test_syncwarp", FaultKind::WarpDivergence, |entry, s| {
        launch(entry, 20, 1, s)
    });
    assert!(
        fault.detail.ends_with("the last warp has 20 lanes"),
        "{fault}"
    );
}

#[test]
fn syncwarp_orders_the_lanes_it_names() {
    let swapped: Vec<i32> = (0..32).map(|l| 1002 + (l ^ 1)).collect();
    for schedule in Schedule::UNLIKE {
        assert_eq!(run("test_syncwarp", schedule).unwrap(), swapped);
        assert_eq!(run("test_syncwarp_pairs", schedule).unwrap(), swapped);
    }
    for entry in ["test_syncwarp_missing", "test_syncwarp_missing_behind_read"] {
        fault_of(entry, FaultKind::Race, run);
    }
    for schedule in Schedule::UNLIKE {
        let fault = run("test_syncwarp_wrong_pairs", schedule).expect_err("a race");
        assert!(
            matches!(fault.kind, FaultKind::Race | FaultKind::Uninitialised),
            "{fault}"
        );
        let fault = launch("test_syncwarp_across_warps", 64, 1, schedule).expect_err("a race");
        assert!(
            matches!(fault.kind, FaultKind::Race | FaultKind::Uninitialised),
            "{fault}"
        );
    }
}
