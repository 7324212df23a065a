//! How the allocator deals with large buffers.

/// Buffers from this size on are the system's own.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE_BYTES: libc::c_int = 256 << 10;

/// Takes every large buffer from the system and gives it back when it is freed. By default the allocator raises the size from
/// which it does so to that of the buffers it has seen, up to 32 MiB, and holds on to what is freed below: the least squares of
/// a small model then took a quarter more than its buffers.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn return_large_buffers() {
    // SAFETY: the call takes no pointer, and its options may be set at any time.
    let _ = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES) };
}

/// Nothing to be set with this allocator.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn return_large_buffers() {}
