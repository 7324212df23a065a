//! Experts, router and which layers have them.

use super::fields::{Fields, sizes};
use super::{Family, GroupScore, Moe, Router, RouterGroups, RouterScore};
use crate::CheckpointError;

/// Far above every published model; bounds what a damaged config can make us allocate.
const MAX_EXPERTS: usize = 2048;

pub(super) fn moe(fields: Fields<'_>, family: Family) -> Result<Moe, CheckpointError> {
    let count_field = family
        .count_fields()
        .into_iter()
        .find(|field| fields.get(field).is_some())
        .unwrap_or(family.count_fields()[0]);
    let num_experts = fields.required(count_field)?;
    if num_experts > MAX_EXPERTS {
        return Err(fields.error(
            count_field,
            format!("is {num_experts}, more than the {MAX_EXPERTS} supported"),
        ));
    }
    let top_k = fields.required("num_experts_per_tok")?;
    if top_k > num_experts {
        return Err(fields.error(
            "num_experts_per_tok",
            format!("is {top_k}, more than the {num_experts} experts of {count_field}"),
        ));
    }
    let expert_width = fields.required(family.width_field())?;
    let shared_width = match family {
        _ if family.follows_deepseek() => fields
            .size("n_shared_experts")?
            .unwrap_or(0)
            .checked_mul(expert_width)
            .ok_or_else(|| fields.error("n_shared_experts", "is too large"))?,
        Family::Qwen2Moe => fields.size("shared_expert_intermediate_size")?.unwrap_or(0),
        _ => 0,
    };
    let router = router(fields, family, num_experts)?;
    if let Some(groups) = router.groups {
        let reachable = num_experts / groups.num_groups * groups.top_groups;
        if top_k > reachable {
            return Err(fields.error(
                "num_experts_per_tok",
                format!(
                    "is {top_k}, but {} groups hold only {reachable} experts",
                    groups.top_groups
                ),
            ));
        }
    }
    Ok(Moe {
        num_experts,
        top_k,
        expert_width,
        shared_width,
        shared_gate: family == Family::Qwen2Moe && shared_width > 0,
        router,
    })
}

fn router(
    fields: Fields<'_>,
    family: Family,
    num_experts: usize,
) -> Result<Router, CheckpointError> {
    let v3 = matches!(family, Family::DeepseekV3 | Family::Glm4Moe);
    if family.follows_deepseek() {
        let score = if v3 { "sigmoid" } else { "softmax" };
        fields.one_of("scoring_func", &[score], score)?;
    }
    let normalise = match family {
        Family::Mixtral => true,
        Family::DeepseekV2 => {
            // Public implementations disagree on whether the scaling factor still applies then.
            if fields.flag("norm_topk_prob", false)? {
                return Err(fields.error(
                    "norm_topk_prob",
                    "is true, which deepseek_v2 does not define",
                ));
            }
            false
        }
        // The defaults of the public configuration classes.
        Family::DeepseekV3 | Family::Glm4Moe => fields.flag("norm_topk_prob", true)?,
        _ => fields.flag("norm_topk_prob", false)?,
    };
    let groups = match family {
        Family::DeepseekV2 => {
            match fields.one_of("topk_method", &["greedy", "group_limited_greedy"], "greedy")? {
                "greedy" => None,
                _ => groups(fields, num_experts, GroupScore::Max)?,
            }
        }
        Family::DeepseekV3 | Family::Glm4Moe => {
            fields.one_of("topk_method", &["noaux_tc"], "noaux_tc")?;
            groups(fields, num_experts, GroupScore::TopTwoSum)?
        }
        _ => None,
    };
    // The public classes' own defaults differ between the families, and a wrong factor would go unnoticed.
    let scaling = match family {
        Family::DeepseekV2 | Family::DeepseekV3 | Family::Glm4Moe => fields
            .float("routed_scaling_factor")?
            .ok_or_else(|| fields.error("routed_scaling_factor", "is missing"))?,
        _ => 1.0,
    };
    Ok(Router {
        score: if v3 {
            RouterScore::Sigmoid
        } else {
            RouterScore::Softmax
        },
        correction_bias: v3,
        groups,
        normalise,
        scaling,
    })
}

