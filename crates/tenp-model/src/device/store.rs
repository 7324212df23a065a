//! Weights on their way: from the mapped file into staging memory, from there to where the kernels run.
//!
//! While a layer computes, the next one is packed into staging memory on other threads; its upload runs beside the
//! kernels that are still at work. At most two layers are resident, unless all of them fit.

use std::collections::VecDeque;
use std::rc::Rc;

use tenp_checkpoint::{Checkpoint, ExpertTensors};
use tenp_kernels::KernelError;
use tenp_kernels::device::Backend;

use super::arena::Contents;
use super::layer::LayerWeights;
use crate::ModelError;
use crate::error::AtLayer;

/// A layer whose weights can be read by kernels.
pub(super) struct Loaded<B: Backend> {
    pub(super) weights: LayerWeights,
    pub(super) arena: B::Buffer<u8>,
}

/// A layer that is being packed.
pub(super) struct Staged<'c, B: Backend> {
    layer: usize,
    weights: LayerWeights,
    /// Where the layer will go: taken before this layer's kernels are asked for, so that the upload need not wait for them.
    arena: B::Idle,
    pub(super) filling: Filling<'c, B>,
}

/// The part of it that another thread works on.
pub(super) struct Filling<'c, B: Backend> {
    checkpoint: &'c Checkpoint,
    layer: usize,
    contents: Contents<'c>,
    staging: B::Staging,
}

impl<B: Backend> Filling<'_, B> {
    /// Packs the layer. Its pages are let go, those of the layer behind it are asked for.
    pub(super) fn fill(&mut self) -> Result<(), KernelError> {
        let checkpoint = self.checkpoint;
        let next = self.layer + 1;
        std::thread::scope(|scope| {
            scope.spawn(move || checkpoint.prefetch_layer(next));
            self.contents.write(B::staging_bytes(&mut self.staging)?)
        })?;
        checkpoint.release_layer(self.layer);
        Ok(())
    }
}

/// An upload under way.
struct Pending<B: Backend> {
    layer: usize,
    weights: LayerWeights,
    transfer: B::Transfer,
}

/// Where a model's layers are.
pub(super) struct Store<B: Backend> {
    /// Layers that stay, where all of them fit.
    resident: Vec<Option<Rc<Loaded<B>>>>,
    keeps: bool,
    total_bytes: u64,
    /// Bytes of the largest layer.
    layer_bytes: usize,
    staging: VecDeque<B::Staging>,
    num_staging: usize,
    arenas: Vec<B::Idle>,
    pending: Option<Pending<B>>,
}

impl<B: Backend> Store<B> {
    /// Finds every tensor of the model; all layers stay once they are there if together they take at most
    /// `resident_bytes`.
    pub(super) fn new(checkpoint: &Checkpoint, resident_bytes: u64) -> Result<Self, ModelError> {
        let num_layers = checkpoint.config().num_layers;
        let (mut largest, mut total) = (0, 0u64);
        for layer in 0..num_layers {
            let bytes = LayerWeights::find(checkpoint, layer, &[])?.1.bytes();
            largest = largest.max(bytes);
            total += bytes as u64;
        }
        Ok(Self {
            resident: (0..num_layers).map(|_| None).collect(),
            keeps: total <= resident_bytes,
            total_bytes: total,
            layer_bytes: largest,
            staging: VecDeque::new(),
            num_staging: 0,
            arenas: Vec::new(),
            pending: None,
        })
    }

    /// Bytes of the largest layer.
    pub(super) fn layer_bytes(&self) -> usize {
        self.layer_bytes
    }

    /// Bytes of all layers, where all of them stay.
    pub(super) fn resident_bytes(&self) -> Option<usize> {
        self.keeps.then_some(self.total_bytes as usize)
    }

