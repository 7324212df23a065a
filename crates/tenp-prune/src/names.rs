//! The closed lists of names a plan is asked for by: methods, expert scores, neuron scores.

use crate::PruneError;

/// An enum whose variants have one name each, used on the command line and in `plan.json` alike.
macro_rules! named {
    (
        $(#[$meta:meta])*
        $what:literal $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $text:literal,)* }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$variant_meta])* $variant,)* }

        impl $name {
            /// Every value, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name on the command line and in `plan.json`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }

        impl std::str::FromStr for $name {
            type Err = PruneError;

            fn from_str(text: &str) -> Result<Self, PruneError> {
                Self::ALL.iter().copied().find(|value| value.name() == text).ok_or_else(|| {
                    PruneError::UnknownName {
                        what: $what,
                        got: text.to_owned(),
                        expected: [$($text,)*].join(", "),
                    }
                })
            }
        }
    };
}

named! {
    /// A pruning method: a preset of allocation, expert score and neuron score. `tenp`, `enp`, `tenp+dern` and
    /// `random-neurons` make experts narrower; the others drop whole experts.
    "method" Method {
        /// TENP (arXiv 2606.09885): trapezoid of whole experts, `direction`, `contribution`.
        Tenp = "tenp",
        /// Uniform widths, neurons by `contribution`.
        Enp = "enp",
        /// Drop the experts that the fewest tokens choose.
        Frequency = "frequency",
        /// Drop the experts with the smallest gate sum.
        Gating = "gating",
        /// Drop by summed output norm.
        Ean = "ean",
        /// Drop by mean gated output norm.
        Reap = "reap",
        /// Drop by mean output norm.
        Man = "man",
        /// Drop by mean squared output norm.
        Msan = "msan",
        /// Drop by the turn an expert gives to the residual stream.
        EasyEp = "easy-ep",
        /// DERN (arXiv 2509.10377): drop the experts the router favours least, and merge their neurons into the others.
        Dern = "dern",
        /// TENP, and what each narrow expert loses is merged into what it keeps, as DERN does.
        TenpDern = "tenp+dern",
        /// Drop random experts (control).
        RandomExperts = "random-experts",
        /// Uniform widths, random neurons (control).
        RandomNeurons = "random-neurons",
    }
}

named! {
    /// Importance of an expert within its layer. The family `tokens^(−b) Σ g^a ‖y‖^c` is written (b, a, c).
    "expert score" ExpertScore {
        /// `Σ g‖y‖(1 − cos(x, y))`, TENP's expert importance.
        Direction = "direction",
        /// (0, 0, 0): tokens routed to the expert.
        Frequency = "frequency",
        /// (0, 1, 0): sum of the gate weights.
        Gating = "gating",
        /// (0, 0, 1): sum of the output norms.
        Ean = "ean",
        /// (1, 1, 1): mean gated output norm.
        Reap = "reap",
        /// (1, 0, 1): mean output norm.
        Man = "man",
        /// (1, 0, 2): mean squared output norm.
        Msan = "msan",
        /// `Σ g‖y‖ · max(0, 1 − cos(r, r + Σ g y))`, r the residual stream.
        EasyEp = "easy-ep",
        /// Mean over all tokens of the expert's share of the token's gate weights (DERN).
        GatingShare = "gating-share",
        /// Seeded random numbers.
        Random = "random",
    }
}

named! {
    /// Importance of a neuron within its expert. All are per token unless they say otherwise.
    "neuron score" NeuronScore {
        /// `h_j⟨w_j, y⟩/‖y‖`, signed: the neuron's share of the output's length (ENP, TENP).
        Contribution = "contribution",
        /// The same with absolute values.
        ContributionAbs = "contribution-abs",
        /// `|h_j|·‖w_j‖` (ENP-L2).
        ActivationNorm = "activation-norm",
        /// `(1 − a) Σ (g h_j)²‖w_j‖² + a max (g h_j)²‖w_j‖²`, a = 0.9 (CAMERA-P); a sum, not a mean.
        Energy = "energy",
        /// `var(h_j)·‖w_j‖²` (WIFV, the score of FLAP).
        Wifv = "wifv",
        /// `sqrt(‖gate row‖² + ‖up row‖² + ‖w_j‖²)`, from the weights alone.
        WeightNorm = "weight-norm",
        /// Seeded random numbers.
        Random = "random",
    }
}

named! {
    /// What makes the errors of different layers comparable, for the sensitivity allocation.
    "error scale" ErrorScale {
        /// As they are.
        None = "none",
        /// Relative to the residual stream behind the layer.
        Residual = "residual",
    }
}

impl NeuronScore {
    /// The score depends on the calibration text, not on the weights or the seed alone.
    pub const fn measured_on_text(self) -> bool {
        !matches!(self, Self::WeightNorm | Self::Random)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_as_themselves() {
        for method in Method::ALL {
            assert_eq!(method.to_string().parse::<Method>().unwrap(), *method);
        }
        for score in ExpertScore::ALL {
            assert_eq!(score.name().parse::<ExpertScore>().unwrap(), *score);
        }
        for score in NeuronScore::ALL {
            assert_eq!(score.name().parse::<NeuronScore>().unwrap(), *score);
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = "reaper".parse::<Method>().unwrap_err().to_string();
        assert!(
            error.contains("`reaper`") && error.contains("tenp, enp, frequency"),
            "{error}"
        );
    }
}
