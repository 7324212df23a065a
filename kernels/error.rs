//! The one error type of this crate.

/// What is wrong with the arguments of a kernel. Nothing has been computed when one of these is returned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A slice has the wrong number of elements.
    #[error("{what}: expected {expected} elements, got {got}")]
    Length {
        /// Which argument.
        what: &'static str,
        /// Elements the shapes ask for.
        expected: usize,
        /// Elements given.
        got: usize,
    },
    /// Two matrices (or a matrix and a count) do not fit together.
    #[error("{what}: expected shape [{}, {}], got [{}, {}]", expected.0, expected.1, got.0, got.1)]
    Shape {
        /// Which argument.
        what: &'static str,
        /// Rows and columns that fit.
        expected: (usize, usize),
        /// Rows and columns given.
        got: (usize, usize),
    },
    /// An index points past the end of what it indexes.
    #[error("{what}: index {index} is out of range for {len}")]
    Index {
        /// Which argument.
        what: &'static str,
        /// The index.
        index: usize,
        /// Number of things it may point to.
        len: usize,
    },
    /// A count that must not be zero is zero, or a divisor does not divide.
    #[error("{what}: {why}")]
    Invalid {
        /// Which argument.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A prefix sum does not start at 0 or goes down.
    #[error("{what}: entry {index} is {got}, expected at least {least}")]
    NotMonotonic {
        /// Which argument.
        what: &'static str,
        /// The first entry that is wrong.
        index: usize,
        /// Its value.
        got: i64,
        /// The entry before it (0 for the first).
        least: i64,
    },
    /// An expert is wider than the room its rows were given.
    #[error("{what}: expert {expert} has width {width}, its padded width is {padded}")]
    TooWide {
        /// Which argument.
        what: &'static str,
        /// The expert.
        expert: usize,
        /// Its width.
        width: i64,
        /// Neurons between its offset and the next.
        padded: i64,
    },
    /// A device pointer is not aligned as the kernel's loads need it.
    #[error("{what}: address {address:#x} is not a multiple of {alignment} bytes")]
    Misaligned {
        /// Which argument.
        what: &'static str,
        /// The address.
        address: u64,
        /// Bytes it must be a multiple of.
        alignment: u64,
    },
    /// A library that the GPU needs is not on this machine.
    #[error("{library} is not installed on this machine ({needed_for})")]
    NoLibrary {
        /// File name of the library.
        library: &'static str,
        /// What it would be used for, and who ships it.
        needed_for: &'static str,
    },
    /// There is a driver but no GPU, or none is visible to this process.
    #[error("no CUDA GPU: {text}")]
    NoGpu {
        /// What the driver says.
        text: String,
    },
    /// The GPU asked for does not exist.
    #[error("no GPU {ordinal}: this machine has {count}, numbered from 0")]
    NoSuchGpu {
        /// Number asked for.
        ordinal: usize,
        /// GPUs there are.
        count: usize,
    },
    /// The kernels were compiled for no architecture that this GPU runs.
    #[error("{name} has compute capability {}.{}; this program was built for {built_for}", capability.0, capability.1)]
    UnsupportedGpu {
        /// Name of the GPU.
        name: String,
        /// Its compute capability.
        capability: (u32, u32),
        /// Architectures in the program.
        built_for: String,
    },
    /// The driver is older than the toolkit the kernels were compiled with.
    #[error(
        "the driver supports CUDA {}.{}; the kernels need {}.{}: install a newer driver",
        driver.0, driver.1, needed.0, needed.1
    )]
    DriverTooOld {
        /// CUDA version the driver supports.
        driver: (u32, u32),
        /// CUDA version the kernels need.
        needed: (u32, u32),
    },
    /// The GPU has not enough memory left.
    #[error("out of GPU memory for {what}: wanted {}, free {}{}{advice}",
        mebibytes(*wanted_bytes), mebibytes(*free_bytes), if advice.is_empty() { "" } else { "; " })]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// Bytes asked for.
        wanted_bytes: u64,
        /// Bytes the GPU has left.
        free_bytes: u64,
        /// What lowers the need, as the program put it.
        advice: String,
    },
    /// A call of the CUDA driver or of cuBLAS failed.
    #[error("{what}: {code}: {text}")]
    Cuda {
        /// What was being done.
        what: &'static str,
        /// The error's name.
        code: String,
        /// The library's own text.
        text: String,
    },
}

fn mebibytes(bytes: u64) -> String {
    // Small amounts matter when little is left.
    if bytes < 1 << 20 {
        format!("{bytes} bytes")
    } else {
        format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
    }
}

impl KernelError {
    /// Whether the machine is the reason (no GPU, no driver, an unsuitable one), not the arguments.
    #[must_use]
    pub fn is_environment(&self) -> bool {
        matches!(
            self,
            Self::NoLibrary { .. }
                | Self::NoGpu { .. }
                | Self::NoSuchGpu { .. }
                | Self::UnsupportedGpu { .. }
                | Self::DriverTooOld { .. }
        )
    }
}

pub(crate) fn check_len(
    what: &'static str,
    expected: usize,
    got: usize,
) -> Result<(), KernelError> {
    if expected == got {
        Ok(())
    } else {
        Err(KernelError::Length {
            what,
            expected,
            got,
        })
    }
}
