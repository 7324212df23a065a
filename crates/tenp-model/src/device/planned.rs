//! Where the schedule of a grouped product is kept.

use tenp_kernels::KernelError;
use tenp_kernels::device::moe_schedule::{Schedule, ScheduleOut};
use tenp_kernels::device::{Backend, DeviceSlice, Memory, Product};

/// The schedule of one grouped product.
pub(super) struct Planned<B: Backend> {
    pub(super) product: Product,
    order: B::Buffer<i32>,
    tile_offsets: B::Buffer<i32>,
    partial_offsets: Option<B::Buffer<i64>>,
}

impl<B: Backend> Planned<B> {
    pub(super) fn new(
        backend: &B,
        product: Product,
        experts: usize,
        partials: bool,
    ) -> Result<Self, KernelError> {
        Ok(Self {
            product,
            order: backend.alloc("schedule", experts)?,
            tile_offsets: backend.alloc("schedule", experts + 1)?,
            partial_offsets: partials
                .then(|| backend.alloc("schedule", experts + 1))
                .transpose()?,
        })
    }

    pub(super) fn out(&mut self, outputs: Option<usize>) -> ScheduleOut<'_> {
        ScheduleOut {
            product: self.product,
            outputs,
            order: self.order.view_mut(),
            tile_offsets: self.tile_offsets.view_mut(),
            partial_offsets: self.partial_offsets.as_mut().map(Memory::view_mut),
        }
    }

    pub(super) fn schedule(&self) -> Schedule<'_> {
        Schedule {
            order: self.order.view(),
            tile_offsets: self.tile_offsets.view(),
        }
    }

    pub(super) fn partial_offsets(&self) -> DeviceSlice<'_, i64> {
        let offsets = self.partial_offsets.as_ref();
        offsets.expect("a product with partial sums").view()
    }
}
