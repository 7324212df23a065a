//! Keys and values of finished tokens, so that generation computes each token once.

/// Keys and values of every layer and sequence.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    layers: Vec<Vec<CachedSequence>>,
    len: usize,
}

/// Keys and values of one sequence in one layer, `[tokens, kv heads · head size]` each.
#[derive(Clone, Debug, Default)]
pub(crate) struct CachedSequence {
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
}

impl KvCache {
    /// An empty cache for `num_sequences` sequences.
    pub fn new(num_layers: usize, num_sequences: usize) -> Self {
        Self {
            layers: vec![vec![CachedSequence::default(); num_sequences]; num_layers],
            len: 0,
        }
    }

    /// Tokens of the first sequence that are in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is cached yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }

    pub(crate) fn layer(&mut self, layer: usize) -> &mut [CachedSequence] {
        &mut self.layers[layer]
    }
}
