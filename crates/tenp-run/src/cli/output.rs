//! What is written, and in which type.

use clap::ValueEnum;

/// Layers for multi-token prediction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MtpArg {
    /// The widths of the last MoE layer, neurons by their weight norms.
    Prune,
    /// As they are.
    Keep,
    /// Gone, and none in the config.
    Drop,
}

/// Element type of the weights written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    /// bfloat16, without scales.
    Bf16,
}
