//! Atomics: never race with one another, always with plain accesses.

use simt::{Buffer, Executor, Fault, FaultKind, Schedule};

use crate::fault_of;
use crate::warps::WarpParams;

fn run(entry: &str, blocks: u32, schedule: Schedule) -> Result<Vec<i32>, Fault> {
    let values: Vec<i32> = (0..32).map(|i| i * 7 % 32 - 40).collect();
    let input = Buffer::input("in", &values);
    let out = Buffer::in_out("out", &[0, -100]);
    let params = WarpParams {
        input: input.ptr(),
        out: out.mut_ptr(),
    };
    Executor::new(schedule).launch(entry, [blocks, 1, 1], [32, 1, 1], 0, &params)?;
    out.written()
}

#[test]
fn add_and_max_over_blocks() {
    for schedule in Schedule::UNLIKE {
        assert_eq!(run("test_atomics", 4, schedule).unwrap(), [128, -9]);
    }
}

#[test]
fn a_plain_read_of_a_counter_races() {
    for blocks in [1, 4] {
        fault_of("test_atomic_and_plain", FaultKind::Race, |entry, s| {
            run(entry, blocks, s)
        });
    }
}
