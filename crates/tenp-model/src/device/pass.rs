//! A pass over the layers: hidden states stay where the kernels run, blocks of sequences go through a layer one after
//! another.

use std::ops::Range;
use std::rc::Rc;
use std::time::Instant;

use tenp_checkpoint::ExpertTensors;
use tenp_kernels::device::elementwise::count_non_finite;
use tenp_kernels::device::{Backend, Memory};

use super::attention::AttentionInput;
use super::layer::Feed;
use super::moe::{Beside, MoeBlock};
use super::moments::DeviceMoments;
use super::store::Loaded;
use super::sums::DeviceSums;
use super::tables::Tables;
use super::{DeviceModel, uploaded, zeros};
use crate::attention::attention_shape;
use crate::engine::Pass;
use crate::error::AtLayer;
use crate::forward::{embed, rotary};
use crate::moments::{ExpertMoments, MomentsWanted};
use crate::weights::non_finite;
use crate::{KvCache, ModelError, Observer, Sequences};

/// Tokens that go to and from the host at once.
const CHUNK_TOKENS: usize = 8192;

/// A pass in progress.
pub(super) struct DevicePass<'s, 'c, B: Backend> {
    model: &'s DeviceModel<'c, B>,
    sequences: &'s Sequences,
    tables: Tables<B>,
    cache: Option<&'s mut KvCache>,
    blocks: Vec<Range<usize>>,
    /// `[tokens, H]`.
    hidden: B::Buffer<f32>,
    softmax_factor: f64,
    layer: usize,
}

/// What a layer leaves behind, once its kernels are done.
struct Aftermath<B: Backend> {
    /// `[1]` elements of the residual stream that are not finite.
    non_finite: B::Buffer<i32>,
    sums: Option<DeviceSums<B>>,
}

