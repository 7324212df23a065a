//! The forward pass, calibration and generation on a [`Backend`]: in bf16, with sums in f32.
//!
//! | what | where |
//! |---|---|
//! | one layer's weights in one piece of memory | `arena`, `layer` |
//! | their way from the mapped file, beside the kernels | `store` |
//! | fp8 weights, unpacked where the kernels run | `unpack` |
//! | the pass, block by block | `pass`, `attention`, `routing`, `moe` |
//! | what the kernels must know of the sequences | `tables` |
//! | calibration sums, and what contributions are made of | `sums`, `gram` |
//! | second moments for least squares | `moments` |
//! | keys and values of finished tokens | `cache` |
//! | what a block's buffers hold | `memory` |

mod arena;
mod attention;
mod cache;
#[cfg(test)]
#[path = "../../tenp-checkpoint/tests/support/fp8.rs"]
mod fp8_folders;
mod gram;
mod layer;
mod memory;
mod moe;
mod moments;
mod pass;
mod planned;
mod routing;
mod store;
mod sums;
mod tables;
mod unpack;

use std::cell::{Cell, OnceCell, RefCell};
use std::time::{Duration, Instant};

use bytemuck::Pod;
use half::bf16;
use tenp_checkpoint::Checkpoint;
use tenp_kernels::KernelError;
use tenp_kernels::device::attention::Pitches;
use tenp_kernels::device::elementwise::{Add, SiluMul, add, silu_mul};
use tenp_kernels::device::rms_norm::{RmsNorm, rms_norm};
use tenp_kernels::device::{
    Backend, DenseElement, DenseShape, DeviceSlice, DeviceSliceMut, InOut, Memory,
};

use self::cache::DeviceCache;
pub(crate) use self::cache::cache_room;
use self::layer::{Mlp, Projection};
use self::memory::block_bytes;
use self::pass::DevicePass;
use self::store::Store;
use crate::attention::attention_shape;
use crate::engine::{Engine, Pass};
use crate::error::AtLayer;
use crate::forward::{Waited, WorkingBytes};
use crate::head::head_name;
use crate::weights::view;
use crate::{KvCache, ModelError, Sequences};

/// Tokens that go through a layer at once, where no sequence is longer: rows enough for every expert of the models we
/// know to be bound by arithmetic (`docs/cuda.md`).
const BLOCK_TOKENS: usize = 16_384;

/// A block's activations may take this much memory.
const BLOCK_BYTES: usize = 6 << 30;

/// Rows that the output head takes at once.
const HEAD_ROWS: usize = 1024;

/// A checkpoint on a backend.
pub struct DeviceModel<'c, B: Backend> {
    checkpoint: &'c Checkpoint,
    backend: B,
    store: RefCell<Store<B>>,
    /// `[vocab, H]`.
    head: OnceCell<B::Buffer<bf16>>,
    block_tokens: usize,
    waited: Cell<Waited>,
}

impl<'c, B: Backend + 'static> DeviceModel<'c, B> {
    /// Finds all tensors; nothing is uploaded yet. Where all layers fit into half of the free memory they stay there
    /// once they have been used.
    ///
    /// # Errors
    /// Missing tensors, a model that the kernels cannot run, or the backend's own words.
    pub fn new(checkpoint: &'c Checkpoint, backend: B) -> Result<Self, ModelError> {
        layer::check(checkpoint).at(0)?;
        let free = backend.free_bytes().at(0)?;
        let full = block_bytes(checkpoint.config(), BLOCK_TOKENS, true);
        Ok(Self {
            checkpoint,
            store: RefCell::new(Store::new(checkpoint, free / 2)?),
            backend,
            head: OnceCell::new(),
            block_tokens: (BLOCK_BYTES / full.div_ceil(BLOCK_TOKENS)).clamp(64, BLOCK_TOKENS),
            waited: Cell::default(),
        })
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &'c Checkpoint {
        self.checkpoint
    }

    fn waited_for_weights(&self, time: Duration) {
        let mut waited = self.waited.get();
        waited.weights += time;
        self.waited.set(waited);
    }

    fn waited_for_kernels(&self, time: Duration) {
        let mut waited = self.waited.get();
        waited.kernels += time;
        self.waited.set(waited);
    }

    /// The cache's store, with room for `positions` positions of each sequence.
    fn cache<'a>(
        &self,
        cache: &'a mut KvCache,
        positions: usize,
    ) -> Result<&'a mut DeviceCache<B>, KernelError> {
        let config = self.checkpoint.config();
        let pitches = Pitches::dense(&attention_shape(config, 0, 1.0).0);
        let pitches = (pitches.k, pitches.v);
        DeviceCache::of(&self.backend, cache, config.num_layers, pitches, positions)
    }

    fn head_weights(&self) -> Result<&B::Buffer<bf16>, ModelError> {
        if let Some(head) = self.head.get() {
            return Ok(head);
        }
        let config = self.checkpoint.config();
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let matrix = self.checkpoint.matrix(head_name(config), vocab, hidden)?;
        let matrix = view(&matrix).at(config.num_layers)?;
        let upload = || {
            let mut buffer = self.backend.alloc::<bf16>("output head", vocab * hidden)?;
            let mut rows = vec![bf16::ZERO; HEAD_ROWS * hidden];
            for first in (0..vocab).step_by(HEAD_ROWS) {
                let count = HEAD_ROWS.min(vocab - first);
                for (r, row) in rows.chunks_exact_mut(hidden).take(count).enumerate() {
                    matrix.round_row(first + r, row)?;
                }
                let range = first * hidden..(first + count) * hidden;
                let part = buffer.view_mut().slice(range)?;
                self.backend.write(part, &rows[..count * hidden])?;
            }
            Ok(buffer)
        };
        let buffer = upload().at(config.num_layers)?;
        Ok(self.head.get_or_init(|| buffer))
    }
}

