//! The checks that run on a GPU (`crates/tenp-model/tests/gpu.rs`), on the executor. `TENP_CHECK_SIZE=real` gives them the
//! inputs that a GPU gets, which takes hours here.

#[path = "../../../tests/checks/mod.rs"]
mod checks;

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

macro_rules! on_the_executor {
    ($($family:ident::$check:ident,)*) => {
        $(
            #[test]
            fn $check() {
                // Every check under a schedule of its own; the kernels' own tests go through all of them.
                let at = stringify!($check).len() % Schedule::UNLIKE.len();
                let backend = Simulated::new(Schedule::UNLIKE[at]).with_wgmma();
                $family::$check(On::new(&backend, 2), size());
            }
        )*
    };
}

every_check!(on_the_executor);
