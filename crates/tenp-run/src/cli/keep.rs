//! How often unfinished work is kept.

use std::time::Duration;

use clap::Args;

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct KeepArgs {
    /// Seconds of calibration that are worth keeping; 0 keeps every layer, for tests.
    #[arg(long, hide = true, default_value_t = 20, value_name = "SECONDS")]
    keep_every: u32,
}

impl KeepArgs {
    pub(crate) fn every(self) -> Duration {
        Duration::from_secs(self.keep_every.into())
    }
}
