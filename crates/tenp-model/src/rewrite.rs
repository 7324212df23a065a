//! New weights for pruned layers: what copying rows and columns of the input cannot do.
//!
//! | what | where |
//! |---|---|
//! | merging dropped experts into the others | [`Dern`] |
//! | fitting what narrowed experts put out | [`LeastSquares`], [`Rescale`] |
//!
//! Each is a [`tenp_checkpoint::LayerRewriter`], which [`tenp_checkpoint::apply_rewritten`] asks for one layer at a time.

mod dern;
mod encode;
mod recover;
mod rescale;

pub use dern::Dern;
pub use recover::{LeastSquares, RecoverOptions};
pub(crate) use recover::{
    fits_at_once, held_moments, operations as fit_operations, rate as fit_rate, runs_for_moments,
};
pub use rescale::Rescale;
