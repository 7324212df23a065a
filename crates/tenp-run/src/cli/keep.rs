//! How often unfinished work is kept, and where hidden states are.

use std::path::Path;
use std::time::Duration;

use clap::Args;
use tenp_checkpoint::folder_of;
use tenp_model::Spill;

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

/// Hidden states stay in memory up to here, where nothing else is said.
const HIDDEN_MEMORY: u64 = 8 << 30;

#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct HiddenArgs {
    /// Memory for the hidden states of all tokens, such as 8GiB; more of them go to a file beside the output, which takes
    /// time but changes no bit. On a GPU they are in its own memory [default: 8GiB].
    #[arg(long, value_parser = super::size, value_name = "SIZE")]
    pub(crate) hidden_memory: Option<u64>,
}

impl HiddenArgs {
    /// What goes beside `output`.
    pub(crate) fn spill(self, output: &Path) -> Spill {
        Spill {
            over: self.hidden_memory.unwrap_or(HIDDEN_MEMORY),
            dir: folder_of(output).to_path_buf(),
        }
    }
}