impl<'s, 'c, B: Backend + 'static> DevicePass<'s, 'c, B> {
    pub(super) fn new(
        model: &'s DeviceModel<'c, B>,
        sequences: &'s Sequences,
        mut cache: Option<&'s mut KvCache>,
    ) -> Result<Self, ModelError> {
        let (checkpoint, backend) = (model.checkpoint, &model.backend);
        let config = checkpoint.config();
        let (rotary, softmax_factor) = rotary(config, sequences.max_positions())?;
        let width = config.hidden_size;
        let mut hidden = backend
            .alloc("hidden states", sequences.num_tokens() * width)
            .at(0)?;
        for (i, ids) in sequences.ids().chunks(CHUNK_TOKENS).enumerate() {
            let mut rows = vec![0f32; ids.len() * width];
            embed(checkpoint, ids, &mut rows)?;
            let start = i * CHUNK_TOKENS * width;
            let part = hidden.view_mut().slice(start..start + rows.len()).at(0)?;
            backend.write(part, &rows).at(0)?;
        }
        let blocks = sequences.blocks(model.block_tokens);
        let room = match &mut cache {
            Some(cache) => Some(model.cache(cache, sequences.max_positions()).at(0)?.room()),
            None => None,
        };
        let tables = Tables::new(backend, sequences, &blocks, &rotary, room).at(0)?;
        Ok(Self {
            model,
            sequences,
            tables,
            cache,
            blocks,
            hidden,
            softmax_factor,
            layer: 0,
        })
    }

    /// Asks for all kernels of a layer; apart from what the observer wants to see, nothing is waited for.
    fn launch(
        &mut self,
        loaded: &Loaded<B>,
        observer: &dyn Observer,
    ) -> Result<Aftermath<B>, ModelError> {
        let (layer, backend) = (self.layer, &self.model.backend);
        let mut sums = match &loaded.weights.feed {
            Feed::Moe(moe) if observer.wants_sums() => {
                let norms = moe
                    .weight_norms(backend, loaded.arena.view(), self.model.hidden())
                    .at(layer)?;
                observer.begin_sums(layer, &moe.widths, norms)?;
                let work = (self.sequences.num_tokens(), self.blocks.len());
                let gram = self.model.gram(moe, loaded.arena.view(), work);
                Some(DeviceSums::new(moe, gram.at(layer)?))
            }
            _ => None,
        };
        for index in 0..self.blocks.len() {
            let beside = sums.as_mut().map_or(Beside::Nothing, Beside::Sums);
            self.launch_block(loaded, index, observer, beside)?;
        }
        let mut non_finite = zeros(backend, "count of damaged numbers", 1).at(layer)?;
        let count = count_non_finite(
            self.hidden.view(),
            non_finite.view_mut(),
            backend.multiprocessors(),
        );
        backend.run(&count.at(layer)?).at(layer)?;
        Ok(Aftermath { non_finite, sums })
    }

    fn launch_block(
        &mut self,
        loaded: &Loaded<B>,
        index: usize,
        observer: &dyn Observer,
        beside: Beside<'_, '_, B>,
    ) -> Result<(), ModelError> {
        let (layer, model) = (self.layer, self.model);
        model.checkpoint.check_stop()?;
        let width = model.hidden();
        let sequences = self.blocks[index].clone();
        let rows = self.sequences.rows(&sequences);
        let block = self.tables.block(index).at(layer)?;
        let range = rows.start * width..rows.end * width;
        let weights = &loaded.weights;
        let arena = loaded.arena.view();

        let hidden = self.hidden.view_mut().slice(range.clone()).at(layer)?;
        let norm = weights.attention_norm.of(arena).at(layer)?;
        let x = model.norm(hidden, None, norm, false).at(layer)?.0;
        let config = model.checkpoint.config();
        let input = AttentionInput {
            weights,
            arena,
            x: x.view(),
            angles: self.tables.angles(),
            shape: attention_shape(config, layer, self.softmax_factor).0,
            block,
        };
        let cached = match &mut self.cache {
            Some(cache) => {
                let cache = model.cache(cache, 0).at(layer)?;
                let num_rows = cache.num_rows();
                Some((cache.layer(layer), num_rows))
            }
            None => None,
        };
        let out = model.attention(&input, cached).at(layer)?;
        drop(x);
        let hidden = self.hidden.view_mut().slice(range.clone()).at(layer)?;
        let norm = weights.mlp_norm.of(arena).at(layer)?;
        let wants_f32 = matches!(weights.feed, Feed::Moe(_));
        let (x, x_f32) = model
            .norm(hidden, Some(out.view()), norm, wants_f32)
            .at(layer)?;
        drop(out);
        let hidden = self.hidden.view_mut().slice(range).at(layer)?;
        match &weights.feed {
            Feed::Dense(mlp) => {
                let out = model.mlp(mlp, arena, x.view()).at(layer)?;
                model.add(hidden, out.view(), None).at(layer)?;
            }
            Feed::Moe(moe) => {
                let x_f32 = x_f32.expect("asked for above");
                let label = self.sequences.spans()[sequences.start].label;
                let block = MoeBlock {
                    layer,
                    rows,
                    label,
                    moe,
                    arena,
                    x: x.view(),
                    x_f32: x_f32.view(),
                };
                model.moe(&block, hidden, observer, beside)?;
            }
        }
        Ok(())
    }

    /// Runs the layer, while the next one is packed on other threads.
    fn run(&mut self, loaded: Rc<Loaded<B>>, observer: &dyn Observer) -> Result<(), ModelError> {
        let (layer, model) = (self.layer, self.model);
        let (backend, checkpoint) = (&model.backend, model.checkpoint);
        let mut next = model
            .store
            .borrow_mut()
            .stage(backend, checkpoint, layer + 1)?;
        let filling = next.as_mut().map(|staged| &mut staged.filling);
        let (launched, filled) = std::thread::scope(|scope| {
            let filling = filling.map(|filling| scope.spawn(move || filling.fill()));
            let launched = self.launch(&loaded, observer);
            let waiting = Instant::now();
            let filled = filling.map_or(Ok(()), |thread| {
                thread.join().expect("packing weights does not panic")
            });
            model.waited_for_weights(waiting.elapsed());
            (launched, filled)
        });
        filled.at(layer + 1)?;
        if let Some(staged) = next {
            model.store.borrow_mut().send(backend, staged)?;
        }
        let waiting = Instant::now();
        self.collect(&loaded, launched?, observer)?;
        model.waited_for_kernels(waiting.elapsed());
        let mut store = model.store.borrow_mut();
        store.release(loaded);
        self.layer += 1;
        Ok(())
    }

    /// Waits for the layer, and hands its sums on.
    fn collect(
        &self,
        loaded: &Loaded<B>,
        aftermath: Aftermath<B>,
        observer: &dyn Observer,
    ) -> Result<(), ModelError> {
        let (layer, backend) = (self.layer, &self.model.backend);
        let mut count = [0];
        backend
            .read(aftermath.non_finite.view(), &mut count)
            .at(layer)?;
        if count[0] > 0 {
            let place = format!("layer {layer}");
            return Err(non_finite(self.model.checkpoint, place, |name| {
                tenp_checkpoint::layer_of(name) == Some(layer)
            }));
        }
        if let (Some(sums), Feed::Moe(moe)) = (aftermath.sums, &loaded.weights.feed) {
            for (index, sums) in sums
                .into_blocks(backend, moe)
                .at(layer)?
                .into_iter()
                .enumerate()
            {
                observer.sums(layer, index, sums)?;
            }
        }
        observer.progress(layer, self.sequences.num_tokens());
        Ok(())
    }
}

