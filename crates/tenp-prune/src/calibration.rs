//! The statistics of one checkpoint, checked once against its config and trusted after that.

use std::collections::BTreeMap;

use tenp_checkpoint::config::ModelConfig;
use tenp_checkpoint::statistics::{LayerStatistics, Statistics};

use crate::PruneError;
use crate::allocate::Shape;

/// Statistics that fit the model: every domain has every MoE layer, every table that is needed its length, every value a
/// number.
#[derive(Clone, Debug)]
pub struct Calibration<'a> {
    shape: Shape,
    layer_ids: Vec<usize>,
    domains: Vec<Domain<'a>>,
}

/// One domain of a [`Calibration`].
#[derive(Clone, Debug)]
pub struct Domain<'a> {
    /// Name.
    pub name: &'a str,
    /// Weight, above 0.
    pub weight: f64,
    /// Statistics of the MoE layers in depth order.
    pub layers: Vec<&'a LayerStatistics>,
}

impl<'a> Calibration<'a> {
    /// Checks `statistics` against the model. `fingerprint` is the checkpoint's own; domains missing in `weights`
    /// weigh 1, domains of weight 0 are left out. Layers that the model's MoE layers do not include (an MTP layer)
    /// are ignored. Of the `[N,K]` tables only the named `tables` have to be there and are checked.
    ///
    /// # Errors
    /// Another checkpoint's statistics, unknown domains or impossible weights, missing layers, tables of the wrong
    /// size, values that are not finite, a checkpoint that is already pruned or has no experts.
    pub fn new(
        config: &ModelConfig,
        fingerprint: &str,
        statistics: &'a Statistics,
        weights: &BTreeMap<String, f64>,
        tables: &[&str],
    ) -> Result<Self, PruneError> {
        if config.widths.is_some() {
            return Err(PruneError::AlreadyPruned);
        }
        let shape = Shape {
            num_layers: config.moe_layers.len(),
            num_experts: config.moe.num_experts,
            expert_width: config.moe.expert_width,
        };
        if shape.num_neurons() == 0 {
            return Err(PruneError::NothingToPrune {
                num_layers: shape.num_layers,
                num_experts: shape.num_experts,
                width: shape.expert_width,
            });
        }
        if statistics.checkpoint != fingerprint {
            return Err(PruneError::Fingerprint {
                expected: fingerprint.to_owned(),
                got: statistics.checkpoint.clone(),
            });
        }
        check_weights(statistics, weights)?;
        let mut domains = Vec::new();
        for (name, layers) in &statistics.domains {
            let weight = weights.get(name).copied().unwrap_or(1.0);
            if weight > 0.0 {
                domains.push(Domain {
                    name,
                    weight,
                    layers: checked_layers(config, shape, (name, layers), tables)?,
                });
            }
        }
        if domains.is_empty() {
            return Err(PruneError::NoDomain {
                known: known_domains(statistics),
            });
        }
        Ok(Self {
            shape,
            layer_ids: config.moe_layers.clone(),
            domains,
        })
    }

    /// Number of layers, experts, and neurons of an expert.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The model's own index of each MoE layer, in depth order.
    pub fn layer_ids(&self) -> &[usize] {
        &self.layer_ids
    }

    /// The domains that count, by name.
    pub fn domains(&self) -> &[Domain<'a>] {
        &self.domains
    }

    /// Tokens routed to each expert, `[moe layer][expert]`, summed over the domains (weights do not enter: these are
    /// counts of what happened).
    pub fn tokens(&self) -> Vec<Vec<u64>> {
        (0..self.shape.num_layers)
            .map(|layer| {
                let mut counts = vec![0_u64; self.shape.num_experts];
                for domain in &self.domains {
                    for (count, tokens) in counts.iter_mut().zip(&domain.layers[layer].tokens) {
                        *count = count.saturating_add(tokens.unsigned_abs());
                    }
                }
                counts
            })
            .collect()
    }
}

