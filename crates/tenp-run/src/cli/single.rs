//! Commands with little to choose: `logits`, `generate` and `demo`.

use std::path::PathBuf;

use clap::Args;

use super::RunArgs;

#[derive(Debug, Args)]
pub(crate) struct Logits {
    /// Folder of the checkpoint.
    pub(crate) model: PathBuf,
    /// .safetensors with `input_ids` [n, len].
    #[arg(long, value_name = "FILE")]
    pub(crate) input: PathBuf,
    /// .safetensors to write: `logits` [n, len, vocab], f32.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Args)]
pub(crate) struct Generate {
    /// Folder of the checkpoint.
    pub(crate) model: PathBuf,
    /// Text to continue.
    #[arg(long)]
    pub(crate) prompt: String,
    /// Tokens to generate at most.
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub(crate) max_tokens: usize,
    /// 0 takes the likeliest token; higher values sample.
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "T",
        allow_negative_numbers = true
    )]
    pub(crate) temperature: f64,
    /// Seed of the sampling.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Folder of the demo: checkpoint, calibration/, tasks/.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) folder: Option<PathBuf>,
    /// Share of the routed-expert neurons to keep.
    #[arg(long, default_value_t = 0.6, value_name = "SHARE")]
    pub(crate) keep: f64,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
