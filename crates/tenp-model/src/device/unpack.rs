//! Layers with fp8 weights: their codes and scales are sent as they lie in the file, half the bytes of bf16, and become
//! the layer in its arena where the kernels run.

use std::ops::Range;

use half::bf16;
use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::device::dequantise_fp8::{DequantiseFp8, dequantise_fp8};
use tenp_kernels::device::pack::{PackDown, PackGateUp, pack_down, pack_gate_up};
use tenp_kernels::device::{Backend, DeviceSlice, DeviceSliceMut, Memory};
use tenp_kernels::{KernelError, MatrixView};

use super::arena::{Contents, Experts, Slot, Source};

/// An fp8 matrix in what is sent.
struct Fp8 {
    codes: Slot<u8>,
    scales: Slot<f32>,
    rows: usize,
    cols: usize,
}

/// An expert's matrix in what is sent.
enum Sent {
    Bf16(Slot<bf16>),
    Fp8(Fp8),
}

/// Where an expert's neurons go.
struct Packed {
    width: usize,
    width_padded: usize,
    hidden: usize,
    /// Bytes of the arena.
    to: Range<usize>,
}

/// What becomes of a part of what is sent; `to` is in bytes of the arena.
enum Step {
    Copy { from: Slot<u8>, to: Range<usize> },
    Dequantise { from: Fp8, to: Range<usize> },
    GateUp { gate: Sent, up: Sent, to: Packed },
    Down { from: Sent, to: Packed },
}

/// The way from what is sent to a layer in its arena.
pub(super) struct Unpacking {
    arena_bytes: usize,
    steps: Vec<Step>,
    /// Elements of the largest matrix that is dequantised on its way.
    room: usize,
}

impl Contents<'_> {
    /// What is sent for these contents, and how it becomes them; where nothing is fp8 it is the contents themselves.
    pub(super) fn sent(self) -> (Self, Option<Unpacking>) {
        if !self.has_fp8() {
            return (self, None);
        }
        let arena_bytes = self.bytes();
        let mut packer = Packer {
            sent: Self::default(),
            steps: Vec::new(),
            room: 0,
        };
        for (to, source) in self.into_parts() {
            packer.part(to, source);
        }
        let unpacking = Unpacking {
            arena_bytes,
            steps: packer.steps,
            room: packer.room,
        };
        (packer.sent, Some(unpacking))
    }
}

/// Puts together what is sent.
struct Packer<'c> {
    sent: Contents<'c>,
    steps: Vec<Step>,
    room: usize,
}

impl<'c> Packer<'c> {
    fn part(&mut self, to: Range<usize>, source: Source<'c>) {
        match source {
            Source::Bf16(matrix) => match matrix.fp8_parts() {
                Some(parts) => {
                    let from = self.fp8(matrix, parts);
                    self.steps.push(Step::Dequantise { from, to });
                }
                None => self.copy(source, to),
            },
            Source::GateUp(ref experts) if source.has_fp8() => {
                for (expert, to) in packed(experts, to.start, 2) {
                    let (gate, up) = (self.matrix(expert.gate), self.matrix(expert.up));
                    self.steps.push(Step::GateUp { gate, up, to });
                }
            }
            Source::DownTransposed(ref experts) if source.has_fp8() => {
                for (expert, to) in packed(experts, to.start, 1) {
                    let from = self.matrix(expert.down);
                    self.steps.push(Step::Down { from, to });
                }
            }
            _ => self.copy(source, to),
        }
    }

    fn copy(&mut self, source: Source<'c>, to: Range<usize>) {
        let from = self.sent.add(source);
        self.steps.push(Step::Copy { from, to });
    }

    fn fp8(&mut self, matrix: MatrixView<'c>, (codes, scales): (&'c [u8], &'c [u8])) -> Fp8 {
        Fp8 {
            codes: self.sent.add(Source::Bytes(codes)),
            scales: self.sent.add(Source::Bytes(scales)),
            rows: matrix.rows(),
            cols: matrix.cols(),
        }
    }

    /// A matrix that is packed when it is there, and dequantised before.
    fn matrix(&mut self, matrix: MatrixView<'c>) -> Sent {
        match matrix.fp8_parts() {
            Some(parts) => {
                self.room = self.room.max(matrix.rows() * matrix.cols());
                Sent::Fp8(self.fp8(matrix, parts))
            }
            None => Sent::Bf16(self.sent.bf16(matrix)),
        }
    }
}

