//! How a function went: the status, the thread's last message, and the wall that no panic passes.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tenp_kernels::KernelError;

use crate::memory::write;

/// What a function says of how it went: one of the constants here.
pub type tenp_status = i32;

/// It did what was asked.
pub const TENP_OK: tenp_status = 0;
/// A pointer that is needed is null.
pub const TENP_ERROR_NULL: tenp_status = 1;
/// Sizes or shapes do not fit together.
pub const TENP_ERROR_SIZE: tenp_status = 2;
/// An index past what it indexes.
pub const TENP_ERROR_RANGE: tenp_status = 3;
/// A value that is not allowed.
pub const TENP_ERROR_INVALID: tenp_status = 4;
/// An address that is not aligned as it must be.
pub const TENP_ERROR_MISALIGNED: tenp_status = 5;
/// This library was built without the feature `cuda`.
pub const TENP_ERROR_NOT_BUILT: tenp_status = 6;
/// No NVIDIA driver, no GPU, or not that one.
pub const TENP_ERROR_NO_GPU: tenp_status = 7;
/// A GPU or a driver that cannot run the kernels.
pub const TENP_ERROR_UNSUPPORTED_GPU: tenp_status = 8;
/// Not enough GPU memory.
pub const TENP_ERROR_OUT_OF_MEMORY: tenp_status = 9;
/// A call of the CUDA driver failed.
pub const TENP_ERROR_CUDA: tenp_status = 10;
/// A bug in this library.
pub const TENP_ERROR_INTERNAL: tenp_status = 11;

/// Why a function failed.
#[derive(Debug)]
pub struct Failure {
    /// The status it returns.
    pub status: tenp_status,
    /// What was wrong, expected and given.
    pub text: String,
}

impl Failure {
    pub(crate) fn new(status: tenp_status, text: impl Into<String>) -> Self {
        Self {
            status,
            text: text.into(),
        }
    }
}

impl From<KernelError> for Failure {
    fn from(error: KernelError) -> Self {
        let status = match error {
            KernelError::Length { .. } | KernelError::Shape { .. } => TENP_ERROR_SIZE,
            KernelError::Index { .. } => TENP_ERROR_RANGE,
            KernelError::Invalid { .. }
            | KernelError::NotMonotonic { .. }
            | KernelError::TooWide { .. } => TENP_ERROR_INVALID,
            KernelError::Misaligned { .. } => TENP_ERROR_MISALIGNED,
            KernelError::NoLibrary { .. }
            | KernelError::NoGpu { .. }
            | KernelError::NoSuchGpu { .. } => TENP_ERROR_NO_GPU,
            KernelError::UnsupportedGpu { .. } | KernelError::DriverTooOld { .. } => {
                TENP_ERROR_UNSUPPORTED_GPU
            }
            KernelError::OutOfMemory { .. } => TENP_ERROR_OUT_OF_MEMORY,
            KernelError::Cuda { .. } => TENP_ERROR_CUDA,
            _ => TENP_ERROR_INTERNAL,
        };
        Self::new(status, error.to_string())
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs a function's body: its failure, or its panic, becomes the status and the thread's last message.
pub(crate) fn status(body: impl FnOnce() -> Result<(), Failure>) -> tenp_status {
    // What the body had in hand is dropped or the caller's; no handle is changed by any function.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return TENP_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure::new(
            TENP_ERROR_INTERNAL,
            format!("a bug in tenp: {}", words_of(panic.as_ref())),
        ),
    };
    let text: Vec<u8> = failure.text.bytes().filter(|&b| b != 0).collect();
    LAST.set(CString::new(text).unwrap_or_default());
    failure.status
}

fn words_of(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("it panicked without words")
}

/// What went wrong at this thread's last failure; lives until its next.
#[unsafe(no_mangle)]
pub extern "C" fn tenp_last_error() -> *const c_char {
    LAST.with_borrow(|text| text.as_ptr())
}

/// What a status means in general.
#[unsafe(no_mangle)]
pub extern "C" fn tenp_status_string(status: tenp_status) -> *const c_char {
    let text: &CStr = match status {
        TENP_OK => c"done",
        TENP_ERROR_NULL => c"a pointer that is needed is null",
        TENP_ERROR_SIZE => c"sizes or shapes do not fit together",
        TENP_ERROR_RANGE => c"an index past what it indexes",
        TENP_ERROR_INVALID => c"a value that is not allowed",
        TENP_ERROR_MISALIGNED => c"an address that is not aligned as it must be",
        TENP_ERROR_NOT_BUILT => c"this library was built without CUDA",
        TENP_ERROR_NO_GPU => c"no NVIDIA driver, no GPU, or not that one",
        TENP_ERROR_UNSUPPORTED_GPU => c"a GPU or a driver that cannot run the kernels",
        TENP_ERROR_OUT_OF_MEMORY => c"not enough GPU memory",
        TENP_ERROR_CUDA => c"a call of the CUDA driver failed",
        TENP_ERROR_INTERNAL => c"a bug in tenp",
        _ => c"no status of tenp",
    };
    text.as_ptr()
}

/// Version of the library.
///
/// # Safety
/// The pointers are null or lead to a number each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tenp_version(
    major: *mut u32,
    minor: *mut u32,
    patch: *mut u32,
) -> tenp_status {
    status(|| {
        let mut parts = env!("CARGO_PKG_VERSION").split(['.', '-', '+']);
        let mut part = || parts.next().and_then(|p| p.parse().ok()).unwrap_or(0);
        let results = [
            ("major", major, part()),
            ("minor", minor, part()),
            ("patch", patch, part()),
        ];
        // SAFETY: the caller's promise.
        unsafe { write(results) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last() -> String {
        // SAFETY: the text of this thread, which nothing changes meanwhile.
        unsafe { CStr::from_ptr(tenp_last_error()) }
            .to_string_lossy()
            .into_owned()
    }

    #[test]
    fn a_panic_becomes_a_status_with_its_words() {
        assert_eq!(status(|| panic!("seven of {}", 9)), TENP_ERROR_INTERNAL);
        assert_eq!(last(), "a bug in tenp: seven of 9");
        assert_eq!(status(|| Ok(())), TENP_OK);
        assert_eq!(last(), "a bug in tenp: seven of 9");
        let other = std::thread::spawn(last).join().unwrap();
        assert_eq!(other, "");
    }

    #[test]
    fn errors_of_the_kernels_have_their_status_and_their_words() {
        let length = KernelError::Length {
            what: "workspace",
            expected: 512,
            got: 17,
        };
        assert_eq!(status(|| Err(length.into())), TENP_ERROR_SIZE);
        assert_eq!(last(), "workspace: expected 512 elements, got 17");
        let none = KernelError::NoSuchGpu {
            ordinal: 3,
            count: 1,
        };
        assert_eq!(status(|| Err(none.into())), TENP_ERROR_NO_GPU);
        let zero = Failure::new(TENP_ERROR_CUDA, "a\0b");
        assert_eq!(status(|| Err(zero)), TENP_ERROR_CUDA);
        assert_eq!(last(), "ab");
    }

    #[test]
    fn every_status_has_words_of_its_own() {
        let words = |status| {
            // SAFETY: a static text.
            unsafe { CStr::from_ptr(tenp_status_string(status)) }
        };
        let all: std::collections::HashSet<_> =
            (TENP_OK..=TENP_ERROR_INTERNAL).map(words).collect();
        assert_eq!(all.len(), 12);
        assert!(!all.contains(words(-1)) && words(-1) == words(12));
    }
}
