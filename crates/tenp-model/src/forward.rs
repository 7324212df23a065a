//! The pass over the layers, one resident at a time.

use std::time::Duration;

use tenp_checkpoint::config::{Attention, RopeScaling};
use tenp_checkpoint::{Checkpoint, ModelConfig};
use tenp_kernels::Compute;
use tenp_kernels::cpu::elementwise::all_finite;
use tenp_kernels::cpu::rotary::{RotaryScaling, RotaryTable};

use tenp_kernels::device::Backend;

use crate::cpu::{CpuModel, CpuPass};
use crate::device::DeviceModel;
use crate::engine::{Engine, Pass};
use crate::error::AtLayer;
use crate::head::Head;
use crate::weights::non_finite;
use crate::{KvCache, ModelError, Observer, Sequences, Spill};

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// A checkpoint that can be run.
#[derive(Clone, Copy)]
pub struct Model<'c> {
    checkpoint: &'c Checkpoint,
    compute: Compute,
    /// Where it runs, if not on the CPU.
    engine: Option<&'c dyn Engine>,
    /// Of hidden states on the CPU.
    spill: Option<&'c Spill>,
}

/// Memory that a pass takes on a GPU, without the sums of its samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WorkingBytes {
    /// On the host, beside the mapped file.
    pub(crate) host: usize,
    /// On the GPU: layers.
    pub(crate) weights: usize,
    /// There, while the pass goes on.
    pub(crate) pass: usize,
    /// Of that, the hidden states of a block.
    pub(crate) block_hidden: usize,
    /// There too, from the first logits on.
    pub(crate) head: usize,
    /// There, when the pass is over: logits, and what they are made of.
    pub(crate) logits: usize,
}

impl WorkingBytes {
    /// On the GPU while layers run.
    pub(crate) fn running(&self) -> usize {
        self.weights + self.pass
    }

    /// On the GPU in passes that logits are made behind.
    pub(crate) fn with_logits(&self) -> usize {
        self.weights + self.pass.max(self.logits) + self.head
    }
}

/// What passes on a GPU have waited for on the host. Kernels run while weights are waited for, so that of a run which the disk
/// holds up nearly all is the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waited {
    /// The next layer's weights being read and packed, everything else having been asked for.
    pub weights: Duration,
    /// Kernels and what they have summed, the next layer's weights having been sent.
    pub kernels: Duration,
}

/// A pass in progress: hidden states of all tokens after some layers.
pub struct Run<'s> {
    pass: Box<dyn Pass + 's>,
    hidden_size: usize,
}

impl Run<'_> {
    /// The layer that the next step runs.
    pub fn layer(&self) -> usize {
        self.pass.layer()
    }

    /// Runs one layer; false when there is none left. The next layer is read ahead meanwhile.
    ///
    /// # Errors
    /// Unreadable tensors, or activations that are not finite.
    pub fn step(&mut self, observer: &dyn Observer) -> Result<bool, ModelError> {
        self.pass.step(observer)
    }

    /// Width of the hidden states.
    pub(crate) fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// Goes on at `layer`, with the hidden states that are there or that [`Self::write_hidden`] puts there.
    pub(crate) fn skip_to(&mut self, layer: usize) {
        self.pass.skip_to(layer);
    }

    /// Copies the hidden states `[rows, H]` from `first_row` on.
    pub(crate) fn read_hidden(&self, first_row: usize, rows: &mut [f32]) -> Result<(), ModelError> {
        self.pass.read_hidden(first_row, rows)
    }

    /// Replaces them.
    pub(crate) fn write_hidden(
        &mut self,
        first_row: usize,
        rows: &[f32],
    ) -> Result<(), ModelError> {
        self.pass.write_hidden(first_row, rows)
    }

    /// Applies the final norm: `[tokens, H]`.
    ///
    /// # Errors
    /// The norm's tensor cannot be read.
    pub fn finish(self) -> Result<Vec<f32>, ModelError> {
        self.pass.finish()
    }
}

