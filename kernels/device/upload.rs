//! Weights on their way to the GPU while it computes: page-locked host memory and a stream of its own.
//!
//! The order between the two streams is kept by ownership: an [`Upload`] holds the buffer it fills, so no kernel can be
//! asked to read it before [`Upload::finish`] has made the compute stream wait for the copy.

use bytemuck::Pod;
use cudarc::driver::{CudaEvent, DriverError, result};

use super::buffer::DeviceBuffer;
use super::context::{Device, driver_error};
use crate::KernelError;
use crate::error::check_len;

/// Page-locked host memory, which the GPU's copy engine reads by itself.
#[derive(Debug)]
pub struct PinnedBuffer<T> {
    device: Device,
    pointer: *mut T,
    len: usize,
    /// Recorded behind the last copy out of this memory.
    read: Option<CudaEvent>,
}

// SAFETY: the memory is owned like a `Vec<T>`'s and not tied to a thread.
unsafe impl<T: Send> Send for PinnedBuffer<T> {}
// SAFETY: shared access only reads, as with a `Vec<T>`.
unsafe impl<T: Sync> Sync for PinnedBuffer<T> {}

impl<T: Pod> PinnedBuffer<T> {
    /// `len` zeros. Locking memory takes long: keep the buffer.
    ///
    /// # Errors
    /// The driver's own words, for one that the system does not let so much memory be locked.
    pub fn new(device: &Device, len: usize) -> Result<Self, KernelError> {
        device.bind()?;
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or_else(|| KernelError::Invalid {
                what: "page-locked memory",
                why: format!("{len} elements do not fit in memory"),
            })?;
        let pointer = if bytes == 0 {
            std::ptr::NonNull::<T>::dangling().as_ptr()
        } else {
            // SAFETY: the context is bound; the memory is freed by `drop` alone.
            let memory = unsafe { result::malloc_host(bytes, 0) }
                .map_err(|e| driver_error("locking host memory", e))?;
            // SAFETY: that many bytes were just allocated.
            unsafe { memory.cast::<u8>().write_bytes(0, bytes) };
            memory.cast()
        };
        Ok(Self {
            device: device.clone(),
            pointer,
            len,
            read: None,
        })
    }

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

    /// The elements, to write: waits for a copy that still reads them.
    ///
    /// # Errors
    /// The driver's own words.
    pub fn as_mut_slice(&mut self) -> Result<&mut [T], KernelError> {
        self.wait()
            .map_err(|e| driver_error("waiting for an upload", e))?;
        // SAFETY: `len` initialised elements that nothing else refers to; the copy engine is done with them.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) })
    }

    fn as_slice(&self) -> &[T] {
        // SAFETY: `len` initialised elements; writing needs `&mut self`.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }
    }
}

impl<T> PinnedBuffer<T> {
    fn wait(&mut self) -> Result<(), DriverError> {
        match self.read.take() {
            Some(event) => event.synchronize(),
            None => Ok(()),
        }
    }
}

impl<T> Drop for PinnedBuffer<T> {
    fn drop(&mut self) {
        if self.len * size_of::<T>() == 0 || self.device.bind().is_err() {
            return;
        }
        if self.wait().is_ok() {
            // SAFETY: allocated by `new`, freed once, no copy reads it any more.
            let _ = unsafe { result::free_host(self.pointer.cast()) };
        }
    }
}

/// GPU memory that no work uses any more, once what came before is done.
#[derive(Debug)]
pub struct IdleBuffer<T> {
    buffer: DeviceBuffer<T>,
    /// Recorded on the compute stream behind the last work that used it.
    idle: CudaEvent,
}

impl<T: Pod> DeviceBuffer<T> {
    /// Gives the buffer up to the next upload, which then need not wait for work that is asked for later.
    ///
    /// # Errors
    /// The driver's own words.
    pub fn idle(self) -> Result<IdleBuffer<T>, KernelError> {
        let device = self.device().clone();
        device.bind()?;
        let idle = device
            .stream()
            .record_event(None)
            .map_err(|e| driver_error("recording an event", e))?;
        Ok(IdleBuffer { buffer: self, idle })
    }
}

/// A copy under way. Dropping it is finishing it.
#[derive(Debug)]
pub struct Upload<T> {
    device: Device,
    // Both are there until `finish` takes them.
    parts: Option<(PinnedBuffer<T>, DeviceBuffer<T>)>,
    done: CudaEvent,
}

impl Device {
    /// Starts copying the first `len` elements of `from` into `into` on a stream of its own, behind the work that used
    /// `into`, and beside all other work.
    ///
    /// # Errors
    /// [`KernelError::Length`] if either is shorter than `len`, or the driver's own words.
    pub fn start_upload<T: Pod>(
        &self,
        mut from: PinnedBuffer<T>,
        into: IdleBuffer<T>,
        len: usize,
    ) -> Result<Upload<T>, KernelError> {
        let IdleBuffer {
            buffer: mut into,
            idle,
        } = into;
        check_len("upload", len, len.min(from.len()).min(into.len()))?;
        self.bind()?;
        let failed = |e| driver_error("uploading", e);
        let uploads = self.uploads();
        uploads.wait(&idle).map_err(failed)?;
        if len > 0 {
            let address = into.view_mut().address();
            // SAFETY: both sides are live and long enough, and owned by the `Upload` until the copy is waited for.
            unsafe {
                result::memcpy_htod_async(address, &from.as_slice()[..len], uploads.cu_stream())
            }
            .map_err(failed)?;
        }
        let event = || uploads.record_event(None).map_err(failed);
        from.read = Some(event()?);
        Ok(Upload {
            device: self.clone(),
            done: event()?,
            parts: Some((from, into)),
        })
    }
}

impl<T: Pod> Upload<T> {
    /// Makes the kernels asked for from now on wait for the copy, and gives both buffers back. Does not wait itself.
    ///
    /// # Errors
    /// The driver's own words.
    ///
    /// # Panics
    /// Never: both are there until this takes them.
    pub fn finish(mut self) -> Result<(PinnedBuffer<T>, DeviceBuffer<T>), KernelError> {
        self.device
            .stream()
            .wait(&self.done)
            .map_err(|e| driver_error("waiting for an upload", e))?;
        Ok(self
            .parts
            .take()
            .expect("only `finish` takes them, and it takes `self`"))
    }
}

impl<T> Drop for Upload<T> {
    fn drop(&mut self) {
        // The buffer is freed in the compute stream's order, which therefore has to be behind the copy.
        if self.parts.is_some() && self.device.stream().wait(&self.done).is_err() {
            // Memory that a copy may still write to is better lost than used again.
            std::mem::forget(self.parts.take());
        }
    }
}
