//! Runs that end before their time: what is kept of them, and what is said.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use tenp_checkpoint::{Checkpoint, CheckpointError, Inputs, Work};
use tenp_model::calibrate::{FoldOptions, Keep};

use crate::place::Place;
use crate::{console, interrupt};

/// The folder of an output that is being written.
pub(crate) const OUTPUT: &str = Work::OUTPUT;

/// The folder of a calibration whose statistics go into a plan.
pub(crate) const CALIBRATION: &str = "calibration";

/// What decides the statistics of a calibration on a text of these inputs.
pub(crate) fn calibration_inputs(
    checkpoint: &Checkpoint,
    mut inputs: Inputs,
    place: &Place,
) -> Inputs {
    for (name, value) in [
        ("checkpoint", checkpoint.fingerprint().to_owned()),
        ("device and precision", place.name()),
        ("program version", env!("CARGO_PKG_VERSION").to_owned()),
    ] {
        inputs.insert(name.to_owned(), value);
    }
    inputs
}

/// Goes on with what an unfinished calibration has left beside `output`, or begins one.
///
/// # Errors
/// Another process is at it, or it was one of other inputs.
pub(crate) fn keep(
    (output, purpose): (&Path, &str),
    mut inputs: Inputs,
    folds: &FoldOptions,
    restart: bool,
    every: Duration,
) -> Result<Keep> {
    let groups = folds
        .num_folds
        .map_or("default".to_owned(), |groups| groups.to_string());
    inputs.insert("groups of samples".to_owned(), groups);
    inputs.insert("tables of groups".to_owned(), folds.tables.join(", "));
    if let Some(tables) = &folds.domain_tables {
        inputs.insert("tables of domains".to_owned(), tables.join(", "));
    }
    let mut work = Work::hold(Work::place(output, purpose), output)?;
    work.resume(inputs, restart)?;
    Ok(Keep::new(work, every))
}

/// Lets go of what a calibration has kept if the checkpoint was written to meanwhile.
///
/// # Errors
/// It was.
pub(crate) fn unchanged(checkpoint: &Checkpoint, keep: Keep) -> Result<Keep> {
    if let Err(error) = checkpoint.check_unchanged() {
        keep.finish();
        return Err(error.into());
    }
    Ok(keep)
}

/// Says so where a calibration could not be kept.
pub(crate) fn tell_trouble(keep: &Keep) {
    if let Some(trouble) = keep.trouble() {
        console::note(&format!(
            "the calibration could not be kept on the way ({trouble}); stopped now, it would begin again"
        ));
    }
}

/// Adds to an error how to go on, where something is kept in one of the folders. A refused output says itself what helps.
pub(crate) fn explain(
    error: impl Into<anyhow::Error>,
    output: &Path,
    purposes: &[&str],
) -> anyhow::Error {
    let error = error.into();
    if matches!(error.downcast_ref(), Some(CheckpointError::Output { .. })) {
        return error;
    }
    let places = purposes.iter().map(|purpose| Work::place(output, purpose));
    let Some(work) = places.into_iter().find(|place| Work::is_unfinished(place)) else {
        return match interrupt::exit_code() {
            Some(_) => error.context(format!(
                "nothing is kept of {} yet, the same command begins again",
                output.display()
            )),
            None => error,
        };
    };
    error.context(format!(
        "{} is unfinished (the same command goes on with what is kept in {}; --restart begins again)",
        output.display(),
        work.display()
    ))
}
