//! Whether the libraries of CUDA are on this machine, asked before cudarc's first call, which panics without them.
//!
//! cudarc can answer that itself only where it loads them; where another of its users has it link them, it cannot.

/// File names of the driver; all are among those that cudarc tries.
pub(super) const DRIVER: [&str; 3] = ["libcuda.so.1", "libcuda.so", "nvcuda.dll"];

/// The same of cuBLAS.
pub(super) const CUBLAS: [&str; 4] = [
    "libcublas.so.13",
    "libcublas.so",
    "libcublas.so.12",
    "cublas64_13.dll",
];

/// Whether the loader finds one of `names`.
pub(super) fn is_found(names: &[&str]) -> bool {
    names.iter().any(|name| {
        // SAFETY: NVIDIA's libraries, whose loading starts nothing; no symbol is taken from them.
        unsafe { libloading::Library::new(*name) }.is_ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_found_by_any_of_its_names() {
        assert!(!is_found(&["libtenp-is-not-there.so"]));
        #[cfg(target_os = "linux")]
        assert!(is_found(&["libtenp-is-not-there.so", "libc.so.6"]));
    }
}
