//! sm_90: bulk copies, barriers of some threads, products of warpgroups, and the proxies between them.

use half::bf16;
use simt::{Buffer, Executor, Fault, FaultKind, Report, Schedule, tensor_map};
use tenp_kernels::device::TensorMap;

use crate::fault_of;

/// Parameters of one pointer and two numbers, and the maps behind them.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct Arguments {
    out: u64,
    numbers: [i32; 2],
    padding: [u64; 14],
    maps: [[u64; 16]; 3],
}

fn map(address: u64, [rows, inner]: [usize; 2], box_rows: u32) -> TensorMap {
    TensorMap {
        address,
        inner: inner as u64,
        rows: rows as u64,
        pitch_bytes: 2 * inner.next_multiple_of(8) as u64,
        group_pitch_bytes: 0,
        box_rows,
    }
}

fn launch(
    entry: &str,
    schedule: Schedule,
    out: u64,
    numbers: [i32; 2],
    [weights, rows]: [&TensorMap; 2],
) -> Result<Report, Fault> {
    let arguments = Arguments {
        out,
        numbers,
        padding: [0; 14],
        maps: [weights, rows, rows].map(tensor_map::encode),
    };
    Executor::new(schedule).launch(entry, [1; 3], [128, 1, 1], 49_152, &arguments)
}

const ROWS: usize = 45;
const INNER: usize = 88;

fn matrix() -> Vec<u16> {
    (0..ROWS * INNER).map(|i| i as u16).collect()
}

/// The box at (row, inner) as it lies in shared memory.
fn load(entry: &str, schedule: Schedule, [row, inner]: [i32; 2]) -> Result<Vec<u16>, Fault> {
    let input = Buffer::input("matrix", &matrix());
    let out = Buffer::<u16>::output("out", 32 * 64);
    let map = map(input.ptr() as u64, [ROWS, INNER], 32);
    launch(
        entry,
        schedule,
        out.mut_ptr() as u64,
        [inner, row],
        [&map, &map],
    )?;
    out.written()
}

#[test]
fn boxes_lie_swizzled_and_zero_outside_the_matrix() {
    let matrix = matrix();
    for (i, [row, inner]) in [[0, 0], [5, 64], [40, 24], [60, 0]].into_iter().enumerate() {
        let got = load("test_bulk_load_right", Schedule::UNLIKE[i], [row, inner]).unwrap();
        for r in 0..32 {
            for c in 0..64 {
                let (y, x) = (row as usize + r, inner as usize + c);
                let want = if y < ROWS && x < INNER {
                    matrix[y * INNER + x]
                } else {
                    0
                };
                // Chunk c / 8 of row r is chunk c / 8 XOR r mod 8.
                let at = r * 64 + ((c / 8) ^ (r % 8)) * 8 + c % 8;
                assert_eq!(got[at], want, "box at {row}, {inner}: element {r}, {c}");
            }
        }
    }
}

fn load_fault(name: &str, kind: FaultKind) -> Fault {
    fault_of(
        &format!("test_bulk_load_{name}"),
        kind,
        |entry, schedule| load(entry, schedule, [0, 0]),
    )
}

#[test]
fn bulk_copies_are_there_when_their_phase_ends_and_not_before() {
    for name in ["no_wait", "other_phase"] {
        // By the schedule the copy is under way, not begun, or there with nothing to say so.
        let entry = format!("test_bulk_load_{name}");
        for schedule in Schedule::UNLIKE {
            let fault = load(&entry, schedule, [0, 0]).expect_err(name);
            let expected = matches!(
                fault.kind,
                FaultKind::PendingCopy | FaultKind::Race | FaultKind::Uninitialised
            );
            assert!(expected, "{name} {schedule:?}: {fault}");
        }
    }
    for name in ["few_bytes", "many_bytes"] {
        let fault = load_fault(name, FaultKind::BarrierDivergence);
        assert!(fault.detail.contains("mbarrier.try_wait"), "{fault}");
    }
    let fault = load_fault("left", FaultKind::PendingCopy);
    assert!(fault.detail.contains("no one has waited"), "{fault}");
}