fn known_domains(statistics: &Statistics) -> String {
    let names: Vec<&str> = statistics.domains.keys().map(String::as_str).collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

fn check_weights(
    statistics: &Statistics,
    weights: &BTreeMap<String, f64>,
) -> Result<(), PruneError> {
    for (domain, &weight) in weights {
        if !statistics.domains.contains_key(domain) {
            return Err(PruneError::UnknownDomain {
                domain: domain.clone(),
                known: known_domains(statistics),
            });
        }
        if !weight.is_finite() || weight < 0.0 {
            return Err(PruneError::DomainWeight {
                domain: domain.clone(),
                got: weight,
            });
        }
    }
    Ok(())
}

fn checked_layers<'a>(
    config: &ModelConfig,
    shape: Shape,
    (domain, layers): (&str, &'a BTreeMap<usize, LayerStatistics>),
    tables: &[&str],
) -> Result<Vec<&'a LayerStatistics>, PruneError> {
    let mut checked = Vec::with_capacity(shape.num_layers);
    for &layer in &config.moe_layers {
        let statistics = layers.get(&layer).ok_or_else(|| PruneError::MissingLayer {
            domain: domain.to_owned(),
            layer,
        })?;
        Place { domain, layer }.check(shape, statistics, tables)?;
        checked.push(statistics);
    }
    Ok(checked)
}

/// Where in the statistics a check stands.
#[derive(Clone, Copy)]
struct Place<'a> {
    domain: &'a str,
    layer: usize,
}

impl Place<'_> {
    fn check(
        self,
        shape: Shape,
        statistics: &LayerStatistics,
        tables: &[&str],
    ) -> Result<(), PruneError> {
        let (experts, width) = (shape.num_experts, shape.expert_width);
        self.check_size("num_experts", experts, statistics.num_experts)?;
        self.check_size("width", width, statistics.width)?;
        self.check_size("tokens", experts, statistics.tokens.len())?;
        if let Some(expert) = statistics.tokens.iter().position(|&tokens| tokens < 0) {
            return Err(self.bad_value(expert, "tokens", statistics.tokens[expert] as f64));
        }
        for (name, table) in per_expert(statistics) {
            self.check_table(name, table, experts, 1)?;
        }
        let needed = per_neuron(statistics).into_iter();
        for (name, table) in needed.filter(|(name, _)| tables.contains(name)) {
            self.check_table(name, table, experts, width)?;
        }
        Ok(())
    }

    fn check_table(
        self,
        name: &'static str,
        table: &[f64],
        experts: usize,
        row: usize,
    ) -> Result<(), PruneError> {
        self.check_size(name, experts * row, table.len())?;
        match table.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => Err(self.bad_value(at / row, name, table[at])),
        }
    }

    fn check_size(self, what: &'static str, expected: usize, got: usize) -> Result<(), PruneError> {
        if got == expected {
            return Ok(());
        }
        Err(PruneError::StatisticShape {
            domain: self.domain.to_owned(),
            layer: self.layer,
            what,
            expected,
            got,
        })
    }

    fn bad_value(self, expert: usize, statistic: &'static str, got: f64) -> PruneError {
        PruneError::StatisticValue {
            domain: self.domain.to_owned(),
            layer: self.layer,
            expert,
            statistic,
            got,
        }
    }
}

/// The `[N]` tables that scores are made from.
fn per_expert(statistics: &LayerStatistics) -> [(&'static str, &[f64]); 8] {
    [
        ("normalised_gate_sum", &statistics.normalised_gate_sum),
        ("gate_sum", &statistics.gate_sum),
        ("norm_sum", &statistics.norm_sum),
        ("norm_sq_sum", &statistics.norm_sq_sum),
        ("gated_norm_sum", &statistics.gated_norm_sum),
        ("direction", &statistics.direction),
        ("residual_direction", &statistics.residual_direction),
        ("output_peak", &statistics.output_peak),
    ]
}

/// The `[N,K]` tables that scores are made from.
fn per_neuron(statistics: &LayerStatistics) -> [(&'static str, &[f64]); 9] {
    [
        ("contribution", &statistics.contribution),
        ("contribution_abs", &statistics.contribution_abs),
        ("activation_norm", &statistics.activation_norm),
        ("energy", &statistics.energy),
        ("peak", &statistics.peak),
        ("mean", &statistics.mean),
        ("second_moment", &statistics.second_moment),
        ("neuron_weight_norm_sq", &statistics.neuron_weight_norm_sq),
        ("down_norm_sq", &statistics.down_norm_sq),
    ]
}
