//! Runs every MoE layer of a checkpoint with the op and with candle's operations, and compares.
//!
//!     cargo run -- [FOLDER]       # the project's demo, or what `tenp-run prune demo` made of it

use std::path::PathBuf;

use candle_core::{Device, Result, bail};
use tenp_candle::compare::{compare, tolerance};
use tenp_candle::layer::Checkpoint;

fn main() -> Result<()> {
    let demo = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../demo");
    let folder = std::env::args_os().nth(1).map_or(demo, PathBuf::from);
    let device = Device::cuda_if_available(0)?;
    let comparisons = compare(&Checkpoint::read(&folder)?, &device)?;
    for comparison in &comparisons {
        println!(
            "layer {}, {:?}: {}, {:.1e} (allowed {:.0e}), widths {:?}",
            comparison.layer,
            comparison.compute,
            if comparison.is_same() {
                "same"
            } else {
                "DIFFERENT"
            },
            comparison.difference,
            tolerance(comparison.compute),
            comparison.widths
        );
    }
    if !comparisons.iter().all(|comparison| comparison.is_same()) {
        bail!("the op and candle's operations differ");
    }
    Ok(())
}
