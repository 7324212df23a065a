//! What a pass over the layers shows to those who watch it.

use std::ops::Range;

use tenp_kernels::cpu::direction::ExpertSums;
use tenp_kernels::cpu::moe::ExpertActivations;
use tenp_kernels::cpu::neuron::NeuronSums;
use tenp_kernels::{ExpertGroups, RaggedLayout};

use crate::ModelError;

/// Squared weight norms of a layer's neurons, `[Σ widths]` in the order of the layer's [`RaggedLayout`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WeightNorms {
    /// ‖gate row‖² + ‖up row‖² + ‖down column‖².
    pub whole: Vec<f64>,
    /// ‖down column‖².
    pub down: Vec<f64>,
}

/// Sums over some tokens of one label at one MoE layer (`docs/methods.md` section 2).
#[derive(Clone, Debug)]
pub struct BlockSums {
    /// Label of the tokens' sequences (calibration domain).
    pub label: usize,
    /// Tokens that went through the layer.
    pub num_tokens: usize,
    /// By expert.
    pub experts: Vec<ExpertSums>,
    /// By neuron.
    pub neurons: NeuronSums,
}

/// What the routed experts of a MoE layer computed for a block.
#[derive(Clone, Copy, Debug)]
pub struct RoutedActivations<'a> {
    /// Which tokens of the block went to which experts.
    pub groups: &'a ExpertGroups,
    /// Activations h and outputs y.
    pub activations: &'a ExpertActivations,
}

/// Watches a pass over the layers. Blocks of one layer may come from several threads and in any order; layers come one
/// after another.
pub trait Observer: Sync {
    /// Whether the pass makes the sums that [`Self::begin_sums`] and [`Self::sums`] take.
    fn wants_sums(&self) -> bool {
        false
    }

    /// A MoE layer whose sums are wanted is about to run.
    ///
    /// # Errors
    /// Ends the pass.
    fn begin_sums(
        &self,
        _layer: usize,
        _layout: &RaggedLayout,
        _norms: WeightNorms,
    ) -> Result<(), ModelError> {
        Ok(())
    }

    /// Sums over block `index` of a MoE layer, counted from 0 in the order of the tokens.
    ///
    /// # Errors
    /// Ends the pass.
    fn sums(&self, _layer: usize, _index: usize, _sums: BlockSums) -> Result<(), ModelError> {
        Ok(())
    }

    /// Whether [`Self::routed`] and [`Self::moe_output`] are of interest.
    fn wants_outputs(&self) -> bool {
        false
    }

    /// The experts that a MoE layer chose for a block of tokens: `[rows, top_k]`.
    ///
    /// # Errors
    /// Ends the pass.
    fn routed(
        &self,
        _layer: usize,
        _rows: Range<usize>,
        _expert_ids: &[u32],
    ) -> Result<(), ModelError> {
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

    /// Whether [`Self::activations`] is of interest. Passes on a GPU have none to show.
    fn wants_activations(&self) -> bool {
        false
    }

    /// A MoE layer's routed activations for a block. Blocks come one after another, in the order of the tokens.
    ///
    /// # Errors
    /// Ends the pass.
    fn activations(
        &self,
        _layer: usize,
        _rows: Range<usize>,
        _routed: &RoutedActivations<'_>,
    ) -> Result<(), ModelError> {
        Ok(())
    }

    /// `tokens` more rows have passed `layer`.
    fn progress(&self, _layer: usize, _tokens: usize) {}
}

/// Watches nothing.
impl Observer for () {}
