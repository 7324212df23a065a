//! A pass in progress: hidden states between layers, blocks of tokens within one.

use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;
use tenp_kernels::cpu::elementwise::{add, all_finite};
use tenp_kernels::cpu::linear::PackedRows;
use tenp_kernels::cpu::moe::ExpertActivations;
use tenp_kernels::cpu::norm::{rms_norm, rms_norm_strided};
use tenp_kernels::cpu::rotary::RotaryTable;

use crate::attention::{AttentionBlock, AttentionBuffers};
use crate::cache::CachedSequence;
use crate::error::AtLayer;
use crate::mlp::{MoeWeights, dense_block};
use crate::weights::non_finite;
use crate::{KvCache, Model, ModelError, MoeBlock, Observer, Sequences};

/// A pass in progress: hidden states of all tokens after some layers.
pub struct Run<'c, 's> {
    model: Model<'c>,
    sequences: &'s Sequences,
    positions: Vec<u32>,
    rotary: RotaryTable,
    softmax_factor: f64,
    hidden: Vec<f32>,
    layer: usize,
    buffers: BufferPool,
}

/// Intermediate results of a block, kept from block to block and layer to layer so that they are allocated once.
#[derive(Default)]
struct Buffers {
    /// Normed input of attention, then of the MLP.
    x: Vec<f32>,
    router_input: PackedRows,
    /// Output of the MoE layer.
    combined: Vec<f32>,
    attention: AttentionBuffers,
    experts: ExpertActivations,
}

/// Buffers that no block is using: as many as blocks were ever in flight at once.
#[derive(Default)]
struct BufferPool(Mutex<Vec<Buffers>>);

impl BufferPool {
    fn lend<R>(&self, work: impl FnOnce(&mut Buffers) -> R) -> R {
        const UNPOISONED: &str = "nothing panics while the pool is locked";
        let spare = self.0.lock().expect(UNPOISONED).pop();
        let mut buffers = spare.unwrap_or_default();
        let result = work(&mut buffers);
        self.0.lock().expect(UNPOISONED).push(buffers);
        result
    }
}

/// One block of sequences with what is its own.
struct Block<'a> {
    index: usize,
    sequences: Range<usize>,
    rows: Range<usize>,
    /// `[rows, H]` of the residual stream.
    hidden: &'a mut [f32],
    cache: Option<&'a mut [CachedSequence]>,
}

/// What all blocks of a layer share.
struct Layer<'a> {
    index: usize,
    attention_norm: Vec<f32>,
    mlp_norm: Vec<f32>,
    attention: AttentionBlock<'a>,
    moe: Option<MoeWeights<'a>>,
    observer: &'a dyn Observer,
}

impl<'c, 's> Run<'c, 's> {
    pub(crate) fn new(
        model: Model<'c>,
        sequences: &'s Sequences,
        hidden: Vec<f32>,
        rotary: RotaryTable,
        softmax_factor: f64,
    ) -> Self {
        Self {
            model,
            sequences,
            positions: sequences.positions(),
            rotary,
            softmax_factor,
            hidden,
            layer: 0,
            buffers: BufferPool::default(),
        }
    }

    /// The layer that the next step runs.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Runs one layer; false when there is none left. The next layer is read ahead meanwhile.
    ///
    /// # Errors
    /// Unreadable tensors, or activations that are not finite.
    pub fn step(
        &mut self,
        observer: &dyn Observer,
        cache: Option<&mut KvCache>,
    ) -> Result<bool, ModelError> {
        let layer = self.layer;
        let checkpoint = self.model.checkpoint();
        if layer == self.model.config().num_layers {
            return Ok(false);
        }
        // Read-ahead on its own thread: on a cold file the call itself can wait for the disk's queue.
        std::thread::scope(|scope| {
            scope.spawn(|| checkpoint.prefetch_layer(layer + 1));
            self.run_layer(layer, observer, cache)
        })?;
        checkpoint.release_layer(layer);
        self.layer += 1;
        Ok(true)
    }

    fn run_layer(
        &mut self,
        layer: usize,
        observer: &dyn Observer,
        cache: Option<&mut KvCache>,
    ) -> Result<(), ModelError> {
        let checkpoint = self.model.checkpoint();
        let config = checkpoint.config();
        let width = config.hidden_size;
        let norm_weight = |name: &str| {
            checkpoint.vector_f32(&format!("model.layers.{layer}.{name}.weight"), width)
        };
        let moe = match config.moe_layers.binary_search(&layer) {
            Ok(_) => Some(MoeWeights::new(checkpoint, layer)?),
            Err(_) => None,
        };
        if let Some(moe) = &moe {
            observer.begin_moe(layer, &moe.experts)?;
        }
        let shared = Layer {
            index: layer,
            attention_norm: norm_weight("input_layernorm")?,
            mlp_norm: norm_weight("post_attention_layernorm")?,
            attention: AttentionBlock {
                checkpoint,
                compute: self.model.compute(),
                layer,
                rotary: &self.rotary,
                softmax_factor: self.softmax_factor,
            },
            moe,
            observer,
        };
        let blocks = split(
            self.sequences,
            self.model.block_tokens(),
            width,
            &mut self.hidden,
            cache.map(|cache| cache.layer(layer)),
        );
        let context = BlockContext {
            model: self.model,
            sequences: self.sequences,
            positions: &self.positions,
        };
        let buffers = &self.buffers;
        let run = |block| buffers.lend(|buffers| context.run(&shared, block, buffers));
        if self.model.blocks_in_flight() == 1 {
            return blocks.into_iter().try_for_each(run);
        }
        // Collected first, so that of several errors the first block's is reported.
        let results: Vec<_> = blocks.into_par_iter().with_max_len(1).map(run).collect();
        results.into_iter().collect()
    }

