//! A backend with no memory to spare: a layer is gone when the next one comes.

use bytemuck::Pod;
use tenp_kernels::KernelError;
use tenp_kernels::device::{
    Backend, Call, DenseElement, DenseShape, DeviceSlice, DeviceSliceMut, Runner,
};

/// The backend inside, which says that nothing is free.
pub(crate) struct Tight<B>(pub(crate) B);

impl<B: Backend> Runner for Tight<B> {
    type Error = KernelError;

    fn multiprocessors(&self) -> usize {
        self.0.multiprocessors()
    }

    fn has_wgmma(&self) -> bool {
        self.0.has_wgmma()
    }

    fn run(&self, call: &Call<'_>) -> Result<(), KernelError> {
        self.0.run(call)
    }
}

impl<B: Backend> Backend for Tight<B> {
    type Buffer<T: Pod> = B::Buffer<T>;
    type Idle = B::Idle;
    type Staging = B::Staging;
    type Transfer = B::Transfer;

    fn alloc<T: Pod>(
        &self,
        what: &'static str,
        len: usize,
    ) -> Result<Self::Buffer<T>, KernelError> {
        self.0.alloc(what, len)
    }

    fn clear<T: Pod>(&self, to: DeviceSliceMut<'_, T>) -> Result<(), KernelError> {
        self.0.clear(to)
    }

    fn write<T: Pod>(&self, to: DeviceSliceMut<'_, T>, values: &[T]) -> Result<(), KernelError> {
        self.0.write(to, values)
    }

    fn read<T: Pod>(&self, from: DeviceSlice<'_, T>, out: &mut [T]) -> Result<(), KernelError> {
        self.0.read(from, out)
    }

    fn copy<T: Pod>(
        &self,
        from: DeviceSlice<'_, T>,
        to: DeviceSliceMut<'_, T>,
    ) -> Result<(), KernelError> {
        self.0.copy(from, to)
    }

    fn dense<I: DenseElement, O: DenseElement>(
        &self,
        shape: &DenseShape,
        x: DeviceSlice<'_, I>,
        weight: DeviceSlice<'_, I>,
        out: DeviceSliceMut<'_, O>,
    ) -> Result<(), KernelError> {
        self.0.dense(shape, x, weight, out)
    }

    fn free_bytes(&self) -> Result<u64, KernelError> {
        Ok(0)
    }

    fn staging(&self, bytes: usize) -> Result<Self::Staging, KernelError> {
        self.0.staging(bytes)
    }

    fn staging_bytes(staging: &mut Self::Staging) -> Result<&mut [u8], KernelError> {
        B::staging_bytes(staging)
    }

    fn idle(&self, buffer: Self::Buffer<u8>) -> Result<Self::Idle, KernelError> {
        self.0.idle(buffer)
    }

    fn start_transfer(
        &self,
        from: Self::Staging,
        into: Self::Idle,
        len: usize,
    ) -> Result<Self::Transfer, KernelError> {
        self.0.start_transfer(from, into, len)
    }

    fn finish_transfer(
        &self,
        transfer: Self::Transfer,
    ) -> Result<(Self::Staging, Self::Buffer<u8>), KernelError> {
        self.0.finish_transfer(transfer)
    }
}