/// The experts that have neurons, and where they go in a part that begins at `start` and has `rows` rows a neuron.
fn packed<'e, 'c>(
    experts: &'e Experts<'c>,
    start: usize,
    rows: usize,
) -> impl Iterator<Item = (&'e ExpertWeights<'c>, Packed)> {
    let neuron_bytes = rows * experts.hidden * size_of::<bf16>();
    let places = experts.weights.iter().enumerate().map(move |(id, expert)| {
        let neurons = experts.layout.range(id);
        let to = Packed {
            width: expert.width(),
            width_padded: neurons.len(),
            hidden: experts.hidden,
            to: start + neurons.start * neuron_bytes..start + neurons.end * neuron_bytes,
        };
        (expert, to)
    });
    places.filter(|(_, to)| to.width > 0)
}

impl Fp8 {
    fn dequantise<B: Backend>(
        &self,
        backend: &B,
        sent: DeviceSlice<'_, u8>,
        out: DeviceSliceMut<'_, bf16>,
    ) -> Result<(), KernelError> {
        backend.run(&dequantise_fp8(DequantiseFp8 {
            input: self.codes.of(sent)?,
            scales: self.scales.of(sent)?,
            out,
            rows: self.rows,
            cols: self.cols,
        })?)
    }
}

impl Sent {
    /// Its elements in bf16: where they are, or dequantised into `room`.
    fn in_bf16<'a, B: Backend>(
        &self,
        backend: &B,
        sent: DeviceSlice<'a, u8>,
        room: &'a mut B::Buffer<bf16>,
    ) -> Result<DeviceSlice<'a, bf16>, KernelError> {
        match self {
            Self::Bf16(slot) => slot.of(sent),
            Self::Fp8(matrix) => {
                matrix.dequantise(backend, sent, room.view_mut())?;
                Ok(room.view())
            }
        }
    }
}

impl Unpacking {
    /// Bytes of the arena.
    pub(super) fn arena_bytes(&self) -> usize {
        self.arena_bytes
    }

    /// Bytes that [`Self::run`] takes for itself.
    pub(super) fn room_bytes(&self) -> usize {
        2 * self.room * size_of::<bf16>()
    }

    /// Asks for the kernels that make the layer in `arena` of what was sent.
    pub(super) fn run<B: Backend>(
        &self,
        backend: &B,
        sent: DeviceSlice<'_, u8>,
        mut arena: DeviceSliceMut<'_, u8>,
    ) -> Result<(), KernelError> {
        let mut rooms = [
            backend.alloc::<bf16>("dequantised weights", self.room)?,
            backend.alloc::<bf16>("dequantised weights", self.room)?,
        ];
        for step in &self.steps {
            step.run(backend, sent, arena.reborrow(), &mut rooms)?;
        }
        Ok(())
    }
}

impl Step {
    fn run<B: Backend>(
        &self,
        backend: &B,
        sent: DeviceSlice<'_, u8>,
        arena: DeviceSliceMut<'_, u8>,
        [room, second_room]: &mut [B::Buffer<bf16>; 2],
    ) -> Result<(), KernelError> {
        match self {
            Self::Copy { from, to } => backend.copy(from.of(sent)?, arena.slice(to.clone())?),
            Self::Dequantise { from, to } => {
                from.dequantise(backend, sent, arena.slice(to.clone())?.cast()?)
            }
            Self::GateUp { gate, up, to } => {
                let args = PackGateUp {
                    gate: gate.in_bf16(backend, sent, room)?,
                    up: up.in_bf16(backend, sent, second_room)?,
                    keep: None,
                    out: arena.slice(to.to.clone())?.cast()?,
                    source_width: to.width,
                    width: to.width,
                    width_padded: to.width_padded,
                    hidden: to.hidden,
                };
                // SAFETY: no neurons are chosen by their ids.
                backend.run(&unsafe { pack_gate_up(args) }?)
            }
            Self::Down { from, to } => backend.run(&pack_down(PackDown {
                down: from.in_bf16(backend, sent, room)?,
                keep: None,
                out: arena.slice(to.to.clone())?.cast()?,
                source_width: to.width,
                width: to.width,
                width_padded: to.width_padded,
                hidden: to.hidden,
            })?),
        }
    }
}

#[cfg(test)]
mod tests;
