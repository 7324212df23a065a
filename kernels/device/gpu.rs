//! The GPU as a [`Backend`].

use bytemuck::Pod;

use super::backend::{Backend, Memory};
use super::buffer::DeviceBuffer;
use super::context::Device;
use super::dense::{DenseElement, DenseShape};
use super::upload::{IdleBuffer, PinnedBuffer, Upload};
use super::view::{DeviceSlice, DeviceSliceMut};
use crate::KernelError;

impl<T: Pod> Memory<T> for DeviceBuffer<T> {
    fn view(&self) -> DeviceSlice<'_, T> {
        Self::view(self)
    }

    fn view_mut(&mut self) -> DeviceSliceMut<'_, T> {
        Self::view_mut(self)
    }
}

impl Backend for Device {
    type Buffer<T: Pod> = DeviceBuffer<T>;
    type Idle = IdleBuffer<u8>;
    type Staging = PinnedBuffer<u8>;
    type Transfer = Upload<u8>;

    fn alloc<T: Pod>(
        &self,
        what: &'static str,
        len: usize,
    ) -> Result<DeviceBuffer<T>, KernelError> {
        Self::alloc(self, what, len)
    }

    fn clear<T: Pod>(&self, mut to: DeviceSliceMut<'_, T>) -> Result<(), KernelError> {
        to.clear(self)
    }

    fn write<T: Pod>(
        &self,
        mut to: DeviceSliceMut<'_, T>,
        values: &[T],
    ) -> Result<(), KernelError> {
        to.copy_from_host(self, values)
    }

    fn read<T: Pod>(&self, from: DeviceSlice<'_, T>, out: &mut [T]) -> Result<(), KernelError> {
        from.copy_to_host(self, out)
    }

    fn copy<T: Pod>(
        &self,
        from: DeviceSlice<'_, T>,
        mut to: DeviceSliceMut<'_, T>,
    ) -> Result<(), KernelError> {
        to.copy_from(self, from)
    }

    fn dense<I: DenseElement, O: DenseElement>(
        &self,
        shape: &DenseShape,
        x: DeviceSlice<'_, I>,
        weight: DeviceSlice<'_, I>,
        out: DeviceSliceMut<'_, O>,
    ) -> Result<(), KernelError> {
        Self::dense(self, shape, x, weight, out)
    }

    fn free_bytes(&self) -> Result<u64, KernelError> {
        Self::free_bytes(self)
    }

    fn staging(&self, bytes: usize) -> Result<PinnedBuffer<u8>, KernelError> {
        PinnedBuffer::new(self, bytes)
    }

    fn staging_bytes(staging: &mut PinnedBuffer<u8>) -> Result<&mut [u8], KernelError> {
        staging.as_mut_slice()
    }

    fn idle(&self, buffer: DeviceBuffer<u8>) -> Result<IdleBuffer<u8>, KernelError> {
        buffer.idle()
    }

    fn start_transfer(
        &self,
        from: PinnedBuffer<u8>,
        into: IdleBuffer<u8>,
        len: usize,
    ) -> Result<Upload<u8>, KernelError> {
        self.start_upload(from, into, len)
    }

    fn finish_transfer(
        &self,
        transfer: Upload<u8>,
    ) -> Result<(PinnedBuffer<u8>, DeviceBuffer<u8>), KernelError> {
        transfer.finish()
    }
}
