//! The pass on the CPU: hidden states between layers, blocks of tokens within one, on all threads.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use rayon::prelude::*;
use tenp_checkpoint::{Checkpoint, ExpertTensors, ModelConfig};
use tenp_kernels::cpu::direction::{ExpertSums, TokenContext, accumulate_expert_sums};
use tenp_kernels::cpu::elementwise::{add, all_finite};
use tenp_kernels::cpu::linear::PackedRows;
use tenp_kernels::cpu::moe::ExpertActivations;
use tenp_kernels::cpu::neuron::{NeuronSums, accumulate_neuron_sums, neuron_weight_norms};
use tenp_kernels::cpu::norm::{rms_norm, rms_norm_strided};
use tenp_kernels::cpu::rotary::RotaryTable;
use tenp_kernels::{Compute, KernelError, RaggedLayout};

use crate::attention::{AttentionBlock, AttentionBuffers};
use crate::cache::CachedSequence;
use crate::engine::Pass;
use crate::error::AtLayer;
use crate::forward::rotary;
use crate::hidden::Hidden;
use crate::mlp::{MoeWeights, RoutedOutput, dense_block};
use crate::moments::{ExpertMoments, Moments, MomentsWanted};
use crate::weights::{expert, non_finite};
use crate::{
    BlockSums, KvCache, ModelError, Observer, RoutedActivations, Sequences, Spill, WeightNorms,
};

/// Expert activations of the blocks of tokens in flight may take this much memory.
const BLOCK_BYTES: usize = 768 << 20;

/// Mean rows of an expert in a block, over which the packing of its weights is spread. The demo model was fastest between
/// 96 and 192 (0.39 to 0.40 s a pass); at 384 the activations of two blocks no longer stay near their cores (0.43 s).
const ROWS_PER_EXPERT: usize = 192;

/// A checkpoint to be run on the CPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuModel<'c> {
    pub(crate) checkpoint: &'c Checkpoint,
    pub(crate) compute: Compute,
    pub(crate) spill: Option<&'c Spill>,
}

impl CpuModel<'_> {
    fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    /// Tokens of a block: enough rows per expert to pay for packing its weights, few enough that a block's activations
    /// stay near the cores, and never more than [`BLOCK_BYTES`] of them.
    pub(crate) fn block_tokens(&self) -> usize {
        let moe = &self.config().moe;
        let paying = ROWS_PER_EXPERT * moe.num_experts.div_ceil(moe.top_k.max(1));
        let fitting = BLOCK_BYTES / self.block_bytes_per_token();
        paying.min(fitting).max(64)
    }

    /// Blocks that run at once: one on each thread where that many fit in [`BLOCK_BYTES`], else one on all threads.
    pub(crate) fn blocks_in_flight(&self) -> usize {
        let threads = rayon::current_num_threads();
        let bytes = threads * self.block_tokens() * self.block_bytes_per_token();
        if bytes <= BLOCK_BYTES { threads } else { 1 }
    }

    /// Bytes of expert activations per token of a block.
    fn block_bytes_per_token(&self) -> usize {
        let moe = &self.config().moe;
        (4 * moe.top_k * (3 * self.config().hidden_size + moe.expert_width)).max(1)
    }
}

/// A pass in progress: hidden states of all tokens after some layers.
pub(crate) struct CpuPass<'s> {
    model: CpuModel<'s>,
    sequences: &'s Sequences,
    cache: Option<&'s mut KvCache>,
    positions: Vec<u32>,
    rotary: RotaryTable,
    softmax_factor: f64,
    hidden: Hidden,
    layer: usize,
    buffers: Arc<BufferPool>,
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
pub(crate) struct BufferPool(Mutex<Vec<Buffers>>);

impl BufferPool {
    /// Of the buffers of every block that was in flight.
    #[cfg(test)]
    pub(crate) fn held_bytes(&self) -> Vec<usize> {
        let buffers = self.0.lock().expect("no thread of the test panicked");
        let of = |buffers: &Buffers| {
            let values = [&buffers.x, &buffers.combined].map(|values| size_of_val(&values[..]));
            values.iter().sum::<usize>()
                + buffers.router_input.held_bytes()
                + buffers.attention.held_bytes()
                + buffers.experts.held_bytes().iter().sum::<usize>()
        };
        buffers.iter().map(of).collect()
    }

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

impl<'s> CpuPass<'s> {
    pub(crate) fn new(
        model: CpuModel<'s>,
        sequences: &'s Sequences,
        cache: Option<&'s mut KvCache>,
    ) -> Result<Self, ModelError> {
        let (rotary, softmax_factor) =
            rotary(model.checkpoint.config(), sequences.max_positions())?;
        Ok(Self {
            model,
            sequences,
            cache,
            positions: sequences.positions(),
            rotary,
            softmax_factor,
            hidden: Hidden::embedded(model.checkpoint, sequences.ids(), model.spill)?,
            layer: 0,
            buffers: Arc::default(),
        })
    }

