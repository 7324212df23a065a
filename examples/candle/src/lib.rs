//! A MoE layer whose experts differ in width, in candle: [`RaggedExperts`] is a custom op over `tenp-kernels`, and
//! [`MoeLayer`] a layer of a `DeepSeek-V2` checkpoint (such as the project's `demo`, whole or pruned) that runs with it,
//! or with candle's own operations to compare.
//!
//! On the CPU. candle's `cuda` links the driver when the program is built, `tenp-kernels` loads it when the program
//! runs, and cudarc, which both go through, refuses to do both in one program: so a GPU is out of this op's reach.

pub mod compare;
pub mod layer;
pub mod op;

pub use layer::MoeLayer;
pub use op::{Expert, RaggedExperts};
