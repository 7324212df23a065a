//! What a forward pass needs of the place it runs on. The GPU is one such place; the executor of the `simt` crate is
//! another, so that a whole model can be checked with the kernels' own sources where there is no GPU.

use bytemuck::Pod;

use super::call::Runner;
use super::dense::{DenseElement, DenseShape};
use super::view::{DeviceSlice, DeviceSliceMut};
use crate::KernelError;

/// Owned memory where kernels run.
pub trait Memory<T> {
    /// All of it, to read.
    fn view(&self) -> DeviceSlice<'_, T>;

    /// All of it, to write.
    fn view_mut(&mut self) -> DeviceSliceMut<'_, T>;
}

/// Memory, copies, dense products and launches, all in the order they are asked for.
pub trait Backend: Runner<Error = KernelError> {
    /// Owned memory; 256-byte aligned, freed behind the work that uses it.
    type Buffer<T: Pod>: Memory<T>;
    /// Memory that no work uses any more, once what was asked for so far is done.
    type Idle;
    /// Host memory that uploads start from.
    type Staging: Send;
    /// An upload under way.
    type Transfer;

    /// `len` elements with whatever was in the memory before; `what` names it if there is not enough.
    ///
    /// # Errors
    /// Not enough memory, or the backend's own words; so in all methods.
    fn alloc<T: Pod>(&self, what: &'static str, len: usize)
    -> Result<Self::Buffer<T>, KernelError>;

    /// Sets all elements to zero.
    ///
    /// # Errors
    /// As [`Self::alloc`].
    fn clear<T: Pod>(&self, to: DeviceSliceMut<'_, T>) -> Result<(), KernelError>;

    /// Copies `values` there, and returns when they have been read.
    ///
    /// # Errors
    /// Lengths that differ.
    fn write<T: Pod>(&self, to: DeviceSliceMut<'_, T>, values: &[T]) -> Result<(), KernelError>;

    /// Copies to `out`, after all work asked for so far, and returns when it is there.
    ///
    /// # Errors
    /// Lengths that differ; what went wrong in that work.
    fn read<T: Pod>(&self, from: DeviceSlice<'_, T>, out: &mut [T]) -> Result<(), KernelError>;

    /// Copies within the backend's memory; the two parts must not overlap.
    ///
    /// # Errors
    /// Lengths that differ.
    fn copy<T: Pod>(
        &self,
        from: DeviceSlice<'_, T>,
        to: DeviceSliceMut<'_, T>,
    ) -> Result<(), KernelError>;

    /// `out = x · Wᵀ` (or `x · W`), sums in f32. In and out may be (bf16, bf16), (bf16, f32) or (f32, f32).
    ///
    /// # Errors
    /// Lengths and pitches that do not fit.
    fn dense<I: DenseElement, O: DenseElement>(
        &self,
        shape: &DenseShape,
        x: DeviceSlice<'_, I>,
        weight: DeviceSlice<'_, I>,
        out: DeviceSliceMut<'_, O>,
    ) -> Result<(), KernelError>;

    /// Bytes that can still be allocated.
    ///
    /// # Errors
    /// The backend's own words.
    fn free_bytes(&self) -> Result<u64, KernelError>;

    /// Host memory of `bytes` bytes for uploads. Making it takes long: keep it.
    ///
    /// # Errors
    /// The backend's own words.
    fn staging(&self, bytes: usize) -> Result<Self::Staging, KernelError>;

    /// Its bytes, once no upload reads them any more.
    ///
    /// # Errors
    /// The backend's own words.
    fn staging_bytes(staging: &mut Self::Staging) -> Result<&mut [u8], KernelError>;

    /// Gives memory up to the next upload into it, which waits for the work asked for so far and for no later work.
    ///
    /// # Errors
    /// The backend's own words.
    fn idle(&self, buffer: Self::Buffer<u8>) -> Result<Self::Idle, KernelError>;

    /// Starts copying the first `len` bytes, beside the work that is under way.
    ///
    /// # Errors
    /// Fewer than `len` bytes on either side.
    fn start_transfer(
        &self,
        from: Self::Staging,
        into: Self::Idle,
        len: usize,
    ) -> Result<Self::Transfer, KernelError>;

    /// Makes work asked for from now on wait for the copy, and gives both back.
    ///
    /// # Errors
    /// The backend's own words.
    fn finish_transfer(
        &self,
        transfer: Self::Transfer,
    ) -> Result<(Self::Staging, Self::Buffer<u8>), KernelError>;
}