    /// With the buffers of passes that run in turn.
    pub(crate) fn sharing(self, buffers: &Arc<BufferPool>) -> Self {
        Self {
            buffers: Arc::clone(buffers),
            ..self
        }
    }

    /// `[tokens, H]` of the residual stream.
    pub(crate) fn hidden(&self) -> &[f32] {
        &self.hidden
    }

    /// The same behind all layers and the final norm, where it is.
    pub(crate) fn normed(mut self) -> Result<Hidden, ModelError> {
        let checkpoint = self.model.checkpoint;
        let config = checkpoint.config();
        let weight = checkpoint.vector_f32("model.norm.weight", config.hidden_size)?;
        let (hidden, eps) = (&mut self.hidden, config.rms_norm_eps);
        rms_norm_strided(hidden, config.hidden_size, &weight, eps).at(config.num_layers)?;
        Ok(self.hidden)
    }

    fn run_layer(
        &mut self,
        layer: usize,
        replaced: &[(usize, ExpertTensors<'_>)],
        observer: &dyn Observer,
    ) -> Result<(), ModelError> {
        let checkpoint = self.model.checkpoint;
        let config = checkpoint.config();
        let width = config.hidden_size;
        let norm_weight = |name: &str| {
            checkpoint.vector_f32(&format!("model.layers.{layer}.{name}.weight"), width)
        };
        let mut moe = match config.moe_layers.binary_search(&layer) {
            Ok(_) => Some(MoeWeights::new(checkpoint, layer)?),
            Err(_) => None,
        };
        if let Some(moe) = &mut moe {
            for (id, tensors) in replaced {
                moe.experts[*id] = expert(tensors).at(layer)?;
            }
        }
        if let Some(moe) = moe.as_ref().filter(|_| observer.wants_sums()) {
            let (layout, norms) = weight_norms(layer, moe)?;
            observer.begin_sums(layer, &layout, norms)?;
        }
        let shared = Layer {
            index: layer,
            attention_norm: norm_weight("input_layernorm")?,
            mlp_norm: norm_weight("post_attention_layernorm")?,
            attention: AttentionBlock {
                checkpoint,
                compute: self.model.compute,
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
            self.cache
                .as_deref_mut()
                .map(|cache| cache.host_layer(layer, config.num_layers)),
        );
        let context = BlockContext {
            model: self.model,
            sequences: self.sequences,
            positions: &self.positions,
        };
        let buffers = &self.buffers;
        let run = |block| buffers.lend(|buffers| context.run(&shared, block, buffers));
        if self.model.blocks_in_flight() == 1 || observer.wants_activations() {
            return blocks.into_iter().try_for_each(run);
        }
        // Each thread takes the next block: sums are added in that order, and those that came early would have to wait.
        let blocks = blocks.into_iter().enumerate().par_bridge();
        let failed = blocks.filter_map(|(place, block)| Some((place, run(block).err()?)));
        // Of several errors the first block's, whoever was first.
        match failed.min_by_key(|(place, _)| *place) {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }
}

impl Pass for CpuPass<'_> {
    fn layer(&self) -> usize {
        self.layer
    }

    /// The next layer is read ahead while this one runs.
    fn step(&mut self, observer: &dyn Observer) -> Result<bool, ModelError> {
        let layer = self.layer;
        let checkpoint = self.model.checkpoint;
        if layer == checkpoint.config().num_layers {
            return Ok(false);
        }
        // Read-ahead on its own thread: on a cold file the call itself can wait for the disk's queue.
        std::thread::scope(|scope| {
            scope.spawn(|| checkpoint.prefetch_layer(layer + 1));
            self.run_layer(layer, &[], observer)
        })?;
        checkpoint.release_layer(layer);
        self.layer += 1;
        Ok(true)
    }

    fn step_with(&mut self, experts: &[(usize, ExpertTensors<'_>)]) -> Result<(), ModelError> {
        let layer = self.layer;
        self.run_layer(layer, experts, &())?;
        self.layer += 1;
        Ok(())
    }

    fn moments(&mut self, wanted: &MomentsWanted<'_>) -> Result<Vec<ExpertMoments>, ModelError> {
        let (layer, before) = (self.layer, self.hidden.copy(self.model.spill)?);
        let moments = Moments::new(layer, self.model.config().hidden_size, wanted);
        self.run_layer(layer, &[], &moments)?;
        self.hidden = before;
        Ok(moments.finish())
    }

    fn skip_to(&mut self, layer: usize) {
        self.layer = layer;
    }

    fn read_hidden(&self, first_row: usize, rows: &mut [f32]) -> Result<(), ModelError> {
        let start = first_row * self.model.config().hidden_size;
        rows.copy_from_slice(&self.hidden[start..start + rows.len()]);
        Ok(())
    }

    fn write_hidden(&mut self, first_row: usize, rows: &[f32]) -> Result<(), ModelError> {
        let start = first_row * self.model.config().hidden_size;
        self.hidden[start..start + rows.len()].copy_from_slice(rows);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Vec<f32>, ModelError> {
        Ok(self.normed()?.into_memory())
    }
}

/// Widths and squared weight norms of a layer's neurons.
fn weight_norms(
    layer: usize,
    moe: &MoeWeights<'_>,
) -> Result<(RaggedLayout, WeightNorms), ModelError> {
    let norms: Vec<_> = moe
        .experts
        .par_iter()
        .map(neuron_weight_norms)
        .collect::<Result<_, _>>()
        .at(layer)?;
    let (whole, down): (Vec<_>, Vec<_>) = norms.into_iter().unzip();
    let norms = WeightNorms {
        whole: whole.concat(),
        down: down.concat(),
    };
    Ok((moe.layout().at(layer)?, norms))
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
    model: CpuModel<'a>,
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
        self.model.checkpoint.check_stop()?;
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
            let checkpoint = self.model.checkpoint;
            dense_block(checkpoint, self.model.compute, layer.index, x, experts)?;
            add(hidden, experts.outputs());
        }
        if !all_finite(hidden) {
            let place = format!("layer {}", layer.index);
            return Err(non_finite(self.model.checkpoint, place, |name| {
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
        let (compute, observer) = (self.model.compute, layer.observer);
        combined.resize(hidden.len(), 0.0);
        experts.keep_packed_outputs(observer.wants_sums());
        let routed = moe.routed(compute, x, router_input, experts, combined)?;
        if observer.wants_sums() {
            let context = TokenContext {
                x,
                residual: hidden,
                combined,
            };
            let sums = block_sums(moe, &routed, context, experts, label).at(layer.index)?;
            observer.sums(layer.index, index, sums)?;
        }
        experts.keep_packed_outputs(false);
        if observer.wants_activations() {
            let routed = RoutedActivations {
                groups: &routed.groups,
                activations: experts,
            };
            observer.activations(layer.index, rows.clone(), &routed)?;
        }
        moe.add_shared(compute, x, experts, combined)?;
        if observer.wants_outputs() {
            observer.routed(layer.index, rows.clone(), &routed.routing.expert_ids)?;
            observer.moe_output(layer.index, rows.clone(), combined)?;
        }
        add(hidden, combined);
        Ok(())
    }
}

/// Every sum over a block, from its routed experts' activations.
fn block_sums(
    moe: &MoeWeights<'_>,
    routed: &RoutedOutput,
    context: TokenContext<'_>,
    activations: &ExpertActivations,
    label: usize,
) -> Result<BlockSums, KernelError> {
    let groups = &routed.groups;
    let mut sums = BlockSums {
        label,
        num_tokens: groups.num_tokens(),
        experts: vec![ExpertSums::default(); moe.experts.len()],
        neurons: NeuronSums::new(moe.layout()?),
    };
    let norms = accumulate_expert_sums(
        groups,
        context,
        activations.outputs(),
        activations.hidden(),
        &mut sums.experts,
    )?;
    accumulate_neuron_sums(&moe.experts, groups, activations, &norms, &mut sums.neurons)?;
    Ok(sums)
}
