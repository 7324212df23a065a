//! Writing the tensors, shard by shard; shards that an earlier run has written stay.

use std::path::Path;

use super::ApplyOptions;
use super::ahead::{Ahead, EndOf};
use super::gather;
use super::layout::OutputTensor;
use crate::atomic::Sink;
use crate::work::Work;
use crate::writer::{Source, WrittenShards, write_from};
use crate::{CheckpointError, PlannedTensor};

/// How far the shards are.
pub(super) struct Copying<'a> {
    work: &'a mut Work,
    /// Shards that were there.
    pub(super) kept: usize,
    done: u64,
    /// Bytes in all.
    pub(super) total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<'a> Copying<'a> {
    pub(super) fn new(
        work: &'a mut Work,
        total: u64,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Self {
        Self {
            work,
            kept: 0,
            done: 0,
            total,
            progress,
        }
    }

    /// Counts `bytes` more.
    pub(super) fn advance(&mut self, bytes: u64) {
        // Headers of shards that were there are not counted in the total.
        self.done = (self.done + bytes).min(self.total);
        (self.progress)(self.done, self.total);
    }

    /// Whether a shard is there, whole: it got its name when it was.
    pub(super) fn keeps(&mut self, shard: &Path, num_bytes: u64) -> bool {
        let keeps = shard.metadata().is_ok_and(|file| file.len() == num_bytes);
        if keeps {
            self.kept += 1;
            self.advance(num_bytes);
        }
        keeps
    }

    /// The next shard is whole: from here on there is something to go on with.
    pub(super) fn completed(&mut self) -> Result<(), CheckpointError> {
        self.work.begin()
    }
}

pub(super) fn write(
    source: gather::Source<'_>,
    tensors: &[OutputTensor<'_>],
    planned: &[PlannedTensor],
    options: &ApplyOptions,
    dir: &Path,
    copying: &mut Copying<'_>,
) -> Result<WrittenShards, CheckpointError> {
    copying.advance(0);
    let ahead = Ahead::new(source.checkpoint, tensors)?;
    let mut gathering = Gathering {
        source,
        tensors,
        copying,
        ahead: &ahead,
    };
    std::thread::scope(|scope| {
        let _end = EndOf(&ahead);
        scope.spawn(|| ahead.read());
        write_from(dir, planned, options.shard_bytes, &mut gathering)
    })
}

struct Gathering<'a, 'c> {
    source: gather::Source<'a>,
    tensors: &'a [OutputTensor<'a>],
    copying: &'a mut Copying<'c>,
    ahead: &'a Ahead<'a>,
}

impl Source for Gathering<'_, '_> {
    fn fill(&mut self, index: usize, sink: &mut Sink<'_>) -> Result<(), CheckpointError> {
        self.source.checkpoint.check_stop()?;
        let output = &self.tensors[index];
        self.source.make(&output.recipe, sink)?;
        self.ahead.passed(index);
        self.copying.advance(output.tensor.num_bytes());
        Ok(())
    }

    fn keeps(&mut self, shard: &Path, num_bytes: u64, tensors: &[usize]) -> bool {
        let keeps = self.copying.keeps(shard, num_bytes);
        if keeps {
            for tensor in tensors {
                self.ahead.passed(*tensor);
            }
        }
        keeps
    }

    fn completed(&mut self) -> Result<(), CheckpointError> {
        self.copying.completed()
    }
}
