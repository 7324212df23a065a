//! Launches captured once and repeated as one: a CUDA graph.

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::call::{Call, Runner as _};
use super::context::{Device, driver_error};
use crate::KernelError;

/// Launches that run together, again and again, over the same memory; what the memory holds may change between.
pub struct Graph {
    graph: CudaGraph,
    device: Device,
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}

impl Device {
    /// Captures `calls`, to be run one behind the other. Nothing runs yet.
    ///
    /// # Errors
    /// The driver's own words.
    ///
    /// # Safety
    /// What the calls were made for stays allocated as long as the graph is launched, and nothing else uses it while a
    /// launch is under way: the graph keeps the addresses, but borrows nothing.
    pub unsafe fn capture(&self, calls: &[Call<'_>]) -> Result<Graph, KernelError> {
        const WHAT: &str = "capturing a graph";
        for call in calls {
            self.prepare(call)?;
        }
        let stream = self.stream();
        stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(|e| driver_error(WHAT, e))?;
        let ran = calls.iter().try_for_each(|call| self.run(call));
        // Ended whatever went wrong, or the stream would stay in capture.
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        ran?;
        let graph =
            graph
                .map_err(|e| driver_error(WHAT, e))?
                .ok_or_else(|| KernelError::Invalid {
                    what: "graph",
                    why: "nothing was captured".into(),
                })?;
        Ok(Graph {
            graph,
            device: self.clone(),
        })
    }
}

impl Graph {
    /// Asks for all launches, behind what was asked for before, and does not wait.
    ///
    /// # Errors
    /// The driver's own words.
    pub fn launch(&self) -> Result<(), KernelError> {
        self.device.bind()?;
        self.graph
            .launch()
            .map_err(|e| driver_error("launching a graph", e))
    }
}
