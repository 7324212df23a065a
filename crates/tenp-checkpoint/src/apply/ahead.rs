//! Reading ahead of the writing, on a thread of its own and never far, and letting go behind it.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard};

use super::layout::{OutputTensor, Recipe};
use crate::{Checkpoint, CheckpointError};

/// Source bytes that are asked for at once.
const CHUNK_BYTES: usize = 8 << 20;

/// Far enough to keep a disk busy while a tensor is put together, near enough to be in memory still when its turn comes.
const AHEAD_BYTES: u64 = 256 << 20;

/// What is noted of an output tensor that has one source.
pub(super) const PLACE_BYTES: usize =
    size_of::<(usize, Range<usize>, u64)>() + size_of::<u64>() + size_of::<Option<usize>>();

/// The bytes of the source in the order in which they are needed.
pub(super) struct Ahead<'a> {
    checkpoint: &'a Checkpoint,
    /// Shard and range, with the bytes of all pieces before it.
    pieces: Vec<(usize, Range<usize>, u64)>,
    /// By output tensor: source bytes up to its end.
    ends: Vec<u64>,
    /// By output tensor: its layer.
    layers: Vec<Option<usize>>,
    /// Source bytes that are done with; all of them at the end.
    used: Mutex<u64>,
    moved: Condvar,
}

impl<'a> Ahead<'a> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        tensors: &[OutputTensor<'_>],
    ) -> Result<Self, CheckpointError> {
        let mut ahead = Self::of(checkpoint);
        for tensor in tensors {
            for bytes in sources(checkpoint, tensor)? {
                let found = checkpoint.shards.iter().enumerate();
                let place = found.filter_map(|(s, shard)| Some((s, shard.range_of(bytes)?)));
                place.for_each(|(shard, range)| ahead.push(shard, range));
            }
            ahead.end(crate::layer_of(&tensor.tensor.name));
        }
        Ok(ahead)
    }

    /// The same for shards that are copied whole, a chunk in place of a tensor.
    pub(super) fn of_chunks(checkpoint: &'a Checkpoint, chunks: &[(usize, Range<usize>)]) -> Self {
        let mut ahead = Self::of(checkpoint);
        for (shard, range) in chunks {
            ahead.push(*shard, range.clone());
            ahead.end(None);
        }
        ahead
    }

    fn of(checkpoint: &'a Checkpoint) -> Self {
        Self {
            checkpoint,
            pieces: Vec::new(),
            ends: Vec::new(),
            layers: Vec::new(),
            used: Mutex::new(0),
            moved: Condvar::new(),
        }
    }

    /// Bytes of all pieces so far.
    fn before(&self) -> u64 {
        let last = self.pieces.last();
        last.map_or(0, |(_, range, before)| before + range.len() as u64)
    }

    fn push(&mut self, shard: usize, range: Range<usize>) {
        self.pieces.push((shard, range, self.before()));
    }

    fn end(&mut self, layer: Option<usize>) {
        self.ends.push(self.before());
        self.layers.push(layer);
    }

    fn used(&self) -> MutexGuard<'_, u64> {
        self.used.lock().expect("nothing panics under this lock")
    }

    /// The thread's work, until everything is asked for or the writing is over.
    pub(super) fn read(&self) {
        for (shard, range, before) in &self.pieces {
            for start in range.clone().step_by(CHUNK_BYTES) {
                let chunk = start..range.end.min(start + CHUNK_BYTES);
                let end = before + (chunk.end - range.start) as u64;
                let mut used = self.used();
                while *used + AHEAD_BYTES < end {
                    used = self
                        .moved
                        .wait(used)
                        .expect("nothing panics under this lock");
                }
                // What was passed meanwhile, or is no longer wanted, is not read.
                if *used < end {
                    drop(used);
                    self.checkpoint.shards[*shard].prefetch(chunk);
                }
            }
        }
    }

    /// A tensor is done with. The source's pages of a layer go with its last: they would pile up in this process.
    pub(super) fn passed(&self, tensor: usize) {
        let before = tensor.checked_sub(1).and_then(|last| self.layers[last]);
        if let Some(finished) = before.filter(|_| before != self.layers[tensor]) {
            self.checkpoint.release_layer(finished);
        }
        let mut used = self.used();
        *used = (*used).max(self.ends[tensor]);
        self.moved.notify_one();
    }
}

/// Ends the reading when the writing ends, whichever way.
pub(super) struct EndOf<'a, 'b>(pub(super) &'a Ahead<'b>);

impl Drop for EndOf<'_, '_> {
    fn drop(&mut self) {
        *self.0.used() = u64::MAX - AHEAD_BYTES;
        self.0.moved.notify_one();
    }
}

/// The source's bytes that a tensor is made of.
fn sources<'c>(
    checkpoint: &'c Checkpoint,
    tensor: &OutputTensor<'c>,
) -> Result<Vec<&'c [u8]>, CheckpointError> {
    let expert = |layer, id, part| -> Result<&'c [u8], CheckpointError> {
        Ok(checkpoint.expert(layer, id)?.part(part).bytes)
    };
    Ok(match &tensor.recipe {
        Recipe::Copy(tensor) | Recipe::KeptExperts(tensor, _) => vec![tensor.bytes],
        Recipe::Expert {
            layer, plan, part, ..
        } => vec![expert(*layer, plan.id, *part)?],
        // Made from a matrix that is asked for by itself.
        Recipe::Scales(..) => Vec::new(),
        Recipe::FusedGateUp { .. } | Recipe::FusedDown { .. } => {
            let mut all = Vec::new();
            for own in tensor.recipe.experts() {
                if let Recipe::Expert {
                    layer, plan, part, ..
                } = own
                {
                    all.push(expert(layer, plan.id, part)?);
                }
            }
            all
        }
        Recipe::Shared { layer, part, .. } => {
            let name = checkpoint.spelling().shared(*layer, *part);
            vec![checkpoint.tensor(&name)?.bytes]
        }
    })
}
