//! Streaming forward pass of Mixture-of-Experts language models.
//!
//! One layer is resident at a time: its weights are read from the memory-mapped checkpoint, used for every token, and
//! let go; hidden states are all that is kept between layers. What runs on top of it:
//!
//! | what | where |
//! |---|---|
//! | token batches | [`sequences`] |
//! | the layer-by-layer pass | [`forward`] |
//! | the same on a GPU | [`device`] |
//! | calibration statistics | [`calibrate`] |
//! | likelihoods, perplexity, comparison with a reference | [`evaluate`] |
//! | what narrower experts would cost | [`sensitivity`] |
//! | new weights for pruned layers | [`rewrite`] |
//! | what a step holds in memory, and how long it computes | [`memory`], [`speed`] |
//! | text generation with a key/value cache | [`generate`] |
//! | tokenizer, chat template, data files | [`text`] |

mod attention;
mod cache;
pub mod calibrate;
pub mod candidates;
mod cpu;
pub mod device;
mod engine;
mod error;
pub mod evaluate;
pub mod forward;
pub mod generate;
mod head;
mod hidden;
pub mod memory;
mod mlp;
mod moments;
mod narrow;
mod observer;
pub mod rewrite;
pub mod sensitivity;
pub mod sequences;
pub mod speed;
pub mod text;
mod weights;

pub use cache::KvCache;
pub use error::ModelError;
pub use forward::{Model, Run, Waited};
pub use head::Head;
pub use hidden::Spill;
pub use observer::{BlockSums, Observer, RoutedActivations, WeightNorms};
pub use sequences::Sequences;
