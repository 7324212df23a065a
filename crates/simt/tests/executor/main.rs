//! The executor itself: each bug planted in `tests/kernels` is found under every schedule, and the right version beside it
//! passes.

mod atomics;
mod barriers;
mod bounds;
mod conversions;
mod copies;
mod hopper;
mod launches;
mod matrices;
mod warps;

use simt::{Fault, FaultKind, Schedule};

/// Runs `entry` under unlike schedules, each of which must find the same kind of fault; returns the first schedule's.
fn fault_of<T>(
    entry: &str,
    kind: FaultKind,
    mut run: impl FnMut(&str, Schedule) -> Result<T, Fault>,
) -> Fault {
    let mut first = None;
    for schedule in Schedule::UNLIKE {
        let Err(fault) = run(entry, schedule) else {
            panic!("{entry} passed under {schedule:?}");
        };
        assert_eq!(fault.kind, kind, "{schedule:?}: {fault}");
        first.get_or_insert(fault);
    }
    first.expect("there are schedules")
}