#[test]
fn what_bulk_copies_ask_of_their_surroundings() {
    let fault = load_fault("no_fence", FaultKind::Undefined);
    assert!(fault.detail.contains("not fenced"), "{fault}");
    let fault = load_fault("shifted", FaultKind::Undefined);
    assert!(fault.detail.contains("multiple of 1024"), "{fault}");
}

#[test]
fn a_box_refilled_while_others_read_it() {
    for schedule in Schedule::UNLIKE {
        let fault = load("test_bulk_load_refilled", schedule, [0, 0]).expect_err("refilled");
        let expected = matches!(fault.kind, FaultKind::PendingCopy | FaultKind::Race);
        assert!(expected, "{schedule:?}: {fault}");
    }
}

fn store(entry: &str, schedule: Schedule) -> Result<Vec<u16>, Fault> {
    let target = Buffer::in_out("matrix", &matrix());
    let out = Buffer::<u16>::output("out", 1);
    let map = map(target.mut_ptr() as u64, [ROWS, INNER], 32);
    launch(
        entry,
        schedule,
        out.mut_ptr() as u64,
        [40, 20],
        [&map, &map],
    )?;
    target.written()
}

#[test]
fn boxes_are_stored_and_clipped() {
    for schedule in Schedule::UNLIKE {
        let got = store("test_bulk_store_right", schedule).unwrap();
        for (i, (&got, &before)) in got.iter().zip(&matrix()).enumerate() {
            let (row, column) = (i / INNER, i % INNER);
            let want = if row >= 20 && column >= 40 {
                (100 + row - 20 + column - 40) as u16
            } else {
                before
            };
            assert_eq!(got, want, "{row} {column}");
        }
    }
}

/// DeepGEMM and others have shipped the first three: no fence before a bulk store, one on the wrong side of the
/// barrier, and a buffer filled again before its store has read it.
#[test]
fn bulk_stores_planted_wrong() {
    for name in ["no_fence", "readers_fence"] {
        let fault = fault_of(&format!("test_bulk_store_{name}"), FaultKind::Race, store);
        assert!(fault.detail.contains("fence.proxy.async"), "{fault}");
    }
    let fault = fault_of("test_bulk_store_reused", FaultKind::Race, store);
    assert!(fault.detail.contains("still reads it"), "{fault}");
    let fault = fault_of("test_bulk_store_no_wait", FaultKind::PendingCopy, store);
    assert!(
        fault.detail.contains("still reads its shared memory"),
        "{fault}"
    );
}

fn turn(entry: &str, schedule: Schedule) -> Result<Vec<u16>, Fault> {
    let input = Buffer::input("matrix", &matrix());
    let out = Buffer::<u16>::output("out", 256);
    let map = map(input.ptr() as u64, [ROWS, INNER], 32);
    launch(entry, schedule, out.mut_ptr() as u64, [0, 0], [&map, &map])?;
    out.written()
}

#[test]
fn barriers_of_some_threads() {
    for schedule in Schedule::UNLIKE {
        let got = turn("test_part_right", schedule).unwrap();
        for (i, &got) in got.iter().enumerate() {
            let (round, group, thread) = (i / 128, i % 128 / 64, i % 64);
            assert_eq!(usize::from(got), 64 * group + 63 - thread + round);
        }
    }
    fault_of("test_part_other_count", FaultKind::BarrierDivergence, turn);
    for schedule in Schedule::UNLIKE {
        let fault = turn("test_part_missing", schedule).expect_err("missing");
        let expected = matches!(fault.kind, FaultKind::Race | FaultKind::Uninitialised);
        assert!(expected, "{schedule:?}: {fault}");
    }
    // A barrier of the whole block that a part of it never comes to, as in an epilogue that only some warps run.
    let fault = fault_of("test_part_whole_block", FaultKind::BarrierDivergence, turn);
    assert!(fault.detail.contains("__syncthreads"), "{fault}");
}

/// Values that bf16 holds and whose products and sums f32 holds exactly.
fn small(seed: usize, count: usize) -> Vec<bf16> {
    (0..count)
        .map(|i| bf16::from_f32(((seed * 31 + i * 17 + i / 7) % 23) as f32 - 11.0))
        .collect()
}

