//! Statistics of a calibration: f64 tables by neuron. What is by expert is too little to count.

use tenp_checkpoint::ModelConfig;
use tenp_kernels::cpu::neuron::NeuronSums;

use crate::calibrate::FoldOptions;

/// Statistics by neuron.
const TABLES: usize = 9;

/// Squared weight norms by neuron, which the sums of a layer have too.
const NORM_TABLES: usize = 2;

/// Of a calibration of some domains, in some groups of samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatisticsMemory {
    /// N·K.
    neurons: usize,
    layers: usize,
    domains: usize,
    /// `[N,K]` tables of a domain.
    domain_tables: usize,
    /// The same of all groups together.
    group_tables: usize,
}

impl StatisticsMemory {
    /// Without groups.
    pub fn new(config: &ModelConfig, domains: usize) -> Self {
        Self {
            neurons: config.moe.num_experts * config.moe.expert_width,
            layers: config.moe_layers.len(),
            domains,
            domain_tables: TABLES,
            group_tables: 0,
        }
    }

    /// As a calibration keeps them, in so many groups.
    #[must_use]
    pub fn kept_by(self, options: &FoldOptions, groups: usize) -> Self {
        let tables = options.domain_tables.as_ref();
        Self {
            domain_tables: tables.map_or(TABLES, Vec::len),
            ..self.with_groups(groups, options.tables.len())
        }
    }

    /// With `tables` tables of each of `groups` groups.
    #[must_use]
    fn with_groups(self, groups: usize, tables: usize) -> Self {
        Self {
            group_tables: groups * tables,
            ..self
        }
    }

    /// One `[N,K]` table.
    fn table(self) -> usize {
        size_of::<f64>() * self.neurons
    }

    /// Of all layers.
    pub fn all(self) -> usize {
        self.layers * self.table() * (self.domain_tables * self.domains + self.group_tables)
    }

    /// Of a layer.
    pub(super) fn layer(self) -> usize {
        self.all() / self.layers.max(1)
    }

    /// Of that, the groups'.
    pub fn groups(self) -> usize {
        self.layers * self.table() * self.group_tables
    }

    /// The tables that a plan of all domains needs, drawn anew.
    pub fn drawn(self, tables: usize) -> usize {
        self.layers * self.table() * tables * self.domains
    }

    /// Of all layers but the last.
    pub(super) fn layers_before_last(self) -> usize {
        self.layer() * self.layers.saturating_sub(1)
    }

    /// A layer's sums of the samples of a label.
    pub(super) fn label(self) -> usize {
        NeuronSums::bytes(self.neurons)
    }

    /// Most of a layer: its sums while blocks run (each domain's, a group's, and those of so many blocks that run or wait
    /// for their turn), or the domains' sums and the statistics made of them.
    pub(super) fn sums(self, blocks: usize) -> usize {
        let sums = self.label();
        let norms = NORM_TABLES * self.table();
        let running = sums * (self.domains + 1 + blocks);
        let made = self.table() * (self.domain_tables * self.domains + self.group_tables);
        norms + running.max(sums * self.domains + made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_sums_and_statistics() {
        let memory = StatisticsMemory {
            neurons: 10,
            layers: 3,
            domains: 2,
            domain_tables: TABLES,
            group_tables: 0,
        };
        assert_eq!(memory.all(), 3 * 80 * 18);
        assert_eq!(memory.layers_before_last(), 2 * 80 * 18);
        // Two domains, a group, one block; then also a second block and one that waits.
        assert_eq!(memory.sums(1), 80 * (2 + 14 + 18));
        assert_eq!(memory.sums(3), 80 * (2 + 7 * 6));
        let grouped = memory.with_groups(8, 2);
        assert_eq!(grouped.all(), 3 * 80 * 34);
        assert_eq!(grouped.sums(1), 80 * (2 + 14 + 34));
        assert_eq!(memory.drawn(2), 3 * 80 * 4);
    }
}
