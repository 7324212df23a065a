//! One layer's weights in one piece of memory: where each is, and how it gets there from the checkpoint.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use half::bf16;
use rayon::prelude::*;
use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::device::{DeviceSlice, PaddedLayout};
use tenp_kernels::{KernelError, MatrixView};

/// Parts begin at multiples of this, so that every kernel's loads are aligned.
const ALIGNMENT: usize = 256;

/// Bytes that a thread copies at once.
const COPIED: usize = 1 << 20;

/// A part of an arena.
#[derive(Debug)]
pub(super) struct Slot<T> {
    bytes: Range<usize>,
    element: PhantomData<T>,
}

impl<T: Pod> Slot<T> {
    /// The part, where the arena is.
    pub(super) fn of<'a>(
        &self,
        arena: DeviceSlice<'a, u8>,
    ) -> Result<DeviceSlice<'a, T>, KernelError> {
        arena.slice(self.bytes.clone())?.cast()
    }
}

/// The routed experts of a layer, to be packed.
#[derive(Debug)]
pub(super) struct Experts<'c> {
    pub(super) hidden: usize,
    pub(super) layout: PaddedLayout,
    pub(super) weights: Vec<ExpertWeights<'c>>,
}

/// What a part is made of.
pub(super) enum Source<'c> {
    /// As they lie.
    Bytes(&'c [u8]),
    /// Rounded to bf16 where it is not.
    Bf16(MatrixView<'c>),
    /// Widened.
    F32(MatrixView<'c>),
    Floats(Vec<f32>),
    Integers(Vec<i32>),
    GateUp(Arc<Experts<'c>>),
    DownTransposed(Arc<Experts<'c>>),
}

impl Source<'_> {
    pub(super) fn has_fp8(&self) -> bool {
        let fp8 = |matrix: &MatrixView<'_>| matrix.fp8_parts().is_some();
        match self {
            Self::Bf16(matrix) => fp8(matrix),
            Self::GateUp(e) => e.weights.iter().any(|e| fp8(&e.gate) || fp8(&e.up)),
            Self::DownTransposed(e) => e.weights.iter().any(|e| fp8(&e.down)),
            // A router is never fp8.
            Self::F32(_) | Self::Bytes(_) | Self::Floats(_) | Self::Integers(_) => false,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Bytes(v) => v.len(),
            Self::Bf16(m) => 2 * m.rows() * m.cols(),
            Self::F32(m) => 4 * m.rows() * m.cols(),
            Self::Floats(v) => 4 * v.len(),
            Self::Integers(v) => 4 * v.len(),
            Self::GateUp(e) => 4 * e.layout.total() * e.hidden,
            Self::DownTransposed(e) => 2 * e.layout.total() * e.hidden,
        }
    }

    /// `out` is as long as the part.
    fn write(&self, out: &mut [u8]) -> Result<(), KernelError> {
        match self {
            Self::Bytes(v) => out
                .par_chunks_mut(COPIED)
                .zip(v.par_chunks(COPIED))
                .for_each(|(to, from)| to.copy_from_slice(from)),
            Self::Bf16(m) => each_row(m.cols(), out, |row, out| m.round_row(row, out))?,
            Self::F32(m) => each_row(m.cols(), out, |row, out| m.widen_row(row, out))?,
            Self::Floats(v) => out.copy_from_slice(bytemuck::cast_slice(v)),
            Self::Integers(v) => out.copy_from_slice(bytemuck::cast_slice(v)),
            Self::GateUp(e) => {
                let out = bytemuck::cast_slice_mut(out);
                e.layout.pack_gate_up(e.hidden, &e.weights, out)?;
            }
            Self::DownTransposed(e) => {
                let out = bytemuck::cast_slice_mut(out);
                e.layout.pack_down(e.hidden, &e.weights, out)?;
            }
        }
        Ok(())
    }
}

/// Writes rows of `cols` elements on all threads.
fn each_row<T: Pod + Send>(
    cols: usize,
    out: &mut [u8],
    write: impl Fn(usize, &mut [T]) -> Result<(), KernelError> + Sync,
) -> Result<(), KernelError> {
    bytemuck::cast_slice_mut(out)
        .par_chunks_exact_mut(cols.max(1))
        .enumerate()
        .with_min_len(64)
        .try_for_each(|(row, out)| write(row, out))
}

/// What fills an arena.
#[derive(Default)]
pub(super) struct Contents<'c> {
    parts: Vec<(Range<usize>, Source<'c>)>,
}

impl<'c> Contents<'c> {
    /// Bytes of the arena.
    pub(super) fn bytes(&self) -> usize {
        let end = self.parts.last().map_or(0, |(range, _)| range.end);
        end.next_multiple_of(ALIGNMENT)
    }

    /// Where the parts are.
    #[cfg(test)]
    pub(super) fn parts(&self) -> impl Iterator<Item = Range<usize>> {
        self.parts.iter().map(|(range, _)| range.clone())
    }

    /// Whether any weight is fp8.
    pub(super) fn has_fp8(&self) -> bool {
        self.parts.iter().any(|(_, source)| source.has_fp8())
    }

    /// The parts and where they are.
    pub(super) fn into_parts(self) -> Vec<(Range<usize>, Source<'c>)> {
        self.parts
    }

    /// A part made of `source`, behind those that are there.
    pub(super) fn add<T>(&mut self, source: Source<'c>) -> Slot<T> {
        let start = self.bytes();
        let bytes = start..start + source.bytes();
        self.parts.push((bytes.clone(), source));
        Slot {
            bytes,
            element: PhantomData,
        }
    }

    /// A matrix in bf16, row-major.
    pub(super) fn bf16(&mut self, matrix: MatrixView<'c>) -> Slot<bf16> {
        self.add(Source::Bf16(matrix))
    }

    /// A matrix in f32, row-major.
    pub(super) fn f32(&mut self, matrix: MatrixView<'c>) -> Slot<f32> {
        self.add(Source::F32(matrix))
    }

    /// A vector.
    pub(super) fn floats(&mut self, values: Vec<f32>) -> Slot<f32> {
        self.add(Source::Floats(values))
    }

    /// A table.
    pub(super) fn integers(&mut self, values: Vec<i32>) -> Slot<i32> {
        self.add(Source::Integers(values))
    }

    /// The experts' gate and up rows, `[2S, H]`, and their down projections transposed, `[S, H]`.
    pub(super) fn experts(&mut self, experts: Experts<'c>) -> (Slot<bf16>, Slot<bf16>) {
        let experts = Arc::new(experts);
        (
            self.add(Source::GateUp(Arc::clone(&experts))),
            self.add(Source::DownTransposed(experts)),
        )
    }

    /// Writes all parts into the first [`Self::bytes`] of `out`, which is 16-byte aligned; what lies between them is
    /// left alone.
    pub(super) fn write(&self, out: &mut [u8]) -> Result<(), KernelError> {
        for (range, source) in &self.parts {
            source.write(&mut out[range.clone()])?;
        }
        Ok(())
    }
}
