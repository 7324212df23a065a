//! Where and how precisely a model runs.

use clap::{Args, ValueEnum};

/// Precision of the products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ComputeArg {
    /// Weights widened to f32, everything in f32.
    F32,
    /// Products of bf16 values, sums in f32.
    Bf16,
}

/// Where the model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum DeviceArg {
    /// The first GPU if there is one, else the CPU.
    #[default]
    Auto,
    Cpu,
    Cuda(usize),
}

impl std::str::FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|ordinal| ordinal.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("`{text}` is none of auto, cpu, cuda, cuda:N")),
        }
    }
}

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct RunArgs {
    /// Where the model runs: cpu, cuda (the first GPU), cuda:N, or auto (a GPU if there is one, else the CPU).
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub(crate) device: DeviceArg,
    /// Precision of the products: by default f32 on the CPU; bf16 on a GPU, which has no other.
    #[arg(long, value_enum)]
    pub(crate) compute: Option<ComputeArg>,
}
