//! Buffers of the statistics that a scored layer leaves.

use half::bf16;
use tenp_kernels::KernelError;
use tenp_kernels::device::geometry::partial_stride;
use tenp_kernels::device::moe_direction::{ROW_DOTS, TOKEN_DOTS};
use tenp_kernels::device::{Backend, Memory as _, PaddedLayout, Product, Tile};
use tenp_kernels::params::{
    TENP_NUM_ACTIVATION_SUMS, TENP_NUM_CONTRIBUTION_SUMS, TENP_NUM_EXPERT_SUMS,
};

use super::super::cases::Case;
use super::super::inputs::Noise;
use super::Tiles;

/// What scoring needs besides.
pub(super) struct Scoring<B: Backend> {
    pub(super) gate_up: Tiles<B>,
    pub(super) contribution: Tiles<B>,
    pub(super) x_f32: B::Buffer<f32>,
    pub(super) residual: B::Buffer<f32>,
    pub(super) y_f32: B::Buffer<f32>,
    pub(super) row_dots: B::Buffer<f64>,
    pub(super) row_peaks: B::Buffer<f32>,
    pub(super) row_inverse: B::Buffer<f32>,
    pub(super) token_dots: B::Buffer<f64>,
    pub(super) activation: B::Buffer<f32>,
    pub(super) contributions: B::Buffer<f32>,
    pub(super) strides: [usize; 2],
    pub(super) neuron_sums: B::Buffer<f64>,
    pub(super) expert_sums: B::Buffer<f64>,
    pub(super) counts: [B::Buffer<i64>; 2],
    /// Gram matrices, once they are made.
    pub(super) gram: Option<B::Buffer<bf16>>,
}

impl<B: Backend> Scoring<B> {
    pub(super) fn new(
        backend: &B,
        noise: &Noise,
        case: &Case,
        layout: &PaddedLayout,
        tile: Tile,
    ) -> Result<Self, KernelError> {
        let (shape, tokens) = (case.shape, case.tokens);
        let rows = tokens * shape.top_k;
        let (gate_up, contribution) = (Product::gate_up_stats(tile), Product::contribution(tile));
        let stride = |product: Product| {
            partial_stride(rows, product.tile, layout.hidden_pitch(), layout.total())
        };
        let strides = [stride(gate_up), stride(contribution)];
        let zeros = |len: usize| {
            let mut buffer = backend.alloc::<f64>("sums", len)?;
            backend.clear(buffer.view_mut())?;
            Ok::<_, KernelError>(buffer)
        };
        let counts = || {
            let mut buffer = backend.alloc::<i64>("counts", shape.experts)?;
            backend.clear(buffer.view_mut())?;
            Ok::<_, KernelError>(buffer)
        };
        Ok(Self {
            gate_up: Tiles::new(backend, gate_up, shape.experts)?,
            contribution: Tiles::new(backend, contribution, shape.experts)?,
            x_f32: noise.wide(backend, tokens * shape.hidden)?,
            residual: noise.wide(backend, tokens * shape.hidden)?,
            y_f32: backend.alloc("y", rows * shape.hidden)?,
            row_dots: backend.alloc("dots", ROW_DOTS * rows)?,
            row_peaks: backend.alloc("peaks", rows)?,
            row_inverse: backend.alloc("inverse norms", rows)?,
            token_dots: backend.alloc("dots", TOKEN_DOTS * tokens)?,
            activation: backend
                .alloc("partials", TENP_NUM_ACTIVATION_SUMS as usize * strides[0])?,
            contributions: backend
                .alloc("partials", TENP_NUM_CONTRIBUTION_SUMS as usize * strides[1])?,
            strides,
            neuron_sums: zeros(TENP_NUM_ACTIVATION_SUMS as usize * layout.total())?,
            expert_sums: zeros(TENP_NUM_EXPERT_SUMS as usize * shape.experts)?,
            counts: [counts()?, counts()?],
            gram: None,
        })
    }
}
