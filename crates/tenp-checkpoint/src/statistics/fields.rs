//! The one table of statistics: names, shapes and how they merge.

use super::LayerStatistics;

/// How two values of a statistic become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Merge {
    Sum,
    Max,
    /// From the weights: the same in every file.
    Equal,
}

/// One f64 statistic.
pub(super) struct Field {
    pub(super) name: &'static str,
    /// `[N,K]` rather than `[N]`.
    pub(super) per_neuron: bool,
    pub(super) merge: Merge,
    pub(super) get: fn(&LayerStatistics) -> &Vec<f64>,
    pub(super) get_mut: fn(&mut LayerStatistics) -> &mut Vec<f64>,
}

impl Field {
    pub(super) fn shape(&self, num_experts: usize, width: usize) -> Vec<usize> {
        if self.per_neuron {
            vec![num_experts, width]
        } else {
            vec![num_experts]
        }
    }

    pub(super) fn length(&self, num_experts: usize, width: usize) -> usize {
        self.shape(num_experts, width).iter().product()
    }
}

macro_rules! fields {
    ($($name:ident $per_neuron:literal $merge:ident),* $(,)?) => {
        /// Every f64 statistic, in file order.
        pub(super) const FIELDS: &[Field] = &[$(Field {
            name: stringify!($name),
            per_neuron: $per_neuron,
            merge: Merge::$merge,
            get: |layer| &layer.$name,
            get_mut: |layer| &mut layer.$name,
        }),*];
    };
}

fields! {
    gate_sum false Sum,
    normalised_gate_sum false Sum,
    norm_sum false Sum,
    norm_sq_sum false Sum,
    gated_norm_sum false Sum,
    direction false Sum,
    residual_direction false Sum,
    output_peak false Max,
    contribution true Sum,
    contribution_abs true Sum,
    activation_norm true Sum,
    energy true Sum,
    peak true Max,
    mean true Sum,
    second_moment true Sum,
    neuron_weight_norm_sq true Equal,
    down_norm_sq true Equal,
}
