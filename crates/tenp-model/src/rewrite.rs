//! New weights for pruned layers: what copying rows and columns of the input cannot do.
//!
//! | what | where |
//! |---|---|
//! | merging dropped experts into the others | [`Dern`] |
//!
//! Each is a [`tenp_checkpoint::LayerRewriter`], which [`tenp_checkpoint::apply_rewritten`] asks for one layer at a time.

mod dern;
mod encode;

pub use dern::Dern;
