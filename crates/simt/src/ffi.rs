//! The C functions of `src-cpp/api.cpp`.

use std::ffi::{c_char, c_void};

#[repr(C)]
pub(crate) struct Request {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared_bytes: u32,
    pub(crate) order: u32,
    pub(crate) seed: u64,
    pub(crate) step_limit: u64,
}

#[repr(C)]
#[derive(Default)]
pub(crate) struct RawReport {
    pub(crate) steps: u64,
    pub(crate) shared_used: u64,
}

#[repr(C)]
pub(crate) struct RawFault {
    pub(crate) kind: u32,
    pub(crate) lane: u32,
    pub(crate) block: [u32; 3],
    pub(crate) num_places: u32,
    pub(crate) places: [u64; 2],
    pub(crate) detail: [c_char; 2048],
}

unsafe extern "C" {
    pub(crate) fn simt_buffer_new(
        name: *const c_char,
        bytes: u64,
        element_bytes: u64,
        writable: u32,
        data: *mut *mut c_void,
    ) -> *mut c_void;
    pub(crate) fn simt_buffer_free(region: *mut c_void);
    pub(crate) fn simt_buffer_set_written(region: *mut c_void);
    pub(crate) fn simt_buffer_written(region: *const c_void, byte: u64) -> u32;
    pub(crate) fn simt_host_access(address: u64, bytes: u64, writes: u32) -> u32;
    pub(crate) fn simt_num_entries() -> u64;
    pub(crate) fn simt_entry_name(index: u64) -> *const c_char;
    pub(crate) fn simt_entry(
        name: *const c_char,
        params_bytes: *mut u64,
        max_threads: *mut u32,
    ) -> u64;
    pub(crate) fn simt_launch(
        name: *const c_char,
        request: *const Request,
        params: *const c_void,
        report: *mut RawReport,
        fault: *mut RawFault,
    ) -> u32;
}
