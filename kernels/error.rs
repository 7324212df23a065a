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