fn product(
    entry: &str,
    schedule: Schedule,
    columns: usize,
    transposed: bool,
) -> Result<Vec<f32>, Fault> {
    let (a, b) = (small(1, 64 * 64), small(2, columns * 64));
    let stored: Vec<bf16> = if transposed {
        (0..64 * 64).map(|i| a[i % 64 * 64 + i / 64]).collect()
    } else {
        a
    };
    let (a, b) = (Buffer::input("a", &stored), Buffer::input("b", &b));
    let out = Buffer::<f32>::output("out", 64 * columns);
    let maps = [
        map(a.ptr() as u64, [64, 64], 64),
        map(b.ptr() as u64, [columns, 64], columns as u32),
    ];
    launch(
        entry,
        schedule,
        out.mut_ptr() as u64,
        [0, 0],
        [&maps[0], &maps[1]],
    )?;
    out.written()
}

fn wanted(columns: usize) -> Vec<f32> {
    let (a, b) = (small(1, 64 * 64), small(2, columns * 64));
    (0..64 * columns)
        .map(|i| {
            let (row, column) = (i / columns, i % columns);
            (0..64)
                .map(|k| a[row * 64 + k].to_f32() * b[column * 64 + k].to_f32())
                .sum()
        })
        .collect()
}

#[test]
fn products_at_every_width_and_both_ways_round() {
    for (i, columns) in [8, 16, 32, 64, 128, 192, 256].into_iter().enumerate() {
        for transposed in [false, true] {
            let entry = format!("test_wgmma_{columns}{}", if transposed { "_t" } else { "" });
            let got = product(&entry, Schedule::UNLIKE[i % 4], columns, transposed).unwrap();
            assert!(got == wanted(columns), "{entry}");
        }
    }
}

#[test]
fn accumulators_hold_nothing_until_they_have_been_waited_for() {
    for name in ["no_wait", "one_left"] {
        let got = product(&format!("test_wgmma_{name}"), Schedule::Forward, 32, false).unwrap();
        assert!(got.iter().all(|v| v.is_nan()), "{name}");
    }
}

fn product_fault(name: &str, kind: FaultKind) -> Fault {
    fault_of(&format!("test_wgmma_{name}"), kind, |entry, schedule| {
        product(entry, schedule, 32, false)
    })
}

#[test]
fn products_used_wrongly() {
    let fault = product_fault("no_fence", FaultKind::Undefined);
    assert!(fault.detail.contains("wgmma.fence"), "{fault}");
    let fault = product_fault("overwritten", FaultKind::Race);
    assert!(fault.detail.contains("still reads it"), "{fault}");
    product_fault("out_of_bounds", FaultKind::OutOfBounds);
    product_fault("one_warp_less", FaultKind::WarpDivergence);
    let fault = product_fault("stored", FaultKind::Race);
    assert!(fault.detail.contains("asynchronous proxy"), "{fault}");
    let right = product("test_wgmma_stored_fenced", Schedule::Forward, 32, false).unwrap();
    assert!(right == wanted(32));
    // A descriptor that says something else reads something else.
    let other = product("test_wgmma_wrong_stride", Schedule::Forward, 32, false).unwrap();
    assert!(other != wanted(32));
}

fn registers(entry: &str, schedule: Schedule) -> Result<Vec<f32>, Fault> {
    let out = Buffer::<f32>::output("out", 256);
    let address = out.mut_ptr() as u64;
    Executor::new(schedule).launch(entry, [1; 3], [384, 1, 1], 0, &address)?;
    out.written()
}

#[test]
fn registers_are_granted_once_others_are_given_up() {
    for schedule in Schedule::UNLIKE {
        assert_eq!(
            registers("test_registers_right", schedule).unwrap(),
            [1.0; 256]
        );
    }
    for name in ["kept", "too_few_given"] {
        let fault = fault_of(
            &format!("test_registers_{name}"),
            FaultKind::BarrierDivergence,
            registers,
        );
        assert!(fault.detail.contains("setmaxnreg"), "{fault}");
    }
}
