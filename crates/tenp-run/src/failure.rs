//! What the shell sees when something fails: one message on stderr and a documented exit code.

use std::process::ExitCode;

use tenp_checkpoint::CheckpointError;
use tenp_kernels::KernelError;
use tenp_model::ModelError;
use tenp_prune::PruneError;

/// 1: the work failed.
const FAILED: u8 = 1;
/// 2: the command line cannot be carried out as it stands.
const USAGE: u8 = 2;

/// 3: the machine lacks something: a GPU, a driver, a build with CUDA.
const ENVIRONMENT: u8 = 3;

/// The machine or the build lacks something that was asked for.
#[derive(Debug)]
#[cfg_attr(
    feature = "cuda",
    allow(dead_code, reason = "the kernels' own errors say it")
)]
pub(crate) struct EnvironmentError(pub(crate) String);

impl std::fmt::Display for EnvironmentError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for EnvironmentError {}

/// 4: what was verified is not as it should be.
const DIFFERENT: u8 = 4;

/// What was verified is not as it should be.
#[derive(Debug)]
pub(crate) struct DifferenceError(pub(crate) String);

impl std::fmt::Display for DifferenceError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for DifferenceError {}

/// A command line that cannot be carried out; the message names the flag and the remedy.
#[derive(Debug)]
pub(crate) struct UsageError(pub(crate) String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// A usage error as an `anyhow` error.
pub(crate) fn usage(message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(UsageError(message.into()))
}

/// Prints the error with its causes and says what the process ends with.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    crate::console::note(&format!("tenp-run: {}", message(error)));
    let own = || error.chain().map(code_of).max().unwrap_or(FAILED);
    ExitCode::from(crate::interrupt::exit_code().unwrap_or_else(own))
}

/// The error and its causes, each said once: many errors name their cause themselves.
fn message(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |said, cause| {
        let cause = cause.to_string();
        match said.as_str() {
            "" => cause,
            text if text.ends_with(&cause) => said,
            text => format!("{text}: {cause}"),
        }
    })
}

fn code_of(cause: &(dyn std::error::Error + 'static)) -> u8 {
    if cause.is::<DifferenceError>() {
        return DIFFERENT;
    }
    let environment = cause.is::<EnvironmentError>()
        || cause
            .downcast_ref::<KernelError>()
            .is_some_and(KernelError::is_environment);
    if environment {
        return ENVIRONMENT;
    }
    let usage = cause.is::<UsageError>()
        || cause.downcast_ref::<PruneError>().is_some_and(is_usage)
        || matches!(cause.downcast_ref(), Some(ModelError::NoPrompt { .. }))
        || cause.downcast_ref::<CheckpointError>().is_some_and(|e| {
            matches!(
                e,
                CheckpointError::Form { .. } | CheckpointError::Output { .. }
            )
        });
    if usage { USAGE } else { FAILED }
}

/// Refusals of option values, as opposed to statistics or checkpoints that do not fit.
fn is_usage(error: &PruneError) -> bool {
    matches!(
        error,
        PruneError::UnknownName { .. }
            | PruneError::Keep { .. }
            | PruneError::Alpha { .. }
            | PruneError::Slope { .. }
            | PruneError::Lambda { .. }
            | PruneError::Threshold { .. }
            | PruneError::Experts { .. }
            | PruneError::ExpertLayers { .. }
            | PruneError::WidthMultiple { .. }
            | PruneError::NoEffect { .. }
            | PruneError::UnknownDomain { .. }
            | PruneError::Curves { .. }
            | PruneError::DomainWeight { .. }
            | PruneError::EmptyBudget { .. }
            | PruneError::GuardedOverBudget { .. }
            | PruneError::GuardedDropped { .. }
            | PruneError::TopKUnreachable { .. }
            | PruneError::WidthLayers { .. }
            | PruneError::WidthExperts { .. }
            | PruneError::WidthTooLarge { .. }
    )
}
