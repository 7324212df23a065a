//! Where a model runs: the CPU, or an engine that brings its own memory.

use tenp_checkpoint::ExpertTensors;

use crate::forward::{Waited, WorkingBytes};
use crate::moments::{ExpertMoments, MomentsWanted};
use crate::{KvCache, ModelError, Observer, Sequences};

/// Runs a checkpoint's layers and head somewhere else than on the CPU.
pub(crate) trait Engine {
    /// Starts a pass over `sequences`, which the caller has checked, behind what `cache` holds.
    fn begin<'s>(
        &'s self,
        sequences: &'s Sequences,
        cache: Option<&'s mut KvCache>,
    ) -> Result<Box<dyn Pass + 's>, ModelError>;

    /// What a pass over `sequences` takes at most, with a calibration's sums of a block or without.
    fn working_bytes(&self, sequences: &Sequences, with_sums: bool) -> WorkingBytes;

    /// Time that its passes have waited so far.
    fn waited(&self) -> Waited;

    /// FLOP/s of a dense product, measured for a fraction of a second.
    fn measured_rate(&self) -> Result<f64, ModelError>;

    /// Logits `[rows, vocab]` of normed hidden states `[rows, H]`.
    fn logits(&self, hidden: &[f32], out: &mut [f32]) -> Result<(), ModelError>;
}

/// A pass in progress: hidden states of all tokens after some layers.
pub(crate) trait Pass {
    /// The layer that the next step runs.
    fn layer(&self) -> usize;

    /// Runs one layer; false when there is none left.
    fn step(&mut self, observer: &dyn Observer) -> Result<bool, ModelError>;

    /// Runs one layer with some experts replaced. Its pages stay, as other passes may want the same layer next.
    fn step_with(&mut self, experts: &[(usize, ExpertTensors<'_>)]) -> Result<(), ModelError>;

    /// Collects moments, by expert, of the MoE layer that the next step runs, and stays before it.
    fn moments(&mut self, wanted: &MomentsWanted<'_>) -> Result<Vec<ExpertMoments>, ModelError>;

    /// Goes on at `layer`, with the hidden states that are there.
    fn skip_to(&mut self, layer: usize);

    /// Copies the hidden states `[rows, H]` from `first_row` on.
    fn read_hidden(&self, first_row: usize, rows: &mut [f32]) -> Result<(), ModelError>;

    /// Replaces them.
    fn write_hidden(&mut self, first_row: usize, rows: &[f32]) -> Result<(), ModelError>;

    /// Applies the final norm: `[tokens, H]`.
    fn finish(self: Box<Self>) -> Result<Vec<f32>, ModelError>;
}
