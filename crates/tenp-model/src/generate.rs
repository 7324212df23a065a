//! Greedy or sampled text generation with a key/value cache.

use crate::{KvCache, Model, ModelError, Sequences};

/// Generation in progress.
pub struct Generator<'c> {
    model: Model<'c>,
    cache: KvCache,
}

impl<'c> Generator<'c> {
    /// A generator with an empty cache.
    pub fn new(model: Model<'c>) -> Self {
        Self {
            cache: KvCache::new(1),
            model,
        }
    }

    /// Feeds `ids` after what was fed before and returns the logits `[vocab]` after the last of them.
    ///
    /// # Errors
    /// As [`Model::hidden_states`]; no ids at all, or more than the model has positions for.
    pub fn feed(&mut self, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        let mut sequences = Sequences::default();
        sequences.push_at(ids, self.cache.len());
        let mut run = self.model.resume(&sequences, &mut self.cache)?;
        while run.step(&())? {}
        let hidden = run.finish()?;
        self.cache.advance(ids.len());
        let width = self.model.config().hidden_size;
        self.model
            .head()?
            .logits(&hidden[hidden.len().saturating_sub(width)..])
    }

    /// Tokens fed so far.
    pub fn position(&self) -> usize {
        self.cache.len()
    }
}

/// Index of the largest logit, the lowest of equals.
pub fn arg_max(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in logits.iter().enumerate() {
        if *v > logits[best] {
            best = i;
        }
    }
    best as u32
}