impl<B: Backend + 'static> Pass for DevicePass<'_, '_, B> {
    fn layer(&self) -> usize {
        self.layer
    }

    fn step(&mut self, observer: &dyn Observer) -> Result<bool, ModelError> {
        let (layer, model) = (self.layer, self.model);
        let (backend, checkpoint) = (&model.backend, model.checkpoint);
        if layer == checkpoint.config().num_layers {
            return Ok(false);
        }
        let waiting = Instant::now();
        let loaded = model.store.borrow_mut().load(backend, checkpoint, layer)?;
        model.waited_for_weights(waiting.elapsed());
        self.run(loaded, observer)?;
        Ok(true)
    }

    fn step_with(&mut self, experts: &[(usize, ExpertTensors<'_>)]) -> Result<(), ModelError> {
        let (layer, model) = (self.layer, self.model);
        let mut store = model.store.borrow_mut();
        let loaded = store.load_with(&model.backend, model.checkpoint, layer, experts)?;
        drop(store);
        self.run(loaded, &())
    }

    fn moments(&mut self, wanted: &MomentsWanted<'_>) -> Result<Vec<ExpertMoments>, ModelError> {
        let (layer, model) = (self.layer, self.model);
        let (backend, width) = (&model.backend, model.hidden());
        let mut store = model.store.borrow_mut();
        let loaded = store.load(backend, model.checkpoint, layer)?;
        drop(store);
        let mut moments = DeviceMoments::new(backend, wanted).at(layer)?;
        for index in 0..self.blocks.len() {
            let rows = self.sequences.rows(&self.blocks[index]);
            let range = rows.start * width..rows.end * width;
            let mut before = backend
                .alloc("hidden states before a layer", range.len())
                .at(layer)?;
            let hidden = self.hidden.view().slice(range.clone()).at(layer)?;
            backend.copy(hidden, before.view_mut()).at(layer)?;
            self.launch_block(&loaded, index, &(), Beside::Moments(&mut moments))?;
            let hidden = self.hidden.view_mut().slice(range).at(layer)?;
            backend.copy(before.view(), hidden).at(layer)?;
            (wanted.progress)(rows.len());
        }
        let moments = moments.finish(backend).at(layer)?;
        let mut store = model.store.borrow_mut();
        store.release(loaded);
        Ok(moments)
    }

    fn skip_to(&mut self, layer: usize) {
        self.layer = layer;
    }

    fn read_hidden(&self, first_row: usize, rows: &mut [f32]) -> Result<(), ModelError> {
        let start = first_row * self.model.hidden();
        let part = self.hidden.view().slice(start..start + rows.len());
        let part = part.at(self.layer)?;
        self.model.backend.read(part, rows).at(self.layer)
    }

    fn write_hidden(&mut self, first_row: usize, rows: &[f32]) -> Result<(), ModelError> {
        let start = first_row * self.model.hidden();
        let part = self.hidden.view_mut().slice(start..start + rows.len());
        let part = part.at(self.layer)?;
        self.model.backend.write(part, rows).at(self.layer)
    }

    fn finish(mut self: Box<Self>) -> Result<Vec<f32>, ModelError> {
        let model = self.model;
        let (backend, width) = (&model.backend, model.hidden());
        let weight = model.checkpoint.vector_f32("model.norm.weight", width)?;
        let weight = uploaded(backend, "final norm", &weight).at(self.layer)?;
        let mut out = vec![0.0; self.sequences.num_tokens() * width];
        for (i, out) in out.chunks_mut(CHUNK_TOKENS * width).enumerate() {
            let start = i * CHUNK_TOKENS * width;
            let range = start..start + out.len();
            let hidden = self.hidden.view_mut().slice(range).at(self.layer)?;
            let (_, normed) = model
                .norm(hidden, None, weight.view(), true)
                .at(self.layer)?;
            let normed = normed.expect("asked for");
            backend.read(normed.view(), out).at(self.layer)?;
        }
        Ok(out)
    }
}