impl<B: Backend> DeviceModel<'_, B> {
    fn hidden(&self) -> usize {
        self.checkpoint.config().hidden_size
    }

    /// `x = rms_norm(hidden + addend) · weight`, in bf16 and, if wanted, in f32; the sum takes the place of `hidden`.
    #[allow(clippy::type_complexity, reason = "two forms of one result")]
    fn norm(
        &self,
        hidden: DeviceSliceMut<'_, f32>,
        addend: Option<DeviceSlice<'_, f32>>,
        weight: DeviceSlice<'_, f32>,
        wants_f32: bool,
    ) -> Result<(B::Buffer<bf16>, Option<B::Buffer<f32>>), KernelError> {
        let len = hidden.len();
        let width = self.hidden();
        let mut x = self.backend.alloc::<bf16>("normed input", len)?;
        let mut x_f32 = wants_f32
            .then(|| self.backend.alloc::<f32>("normed input", len))
            .transpose()?;
        self.backend.run(&rms_norm(RmsNorm {
            x: match addend {
                Some(_) => InOut::Over(hidden),
                None => InOut::Apart(hidden.as_slice(), None),
            },
            addend,
            weight,
            out_f32: x_f32.as_mut().map(Memory::view_mut),
            out_bf16: Some(x.view_mut()),
            eps: self.checkpoint.config().rms_norm_eps,
            rows: len / width,
            width,
            x_pitch: width,
            out_pitch: width,
        })?)?;
        Ok((x, x_f32))
    }

    /// `x · Wᵀ` in f32; a bias is not added.
    fn product<I: DenseElement>(
        &self,
        x: DeviceSlice<'_, I>,
        weight: DeviceSlice<'_, I>,
        outputs: usize,
        inner: usize,
    ) -> Result<B::Buffer<f32>, KernelError> {
        let rows = x.len() / inner;
        let mut out = self.backend.alloc("dense output", rows * outputs)?;
        let shape = DenseShape::new(rows, inner, outputs);
        self.backend.dense(&shape, x, weight, out.view_mut())?;
        Ok(out)
    }

    /// The same with a projection's own weight.
    fn project(
        &self,
        projection: &Projection,
        arena: DeviceSlice<'_, u8>,
        x: DeviceSlice<'_, bf16>,
    ) -> Result<B::Buffer<f32>, KernelError> {
        let weight = projection.weight.of(arena)?;
        self.product(x, weight, projection.outputs, projection.inner)
    }

    /// down(silu(gate x) · up x), `[tokens, H]`.
    fn mlp(
        &self,
        mlp: &Mlp,
        arena: DeviceSlice<'_, u8>,
        x: DeviceSlice<'_, bf16>,
    ) -> Result<B::Buffer<f32>, KernelError> {
        let gate = self.project(&mlp.gate, arena, x)?;
        let up = self.project(&mlp.up, arena, x)?;
        let (rows, cols) = (x.len() / self.hidden(), mlp.gate.outputs);
        let mut h = self
            .backend
            .alloc::<bf16>("dense activations", rows * cols)?;
        self.backend.run(&silu_mul(SiluMul {
            gate: gate.view(),
            up: up.view(),
            out: h.view_mut(),
            rows,
            cols,
            pitch: cols,
        })?)?;
        self.project(&mlp.down, arena, h.view())
    }

    /// `to += sigmoid(row_logits) · b`, or `to += b` without them.
    fn add(
        &self,
        to: DeviceSliceMut<'_, f32>,
        b: DeviceSlice<'_, f32>,
        row_logits: Option<DeviceSlice<'_, f32>>,
    ) -> Result<(), KernelError> {
        let cols = self.hidden();
        let rows = to.len() / cols;
        self.backend.run(&add(Add {
            a: InOut::Over(to),
            b,
            row_logits,
            rows,
            cols,
        })?)
    }
}

