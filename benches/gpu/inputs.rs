//! Random inputs of the GPU benches, gigabytes of them.

use half::bf16;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tenp_kernels::KernelError;
use tenp_kernels::device::{Backend, Memory as _};

use super::cases::Shape;

/// Random numbers in ±`scale`, repeated at a length that no tile or cache divides: products take the same power as
/// with fresh ones, and a host writes gigabytes of them in seconds.
pub struct Noise(Vec<bf16>);

impl Noise {
    pub fn new(scale: f32) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let one = || rng.next_u32();
        let number = |bits: u32| (bits as f32 / u32::MAX as f32 * 2.0 - 1.0) * scale;
        let values = std::iter::repeat_with(one).map(|bits| bf16::from_f32(number(bits)));
        Self(values.take(1_048_573).collect())
    }

    /// Fills `len` elements of new memory, beginning at place `phase` of the numbers.
    pub fn buffer<B: Backend>(
        &self,
        backend: &B,
        len: usize,
        phase: usize,
    ) -> Result<B::Buffer<bf16>, KernelError> {
        const STEP: usize = 1 << 24;
        let mut buffer = backend.alloc::<bf16>("bench input", len)?;
        let mut part = Vec::new();
        for first in (0..len).step_by(STEP) {
            let count = STEP.min(len - first);
            part.clear();
            let mut at = (first + phase) % self.0.len();
            while part.len() < count {
                let run = (self.0.len() - at).min(count - part.len());
                part.extend_from_slice(&self.0[at..at + run]);
                at = 0;
            }
            backend.write(buffer.view_mut().slice(first..first + count)?, &part)?;
        }
        Ok(buffer)
    }

    pub fn wide<B: Backend>(&self, backend: &B, len: usize) -> Result<B::Buffer<f32>, KernelError> {
        let values: Vec<f32> = (0..len)
            .map(|i| self.0[i % self.0.len()].to_f32())
            .collect();
        let mut buffer = backend.alloc("bench input", len)?;
        backend.write(buffer.view_mut(), &values)?;
        Ok(buffer)
    }
}

/// Sets of weights at full width; narrower experts use the first part of each. Their padding is not zero: times do not
/// depend on it, results would.
pub struct Weights<B: Backend> {
    pub gate_up: Vec<B::Buffer<bf16>>,
    pub down_t: Vec<B::Buffer<bf16>>,
}

impl<B: Backend> Weights<B> {
    pub fn new(
        backend: &B,
        noise: &Noise,
        shape: &Shape,
        sets: usize,
    ) -> Result<Self, KernelError> {
        let len = shape.experts * shape.width.next_multiple_of(16) * shape.hidden;
        let of = |len, first: usize| {
            (0..sets)
                .map(|s| noise.buffer(backend, len, first + 10_007 * s))
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            gate_up: of(2 * len, 0)?,
            down_t: of(len, 5)?,
        })
    }
}
