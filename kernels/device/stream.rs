//! Launches on a stream that another runtime owns.

use std::marker::PhantomData;

use cudarc::driver::sys::CUstream;

use super::call::{Call, Runner};
use super::context::Device;
use crate::KernelError;

/// A [`Runner`] whose kernels go to someone else's stream, behind what was asked of that stream before.
#[derive(Debug)]
pub struct OnStream<'s> {
    device: Device,
    stream: CUstream,
    marker: PhantomData<&'s ()>,
}

impl Device {
    /// Launches on `stream`: of cudarc `CudaStream::cu_stream`, of the CUDA runtime its `cudaStream_t`, null the default
    /// stream.
    ///
    /// # Safety
    /// The stream belongs to this GPU's primary context, which is what cudarc's `CudaContext` and the CUDA runtime use,
    /// and lives as long as the result.
    #[must_use]
    pub unsafe fn on_stream<'s>(&self, stream: CUstream) -> OnStream<'s> {
        OnStream {
            device: self.clone(),
            stream,
            marker: PhantomData,
        }
    }
}

impl Runner for OnStream<'_> {
    type Error = KernelError;

    fn multiprocessors(&self) -> usize {
        self.device.multiprocessors()
    }

    fn has_wgmma(&self) -> bool {
        self.device.has_wgmma()
    }

    fn run(&self, call: &Call<'_>) -> Result<(), KernelError> {
        self.device.launch(call, self.stream)
    }
}
