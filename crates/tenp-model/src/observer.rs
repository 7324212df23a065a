//! What a pass over the layers shows to those who watch it.

use std::ops::Range;

use tenp_kernels::ExpertGroups;
use tenp_kernels::cpu::moe::{ExpertActivations, ExpertWeights};
use tenp_kernels::cpu::router::Routing;

use crate::ModelError;

/// One block of tokens at one MoE layer, as an [`Observer`] sees it.
pub struct MoeBlock<'a> {
    /// The model's own layer index.
    pub layer: usize,
    /// Number of the block in the layer, counted from 0 in the order of the tokens.
    pub index: usize,
    /// Label of the block's sequences (calibration domain).
    pub label: usize,
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// The routed experts' weights.
    pub experts: &'a [ExpertWeights<'a>],
    /// `[rows, H]` what the experts received.
    pub x: &'a [f32],
    /// `[rows, H]` residual stream before the layer's norm.
    pub residual: &'a [f32],
    /// Chosen experts and weights.
    pub routing: &'a Routing,
    /// The same, grouped by expert.
    pub groups: &'a ExpertGroups,
    /// h and y of every row.
    pub activations: &'a ExpertActivations,
    /// `[rows, H]` Σ g y of the routed experts.
    pub combined: &'a [f32],
}

/// Watches a pass over the layers. Blocks of one layer may come from several threads and in any order; layers come one
/// after another.
pub trait Observer: Sync {
    /// A MoE layer is about to run.
    ///
    /// # Errors
    /// Ends the pass.
    fn begin_moe(&self, _layer: usize, _experts: &[ExpertWeights<'_>]) -> Result<(), ModelError> {
        Ok(())
    }

    /// A MoE layer has run its routed experts on a block of tokens.
    ///
    /// # Errors
    /// Ends the pass.
    fn moe(&self, _block: &MoeBlock<'_>) -> Result<(), ModelError> {
        Ok(())
    }

    /// A MoE layer's whole output (routed and shared) for a block: `[rows, H]`.
    ///
    /// # Errors
    /// Ends the pass.
    fn moe_output(
        &self,
        _layer: usize,
        _rows: Range<usize>,
        _output: &[f32],
    ) -> Result<(), ModelError> {
        Ok(())
    }

    /// Whether [`Self::moe`] accumulates neuron sums, for which the expert outputs are kept in a second form.
    fn scores_neurons(&self) -> bool {
        false
    }

    /// `tokens` more rows have passed `layer`.
    fn progress(&self, _layer: usize, _tokens: usize) {}
}

/// Watches nothing.
impl Observer for () {}
