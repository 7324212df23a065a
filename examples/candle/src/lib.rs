//! A MoE layer whose experts differ in width, in candle: [`RaggedExperts`] is a custom op over `tenp-kernels`, and
//! [`MoeLayer`] a layer of a `DeepSeek-V2` checkpoint (such as the project's `demo`, whole or pruned) that runs with it,
//! or with candle's own operations to compare.
//!
//! On the CPU, and with the feature `cuda` on an NVIDIA GPU.

pub mod compare;
#[cfg(feature = "cuda")]
mod cuda;
pub mod layer;
pub mod op;

pub use layer::MoeLayer;
pub use op::{Expert, RaggedExperts};
