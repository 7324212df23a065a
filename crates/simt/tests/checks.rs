//! The checks that run on a GPU (`crates/tenp-model/tests/gpu.rs`), on the executor. `TENP_CHECK_SIZE=real` gives them the
//! inputs that a GPU gets, which takes hours here.

#[path = "../../../tests/checks/mod.rs"]
mod checks;

use std::sync::atomic::{AtomicUsize, Ordering};

use checks::{
    On, Size, attention, batch, bounds, layer_sums, memory, plain_layer, products, repeats, rotary,
    rows, segments,
};
use simt::{Schedule, Simulated};

fn size() -> Size {
    match std::env::var("TENP_CHECK_SIZE").as_deref() {
        Ok("real") => Size::Real,
        _ => Size::Small,
    }
}

macro_rules! names {
    ($($family:ident::$check:ident,)*) => { &[$(stringify!($check)),*] };
}
/// Checks that are done, and those that there are.
static DONE: AtomicUsize = AtomicUsize::new(0);
const CHECKS: &[&str] = every_check!(names);

/// Every kernel has been launched by some check once the last of them is done: where only some run, nothing is said.
fn done() {
    if DONE.fetch_add(1, Ordering::Relaxed) + 1 < CHECKS.len() {
        return;
    }
    let launched = simt::executor::launched();
    let missing: Vec<String> = simt::executor::entries()
        .into_iter()
        .filter(|entry| entry.starts_with("tenp_") && !launched.contains(entry))
        .collect();
    assert!(
        missing.is_empty(),
        "no check of tests/checks launches {}",
        missing.join(", ")
    );
}

macro_rules! on_the_executor {
    ($($family:ident::$check:ident,)*) => {
        $(
            #[test]
            fn $check() {
                // Every check under a schedule of its own; the kernels' own tests go through all of them. What is done
                // again is done in another order, on another number of multiprocessors.
                let at = stringify!($check).len() % Schedule::UNLIKE.len();
                let backend = match stringify!($family) {
                    "repeats" => Simulated::never_alike(),
                    _ => Simulated::new(Schedule::UNLIKE[at]),
                };
                $family::$check(On::new(&backend.with_wgmma(), 2), size());
                done();
            }
        )*
    };
}

every_check!(on_the_executor);