impl<B: Backend + 'static> Engine for DeviceModel<'_, B> {
    fn begin<'s>(
        &'s self,
        sequences: &'s Sequences,
        cache: Option<&'s mut KvCache>,
    ) -> Result<Box<dyn Pass + 's>, ModelError> {
        Ok(Box::new(DevicePass::new(self, sequences, cache)?))
    }

    fn working_bytes(&self, sequences: &Sequences, with_sums: bool) -> WorkingBytes {
        let (config, store) = (self.checkpoint.config(), self.store.borrow());
        let (vocab, width) = (config.vocab_size, config.hidden_size);
        let tokens = sequences.num_tokens();
        let blocks = sequences.blocks(self.block_tokens);
        let rows = blocks.iter().map(|block| sequences.rows(block).len());
        let most_rows = rows.max().unwrap_or(0);
        let block = block_bytes(config, most_rows, with_sums);
        let gram = if with_sums {
            self.gram_bytes(tokens, blocks.len())
        } else {
            0
        };
        WorkingBytes {
            host: store.host_bytes(),
            weights: store.device_bytes(),
            // Hidden states and positions.
            pass: 4 * tokens * (width + 1) + block + gram,
            block_hidden: 4 * most_rows * width,
            head: 2 * vocab * width,
            logits: tokens.min(HEAD_ROWS) * (2 * width + 4 * vocab),
        }
    }

    fn waited(&self) -> Waited {
        self.waited.get()
    }

    fn measured_rate(&self) -> Result<f64, ModelError> {
        const SIZE: usize = 4096;
        let run = || {
            let backend = &self.backend;
            let values: Vec<bf16> = (0..SIZE * SIZE)
                .map(|i| bf16::from_f32((i % 97) as f32 * 0.01 - 0.5))
                .collect();
            let x = uploaded(backend, "measured product", &values)?;
            let mut out = backend.alloc::<f32>("measured product", SIZE * SIZE)?;
            let shape = DenseShape::new(SIZE, SIZE, SIZE);
            let mut product = |count: usize| {
                for _ in 0..count {
                    backend.dense(&shape, x.view(), x.view(), out.view_mut())?;
                }
                let mut first = [0f32];
                backend.read(out.view().slice(0..1)?, &mut first)
            };
            product(1)?;
            let (started, count) = (Instant::now(), 16);
            product(count)?;
            let flops = 2.0 * (SIZE as f64).powi(3) * count as f64;
            Ok(flops / started.elapsed().as_secs_f64())
        };
        run().at(0)
    }

    fn logits(&self, hidden: &[f32], out: &mut [f32]) -> Result<(), ModelError> {
        let config = self.checkpoint.config();
        let (vocab, width) = (config.vocab_size, config.hidden_size);
        let head = self.head_weights()?;
        let mut run = || {
            let chunks = hidden.chunks(HEAD_ROWS * width);
            for (hidden, out) in chunks.zip(out.chunks_mut(HEAD_ROWS * vocab)) {
                let hidden: Vec<bf16> = hidden.iter().map(|&v| bf16::from_f32(v)).collect();
                let x = uploaded(&self.backend, "normed hidden states", &hidden)?;
                let logits = self.product(x.view(), head.view(), vocab, width)?;
                self.backend.read(logits.view(), out)?;
            }
            Ok(())
        };
        run().at(config.num_layers)
    }
}

/// A copy of `values`.
fn uploaded<B: Backend, T: Pod>(
    backend: &B,
    what: &'static str,
    values: &[T],
) -> Result<B::Buffer<T>, KernelError> {
    let mut buffer = backend.alloc(what, values.len())?;
    backend.write(buffer.view_mut(), values)?;
    Ok(buffer)
}

/// `len` zeros.
fn zeros<B: Backend, T: Pod>(
    backend: &B,
    what: &'static str,
    len: usize,
) -> Result<B::Buffer<T>, KernelError> {
    let mut buffer = backend.alloc(what, len)?;
    backend.clear(buffer.view_mut())?;
    Ok(buffer)
}
