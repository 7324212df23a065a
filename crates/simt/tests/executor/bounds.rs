//! Accesses that leave their array, or find nothing there.

use simt::{Buffer, Executor, Fault, FaultKind, Schedule};

use crate::fault_of;

#[repr(C)]
#[derive(Clone, Copy)]
struct RowsParams {
    input: *const f32,
    out: *mut f32,
    group_offsets: *const i32,
    num_rows: i32,
    padding: i32,
}

const ROWS: usize = 12;

/// Runs a row kernel on `blocks` blocks; two experts share the rows, the first has 5.
fn run_blocks(entry: &str, blocks: u32, schedule: Schedule) -> Result<Vec<f32>, Fault> {
    let values: Vec<f32> = (0..ROWS * 32).map(|i| i as f32).collect();
    let input = Buffer::input("in", &values);
    let out = Buffer::output("out", ROWS * 32);
    let offsets = Buffer::input("group_offsets", &[0, 5, ROWS as i32]);
    let params = RowsParams {
        input: input.ptr(),
        out: out.mut_ptr(),
        group_offsets: offsets.ptr(),
        num_rows: ROWS as i32,
        padding: 0,
    };
    Executor::new(schedule).step_limit(1 << 20).launch(
        entry,
        [blocks, 1, 1],
        [32, 1, 1],
        128,
        &params,
    )?;
    out.written()
}

fn run_rows(entry: &str, schedule: Schedule) -> Result<Vec<f32>, Fault> {
    run_blocks(entry, ROWS as u32, schedule)
}

fn run_two(entry: &str, schedule: Schedule) -> Result<Vec<f32>, Fault> {
    run_blocks(entry, 2, schedule)
}

#[test]
fn right_kernels_pass() {
    let values: Vec<f32> = (0..ROWS * 32).map(|i| i as f32).collect();
    for schedule in Schedule::UNLIKE {
        assert_eq!(run_rows("test_rows", schedule).unwrap(), values);
        assert_eq!(run_two("test_tiles", schedule).unwrap(), values);
    }
}

#[test]
fn out_of_bounds_rows() {
    let fault = fault_of("test_rows_read_past_end", FaultKind::OutOfBounds, run_rows);
    assert_eq!(fault.block, [ROWS as u32 - 1, 0, 0], "{fault}");
    assert!(
        fault
            .detail
            .starts_with("reads 4 bytes at 0 bytes past the end of `in` (384 elements"),
        "{fault}"
    );
    let fault = fault_of("test_rows_write_past_end", FaultKind::OutOfBounds, run_rows);
    assert!(
        fault
            .detail
            .starts_with("writes 4 bytes at 0 bytes past the end of `out`"),
        "{fault}"
    );
    let fault = fault_of(
        "test_rows_write_before_start",
        FaultKind::OutOfBounds,
        run_rows,
    );
    assert!(
        fault.detail.contains("4 bytes before the start of `out`"),
        "{fault}"
    );
    fault_of("test_null", FaultKind::OutOfBounds, run_rows);
    fault_of("test_local_index", FaultKind::OutOfBounds, run_rows);
}

#[test]
fn writes_to_an_input() {
    let fault = fault_of("test_rows_write_input", FaultKind::ReadOnly, run_rows);
    assert!(
        fault.detail.ends_with("element 0 of `in`, an input"),
        "{fault}"
    );
}

#[test]
fn unwritten_outputs() {
    let fault = fault_of("test_rows_one_left_out", FaultKind::Unwritten, run_rows);
    assert!(
        fault
            .detail
            .starts_with("32 of 384 elements were never written, first [64, 65,"),
        "{fault}"
    );
    let fault = fault_of("test_rows_half_written", FaultKind::Unwritten, run_rows);
    assert!(fault.detail.starts_with("384 of 384"), "{fault}");
}

#[test]
fn reads_of_nothing() {
    let fault = fault_of("test_rows_read_output", FaultKind::Uninitialised, run_rows);
    assert!(fault.detail.contains("of `out`"), "{fault}");
    let fault = fault_of("test_shared_unwritten", FaultKind::Uninitialised, run_rows);
    assert_eq!(fault.thread, Some(7), "{fault}");
    let fault = fault_of(
        "test_shared_of_other_block",
        FaultKind::Uninitialised,
        run_two,
    );
    assert_eq!(fault.block, [1, 0, 0], "{fault}");
}

#[test]
fn a_tile_that_straddles_two_experts() {
    let fault = fault_of("test_tiles_straddle", FaultKind::Race, run_two);
    // Row 5 is the second expert's first.
    assert!(fault.detail.starts_with("writes element 160"), "{fault}");
    assert!(
        fault
            .detail
            .contains("written by thread 0 of block (0, 0, 0)"),
        "{fault}"
    );
    assert_eq!(fault.block, [1, 0, 0]);
}

#[test]
fn blocks_are_not_ordered() {
    for schedule in Schedule::UNLIKE {
        let fault = run_two("test_rows_of_other_block", schedule).expect_err("a race");
        // The reading block may come first.
        assert!(
            matches!(fault.kind, FaultKind::Race | FaultKind::Uninitialised),
            "{fault}"
        );
    }
}

#[test]
fn a_block_changes_what_others_read() {
    fault_of(
        "test_row_others_read",
        FaultKind::Race,
        |entry, schedule| {
            let row = Buffer::in_out("row", &[0.0f32; 32]);
            let params = RowsParams {
                input: row.ptr(),
                out: row.mut_ptr(),
                group_offsets: std::ptr::null(),
                num_rows: 1,
                padding: 0,
            };
            Executor::new(schedule).launch(entry, [3, 1, 1], [32, 1, 1], 0, &params)
        },
    );
}

#[test]
fn read_only_loads_of_what_was_written() {
    let fault = fault_of("test_read_only_of_written", FaultKind::Race, run_two);
    assert!(fault.detail.contains("as read-only"), "{fault}");
}

#[test]
fn shared_memory_ends_where_the_launch_says() {
    let fault = fault_of("test_shared_past_end", FaultKind::OutOfBounds, run_rows);
    assert!(
        fault
            .detail
            .contains("at byte 128 of shared memory (128 bytes)"),
        "{fault}"
    );
    assert_eq!(fault.thread, Some(31));
}

#[test]
fn misaligned_vectors() {
    let fault = fault_of("test_vector_misaligned", FaultKind::Misaligned, run_rows);
    assert!(fault.detail.contains("a multiple of 16"), "{fault}");
}

#[test]
fn undefined_arithmetic() {
    let fault = fault_of("test_size_overflow", FaultKind::Undefined, run_rows);
    assert!(fault.detail.contains("multiplication overflows"), "{fault}");
}

#[test]
fn endless_kernels_end() {
    fault_of("test_endless", FaultKind::StepLimit, run_rows);
    fault_of("test_endless_with_barriers", FaultKind::StepLimit, run_rows);
}
