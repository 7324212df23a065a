//! Weights on their way: from the mapped file into staging memory, from there to where the kernels run.
//!
//! While a layer computes, the next one is packed into staging memory on other threads; its upload runs beside the
//! kernels that are still at work. At most two layers are resident, unless all of them fit: of a layer with fp8 weights
//! what was sent is one of the two, until its turn comes and kernels unpack it.

use std::collections::VecDeque;
use std::rc::Rc;

use tenp_checkpoint::{Checkpoint, ExpertTensors};
use tenp_kernels::KernelError;
use tenp_kernels::device::{Backend, Memory, PaddedLayout};

use super::arena::Contents;
use super::layer::{Feed, LayerWeights};
use super::unpack::Unpacking;
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
    unpacking: Option<Unpacking>,
    /// Where the upload will go: taken before this layer's kernels are asked for, so that it need not wait for them.
    target: B::Idle,
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
    unpacking: Option<Unpacking>,
    transfer: B::Transfer,
}

/// Sizes of the buffers that every layer fits into.
#[derive(Clone, Copy, Default)]
struct Sizes {
    /// An arena.
    arena: usize,
    /// What is sent of a layer, to be packed on the host.
    staging: usize,
    /// What is sent of a layer with fp8 weights.
    packed: usize,
    /// What unpacking one takes besides.
    room: usize,
    /// Arenas in turn.
    arenas: usize,
}

impl Sizes {
    fn add(&mut self, sent: &Contents<'_>, unpacking: Option<&Unpacking>) {
        let sent = sent.bytes();
        self.staging = self.staging.max(sent);
        match unpacking {
            None => {
                self.arena = self.arena.max(sent);
                // One computes, and one is uploaded into.
                self.arenas = 2;
            }
            Some(unpacking) => {
                self.arena = self.arena.max(unpacking.arena_bytes());
                self.packed = self.packed.max(sent);
                self.room = self.room.max(unpacking.room_bytes());
                self.arenas = self.arenas.max(1);
            }
        }
    }
}

/// Where a model's layers are.
pub(super) struct Store<B: Backend> {
    /// Layers that stay, where all of them fit.
    resident: Vec<Option<Rc<Loaded<B>>>>,
    keeps: bool,
    total_bytes: u64,
    sizes: Sizes,
    /// Of the MoE layers.
    layouts: Vec<PaddedLayout>,
    staging: VecDeque<B::Staging>,
    num_staging: usize,
    arenas: Vec<B::Buffer<u8>>,
    /// For what is sent of layers with fp8 weights, unless it is on its way.
    packed: Option<B::Buffer<u8>>,
    pending: Option<Pending<B>>,
}

impl<B: Backend> Store<B> {
    /// Finds every tensor of the model; all layers stay once they are there if together they take at most
    /// `resident_bytes`.
    pub(super) fn new(checkpoint: &Checkpoint, resident_bytes: u64) -> Result<Self, ModelError> {
        let num_layers = checkpoint.config().num_layers;
        let (mut sizes, mut total) = (Sizes::default(), 0u64);
        let mut layouts = Vec::new();
        for layer in 0..num_layers {
            let (weights, contents) = LayerWeights::find(checkpoint, layer, &[])?;
            if let Feed::Moe(moe) = weights.feed {
                layouts.push(moe.layout);
            }
            total += contents.bytes() as u64;
            let (sent, unpacking) = contents.sent();
            sizes.add(&sent, unpacking.as_ref());
        }
        Ok(Self {
            resident: (0..num_layers).map(|_| None).collect(),
            keeps: total <= resident_bytes,
            total_bytes: total,
            sizes,
            layouts,
            staging: VecDeque::new(),
            num_staging: 0,
            arenas: Vec::new(),
            packed: None,
            pending: None,
        })
    }

    /// Widths of the MoE layers.
    pub(super) fn layouts(&self) -> &[PaddedLayout] {
        &self.layouts
    }

    /// Bytes on the host: two layers being sent.
    pub(super) fn host_bytes(&self) -> usize {
        2 * self.sizes.staging
    }

