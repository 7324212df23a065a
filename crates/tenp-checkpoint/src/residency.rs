//! Reading a layer ahead and letting it go.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::checkpoint::Checkpoint;
use crate::names::layer_of;
use crate::shard::Shard;

/// Byte ranges of every layer's tensors, adjoining ones joined.
#[derive(Debug)]
pub(crate) struct LayerRanges(BTreeMap<usize, Vec<(usize, Range<usize>)>>);

impl LayerRanges {
    pub(crate) fn new(shards: &[Shard]) -> Self {
        let mut layers: BTreeMap<usize, Vec<(usize, Range<usize>)>> = BTreeMap::new();
        for (index, shard) in shards.iter().enumerate() {
            for entry in &shard.entries {
                let Some(layer) = layer_of(&entry.name) else {
                    continue;
                };
                let ranges = layers.entry(layer).or_default();
                match ranges.last_mut() {
                    Some((last, range)) if *last == index && range.end == entry.start => {
                        range.end = entry.end;
                    }
                    _ => ranges.push((index, entry.start..entry.end)),
                }
            }
        }
        Self(layers)
    }

    fn of(&self, layer: usize) -> impl Iterator<Item = &(usize, Range<usize>)> {
        self.0.get(&layer).into_iter().flatten()
    }
}

impl Checkpoint {
    /// Bytes of a layer's tensors; 0 for a layer that does not exist.
    pub fn layer_bytes(&self, layer: usize) -> u64 {
        self.ranges
            .of(layer)
            .map(|(_, range)| range.len() as u64)
            .sum()
    }

    /// Starts reading a layer's tensors into memory without waiting for them.
    pub fn prefetch_layer(&self, layer: usize) {
        for (shard, range) in self.ranges.of(layer) {
            self.shards[*shard].prefetch(range.clone());
        }
    }

    /// Lets go of a layer's pages. Touching them again reads them again. The system's file cache is left to the system:
    /// where memory is plenty, a second pass finds the file still there.
    pub fn release_layer(&self, layer: usize) {
        for (shard, range) in self.ranges.of(layer) {
            self.shards[*shard].release(range.clone());
        }
    }
}
