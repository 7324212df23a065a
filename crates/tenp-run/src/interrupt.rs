//! Ctrl-C and SIGTERM: work ends at the next opportunity, a second one ends the process at once.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Exit codes of processes that a signal ended begin here.
const SIGNAL_BASE: c_int = 128;

struct Requested {
    stop: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

static REQUESTED: LazyLock<Requested> = LazyLock::new(|| Requested {
    stop: Arc::default(),
    signal: Arc::default(),
});

/// From here on the signals ask for an end, instead of being one.
///
/// # Errors
/// The system's own.
pub(crate) fn listen() -> std::io::Result<()> {
    let Requested { stop, signal } = &*REQUESTED;
    for number in [SIGINT, SIGTERM] {
        // In this order, so that only a second signal finds the flag raised.
        flag::register_conditional_shutdown(number, SIGNAL_BASE + number, Arc::clone(stop))?;
        flag::register_usize(number, Arc::clone(signal), number as usize)?;
        flag::register(number, Arc::clone(stop))?;
    }
    Ok(())
}

/// Becomes true when the work is to end.
pub(crate) fn stop() -> Arc<AtomicBool> {
    Arc::clone(&REQUESTED.stop)
}

/// What the process ends with, if a signal asked for the end.
pub(crate) fn exit_code() -> Option<u8> {
    let signal = REQUESTED.signal.load(Ordering::Relaxed);
    let code = (signal > 0).then_some(SIGNAL_BASE as usize + signal)?;
    u8::try_from(code).ok()
}