    /// Bytes where the kernels run: all layers where they stay, else those in turn; what is sent in fp8, and its unpacking.
    pub(super) fn device_bytes(&self) -> usize {
        let layers = if self.keeps {
            self.total_bytes as usize
        } else {
            self.sizes.arenas * self.sizes.arena
        };
        layers + self.sizes.packed + self.sizes.room
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
        let (sent, unpacking) = contents.sent();
        self.grow(&sent, unpacking.as_ref());
        // Two in turn: one is packed while the other is still being read by its upload.
        let staging = if self.num_staging < 2 {
            self.num_staging += 1;
            backend.staging(self.sizes.staging).at(layer)?
        } else {
            let oldest = self.staging.pop_front();
            oldest
                .expect("one layer is staged at a time, and its memory comes back with its upload")
        };
        let bytes = sent.bytes();
        let target = if unpacking.is_some() {
            self.packed(backend, bytes).at(layer)?
        } else {
            self.arena(backend, bytes).at(layer)?
        };
        Ok(Staged {
            layer,
            weights,
            unpacking,
            target: backend.idle(target).at(layer)?,
            filling: Filling {
                checkpoint,
                layer,
                contents: sent,
                staging,
            },
        })
    }

    /// Makes room for a layer whose replaced experts take more than its own: they may be bf16 where those are fp8. Nothing
    /// is under way then.
    fn grow(&mut self, sent: &Contents<'_>, unpacking: Option<&Unpacking>) {
        let before = self.sizes.staging;
        self.sizes.add(sent, unpacking);
        if self.sizes.staging > before {
            self.staging.clear();
            self.num_staging = 0;
        }
    }

    /// Memory for a layer of `bytes` bytes; where layers stay, no more than that.
    fn arena(&mut self, backend: &B, bytes: usize) -> Result<B::Buffer<u8>, KernelError> {
        self.arenas.retain(|arena| arena.view().len() >= bytes);
        if let Some(arena) = self.arenas.pop() {
            return Ok(arena);
        }
        let room = if self.keeps { bytes } else { self.sizes.arena };
        backend.alloc("a layer's weights", room)
    }

    /// Memory for `bytes` bytes that are sent of a layer with fp8 weights.
    fn packed(&mut self, backend: &B, bytes: usize) -> Result<B::Buffer<u8>, KernelError> {
        match self.packed.take() {
            Some(packed) if packed.view().len() >= bytes => Ok(packed),
            _ => backend.alloc("a layer's fp8 weights", self.sizes.packed),
        }
    }

    /// Starts the upload of a layer that has been packed.
    pub(super) fn send(&mut self, backend: &B, staged: Staged<'_, B>) -> Result<(), ModelError> {
        let Staged {
            layer,
            weights,
            unpacking,
            target,
            filling,
        } = staged;
        let bytes = filling.contents.bytes();
        let transfer = backend
            .start_transfer(filling.staging, target, bytes)
            .at(layer)?;
        self.pending = Some(Pending {
            layer,
            weights,
            unpacking,
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
        let (staging, target) = backend.finish_transfer(pending.transfer).at(layer)?;
        self.staging.push_back(staging);
        let arena = match pending.unpacking {
            None => target,
            Some(unpacking) => {
                let mut arena = self.arena(backend, unpacking.arena_bytes()).at(layer)?;
                unpacking
                    .run(backend, target.view(), arena.view_mut())
                    .at(layer)?;
                // The next upload into it is behind these kernels: it is made idle when that upload is staged.
                self.packed = Some(target);
                arena
            }
        };
        Ok(Rc::new(Loaded {
            weights: pending.weights,
            arena,
        }))
    }

    /// A layer that a pass has gone through: its memory is used again, unless it stays.
    pub(super) fn release(&mut self, loaded: Rc<Loaded<B>>) {
        if let Ok(loaded) = Rc::try_unwrap(loaded) {
            self.arenas.push(loaded.arena);
        }
    }

    /// An upload that no pass goes on with.
    fn drop_pending(&mut self, backend: &B) -> Result<(), KernelError> {
        if let Some(pending) = self.pending.take() {
            let (staging, target) = backend.finish_transfer(pending.transfer)?;
            self.staging.push_back(staging);
            match pending.unpacking {
                None => self.arenas.push(target),
                Some(_) => self.packed = Some(target),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