    /// Begins to stage `layer`, unless there is no such layer or it is there already.
    pub(super) fn stage<'c>(
        &mut self,
        backend: &B,
        checkpoint: &'c Checkpoint,
        layer: usize,
    ) -> Result<Option<Staged<'c, B>>, ModelError> {
        if self.resident.get(layer).is_none_or(Option::is_some) {
            return Ok(None);
        }
        self.stage_with(backend, checkpoint, layer, &[]).map(Some)
    }

    fn stage_with<'c>(
        &mut self,
        backend: &B,
        checkpoint: &'c Checkpoint,
        layer: usize,
        replaced: &[(usize, ExpertTensors<'c>)],
    ) -> Result<Staged<'c, B>, ModelError> {
        let (weights, contents) = LayerWeights::find(checkpoint, layer, replaced)?;
        // Two in turn: one is packed while the other is still being read by its upload.
        let staging = if self.num_staging < 2 {
            self.num_staging += 1;
            backend.staging(self.layer_bytes).at(layer)?
        } else {
            let oldest = self.staging.pop_front();
            oldest
                .expect("one layer is staged at a time, and its memory comes back with its upload")
        };
        let arena = if let Some(arena) = self.arenas.pop() {
            arena
        } else {
            let room = if self.keeps {
                contents.bytes()
            } else {
                self.layer_bytes
            };
            let arena = backend.alloc("a layer's weights", room).at(layer)?;
            backend.idle(arena).at(layer)?
        };
        Ok(Staged {
            layer,
            weights,
            arena,
            filling: Filling {
                checkpoint,
                layer,
                contents,
                staging,
            },
        })
    }

    /// Starts the upload of a layer that has been packed.
    pub(super) fn send(&mut self, backend: &B, staged: Staged<'_, B>) -> Result<(), ModelError> {
        let Staged {
            layer,
            weights,
            arena,
            filling,
        } = staged;
        let bytes = filling.contents.bytes();
        let transfer = backend
            .start_transfer(filling.staging, arena, bytes)
            .at(layer)?;
        self.pending = Some(Pending {
            layer,
            weights,
            transfer,
        });
        Ok(())
    }

    /// The weights of `layer`, for kernels asked for from now on.
    pub(super) fn load(
        &mut self,
        backend: &B,
        checkpoint: &Checkpoint,
        layer: usize,
    ) -> Result<Rc<Loaded<B>>, ModelError> {
        if let Some(Some(loaded)) = self.resident.get(layer) {
            return Ok(Rc::clone(loaded));
        }
        if self.pending.as_ref().is_none_or(|p| p.layer != layer) {
            self.drop_pending(backend).at(layer)?;
            if let Some(mut staged) = self.stage(backend, checkpoint, layer)? {
                staged.filling.fill().at(layer)?;
                self.send(backend, staged)?;
            }
        }
        let loaded = self.arrive(backend, layer)?;
        if self.keeps {
            self.resident[layer] = Some(Rc::clone(&loaded));
        }
        Ok(loaded)
    }

    /// The weights of `layer` with some experts replaced; never kept for another pass.
    pub(super) fn load_with(
        &mut self,
        backend: &B,
        checkpoint: &Checkpoint,
        layer: usize,
        replaced: &[(usize, ExpertTensors<'_>)],
    ) -> Result<Rc<Loaded<B>>, ModelError> {
        self.drop_pending(backend).at(layer)?;
        let mut staged = self.stage_with(backend, checkpoint, layer, replaced)?;
        staged.filling.fill().at(layer)?;
        self.send(backend, staged)?;
        self.arrive(backend, layer)
    }

    /// What was sent, for kernels asked for from now on.
    fn arrive(&mut self, backend: &B, layer: usize) -> Result<Rc<Loaded<B>>, ModelError> {
        let pending = self.pending.take().expect("just sent");
        let (staging, arena) = backend.finish_transfer(pending.transfer).at(layer)?;
        self.staging.push_back(staging);
        Ok(Rc::new(Loaded {
            weights: pending.weights,
            arena,
        }))
    }

    /// A layer that a pass has gone through: its memory is used again, unless it stays.
    pub(super) fn release(
        &mut self,
        backend: &B,
        loaded: Rc<Loaded<B>>,
    ) -> Result<(), KernelError> {
        if let Ok(loaded) = Rc::try_unwrap(loaded) {
            self.arenas.push(backend.idle(loaded.arena)?);
        }
        Ok(())
    }

    /// An upload that no pass goes on with.
    fn drop_pending(&mut self, backend: &B) -> Result<(), KernelError> {
        if let Some(pending) = self.pending.take() {
            let (staging, arena) = backend.finish_transfer(pending.transfer)?;
            self.staging.push_back(staging);
            self.arenas.push(backend.idle(arena)?);
        }
        Ok(())
    }
}
