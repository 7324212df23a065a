//! Keys and values of finished tokens, where the kernels run.

use std::any::Any;

use half::bf16;
use tenp_kernels::KernelError;
use tenp_kernels::device::{Backend, Memory};

use crate::KvCache;
use crate::cache::Store;

/// Keys and values of one layer: `[num_sequences · room, pitch]` each.
pub(super) struct CachedLayer<B: Backend> {
    pub(super) keys: B::Buffer<bf16>,
    pub(super) values: B::Buffer<bf16>,
}

/// A [`KvCache`]'s store on a backend.
pub(super) struct DeviceCache<B: Backend> {
    layers: Vec<CachedLayer<B>>,
    /// Rows that each sequence has.
    room: usize,
    /// Elements of a key and of a value.
    pitches: (usize, usize),
    num_sequences: usize,
}

/// Rows of a sequence that has so many positions.
pub(crate) fn cache_room(positions: usize) -> usize {
    positions.next_power_of_two().max(64)
}

impl<B: Backend + 'static> DeviceCache<B> {
    /// The store of `cache`, with room for `positions` positions of each sequence.
    pub(super) fn of<'a>(
        backend: &B,
        cache: &'a mut KvCache,
        num_layers: usize,
        pitches: (usize, usize),
        positions: usize,
    ) -> Result<&'a mut Self, KernelError> {
        if matches!(cache.store, Store::Empty) {
            cache.store = Store::Engine(Box::new(Self {
                layers: Vec::with_capacity(num_layers),
                room: 0,
                pitches,
                num_sequences: cache.num_sequences(),
            }));
        }
        let filled = cache.len();
        let Store::Engine(store) = &mut cache.store else {
            panic!("a cache belongs to the model that was first run with it");
        };
        let store: &mut dyn Any = &mut **store;
        let store: &mut Self = store
            .downcast_mut()
            .expect("a cache belongs to the model that was first run with it");
        if positions > store.room {
            store.grow(backend, num_layers, positions, filled)?;
        }
        Ok(store)
    }

    /// Rows that each sequence has.
    pub(super) fn room(&self) -> usize {
        self.room
    }

    /// Rows in all.
    pub(super) fn num_rows(&self) -> usize {
        self.room * self.num_sequences
    }

    /// Keys and values of a layer.
    pub(super) fn layer(&mut self, layer: usize) -> &mut CachedLayer<B> {
        &mut self.layers[layer]
    }

    /// Doubles the room until it is enough, and takes along the `filled` rows of each sequence.
    fn grow(
        &mut self,
        backend: &B,
        num_layers: usize,
        positions: usize,
        filled: usize,
    ) -> Result<(), KernelError> {
        let room = cache_room(positions);
        let old = std::mem::take(&mut self.layers);
        let rows = room * self.num_sequences;
        let mut old = old.into_iter();
        for _ in 0..num_layers {
            let mut new = CachedLayer {
                keys: backend.alloc("key cache", rows * self.pitches.0)?,
                values: backend.alloc("value cache", rows * self.pitches.1)?,
            };
            if let Some(old) = old.next() {
                let (keys, values) = self.pitches;
                self.take_along(backend, &old.keys, &mut new.keys, keys, (room, filled))?;
                self.take_along(
                    backend,
                    &old.values,
                    &mut new.values,
                    values,
                    (room, filled),
                )?;
            }
            self.layers.push(new);
        }
        self.room = room;
        Ok(())
    }

    /// Copies the `filled` rows of each sequence to where they are with `room` rows a sequence.
    fn take_along(
        &self,
        backend: &B,
        old: &B::Buffer<bf16>,
        new: &mut B::Buffer<bf16>,
        pitch: usize,
        (room, filled): (usize, usize),
    ) -> Result<(), KernelError> {
        for s in 0..self.num_sequences {
            let part = |room: usize| s * room * pitch..(s * room + filled) * pitch;
            let from = old.view().slice(part(self.room))?;
            let to = new.view_mut().slice(part(room))?;
            backend.copy(from, to)?;
        }
        Ok(())
    }
}
