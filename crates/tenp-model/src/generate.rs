//! Greedy or sampled text generation with a key/value cache, of one text or of many together.

use std::ops::Range;

use tenp_checkpoint::ModelConfig;
use tenp_checkpoint::config::Attention;

use crate::{KvCache, Model, ModelError, Sequences};

/// Keys and values, in bytes of the CPU's cache, that prompts completed together may take.
const CACHE_BYTES: usize = 8 << 30;

/// Where a completion ends, if not at an end-of-sequence token.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of a completion.
    pub new_tokens: usize,
    /// Tokens of a prompt with its completion; at most the model's positions count.
    pub len: usize,
}

impl Limits {
    /// Tokens that may follow a prompt of `prompt` tokens.
    pub fn room(self, prompt: usize, config: &ModelConfig) -> usize {
        let len = self.len.min(config.max_positions);
        self.new_tokens.min(len.saturating_sub(prompt))
    }
}

/// Greedy completions of `prompts`, without the end-of-sequence token. Prompts go through the layers together, one token of
/// each a pass, so that a layer's weights are read once for all of them; as many at a time as their keys and values
/// allow. `advance` is told of every token.
///
/// # Errors
/// As [`Model::hidden_states`]; an empty prompt, or one longer than the model's positions.
pub fn complete(
    model: &Model<'_>,
    prompts: &[&[u32]],
    limits: Limits,
    advance: &dyn Fn(usize),
) -> Result<Vec<Vec<u32>>, ModelError> {
    let bytes: Vec<usize> = prompts
        .iter()
        .map(|prompt| {
            let room = limits.room(prompt.len(), model.config());
            (prompt.len() + room) * cached_bytes_per_token(model.config())
        })
        .collect();
    let mut completions = Vec::with_capacity(prompts.len());
    for batch in batches(&bytes, CACHE_BYTES) {
        completions.extend(complete_together(model, &prompts[batch], limits, advance)?);
    }
    Ok(completions)
}

/// Runs of items of at most `most` bytes together, or of one that has more.
fn batches(bytes: &[usize], most: usize) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut taken = 0;
    for (i, bytes) in bytes.iter().enumerate() {
        match batches.last_mut() {
            Some(batch) if taken + bytes <= most => {
                batch.end = i + 1;
                taken += bytes;
            }
            _ => {
                batches.push(i..i + 1);
                taken = *bytes;
            }
        }
    }
    batches
}

/// Bytes of a token's keys and values in all layers.
fn cached_bytes_per_token(config: &ModelConfig) -> usize {
    let values = match &config.attention {
        Attention::Mla {
            num_heads,
            nope_dim,
            rope_dim,
            v_dim,
            ..
        } => num_heads * (nope_dim + rope_dim + v_dim),
        Attention::Gqa {
            num_kv_heads,
            head_dim,
            ..
        } => 2 * num_kv_heads * head_dim,
    };
    4 * config.num_layers * values
}

/// Keys and values of `sequences` that are completed together, with `new_tokens` more each: all, or what is allowed.
pub(crate) fn most_cached_bytes(
    config: &ModelConfig,
    sequences: &Sequences,
    new_tokens: usize,
) -> usize {
    let more = new_tokens * sequences.spans().len();
    let all = (sequences.num_tokens() + more) * cached_bytes_per_token(config);
    all.min(CACHE_BYTES)
}

/// The same on a GPU, in bf16 and with as much room for each sequence of a batch as the longest takes.
pub(crate) fn most_cached_on_device(
    config: &ModelConfig,
    sequences: &Sequences,
    new_tokens: usize,
) -> usize {
    let position = cached_bytes_per_token(config);
    let lens = sequences.spans().iter();
    let lens: Vec<usize> = lens.map(|span| span.rows.len() + new_tokens).collect();
    let bytes: Vec<usize> = lens.iter().map(|len| len * position).collect();
    let batches = batches(&bytes, CACHE_BYTES).into_iter();
    let of = |batch: Range<usize>| {
        let longest = lens[batch.clone()].iter().max().copied().unwrap_or(0);
        batch.len() * crate::device::cache_room(longest) * position / 2
    };
    batches.map(of).max().unwrap_or(0)
}

fn complete_together(
    model: &Model<'_>,
    prompts: &[&[u32]],
    limits: Limits,
    advance: &dyn Fn(usize),
) -> Result<Vec<Vec<u32>>, ModelError> {
    let config = model.config();
    let room = |i: usize| limits.room(prompts[i].len(), config);
    let mut completions: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
    let mut going: Vec<bool> = (0..prompts.len()).map(|i| room(i) > 0).collect();
    let mut cache = KvCache::new(prompts.len());
    while going.contains(&true) {
        // One span for each cached sequence, empty where it has ended.
        let mut sequences = Sequences::default();
        let mut last_rows = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            match (going[i], completions[i].last()) {
                (false, _) => sequences.push_at(&[], 0),
                (true, None) => sequences.push_at(prompt, 0),
                (true, Some(&id)) => {
                    sequences.push_at(&[id], prompt.len() + completions[i].len() - 1)
                }
            };
            if going[i] {
                last_rows.push(sequences.num_tokens() - 1);
            }
        }
        let mut run = model.resume(&sequences, &mut cache)?;
        while run.step(&())? {}
        let hidden = run.finish()?;
        cache.reach(sequences.max_positions());
        let mut next = Vec::with_capacity(last_rows.len());
        let head = model.head()?;
        head.for_each(&hidden, &last_rows, |_, logits| next.push(arg_max(logits)))?;
        let sampled: Vec<usize> = (0..prompts.len()).filter(|&i| going[i]).collect();
        for (i, id) in sampled.into_iter().zip(next) {
            if config.eos_token_ids.contains(&id) {
                going[i] = false;
            } else {
                completions[i].push(id);
                advance(1);
                going[i] = completions[i].len() < room(i);
            }
        }
    }
    Ok(completions)
}

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
        self.cache.reach(sequences.max_positions());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_what_fits() {
        assert_eq!(
            batches(&[4, 4, 3, 20, 1, 9, 2], 10),
            [0..2, 2..3, 3..4, 4..6, 6..7]
        );
        assert!(batches(&[], 10).is_empty());
    }
}