impl<'c> Model<'c> {
    /// A model over an opened checkpoint, run on the CPU.
    pub fn new(checkpoint: &'c Checkpoint, compute: Compute) -> Self {
        Self {
            checkpoint,
            compute,
            engine: None,
            spill: None,
        }
    }

    /// A model that runs on a backend, in bf16.
    pub fn on<'m, B: Backend + 'static>(device: &'m DeviceModel<'_, B>) -> Model<'m> {
        Model {
            checkpoint: device.checkpoint(),
            compute: Compute::Bf16,
            engine: Some(device),
            spill: None,
        }
    }

    /// The same model, whose hidden states go to a file where they are many. On a GPU they stay where they are.
    #[must_use]
    pub fn spilling(self, spill: &'c Spill) -> Self {
        Self {
            spill: Some(spill),
            ..self
        }
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &'c Checkpoint {
        self.checkpoint
    }

    /// Precision of the products.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// The model's shape.
    pub fn config(&self) -> &'c ModelConfig {
        self.checkpoint.config()
    }

    /// The output head.
    ///
    /// # Errors
    /// The head's tensor cannot be read.
    pub fn head(&self) -> Result<Head<'c>, ModelError> {
        Head::new(self.checkpoint, self.compute, self.engine)
    }

    /// Starts a pass over `sequences`.
    ///
    /// # Errors
    /// A token id outside the vocabulary, a sequence longer than the model's positions, an unreadable embedding.
    pub fn begin<'s>(&self, sequences: &'s Sequences) -> Result<Run<'s>, ModelError>
    where
        'c: 's,
    {
        let pass = self.pass(sequences, None)?;
        Ok(Run {
            pass,
            hidden_size: self.config().hidden_size,
        })
    }

    /// Starts a pass over sequences that continue those of `cache`, one each, and will be in it afterwards.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn resume<'s>(
        &self,
        sequences: &'s Sequences,
        cache: &'s mut KvCache,
    ) -> Result<Run<'s>, ModelError>
    where
        'c: 's,
    {
        let pass = self.pass(sequences, Some(cache))?;
        Ok(Run {
            pass,
            hidden_size: self.config().hidden_size,
        })
    }

    pub(crate) fn pass<'s>(
        &self,
        sequences: &'s Sequences,
        cache: Option<&'s mut KvCache>,
    ) -> Result<Box<dyn Pass + 's>, ModelError>
    where
        'c: 's,
    {
        sequences.check(self.config())?;
        Ok(match self.engine {
            Some(engine) => engine.begin(sequences, cache)?,
            None => Box::new(CpuPass::new(self.on_cpu(), sequences, cache)?),
        })
    }

    /// What decides the last bits of a pass, beside the machine.
    pub(crate) fn arithmetic(&self) -> String {
        let by = if self.engine.is_some() {
            "kernels, "
        } else {
            ""
        };
        format!("{by}{:?}", self.compute)
    }

    pub(crate) fn on_cpu(&self) -> CpuModel<'c> {
        CpuModel {
            checkpoint: self.checkpoint,
            compute: self.compute,
            spill: self.spill,
        }
    }

    /// Runs all layers and returns the normed hidden states `[tokens, H]`.
    ///
    /// # Errors
    /// As [`Self::begin`], [`Run::step`] and [`Run::finish`].
    pub fn hidden_states(
        &self,
        sequences: &Sequences,
        observer: &dyn Observer,
    ) -> Result<Vec<f32>, ModelError> {
        let mut run = self.begin(sequences)?;
        while run.step(observer)? {}
        run.finish()
    }

    /// Bytes of hidden states per token.
    pub fn hidden_bytes_per_token(&self) -> usize {
        4 * self.config().hidden_size
    }

    /// Bytes of hidden states that go to a file.
    pub fn spilled_bytes(&self, tokens: usize) -> usize {
        let hidden = tokens * self.hidden_bytes_per_token();
        let spills = |spill: &Spill| self.engine.is_none() && hidden as u64 > spill.over;
        if self.spill.is_some_and(spills) {
            hidden
        } else {
            0
        }
    }

    /// What a pass takes at most where an engine runs it.
    pub(crate) fn engine_bytes(
        &self,
        sequences: &Sequences,
        with_sums: bool,
    ) -> Option<WorkingBytes> {
        let engine = self.engine?;
        Some(engine.working_bytes(sequences, with_sums))
    }

    /// What passes have waited for so far, where a GPU runs them.
    pub fn waited(&self) -> Option<Waited> {
        self.engine.map(Engine::waited)
    }

    /// FLOP/s of a dense product on the GPU, where one runs the model.
    pub(crate) fn engine_rate(&self) -> Result<Option<f64>, ModelError> {
        self.engine.map(Engine::measured_rate).transpose()
    }

    /// Tokens of a block on the CPU; samples are grouped by it, wherever they run.
    pub(crate) fn block_tokens(&self) -> usize {
        self.on_cpu().block_tokens()
    }
}

