//! How large a checkpoint is, and where it came from if it was pruned.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::Dtype;
use crate::checkpoint::Checkpoint;
use crate::expected::expected_tensors;
use crate::fp8::{scale_name, scale_shape, weight_of_scale};
use crate::names::{Part, layer_of};

/// Parameters and bytes of a checkpoint. MTP layers count in bytes but not in parameters, as published figures do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointSize {
    /// All parameters.
    pub parameters_total: u64,
    /// Parameters of routed experts.
    pub parameters_routed: u64,
    /// Parameters used per token: everything but the experts that are not chosen. In a ragged checkpoint experts are
    /// taken at their layer's mean width.
    pub parameters_active: u64,
    /// Bytes of all tensors present.
    pub bytes_total: u64,
    /// Bytes of the routed experts' tensors, scales included.
    pub bytes_routed: u64,
    /// Element size of the routed experts.
    pub routed_bytes_per_parameter: u64,
}

/// What a pruned checkpoint says about its original.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrunedFrom {
    /// Fingerprint of the original.
    pub fingerprint: Option<String>,
    /// Folder name of the original.
    pub source: Option<String>,
    /// Method of the plan.
    pub method: Option<String>,
}

impl std::fmt::Display for PrunedFrom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.source, &self.fingerprint) {
            (Some(source), Some(fingerprint)) => write!(f, "{source}, fingerprint {fingerprint}"),
            (Some(source), None) => write!(f, "{source}"),
            (None, Some(fingerprint)) => write!(f, "the checkpoint with fingerprint {fingerprint}"),
            (None, None) => f.write_str("an unknown checkpoint"),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct PlanHead {
    fingerprint: Option<String>,
    method: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ReportHead {
    source: SourceHead,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct SourceHead {
    name: Option<String>,
}

/// Elements of a shape. Saturates: with shards missing, nothing but the config vouches for the sizes.
fn count(shape: &[usize]) -> u64 {
    shape
        .iter()
        .fold(1, |count, axis| u64::saturating_mul(count, *axis as u64))
}

impl Checkpoint {
    /// Parameters and bytes. Tensors of missing shards are counted from the config, in parameters only.
    pub fn size(&self) -> CheckpointSize {
        let config = self.config();
        let mut size = CheckpointSize {
            routed_bytes_per_parameter: self.routed_dtype().size() as u64,
            ..CheckpointSize::default()
        };
        for tensor in self.tensors() {
            size.bytes_total += tensor.bytes.len() as u64;
            // Scales are how fp8 weights are written, not parameters of their own.
            let main = layer_of(tensor.name).is_none_or(|layer| layer < config.num_layers);
            if main && weight_of_scale(tensor.name).is_none() {
                size.parameters_total += (tensor.bytes.len() / tensor.dtype.size()) as u64;
            }
        }
        if !self.missing_shards().is_empty() {
            size.parameters_total += expected_tensors(config, self.spelling())
                .filter(|tensor| !self.contains(&tensor.name))
                .map(|tensor| count(&tensor.shape))
                .fold(0, u64::saturating_add);
        }
        let mut active_routed = 0_u64;
        for index in 0..config.moe_layers.len() {
            let num_experts = config.num_experts(index);
            let width: usize = (0..num_experts)
                .map(|expert| config.width(index, expert))
                .sum();
            let layer = count(&[3, width, config.hidden_size]);
            let share = layer.saturating_mul(config.moe.top_k as u64) / num_experts.max(1) as u64;
            size.parameters_routed = size.parameters_routed.saturating_add(layer);
            active_routed = active_routed.saturating_add(share);
        }
        size.parameters_active = size
            .parameters_total
            .saturating_sub(size.parameters_routed)
            .saturating_add(active_routed);
        size.bytes_routed = size
            .parameters_routed
            .saturating_mul(size.routed_bytes_per_parameter)
            .saturating_add(self.routed_scale_bytes());
        size
    }

    /// Bytes of the routed experts' scales.
    fn routed_scale_bytes(&self) -> u64 {
        if self.routed_dtype() != Dtype::F8E4M3 {
            return 0;
        }
        let config = self.config();
        let layers = 0..config.moe_layers.len();
        let experts =
            layers.flat_map(|layer| (0..config.num_experts(layer)).map(move |e| (layer, e)));
        let blocks = |(layer, expert)| {
            let width = config.width(layer, expert);
            count(&scale_shape(width, config.hidden_size)) * 3
        };
        let layer = config.moe_layers.first().copied().unwrap_or(0);
        let name = scale_name(&self.spelling().expert(layer, 0, Part::Gate));
        let size = self.find(&name).map_or(4, |(_, entry)| entry.dtype.size());
        experts.map(|expert| size as u64 * blocks(expert)).sum()
    }

    /// The element type of most bytes.
    pub fn dtype(&self) -> Dtype {
        let mut bytes: BTreeMap<Dtype, u64> = BTreeMap::new();
        for tensor in self.tensors() {
            *bytes.entry(tensor.dtype).or_default() += tensor.bytes.len() as u64;
        }
        bytes
            .into_iter()
            .max_by_key(|(_, bytes)| *bytes)
            .map_or(Dtype::BF16, |(dtype, _)| dtype)
    }

    fn routed_dtype(&self) -> Dtype {
        let layer = self.config().moe_layers[0];
        self.expert(layer, 0)
            .map_or_else(|_| self.dtype(), |expert| expert.gate.dtype)
    }

    /// Where a pruned checkpoint came from; `None` for an original, or an identical copy of one.
    pub fn pruned_from(&self) -> Option<PrunedFrom> {
        let plan: Option<PlanHead> = self.read_json("tenp_plan.json");
        let copy = plan
            .as_ref()
            .is_some_and(|plan| plan.fingerprint.as_deref() == Some(self.fingerprint()));
        let section = self.config_json().get("tenp");
        if copy || (plan.is_none() && section.is_none()) {
            return None;
        }
        let plan = plan.unwrap_or_default();
        let recorded = section
            .and_then(|section| section.get("source_fingerprint"))
            .and_then(|fingerprint| fingerprint.as_str());
        let report: ReportHead = self.read_json("report.json").unwrap_or_default();
        Some(PrunedFrom {
            fingerprint: plan.fingerprint.or(recorded.map(str::to_owned)),
            source: report.source.name,
            method: plan.method,
        })
    }

    /// A damaged side file counts as an empty one: it still shows that the folder is an output.
    fn read_json<T: for<'de> Deserialize<'de> + Default>(&self, name: &str) -> Option<T> {
        let text = std::fs::read(self.dir().join(name)).ok()?;
        Some(serde_json::from_slice(&text).unwrap_or_default())
    }
}
