//! Launching an entry.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_void};
use std::sync::{Mutex, PoisonError};

use tenp_kernels::device::Call;

use crate::fault::{Fault, FaultKind};
use crate::{ffi, tensor_map};

/// In which order threads and blocks get their turn. A thread runs until it waits for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Schedule {
    /// First block and thread first; threads keep step, as the one that has waited longest goes on.
    Forward,
    /// Last block and thread first; one warp runs ahead as far as it can.
    Reversed,
    /// Any thread that can go on, any block next, by this seed.
    Random(u64),
}

impl Schedule {
    /// A choice of unlike schedules, for tests that run a kernel under each.
    pub const UNLIKE: [Self; 4] = [
        Self::Forward,
        Self::Reversed,
        Self::Random(1),
        Self::Random(2),
    ];
}

/// What a launch that ended well did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Memory accesses and basic blocks, the measure of [`Executor::step_limit`].
    pub steps: u64,
    /// Bytes of shared memory up to the last one touched.
    pub shared_used: usize,
}

/// How launches run. All checks are always on.
#[derive(Clone, Copy, Debug)]
pub struct Executor {
    schedule: Schedule,
    step_limit: u64,
}

impl Default for Executor {
    fn default() -> Self {
        Self::new(Schedule::Forward)
    }
}

impl Executor {
    /// An executor with this schedule.
    pub fn new(schedule: Schedule) -> Self {
        Self {
            schedule,
            step_limit: 1 << 30,
        }
    }

    /// Steps of one block before it counts as endless: 2³⁰ unless set, some seconds.
    #[must_use]
    pub fn step_limit(self, steps: u64) -> Self {
        Self {
            step_limit: steps.max(1),
            ..self
        }
    }

    /// Runs one grid of `entry`. `params` is its parameter struct, with the layout of `params.h`, whose pointers come from
    /// [`Buffer`](crate::Buffer)s of this thread.
    ///
    /// # Errors
    /// The first [`Fault`]; buffers keep what was written before it.
    pub fn launch<P: Copy>(
        &self,
        entry: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: u32,
        params: &P,
    ) -> Result<Report, Fault> {
        self.launch_raw(
            entry,
            (grid, block, shared_bytes),
            std::ptr::from_ref(params).cast(),
            size_of::<P>(),
        )
    }

    /// Runs a call of `tenp_kernels::device`, with its tensor maps where it has some.
    ///
    /// # Errors
    /// The first [`Fault`].
    pub fn launch_call(&self, call: &Call<'_>) -> Result<Report, Fault> {
        self.launch_call_as(call.entry(), call)
    }

    /// The same with another entry of the same arguments.
    ///
    /// # Errors
    /// The first [`Fault`].
    pub fn launch_call_as(&self, entry: &str, call: &Call<'_>) -> Result<Report, Fault> {
        let launch = call.launch();
        let words = tensor_map::arguments(call.params(), call.tensor_maps());
        self.launch_raw(
            entry,
            (launch.grid, [launch.threads, 1, 1], launch.shared_bytes),
            words.as_ptr().cast(),
            size_of_val(words.as_slice()),
        )
    }

    /// `params` points to `params_bytes` bytes.
    fn launch_raw(
        &self,
        entry: &str,
        (grid, block, shared_bytes): ([u32; 3], [u32; 3], u32),
        params: *const c_void,
        params_bytes: usize,
    ) -> Result<Report, Fault> {
        let refused = |detail: String| Fault::without_place(FaultKind::Launch, entry, detail);
        let Some((name, expected)) = find(entry) else {
            return Err(refused(format!(
                "no such entry; there are {}",
                entries().join(", ")
            )));
        };
        if expected != params_bytes as u64 {
            return Err(refused(format!(
                "parameters of {params_bytes} bytes, expected {expected}"
            )));
        }
        let (order, seed) = match self.schedule {
            Schedule::Forward => (0, 0),
            Schedule::Reversed => (1, 0),
            Schedule::Random(seed) => (2, seed),
        };
        let request = ffi::Request {
            grid,
            block,
            shared_bytes,
            order,
            seed,
            step_limit: self.step_limit,
        };
        let mut report = ffi::RawReport::default();
        let mut fault = ffi::RawFault {
            kind: 0,
            lane: u32::MAX,
            block: [0; 3],
            num_places: 0,
            places: [0; 2],
            detail: [0; 2048],
        };
        // SAFETY: `name` is an entry's and `params` has the size it takes; both structs are as in api.cpp. Kernel code
        // reaches memory only through checks that know this thread's buffers.
        let done = unsafe {
            ffi::simt_launch(
                name.as_ptr(),
                &raw const request,
                params,
                &raw mut report,
                &raw mut fault,
            )
        };
        if done == 0 {
            return Err(Fault::from_raw(entry, &fault));
        }
        let mut launched = LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner);
        if !launched.contains(entry) {
            launched.insert(entry.to_string());
        }
        Ok(Report {
            steps: report.steps,
            shared_used: report.shared_used as usize,
        })
    }
}

/// [`Executor::launch`] of the default executor.
///
/// # Errors
/// The first [`Fault`].
pub fn launch<P: Copy>(
    entry: &str,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    params: &P,
) -> Result<Report, Fault> {
    Executor::default().launch(entry, grid, block, shared_bytes, params)
}

/// Entries of which some launch of this process ended well.
static LAUNCHED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Names of the entries that were launched by this process without a fault.
pub fn launched() -> BTreeSet<String> {
    LAUNCHED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
}

/// Names of all entries, sorted: those of `kernels/cuda` and the test kernels of this crate.
pub fn entries() -> Vec<String> {
    // SAFETY: the table is complete before `main` and does not change.
    let count = unsafe { ffi::simt_num_entries() };
    let mut names: Vec<String> = (0..count)
        .map(|i| {
            // SAFETY: `i` is within the table, whose names are string literals.
            let name = unsafe { CStr::from_ptr(ffi::simt_entry_name(i)) };
            name.to_string_lossy().into_owned()
        })
        .collect();
    names.sort();
    names
}

/// An entry's name for C and the size of its parameters.
fn find(entry: &str) -> Option<(CString, u64)> {
    let name = CString::new(entry).ok()?;
    let (mut params_bytes, mut max_threads) = (0, 0);
    // SAFETY: the name is a C string, the results are written if the entry is found.
    let found =
        unsafe { ffi::simt_entry(name.as_ptr(), &raw mut params_bytes, &raw mut max_threads) };
    (found != 0).then_some((name, params_bytes))
}
