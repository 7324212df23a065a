//! Kernels for Mixture-of-Experts layers whose experts differ in width.
//!
//! | module | what is in it |
//! |---|---|
//! | [`matrix`] | [`MatrixView`]: a weight matrix as it lies in a checkpoint (f32, f16, bf16 or block-scaled fp8, any alignment) |
//! | [`layout`] | [`RaggedLayout`] of neurons, [`ExpertGroups`]: the routed rows of every expert |
//! | [`cpu`] | every operation of a streaming forward pass and of the scoring, on the CPU |
//! | [`cost`] | FLOPs, bytes and floor times of the operations |
//! | [`params`] | what the CUDA kernels are called with, as the C header declares it |
//! | [`device`] | weights as the CUDA kernels want them, launch geometry; with the feature `cuda` the GPU itself |
//!
//! All CPU operations keep one promise: a row of a result depends on that row's inputs only, and every sum runs in a
//! fixed order. So results do not depend on the batch, on the number of threads, or (in f32) on the instruction set.

pub mod cost;
pub mod cpu;
pub mod device;
pub mod error;
mod fp8;
pub mod layout;
pub mod matrix;
pub mod params;

pub use error::KernelError;
pub use fp8::FP8_BLOCK;
pub use layout::{ExpertGroups, RaggedLayout};
pub use matrix::{Dtype, MatrixView};

/// Precision of the matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compute {
    /// Weights widened to f32, products and sums in f32.
    F32,
    /// Both factors rounded to bf16 (nearest even), sums in f32.
    Bf16,
}
