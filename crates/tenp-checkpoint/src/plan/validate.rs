//! Whether a plan fits a checkpoint.

use super::{ExpertPlan, LayerPlan, Plan};
use crate::config::{GroupScore, ModelConfig};
use crate::{Checkpoint, CheckpointError};

impl Plan {
    /// Checks that the plan was made for this checkpoint and is sound: its layers, every expert once and in order,
    /// widths within the experts', neurons ascending and in range, and a router that still reaches top-k experts.
    ///
    /// # Errors
    /// [`CheckpointError::PlanMismatch`] for another checkpoint's plan, [`CheckpointError::AlreadyPruned`] for a ragged
    /// checkpoint, [`CheckpointError::Plan`] naming layer and expert.
    pub fn validate(&self, checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
        self.check_format()?;
        if let Some(original) = checkpoint.pruned_from() {
            return Err(CheckpointError::AlreadyPruned {
                dir: checkpoint.dir().to_path_buf(),
                original: original.to_string(),
            });
        }
        if self.fingerprint != checkpoint.fingerprint() {
            return Err(CheckpointError::PlanMismatch {
                plan: self.fingerprint.clone(),
                checkpoint: checkpoint.fingerprint().to_owned(),
            });
        }
        self.check_model(checkpoint.config())
    }

    /// The part of [`Self::validate`] that needs only the config.
    pub(crate) fn check_model(&self, config: &ModelConfig) -> Result<(), CheckpointError> {
        let layers: Vec<usize> = self.layers.iter().map(|layer| layer.layer).collect();
        if layers != config.moe_layers {
            return Err(error(
                "",
                format!(
                    "lists the layers {layers:?}, the model's MoE layers are {:?}; make the plan again",
                    config.moe_layers
                ),
            ));
        }
        for layer in &self.layers {
            check_layer(layer, config)?;
        }
        if let Some(dern) = &self.dern {
            dern.check(config, &self.layers)?;
        }
        self.check_counts(config)
    }

    fn check_counts(&self, config: &ModelConfig) -> Result<(), CheckpointError> {
        for layer in &self.layers {
            let count = layer.kept().count();
            if count < config.moe.num_experts {
                check_reachable(layer, config, count)
                    .map_err(|problem| error(format!(", layer {}", layer.layer), problem))?;
            }
        }
        Ok(())
    }
}

fn check_layer(layer: &LayerPlan, config: &ModelConfig) -> Result<(), CheckpointError> {
    let num_experts = config.moe.num_experts;
    let in_order = layer
        .experts
        .iter()
        .map(|expert| expert.id)
        .eq(0..num_experts);
    if !in_order {
        return Err(error(
            format!(", layer {}", layer.layer),
            format!(
                "must list the experts 0 to {} once, in order",
                num_experts - 1
            ),
        ));
    }
    for expert in &layer.experts {
        check_expert(expert, config.moe.expert_width).map_err(|problem| {
            error(
                format!(", layer {}, expert {}", layer.layer, expert.id),
                format!("{problem}; make the plan again"),
            )
        })?;
    }
    Ok(())
}

fn check_expert(expert: &ExpertPlan, full: usize) -> Result<(), String> {
    let width = expert.width;
    if width > full {
        return Err(format!("width {width} is above the expert's {full}"));
    }
    let Some(neurons) = &expert.neurons else {
        return match (width, expert.dropped) {
            (0, _) => Ok(()),
            (_, true) => Err(format!("is dropped, but has width {width}")),
            (_, false) if width == full => Ok(()),
            _ => Err(format!("width {width} of {full}, but no list of neurons")),
        };
    };
    if expert.dropped && !neurons.is_empty() {
        return Err("is dropped, but lists neurons".to_owned());
    }
    if neurons.len() != width {
        return Err(format!(
            "width {width}, but {} neurons are listed",
            neurons.len()
        ));
    }
    if let Some([first, second]) = neurons.array_windows().find(|[a, b]| a >= b) {
        return Err(format!(
            "neuron {first} is followed by {second}; ids must ascend and be unique"
        ));
    }
    match neurons.last() {
        Some(last) if *last as usize >= full => Err(format!(
            "neuron {last} does not exist, the expert has {full}"
        )),
        _ => Ok(()),
    }
}

fn check_reachable(layer: &LayerPlan, config: &ModelConfig, count: usize) -> Result<(), String> {
    let top_k = config.moe.top_k;
    if count < top_k {
        return Err(format!(
            "keeps {count} experts, but each token chooses {top_k}; keep more"
        ));
    }
    let Some(groups) = config.moe.router.groups else {
        return Ok(());
    };
    let old_size = config.moe.num_experts / groups.num_groups;
    let mut sizes = vec![0_usize; groups.num_groups];
    for expert in layer.kept() {
        sizes[expert.id / old_size] += 1;
    }
    let size = sizes[0];
    if let Some(group) = sizes.iter().position(|other| *other != size) {
        return Err(format!(
            "keeps {size} experts in group 0, but {} in group {group}; routing needs equal groups",
            sizes[group]
        ));
    }
    if groups.score == GroupScore::TopTwoSum && size < 2 {
        return Err(
            "keeps fewer than the 2 experts per group that a group's score needs".to_owned(),
        );
    }
    if size * groups.top_groups < top_k {
        return Err(format!(
            "keeps {size} experts per group: {} groups hold fewer than the {top_k} each token chooses; keep more",
            groups.top_groups
        ));
    }
    Ok(())
}

fn error(place: impl Into<String>, problem: impl Into<String>) -> CheckpointError {
    CheckpointError::Plan {
        place: place.into(),
        problem: problem.into(),
    }
}
