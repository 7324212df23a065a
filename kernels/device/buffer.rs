//! Owned memory on the GPU, and copies to and from it.

use std::marker::PhantomData;

use bytemuck::Pod;
use cudarc::driver::{DriverError, result, sys};

use super::context::{Device, driver_error};
use super::view::{DeviceSlice, DeviceSliceMut};
use crate::KernelError;
use crate::error::check_len;

/// `len` elements on the GPU, freed when dropped. Work that still uses it then is done first: both are in stream order.
#[derive(Debug)]
pub struct DeviceBuffer<T> {
    device: Device,
    address: u64,
    len: usize,
    marker: PhantomData<T>,
}

impl Device {
    /// `len` elements with whatever was in the memory before; `what` names it if there is not enough.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`], or the driver's own words.
    pub fn alloc<T: Pod>(
        &self,
        what: &'static str,
        len: usize,
    ) -> Result<DeviceBuffer<T>, KernelError> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or_else(|| KernelError::Invalid {
                what,
                why: format!("{len} elements do not fit in memory"),
            })?;
        let address = if bytes == 0 {
            0
        } else {
            self.bind()?;
            let stream = self.stream().cu_stream();
            // SAFETY: the context is bound, the stream is its own.
            let allocated = unsafe {
                if self.context().has_async_alloc() {
                    result::malloc_async(stream, bytes)
                } else {
                    result::malloc_sync(bytes)
                }
            };
            match allocated {
                Ok(address) => address,
                Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                    return Err(self.out_of_memory(what, bytes as u64));
                }
                Err(error) => return Err(driver_error(what, error)),
            }
        };
        Ok(DeviceBuffer {
            device: self.clone(),
            address,
            len,
            marker: PhantomData,
        })
    }

    /// `len` zeros.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn zeros<T: Pod>(
        &self,
        what: &'static str,
        len: usize,
    ) -> Result<DeviceBuffer<T>, KernelError> {
        let mut buffer = self.alloc(what, len)?;
        buffer.view_mut().clear(self)?;
        Ok(buffer)
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn upload<T: Pod>(
        &self,
        what: &'static str,
        values: &[T],
    ) -> Result<DeviceBuffer<T>, KernelError> {
        let mut buffer = self.alloc(what, values.len())?;
        buffer.view_mut().copy_from_host(self, values)?;
        Ok(buffer)
    }
}

impl<T: Pod> DeviceBuffer<T> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The GPU it lies on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// All of it, to read.
    #[must_use]
    pub fn view(&self) -> DeviceSlice<'_, T> {
        // SAFETY: the buffer's own memory, borrowed for as long as the view.
        unsafe { DeviceSlice::from_raw(self.address, self.len) }
    }

    /// All of it, to write.
    #[must_use]
    pub fn view_mut(&mut self) -> DeviceSliceMut<'_, T> {
        // SAFETY: the buffer's own memory, borrowed alone for as long as the view.
        unsafe { DeviceSliceMut::from_raw(self.address, self.len) }
    }

    /// Copies everything back, after all work asked for so far.
    ///
    /// # Errors
    /// The driver's own words, about the copy or about that work.
    pub fn to_vec(&self) -> Result<Vec<T>, KernelError> {
        let mut out = vec![T::zeroed(); self.len];
        self.view().copy_to_host(&self.device, &mut out)?;
        Ok(out)
    }
}

impl<T> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        if self.address == 0 || self.device.bind().is_err() {
            return;
        }
        // Nowhere to report to: a failure here comes up again at the next call.
        // SAFETY: allocated by `alloc` in the same way, freed once, after the work before it on the same stream.
        let _ = unsafe {
            if self.device.context().has_async_alloc() {
                result::free_async(self.address, self.device.stream().cu_stream())
            } else {
                // Without the pool nothing orders the free behind the kernels.
                self.device
                    .stream()
                    .synchronize()
                    .and_then(|()| result::free_sync(self.address))
            }
        };
    }
}

impl<T: Pod> DeviceSlice<'_, T> {
    /// Copies to `out`, after all work asked for so far, and waits.
    ///
    /// # Errors
    /// [`KernelError::Length`] if `out` is not as long, or the driver's own words.
    pub fn copy_to_host(&self, device: &Device, out: &mut [T]) -> Result<(), KernelError> {
        check_len("copy from the GPU", self.len(), out.len())?;
        if self.is_empty() {
            return Ok(());
        }
        device.bind()?;
        // SAFETY: both sides are live and as long; the stream is waited for before `out` is looked at.
        unsafe { result::memcpy_dtoh_async(out, self.address(), device.stream().cu_stream()) }
            .map_err(|e| driver_error("copying from the GPU", e))?;
        device.synchronize()
    }
}

impl<T: Pod> DeviceSliceMut<'_, T> {
    /// Sets every byte to zero, in stream order.
    ///
    /// # Errors
    /// The driver's own words.
    pub fn clear(&mut self, device: &Device) -> Result<(), KernelError> {
        if self.is_empty() {
            return Ok(());
        }
        device.bind()?;
        let (bytes, stream) = (self.len() * size_of::<T>(), device.stream().cu_stream());
        // SAFETY: live memory of that many bytes, borrowed to write.
        unsafe { result::memset_d8_async(self.address(), 0, bytes, stream) }
            .map_err(|e| driver_error("clearing GPU memory", e))
    }

    /// Copies `values` here and waits until they have been read.
    ///
    /// # Errors
    /// [`KernelError::Length`] if they are not as many, or the driver's own words.
    pub fn copy_from_host(&mut self, device: &Device, values: &[T]) -> Result<(), KernelError> {
        check_len("copy to the GPU", self.len(), values.len())?;
        if self.is_empty() {
            return Ok(());
        }
        device.bind()?;
        let stream = device.stream().cu_stream();
        // SAFETY: both sides are live and as long; the wait below keeps `values` borrowed until they have been read.
        unsafe { result::memcpy_htod_async(self.address(), values, stream) }
            .map_err(|e| driver_error("copying to the GPU", e))?;
        device.synchronize()
    }

    /// Copies from elsewhere on the GPU, in stream order.
    ///
    /// # Errors
    /// [`KernelError::Length`] if the lengths differ, or the driver's own words.
    pub fn copy_from(
        &mut self,
        device: &Device,
        from: DeviceSlice<'_, T>,
    ) -> Result<(), KernelError> {
        check_len("copy on the GPU", self.len(), from.len())?;
        if self.is_empty() {
            return Ok(());
        }
        device.bind()?;
        let bytes = self.len() * size_of::<T>();
        let stream = device.stream().cu_stream();
        // SAFETY: both are live GPU memory of that many bytes, and apart: one is borrowed to write.
        unsafe { result::memcpy_dtod_async(self.address(), from.address(), bytes, stream) }
            .map_err(|e| driver_error("copying on the GPU", e))
    }
}