fn groups(
    fields: Fields<'_>,
    num_experts: usize,
    score: GroupScore,
) -> Result<Option<RouterGroups>, CheckpointError> {
    let num_groups = fields.required("n_group")?;
    if num_groups <= 1 {
        return Ok(None);
    }
    let top_groups = fields.required("topk_group")?;
    if !num_experts.is_multiple_of(num_groups) {
        return Err(fields.error(
            "n_group",
            format!("is {num_groups}, which does not divide {num_experts} experts"),
        ));
    }
    if top_groups > num_groups {
        return Err(fields.error(
            "topk_group",
            format!("is {top_groups}, more than n_group = {num_groups}"),
        ));
    }
    if score == GroupScore::TopTwoSum && num_experts / num_groups < 2 {
        return Err(fields.error(
            "n_group",
            format!("is {num_groups}: a group's score is the sum of its best two, but groups hold one expert"),
        ));
    }
    Ok(Some(RouterGroups {
        num_groups,
        top_groups,
        score,
    }))
}

/// Indices of the MoE layers, ascending.
pub(super) fn moe_layers(
    fields: Fields<'_>,
    family: Family,
    num_layers: usize,
) -> Result<Vec<usize>, CheckpointError> {
    let layers: Vec<usize> = if let Some(kinds) = fields.list("mlp_layer_types")? {
        kinds
            .iter()
            .take(num_layers)
            .enumerate()
            .filter(|(_, kind)| kind.as_str() == Some("sparse"))
            .map(|(layer, _)| layer)
            .collect()
    } else if family.follows_deepseek() {
        let first = fields.size("first_k_dense_replace")?.unwrap_or(0);
        let every = fields.size("moe_layer_freq")?.unwrap_or(1).max(1);
        (first..num_layers)
            .filter(|layer| layer.is_multiple_of(every))
            .collect()
    } else if matches!(family, Family::Qwen2Moe | Family::Qwen3Moe) {
        let every = fields.size("decoder_sparse_step")?.unwrap_or(1).max(1);
        let dense = fields.sizes("mlp_only_layers")?.unwrap_or_default();
        (0..num_layers)
            .filter(|layer| (layer + 1).is_multiple_of(every) && !dense.contains(layer))
            .collect()
    } else {
        (0..num_layers).collect()
    };
    if layers.is_empty() {
        return Err(fields.error("num_hidden_layers", "leaves no Mixture-of-Experts layer"));
    }
    Ok(layers)
}

/// The widths that a ragged checkpoint records.
pub(super) fn widths(
    fields: Fields<'_>,
    moe: &Moe,
    num_moe_layers: usize,
) -> Result<Vec<Vec<usize>>, CheckpointError> {
    let section = fields.object("tenp")?.ok_or_else(|| {
        fields.error(
            "tenp",
            "is missing, but model_type says the checkpoint is ragged",
        )
    })?;
    if section.size("version")? != Some(1) {
        return Err(section.error(
            "tenp.version",
            "is not 1; use a newer version of this program",
        ));
    }
    section.one_of("form", &["ragged"], "ragged")?;
    let layers = section
        .list("widths")?
        .ok_or_else(|| section.error("tenp.widths", "is missing"))?;
    if layers.len() != num_moe_layers {
        return Err(section.error(
            "tenp.widths",
            format!(
                "has {} layers, the model has {num_moe_layers} MoE layers",
                layers.len()
            ),
        ));
    }
    layers
        .iter()
        .enumerate()
        .map(|(index, layer)| {
            sizes(layer)
                .filter(|widths| moe.reaches_top_k(widths.len()))
                .filter(|widths| widths.iter().all(|width| *width <= moe.expert_width))
                .ok_or_else(|| {
                    section.error(
                        "tenp.widths",
                        format!(
                            "of MoE layer number {index} are not {} widths of at most {}, or fewer that the router can choose its {} from",
                            moe.num_experts, moe.expert_width, moe.top_k
                        ),
                    )
                })
        })
        .collect()
}

impl Moe {
    /// Whether the router can do its work in a layer of this many experts, evenly over the groups.
    fn reaches_top_k(&self, count: usize) -> bool {
        let Some(groups) = self.router.groups else {
            return (self.top_k..=self.num_experts).contains(&count);
        };
        let size = count / groups.num_groups;
        count <= self.num_experts
            && count.is_multiple_of(groups.num_groups)
            && size * groups.top_groups >= self.top_k
            && (groups.score == GroupScore::Max || size >= 2)
    }
}
