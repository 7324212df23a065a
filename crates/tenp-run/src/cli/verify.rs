//! `verify`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// Folder of the pruned checkpoint; its report.json says in which form and types it was written, and what became of
    /// layers for multi-token prediction.
    pub(crate) output: PathBuf,
    /// Folder of the checkpoint that it was made from.
    #[arg(long, value_name = "MODEL")]
    pub(crate) against: PathBuf,
    /// Plan that it should follow [default: its own tenp_plan.json].
    #[arg(long, value_name = "FILE")]
    pub(crate) plan: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
