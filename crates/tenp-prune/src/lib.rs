//! Which experts and neurons of a Mixture-of-Experts checkpoint to keep: pure decisions, from calibration statistics
//! to scores to a plan. No files are opened and no weights are read here.
//!
//! | module | what it answers |
//! |---|---|
//! | [`score`] | how much does an expert matter to its layer, a neuron to its expert? |
//! | [`allocate`] | how many neurons does each expert keep, so that the total is exact? |
//! | [`plan()`] | which experts stay whole, which neurons of the others stay? |
//! | [`accounting()`] | what share of parameters, arithmetic and bytes is that? |
//!
//! ```
//! use tenp_prune::{Method, PlanRequest};
//!
//! let request = PlanRequest { method: Method::Tenp, keep: 0.6, ..PlanRequest::default() };
//! assert_eq!(request.method.to_string(), "tenp");
//! // let plan = tenp_prune::plan(&config, &size, &fingerprint, &statistics, &request)?;
//! ```
//!
//! Formulas and their sources are in `docs/methods.md`. Everything is computed in a fixed order on one thread, so the
//! same arguments give the same plan everywhere.

#![forbid(unsafe_code)]

pub mod allocate;
pub mod calibration;
pub mod score;

mod accounting;
mod error;
mod names;
mod needs;
mod plan;
mod record;
mod request;
mod rescale;
mod stability;

pub use accounting::{ModelSize, accounting};
pub use calibration::Calibration;
pub use error::PruneError;
pub use names::{ErrorScale, ExpertScore, Method, NeuronScore};
pub use plan::{neuron_orders, plan};
pub use request::{
    Allocation, AlphaTried, DEFAULT_LAMBDA, DEFAULT_SLOPE, DEFAULT_THRESHOLD,
    DEFAULT_THRESHOLD_WITHIN, DernRequest, PlanRequest, alpha_candidates,
};
pub use rescale::rescale_factors;
pub use stability::{LayerStability, Stability, rank_correlation, stability};
