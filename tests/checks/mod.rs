//! Checks of every kernel through its wrapper, on any [`Backend`]. The `simt` crate's executor runs them in every
//! `cargo test`, so that they are right before a GPU sees them; `crates/tenp-model/tests/gpu.rs` runs them on a GPU.
//!
//! They are smoke and accuracy checks: what the executor alone can find (races, wrong bounds, missing waits) is looked
//! for in that crate's own tests.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "every test binary uses another part, and none is a library"
)]
#![allow(
    clippy::needless_range_loop,
    reason = "an element of several tables at once"
)]

pub mod attention;
pub mod batch;
pub mod bounds;
#[path = "../../crates/simt/tests/support/layer.rs"]
pub mod layer;
pub mod layer_sums;
pub mod memory;
pub mod plain_layer;
pub mod products;
pub mod repeats;
pub mod rotary;
pub mod rows;
pub mod segments;

use std::sync::atomic::{AtomicBool, Ordering};

use bytemuck::Pod;
use half::bf16;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tenp_kernels::KernelError;
use tenp_kernels::device::{Backend, Call, DeviceSlice, Memory as _};

/// How large a check's inputs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// A second or less on the executor: every awkward width.
    Small,
    /// Sizes of real models, for a GPU.
    Real,
}

/// Calls `$each!` with the name of every check of a backend: `fn(On<'_, B>, Size)`.
#[macro_export]
macro_rules! every_check {
    ($each:ident) => {
        $each! {
            batch::grouping_is_that_of_the_cpu,
            products::gate_up_and_down_of_every_tile,
            products::statistics_and_contributions,
            products::numbers_that_are_not_finite_stay_in_their_rows,
            layer_sums::a_scored_layer_is_that_of_the_cpu,
            layer_sums::shared_outputs_and_residuals_are_added,
            plain_layer::outputs_in_bf16_cost_no_more_than_activations_in_bf16,
            attention::prefill_of_ragged_sequences,
            attention::decode_with_and_without_splits,
            rows::norms,
            rows::routers,
            rotary::rotary_and_mla_keys,
            rows::elementwise,
            rows::embedding_and_conversions,
            rows::fp8_blocks,
            rows::gathered_rows,
            rows::scaled_rows,
            segments::packing,
            segments::norms_and_similarity,
            segments::clusters,
            memory::dense_products,
            memory::uploads_beside_work,
            memory::copies_keep_their_places,
            bounds::bad_arguments_are_named,
            repeats::products_have_the_same_bits,
            repeats::attention_has_the_same_bits,
            repeats::a_scored_layer_has_the_same_bits,
        }
    };
}

/// Widths around every tile and padding boundary.
pub const AWKWARD_WIDTHS: [usize; 10] = [0, 1, 7, 8, 63, 64, 65, 127, 128, 129];

/// Rounding to bf16 moves a number by at most this part of it.
pub const BF16_ROUNDING: f64 = 1.0 / 256.0;

/// The same of f32.
pub const F32_ROUNDING: f64 = 1.0 / 16_777_216.0;

/// Whether outputs are filled with 0xff bytes first, so that one that is never written is NaN. The executor knows by
/// itself what was written; compute-sanitizer's initcheck would take the fill for a result.
pub static POISON: AtomicBool = AtomicBool::new(false);

/// A backend as the checks use it: every failure ends the check.
#[derive(Debug)]
pub struct On<'b, B: Backend> {
    pub backend: &'b B,
    /// How often a check of repeats runs.
    pub repeats: usize,
}

impl<B: Backend> Clone for On<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for On<'_, B> {}

impl<'b, B: Backend> On<'b, B> {
    pub fn new(backend: &'b B, repeats: usize) -> Self {
        Self { backend, repeats }
    }

    pub fn input<T: Pod>(self, values: &[T]) -> B::Buffer<T> {
        let mut buffer = self.alloc(values.len());
        self.backend
            .write(buffer.view_mut(), values)
            .unwrap_or_else(|e| panic!("{e}"));
        buffer
    }

    pub fn filled<T: Pod>(self, value: T, len: usize) -> B::Buffer<T> {
        self.input(&vec![value; len])
    }

    /// For results; see [`POISON`].
    pub fn output<T: Pod>(self, len: usize) -> B::Buffer<T> {
        if !POISON.load(Ordering::Relaxed) {
            return self.alloc(len);
        }
        let mut values = vec![T::zeroed(); len];
        bytemuck::cast_slice_mut::<T, u8>(&mut values).fill(0xff);
        self.input(&values)
    }

    fn alloc<T: Pod>(self, len: usize) -> B::Buffer<T> {
        let buffer = self.backend.alloc("buffer of a check", len);
        buffer.unwrap_or_else(|e| panic!("{e}"))
    }

    #[track_caller]
    pub fn get<T: Pod>(self, view: DeviceSlice<'_, T>) -> Vec<T> {
        let mut values = vec![T::zeroed(); view.len()];
        self.backend
            .read(view, &mut values)
            .unwrap_or_else(|e| panic!("{e}"));
        values
    }

    #[track_caller]
    pub fn go(self, call: Result<Call<'_>, KernelError>) {
        let call = call.unwrap_or_else(|e| panic!("{e}"));
        self.backend.run(&call).unwrap_or_else(|e| panic!("{e}"));
    }

    #[track_caller]
    pub fn go_all(self, calls: Result<Vec<Call<'_>>, KernelError>) {
        for call in calls.unwrap_or_else(|e| panic!("{e}")) {
            self.go(Ok(call));
        }
    }
}

pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// `count` numbers in ±`scale` that bf16 holds exactly.
pub fn bf16_values(rng: &mut ChaCha8Rng, count: usize, scale: f32) -> Vec<bf16> {
    let values = f32_values(rng, count, scale);
    values.into_iter().map(bf16::from_f32).collect()
}

/// `count` numbers in ±`scale`.
pub fn f32_values(rng: &mut ChaCha8Rng, count: usize, scale: f32) -> Vec<f32> {
    (0..count)
        .map(|_| rng.random_range(-scale..scale))
        .collect()
}

pub fn widened(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|v| v.to_f32()).collect()
}

/// Sum of products, and how far a sum in f32 may be from it: in any order, and with tensor cores, which cut off instead
/// of rounding when they align the terms of one instruction.
pub fn dot(a: impl Iterator<Item = f64>, b: impl Iterator<Item = f64>) -> (f64, f64) {
    let (mut sum, mut size, mut count) = (0.0, 0.0, 1.0);
    for (a, b) in a.zip(b) {
        sum += a * b;
        size += (a * b).abs();
        count += 1.0;
    }
    (sum, 4.0 * count * F32_ROUNDING * size)
}

/// At most `count` of `0..len`, the first and the last among them.
pub fn sampled(len: usize, count: usize) -> Vec<usize> {
    if len <= count {
        return (0..len).collect();
    }
    let at = |i: usize| i * (len - 1) / (count - 1);
    (0..count).map(at).collect()
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

/// ‖got − want‖ / ‖want‖.
pub fn distance(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let off = square(&mut got.iter().zip(want).map(|(a, b)| a - b));
    off / square(&mut want.iter().copied()).max(f64::MIN_POSITIVE)
}
