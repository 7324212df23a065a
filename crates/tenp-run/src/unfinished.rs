//! What is said of a run that ended before its time.

use std::path::Path;

use tenp_checkpoint::{CheckpointError, Work};

/// Adds to an error how to go on, where there is something to go on with. A refused output says itself what helps.
pub(crate) fn explain(
    error: impl Into<anyhow::Error>,
    output: &Path,
    purpose: &str,
) -> anyhow::Error {
    let error = error.into();
    let refused = matches!(error.downcast_ref(), Some(CheckpointError::Output { .. }));
    let work = Work::place(output, purpose);
    if refused || !work.is_dir() {
        return error;
    }
    error.context(format!(
        "{} is unfinished (the same command goes on with what is kept in {}; --restart begins again)",
        output.display(),
        work.display()
    ))
}