    /// Applies the final norm: `[tokens, H]`.
    ///
    /// # Errors
    /// The norm's tensor cannot be read.
    pub fn finish(self) -> Result<Vec<f32>, ModelError> {
        let config = self.model.config();
        let weight = self
            .model
            .checkpoint()
            .vector_f32("model.norm.weight", config.hidden_size)?;
        let mut out = self.hidden;
        rms_norm_strided(&mut out, config.hidden_size, &weight, config.rms_norm_eps)
            .at(config.num_layers)?;
        Ok(out)
    }
}

/// Cuts the sequences into blocks and hands each its own part of the hidden states and of the cache.
fn split<'a>(
    sequences: &Sequences,
    max_tokens: usize,
    width: usize,
    mut hidden: &'a mut [f32],
    mut cache: Option<&'a mut [CachedSequence]>,
) -> Vec<Block<'a>> {
    let blocks = sequences.blocks(max_tokens).into_iter().enumerate();
    blocks
        .map(|(index, block)| {
            let rows = sequences.rows(&block);
            let (mine, rest) = std::mem::take(&mut hidden).split_at_mut(rows.len() * width);
            hidden = rest;
            let cached = cache.take().map(|all| {
                let (mine, rest) = all.split_at_mut(block.len());
                cache = Some(rest);
                mine
            });
            Block {
                index,
                sequences: block,
                rows,
                hidden: mine,
                cache: cached,
            }
        })
        .collect()
}

/// What a block needs of the run.
struct BlockContext<'a> {
    model: Model<'a>,
    sequences: &'a Sequences,
    positions: &'a [u32],
}

impl BlockContext<'_> {
    /// Runs one layer on one block.
    fn run(
        &self,
        layer: &Layer<'_>,
        block: Block<'_>,
        buffers: &mut Buffers,
    ) -> Result<(), ModelError> {
        let config = self.model.config();
        let eps = config.rms_norm_eps;
        let Block { rows, hidden, .. } = block;
        let Buffers {
            x,
            attention,
            experts,
            ..
        } = &mut *buffers;
        x.resize(hidden.len(), 0.0);
        rms_norm(hidden, &layer.attention_norm, eps, x).at(layer.index)?;
        let positions = &self.positions[rows.clone()];
        let out = layer.attention.run(
            x,
            self.sequences,
            &block.sequences,
            positions,
            block.cache,
            attention,
        )?;
        add(hidden, out);
        rms_norm(hidden, &layer.mlp_norm, eps, x).at(layer.index)?;
        if let Some(moe) = &layer.moe {
            let label = self.sequences.spans()[block.sequences.start].label;
            self.moe(layer, moe, (block.index, label, &rows), hidden, buffers)?;
        } else {
            let checkpoint = self.model.checkpoint();
            dense_block(checkpoint, self.model.compute(), layer.index, x, experts)?;
            add(hidden, experts.outputs());
        }
        if !all_finite(hidden) {
            let place = format!("layer {}", layer.index);
            return Err(non_finite(self.model.checkpoint(), place, |name| {
                tenp_checkpoint::layer_of(name) == Some(layer.index)
            }));
        }
        layer.observer.progress(layer.index, rows.len());
        Ok(())
    }

    /// The MoE part: adds its output to `hidden`, which `buffers.x` is the normed form of.
    fn moe(
        &self,
        layer: &Layer<'_>,
        moe: &MoeWeights<'_>,
        (index, label, rows): (usize, usize, &Range<usize>),
        hidden: &mut [f32],
        buffers: &mut Buffers,
    ) -> Result<(), ModelError> {
        let Buffers {
            x,
            router_input,
            combined,
            experts,
            ..
        } = buffers;
        let (compute, observer) = (self.model.compute(), layer.observer);
        combined.resize(hidden.len(), 0.0);
        experts.keep_packed_outputs(observer.scores_neurons());
        let routed = moe.routed(compute, x, router_input, experts, combined)?;
        observer.moe(&MoeBlock {
            layer: layer.index,
            index,
            label,
            rows: rows.clone(),
            experts: &moe.experts,
            x,
            residual: hidden,
            routing: &routed.routing,
            groups: &routed.groups,
            activations: experts,
            combined,
        })?;
        experts.keep_packed_outputs(false);
        moe.add_shared(compute, x, experts, combined)?;
        observer.moe_output(layer.index, rows.clone(), combined)?;
        add(hidden, combined);
        Ok(())
    }
}
