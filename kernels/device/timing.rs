//! Times of work on the GPU.

use cudarc::driver::{CudaEvent, sys};

use super::context::{Device, driver_error};
use crate::KernelError;

/// Time between two points of the compute stream, by the GPU's own clock.
#[derive(Debug)]
pub struct Timer {
    start: CudaEvent,
    end: CudaEvent,
}

impl Timer {
    /// A timer at rest.
    ///
    /// # Errors
    /// The driver's own words.
    pub fn new(device: &Device) -> Result<Self, KernelError> {
        // Without this flag cudarc makes events that cannot be asked for times.
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let event = || {
            device
                .context()
                .new_event(flags)
                .map_err(|e| driver_error("making an event", e))
        };
        Ok(Self {
            start: event()?,
            end: event()?,
        })
    }

    /// Marks the start.
    ///
    /// # Errors
    /// The driver's own words.
    pub fn start(&self, device: &Device) -> Result<(), KernelError> {
        self.start
            .record(device.stream())
            .map_err(|e| driver_error("recording an event", e))
    }

    /// Marks the end.
    ///
    /// # Errors
    /// The driver's own words.
    pub fn stop(&self, device: &Device) -> Result<(), KernelError> {
        self.end
            .record(device.stream())
            .map_err(|e| driver_error("recording an event", e))
    }

    /// Waits for the end and gives the time between both.
    ///
    /// # Errors
    /// The driver's own words.
    pub fn elapsed(&self) -> Result<std::time::Duration, KernelError> {
        let milliseconds = self
            .start
            .elapsed_ms(&self.end)
            .map_err(|e| driver_error("reading a time", e))?;
        Ok(std::time::Duration::from_secs_f64(
            f64::from(milliseconds) / 1e3,
        ))
    }
}
