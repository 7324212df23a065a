//! What the tests of the kernels share: data, experts of awkward widths, routings, and the launches around a product.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "every test binary uses another part, and none is a library"
)]

pub mod layer;
pub mod moe;

use half::bf16;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use simt::{Executor, Report, Schedule};

/// Widths around every tile and padding boundary.
pub const AWKWARD_WIDTHS: [usize; 10] = [0, 1, 7, 8, 63, 64, 65, 127, 128, 129];

/// Half a unit in the last place of bf16, relative: rounding to nearest moves a number by at most this part of it.
pub const BF16_ROUNDING: f64 = 1.0 / 256.0 / 2.0;

/// The same of f32.
pub const F32_ROUNDING: f64 = 1.0 / 16_777_216.0;

/// A generator for one test's data.
pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// `count` numbers in ±`scale` that bf16 holds exactly.
pub fn bf16_values(rng: &mut ChaCha8Rng, count: usize, scale: f32) -> Vec<bf16> {
    (0..count)
        .map(|_| bf16::from_f32(rng.random_range(-scale..scale)))
        .collect()
}

/// `count` numbers in ±`scale`.
pub fn f32_values(rng: &mut ChaCha8Rng, count: usize, scale: f32) -> Vec<f32> {
    (0..count)
        .map(|_| rng.random_range(-scale..scale))
        .collect()
}

/// The bits that kernels take.
pub fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Widened.
pub fn widened(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|v| v.to_f32()).collect()
}

/// The number behind bf16 bits.
pub fn number(bits: u16) -> f64 {
    f64::from(bf16::from_bits(bits).to_f32())
}

/// Launches and panics with the whole report of a fault.
pub fn launch<P: Copy>(
    schedule: Schedule,
    entry: &str,
    grid: impl Grid,
    block: u32,
    shared_bytes: usize,
    params: &P,
) -> Report {
    Executor::new(schedule)
        .launch(
            entry,
            grid.dimensions(),
            [block, 1, 1],
            shared_bytes as u32,
            params,
        )
        .unwrap_or_else(|fault| panic!("{fault}"))
}

/// A grid of one, two or three dimensions.
pub trait Grid {
    /// As the launch takes it.
    fn dimensions(self) -> [u32; 3];
}

impl Grid for usize {
    fn dimensions(self) -> [u32; 3] {
        [self as u32, 1, 1]
    }
}

impl Grid for (usize, usize) {
    fn dimensions(self) -> [u32; 3] {
        [self.0 as u32, self.1 as u32, 1]
    }
}

impl Grid for (usize, usize, usize) {
    fn dimensions(self) -> [u32; 3] {
        [self.0 as u32, self.1 as u32, self.2 as u32]
    }
}

/// Asserts `|got − want| ≤ tolerance`, or that both are NaN, or the same infinity.
#[track_caller]
pub fn assert_close(got: f64, want: f64, tolerance: f64, what: impl Fn() -> String) {
    let same = got == want || (got.is_nan() && want.is_nan());
    assert!(
        same || (got - want).abs() <= tolerance,
        "{}: got {got}, want {want} ± {tolerance}",
        what()
    );
}