/// Fills `rows`, `[tokens, H]`, with the embedding's rows of `ids`, which are in the vocabulary.
pub(crate) fn embed(
    checkpoint: &Checkpoint,
    ids: &[u32],
    rows: &mut [f32],
) -> Result<(), ModelError> {
    let config = checkpoint.config();
    let embedding = checkpoint.matrix(EMBEDDING, config.vocab_size, config.hidden_size)?;
    for (&id, row) in ids.iter().zip(rows.chunks_exact_mut(config.hidden_size)) {
        embedding.widen_row(id as usize, row);
    }
    if all_finite(rows) {
        Ok(())
    } else {
        Err(non_finite(checkpoint, "embedding".to_owned(), |name| {
            name == EMBEDDING
        }))
    }
}

/// The rotary table for `positions` positions, and the factor that YaRN puts on the softmax scale of MLA.
pub(crate) fn rotary(
    config: &ModelConfig,
    positions: usize,
) -> Result<(RotaryTable, f64), ModelError> {
    let (dim, mla) = match &config.attention {
        Attention::Mla { rope_dim, .. } => (*rope_dim, true),
        Attention::Gqa { rotary_dim, .. } => (*rotary_dim, false),
    };
    // arXiv 2309.00071 section 3.4, as DeepSeek-V2 uses it.
    let mscale = |factor: f64, m: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * m * factor.ln() + 1.0
        }
    };
    let (scaling, softmax) = match &config.rope.scaling {
        RopeScaling::None => (RotaryScaling::None, 1.0),
        RopeScaling::Linear { factor } => (RotaryScaling::Linear(*factor), 1.0),
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            mscale: m,
            mscale_all_dim,
            attention_factor,
            original_max_positions,
        } => {
            let both = m
                .filter(|m| *m != 0.0)
                .zip(mscale_all_dim.filter(|m| *m != 0.0));
            let attention_factor = attention_factor.unwrap_or(match both {
                Some((m, all)) => mscale(*factor, m) / mscale(*factor, all),
                None => mscale(*factor, 1.0),
            });
            let softmax = match mscale_all_dim {
                Some(all) if mla && *all != 0.0 => mscale(*factor, *all).powi(2),
                _ => 1.0,
            };
            let scaling = RotaryScaling::Yarn {
                factor: *factor,
                beta_fast: *beta_fast,
                beta_slow: *beta_slow,
                original_max_positions: *original_max_positions,
                attention_factor,
            };
            (scaling, softmax)
        }
    };
    let table = RotaryTable::new(
        dim,
        config.rope.theta,
        &scaling,
        config.rope.interleaved,
        positions,
    )
    .at(0)?;
    // MLA rotates the end of a head, everything else its beginning.
    let table = if mla {
        table
    } else {
        table.of_leading_elements()
    };
    Ok((table, softmax))
}
