//! Writing the tensors, shard by shard; shards that an earlier run has written stay.

use std::path::Path;
use std::sync::mpsc;

use super::ApplyOptions;
use super::ahead::{Ahead, EndOf};
use super::gather::{self, Receiver};
use super::layout::OutputTensor;
use crate::atomic::Sink;
use crate::work::Work;
use crate::writer::{Source, WrittenShards, write_from};
use crate::{Checkpoint, CheckpointError, PlannedTensor, TensorView};

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

/// Pieces that are made and wait for the writer. In fp8 it is the scales of the matrix that is being written, while the next
/// matrix is made.
pub(super) const WAITING_PIECES: usize = 1;

/// What the writer takes next.
enum Piece<'a> {
    Bytes(Vec<u8>),
    /// A tensor of the source as it is, which the system copies.
    Tensor(TensorView<'a>),
    /// There is no next one.
    Failed(CheckpointError),
}

pub(super) fn write<'a>(
    source: gather::Source<'a>,
    tensors: &[OutputTensor<'a>],
    planned: &[PlannedTensor],
    options: &ApplyOptions,
    dir: &Path,
    copying: &mut Copying<'_>,
) -> Result<WrittenShards, CheckpointError> {
    copying.advance(0);
    let checkpoint = source.checkpoint();
    let ahead = Ahead::new(checkpoint, tensors)?;
    std::thread::scope(|scope| {
        let _end = EndOf(&ahead);
        scope.spawn(|| ahead.read());
        let (orders, ordered) = mpsc::channel();
        let (made, pieces) = mpsc::sync_channel(WAITING_PIECES);
        let making = Making { source, made };
        scope.spawn(move || making.run(tensors, &ordered));
        let mut writing = Writing {
            checkpoint,
            tensors,
            copying,
            ahead: &ahead,
            orders,
            pieces,
        };
        write_from(dir, planned, options.shard_bytes, &mut writing)
    })
}

/// The thread that makes tensors while others are written. It ends when nobody takes pieces or orders tensors any more.
struct Making<'a> {
    source: gather::Source<'a>,
    made: mpsc::SyncSender<Piece<'a>>,
}

impl<'a> Making<'a> {
    fn run(mut self, tensors: &[OutputTensor<'a>], ordered: &mpsc::Receiver<Vec<usize>>) {
        for index in ordered.iter().flatten() {
            let recipe = &tensors[index].recipe;
            if let Err(error) = self.source.make(recipe, &mut Waiting(&self.made)) {
                // Nobody to tell is a writer that has an error of its own.
                let _ = self.made.send(Piece::Failed(error));
                return;
            }
        }
    }
}

/// The way to the writer.
struct Waiting<'w, 'a>(&'w mpsc::SyncSender<Piece<'a>>);

impl<'a> Waiting<'_, 'a> {
    fn send(&self, piece: Piece<'a>) -> Result<(), CheckpointError> {
        // A writer that is gone has an error of its own to tell.
        self.0.send(piece).map_err(|_| CheckpointError::Interrupted)
    }
}

impl<'a> Receiver<'a> for Waiting<'_, 'a> {
    fn take(&mut self, bytes: Vec<u8>) -> Result<(), CheckpointError> {
        self.send(Piece::Bytes(bytes))
    }

    fn take_tensor(&mut self, tensor: TensorView<'a>) -> Result<(), CheckpointError> {
        self.send(Piece::Tensor(tensor))
    }
}

struct Writing<'a, 'c> {
    checkpoint: &'a Checkpoint,
    tensors: &'a [OutputTensor<'a>],
    copying: &'a mut Copying<'c>,
    ahead: &'a Ahead<'a>,
    /// Positions of the tensors to make, shard by shard.
    orders: mpsc::Sender<Vec<usize>>,
    pieces: mpsc::Receiver<Piece<'a>>,
}

impl Source for Writing<'_, '_> {
    fn begins(&mut self, tensors: &[usize]) {
        // Where nobody makes them, `fill` finds out.
        let _ = self.orders.send(tensors.to_vec());
    }

    fn fill(&mut self, index: usize, sink: &mut Sink<'_>) -> Result<(), CheckpointError> {
        self.checkpoint.check_stop()?;
        let end = sink.written() + self.tensors[index].tensor.num_bytes();
        while sink.written() < end {
            match self.pieces.recv() {
                Ok(Piece::Bytes(bytes)) => sink.write(&bytes)?,
                Ok(Piece::Tensor(tensor)) => self.checkpoint.copy(&tensor, sink)?,
                Ok(Piece::Failed(error)) => return Err(error),
                Err(mpsc::RecvError) => return Err(CheckpointError::Interrupted),
            }
        }
        self.ahead.passed(index);
        self.copying.advance(self.tensors[index].tensor.num_bytes());
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
