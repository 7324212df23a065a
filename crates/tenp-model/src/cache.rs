//! Keys and values of finished tokens, so that generation computes each token once.

use std::any::Any;

/// Keys and values of every layer and sequence, where the model that fills it keeps them.
#[derive(Default)]
pub struct KvCache {
    num_sequences: usize,
    len: usize,
    pub(crate) store: Store,
}

/// Where keys and values are.
#[derive(Default)]
pub(crate) enum Store {
    /// Nothing is cached yet.
    #[default]
    Empty,
    /// In host memory, by layer and sequence.
    Host(Vec<Vec<CachedSequence>>),
    /// With an engine of its own.
    Engine(Box<dyn Any>),
}

/// Keys and values of one sequence in one layer, `[tokens, kv heads · head size]` each.
#[derive(Clone, Debug, Default)]
pub(crate) struct CachedSequence {
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
}

impl KvCache {
    /// An empty cache for `num_sequences` sequences.
    pub fn new(num_sequences: usize) -> Self {
        Self {
            num_sequences,
            ..Self::default()
        }
    }

    /// Tokens of the longest sequence that are in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is cached yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn num_sequences(&self) -> usize {
        self.num_sequences
    }

    /// Notes that the longest sequence now has `len` tokens in the cache, unless it had more before.
    pub(crate) fn reach(&mut self, len: usize) {
        self.len = self.len.max(len);
    }

    /// The host's sequences of a layer.
    ///
    /// # Panics
    /// If another engine has filled the cache: a cache belongs to the model that was first run with it.
    pub(crate) fn host_layer(&mut self, layer: usize, num_layers: usize) -> &mut [CachedSequence] {
        if matches!(self.store, Store::Empty) {
            let layer = vec![CachedSequence::default(); self.num_sequences];
            self.store = Store::Host(vec![layer; num_layers]);
        }
        let Store::Host(layers) = &mut self.store else {
            panic!("a cache belongs to the model that was first run with it");
        };
        &mut layers[layer]
    }
}
