//! Options of what computes new weights: DERN's merging, and recovery.

use clap::{Args, ValueEnum};
use tenp_checkpoint::plan::{Initialisation, MergeWeights, RouterRule};

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "DERN (--method dern, tenp+dern)")]
pub(crate) struct DernArgs {
    /// What two neurons' similarity is made of: weights of the cosines of gate row, up row and down column
    /// [default: 0,0.5,0.5].
    #[arg(long, value_name = "G,U,D", value_parser = lambda)]
    pub(crate) lambda: Option<[f64; 3]>,
    /// A dropped neuron is merged into a kept one where their similarity is above this, else it is discarded
    /// [default: 0.4; 0 with tenp+dern].
    #[arg(long, value_name = "SIMILARITY")]
    pub(crate) threshold: Option<f64>,
    /// Kept router rows: gain a share of the dropped ones (default), or stay as they are.
    #[arg(long, value_enum, value_name = "RULE")]
    pub(crate) router: Option<RouterArg>,
    /// Where the clustering starts: neurons with the largest gate entries (default of dern), by lot, or those that the
    /// expert has of its own (default of tenp+dern).
    #[arg(long, value_enum, value_name = "START")]
    pub(crate) init: Option<InitArg>,
    /// Weight of a neuron in a merge: how much the router favours its expert (dern, default), its own energy (tenp+dern,
    /// default), or all the same.
    #[arg(long, value_enum, value_name = "WEIGHTS")]
    pub(crate) merge_weights: Option<MergeWeightsArg>,
    /// Neurons that differ in the sign of both up and down count as the same.
    #[arg(long)]
    pub(crate) sign_canonical: bool,
}

/// An option whose values another crate names.
macro_rules! value_arg {
    ($(#[$meta:meta])* $name:ident = $of:ident { $($(#[$variant_meta:meta])* $variant:ident),* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
        pub(crate) enum $name { $($(#[$variant_meta])* $variant),* }

        impl From<$name> for $of {
            fn from(value: $name) -> Self {
                match value { $($name::$variant => Self::$variant),* }
            }
        }
    };
}

value_arg! {
    /// What becomes of kept router rows.
    RouterArg = RouterRule {
        /// Gain the dropped rows, by the share of neurons moved.
        Transfer,
        /// Stay as they are.
        Keep
    }
}
value_arg! {
    /// Start of the clustering.
    InitArg = Initialisation {
        /// Neurons with the largest entry of a gate row.
        Peak,
        /// By lot.
        Random,
        /// The neurons that the expert has or keeps of its own.
        Kept
    }
}
value_arg! {
    /// Weights of a merge.
    MergeWeightsArg = MergeWeights {
        /// The router's favour of the expert a neuron comes from.
        Router,
        /// All the same.
        Uniform,
        /// The neuron's own energy.
        Energy
    }
}

fn lambda(text: &str) -> Result<[f64; 3], String> {
    let values: Vec<f64> = text
        .split(',')
        .map(|value| {
            value
                .trim()
                .parse()
                .map_err(|_| format!("`{value}` is not a number"))
        })
        .collect::<Result<_, _>>()?;
    <[f64; 3]>::try_from(values).map_err(|_| "expected three numbers, such as 0,0.5,0.5".to_owned())
}

/// What makes up for the neurons that are gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum RecoverArg {
    /// Nothing.
    #[default]
    None,
    /// Kept columns of the down projections are scaled by what all neurons contribute over what the kept ones do.
    Rescale,
    /// Down projections are fitted to the whole experts' outputs on the calibration text.
    LeastSquares,
}

/// How tokens count in the fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GatesArg {
    /// By the square of their gate weight.
    Gated,
    /// All the same.
    Ungated,
}

/// What a layer is fitted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum InputsArg {
    /// What the layers before it put out once they are pruned and recovered.
    Pruned,
    /// What they put out in the original.
    Original,
}

#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Recovery, for methods that narrow experts")]
pub(crate) struct RecoverArgs {
    /// How narrowed experts make up for the neurons that are gone.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) recover: RecoverArg,
    /// With --recover least-squares: how tokens count [default: gated].
    #[arg(long, value_enum, value_name = "GATES")]
    pub(crate) recover_gates: Option<GatesArg>,
    /// With --recover least-squares: what a layer is fitted on [default: pruned].
    #[arg(long, value_enum, value_name = "INPUTS")]
    pub(crate) recover_inputs: Option<InputsArg>,
}
