//! Runs the calls of the wrappers in the executor, and views its buffers as GPU memory.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "every test binary uses another part, and none is a library"
)]

pub mod batch;

use bytemuck::Pod;
use simt::{Buffer, Executor, Schedule};
use tenp_kernels::device::{Call, DeviceSlice, DeviceSliceMut};

/// What a kernel reads.
pub fn read<T: Pod>(buffer: &Buffer<T>) -> DeviceSlice<'_, T> {
    // SAFETY: the buffer lives as long as the borrow; the executor finds wrong accesses itself.
    unsafe { DeviceSlice::from_raw(buffer.ptr() as u64, buffer.len()) }
}

/// What a kernel writes. Unlike real memory's, the executor's buffers are looked at only between launches.
pub fn write<T: Pod>(buffer: &Buffer<T>) -> DeviceSliceMut<'_, T> {
    // SAFETY: as above.
    unsafe { DeviceSliceMut::from_raw(buffer.mut_ptr() as u64, buffer.len()) }
}

macro_rules! by_length {
    ($call:expr, $launch:expr, $($words:literal)*) => {
        match $call.params().len() {
            $($words => {
                let words: [u64; $words] = $call.params().try_into().expect("matched");
                $launch(&words)
            })*
            other => panic!("{other} words of parameters"),
        }
    };
}

/// Runs a call and panics with the whole report of a fault.
pub fn run(schedule: Schedule, call: &Call<'_>) {
    if !call.launch().is_empty() {
        by_length!(call, |words| launch(schedule, call, words), 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24);
    }
}

fn launch<P: Copy>(schedule: Schedule, call: &Call<'_>, params: &P) {
    let launch = call.launch();
    let report = Executor::new(schedule)
        .launch(
            call.entry(),
            launch.grid,
            [launch.threads, 1, 1],
            launch.shared_bytes,
            params,
        )
        .unwrap_or_else(|fault| panic!("{fault}"));
    assert!(report.shared_used <= launch.shared_bytes as usize);
}
