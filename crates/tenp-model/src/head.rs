//! From hidden states to logits.

use tenp_checkpoint::{Checkpoint, ModelConfig};
use tenp_kernels::cpu::elementwise::all_finite;
use tenp_kernels::cpu::linear::linear;
use tenp_kernels::{Compute, MatrixView};

use crate::ModelError;
use crate::engine::Engine;
use crate::error::AtLayer;
use crate::forward::EMBEDDING;
use crate::weights::{non_finite, view};

/// The tensor that logits are made with.
pub(crate) fn head_name(config: &ModelConfig) -> &'static str {
    if config.tie_word_embeddings {
        EMBEDDING
    } else {
        "lm_head.weight"
    }
}

/// Rows whose logits are made at once: 64 MiB of them.
fn batch_rows(vocab_size: usize) -> usize {
    ((64 << 20) / 4 / vocab_size.max(1)).clamp(14, 4096)
}

/// Bytes of the logits of `rows` rows, as many as are made at once, and of the hidden states they are made of.
pub(crate) fn batch_bytes(config: &ModelConfig, rows: usize) -> usize {
    let values = config.vocab_size + config.hidden_size;
    size_of::<f32>() * batch_rows(config.vocab_size).min(rows) * values
}

/// The output head of a model (its embedding matrix, where the two are tied).
#[derive(Clone, Copy)]
pub struct Head<'c> {
    checkpoint: &'c Checkpoint,
    engine: Option<&'c dyn Engine>,
    name: &'static str,
    weight: MatrixView<'c>,
    compute: Compute,
    num_layers: usize,
}

impl<'c> Head<'c> {
    pub(crate) fn new(
        checkpoint: &'c Checkpoint,
        compute: Compute,
        engine: Option<&'c dyn Engine>,
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        let name = head_name(config);
        let weight = checkpoint.matrix(name, config.vocab_size, config.hidden_size)?;
        Ok(Self {
            checkpoint,
            engine,
            name,
            weight: view(&weight).at(config.num_layers)?,
            compute,
            num_layers: config.num_layers,
        })
    }

    /// Vocabulary size.
    pub fn vocab_size(&self) -> usize {
        self.weight.rows()
    }

    /// Logits `[rows, vocab]` of normed hidden states `[rows, H]`.
    ///
    /// # Errors
    /// A number of values that is no multiple of H; logits that are not finite.
    pub fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>, ModelError> {
        let mut out = vec![0.0; hidden.len() / self.weight.cols() * self.weight.rows()];
        match self.engine {
            Some(engine) => engine.logits(hidden, &mut out)?,
            None => {
                linear(self.compute, hidden, &self.weight, None, &mut out).at(self.num_layers)?;
            }
        }
        if all_finite(&out) {
            Ok(out)
        } else {
            Err(non_finite(
                self.checkpoint,
                "output head".to_owned(),
                |name| name == self.name || name == "model.norm.weight",
            ))
        }
    }

    /// Calls `visit(row, logits)` for each of `rows` of `hidden`, a bounded number of rows in memory at a time.
    ///
    /// # Errors
    /// As [`Self::logits`].
    pub fn for_each(
        &self,
        hidden: &[f32],
        rows: &[usize],
        mut visit: impl FnMut(usize, &[f32]),
    ) -> Result<(), ModelError> {
        let width = self.weight.cols();
        for rows in rows.chunks(batch_rows(self.vocab_size())) {
            let gathered: Vec<f32> = rows
                .iter()
                .flat_map(|&r| &hidden[r * width..(r + 1) * width])
                .copied()
                .collect();
            for (&row, logits) in rows
                .iter()
                .zip(self.logits(&gathered)?.chunks_exact(self.vocab_size()))
            {
                visit(row, logits);
            }
        }
        Ok(())
    }
}
