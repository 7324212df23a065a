//! What the tests of the kernels share: data, experts of awkward widths, routed batches, and how calls are run.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "every test binary uses another part, and none is a library"
)]

pub mod layer;
pub mod moe;
pub mod products;
pub mod segments;
pub mod sums;

use bytemuck::Pod;
use half::bf16;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use simt::{Buffer, Executor, Fault, Schedule};
use tenp_kernels::KernelError;
use tenp_kernels::device::{Call, DeviceSlice, DeviceSliceMut, Runner};

/// Widths around every tile and padding boundary.
pub const AWKWARD_WIDTHS: [usize; 10] = [0, 1, 7, 8, 63, 64, 65, 127, 128, 129];

/// Half a unit in the last place of bf16, relative: rounding to nearest moves a number by at most this part of it.
pub const BF16_ROUNDING: f64 = 1.0 / 256.0;

/// The same of f32.
pub const F32_ROUNDING: f64 = 1.0 / 16_777_216.0;

/// A generator for one test's data.
pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// `count` numbers in ±`scale` that bf16 holds exactly.
pub fn bf16_values(rng: &mut ChaCha8Rng, count: usize, scale: f32) -> Vec<bf16> {
    f32_values(rng, count, scale)
        .into_iter()
        .map(bf16::from_f32)
        .collect()
}

/// `count` numbers in ±`scale`.
pub fn f32_values(rng: &mut ChaCha8Rng, count: usize, scale: f32) -> Vec<f32> {
    (0..count)
        .map(|_| rng.random_range(-scale..scale))
        .collect()
}

/// Widened.
pub fn widened(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|v| v.to_f32()).collect()
}

/// Sum of products, and how far f32 may be from it whatever the order of its additions.
pub fn dot(a: &[bf16], b: &[bf16]) -> (f64, f64) {
    let terms = || a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64());
    let size: f64 = terms().map(f64::abs).sum();
    (terms().sum(), (a.len() as f64 + 1.0) * F32_ROUNDING * size)
}

/// The executor as what runs calls.
#[derive(Clone, Copy, Debug)]
pub struct Sim {
    pub schedule: Schedule,
    /// Persistent kernels get twice as many blocks.
    pub multiprocessors: usize,
    /// Without the products of sm_90, where the caller leaves the choice.
    pub portable: bool,
    /// Entries that have a copy with this mistake planted (`build/planted.rs`) run as that.
    pub planted: Option<&'static str>,
}

/// How a call fails here.
#[derive(Debug)]
pub enum Failure {
    Refused(KernelError),
    Fault(Fault),
}

impl From<KernelError> for Failure {
    fn from(error: KernelError) -> Self {
        Self::Refused(error)
    }
}

impl Runner for Sim {
    type Error = Failure;

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn has_wgmma(&self) -> bool {
        !self.portable
    }

    fn run(&self, call: &Call<'_>) -> Result<(), Failure> {
        if call.launch().is_empty() {
            return Ok(());
        }
        let copy = self
            .planted
            .map(|mistake| format!("planted_{mistake}_{}", call.entry()))
            .filter(|copy| simt::executor::entries().contains(copy));
        Executor::new(self.schedule)
            .launch_call_as(copy.as_deref().unwrap_or(call.entry()), call)
            .map(|_| ())
            .map_err(Failure::Fault)
    }
}

impl Sim {
    pub fn new(schedule: Schedule) -> Self {
        Self {
            schedule,
            multiprocessors: 2,
            portable: false,
            planted: None,
        }
    }

    /// The `i`-th of some that differ in schedule and grid.
    pub fn unlike(i: usize) -> Self {
        Self {
            schedule: Schedule::UNLIKE[i % 4],
            multiprocessors: [2, 1, 3, 20][i % 4],
            portable: false,
            planted: None,
        }
    }

    /// Itself with and without the products of sm_90.
    pub fn both(self) -> [Self; 2] {
        [true, false].map(|portable| Self { portable, ..self })
    }

    /// Runs a call whose arguments must be good; a fault ends the test with its whole report.
    #[track_caller]
    pub fn go(&self, call: Result<Call<'_>, KernelError>) {
        let call = call.unwrap_or_else(|e| panic!("{e}"));
        match self.run(&call) {
            Ok(()) => {}
            Err(Failure::Fault(fault)) => panic!("{fault}"),
            Err(Failure::Refused(error)) => panic!("{error}"),
        }
    }
}

/// A buffer as an argument.
pub fn view<T: Pod>(buffer: &Buffer<T>) -> DeviceSlice<'_, T> {
    // SAFETY: the buffer outlives the view, and launches that write to it run one after another.
    unsafe { DeviceSlice::from_raw(buffer.ptr() as u64, buffer.len()) }
}

/// A buffer as a result.
pub fn view_mut<T: Pod>(buffer: &Buffer<T>) -> DeviceSliceMut<'_, T> {
    // SAFETY: as `view`; the executor finds accesses that a launch's threads do not order.
    unsafe { DeviceSliceMut::from_raw(buffer.mut_ptr() as u64, buffer.len()) }
}

/// A buffer's bytes, for comparisons that NaN and zeros must pass too.
pub fn bytes_of<T: Pod>(buffer: &Buffer<T>) -> Vec<u8> {
    bytemuck::cast_slice(&buffer.to_vec()).to_vec()
}

/// Asserts `|got − want| ≤ tolerance`, or that both are NaN, or the same infinity.
#[track_caller]
pub fn assert_close(got: f64, want: f64, tolerance: f64, what: impl Fn() -> String) {
    let same = got == want || (got.is_nan() && want.is_nan());
    assert!(
        same || (want.is_finite() && (got - want).abs() <= tolerance),
        "{}: got {got}, want {want} ± {tolerance}",
        what()
    );
}
