//! Attention and rotary fields.

use super::fields::Fields;
use super::{Attention, Family, QkNorm, Rope, RopeScaling};
use crate::CheckpointError;

pub(super) fn attention(
    fields: Fields<'_>,
    family: Family,
    hidden_size: usize,
    num_layers: usize,
) -> Result<Attention, CheckpointError> {
    let num_heads = fields.required("num_attention_heads")?;
    match family {
        Family::DeepseekV2 | Family::DeepseekV3 => latent(fields, num_heads),
        _ => grouped(fields, family, num_heads, hidden_size, num_layers),
    }
}

fn latent(fields: Fields<'_>, num_heads: usize) -> Result<Attention, CheckpointError> {
    let rope_dim = fields.required("qk_rope_head_dim")?;
    if rope_dim % 2 != 0 {
        return Err(fields.error("qk_rope_head_dim", "is odd; rotary pairs need an even size"));
    }
    Ok(Attention::Mla {
        num_heads,
        q_lora_rank: fields.size("q_lora_rank")?.filter(|rank| *rank > 0),
        kv_lora_rank: fields.required("kv_lora_rank")?,
        nope_dim: fields.required("qk_nope_head_dim")?,
        rope_dim,
        v_dim: fields.required("v_head_dim")?,
        bias: fields.flag("attention_bias", false)?,
    })
}

fn grouped(
    fields: Fields<'_>,
    family: Family,
    num_heads: usize,
    hidden_size: usize,
    num_layers: usize,
) -> Result<Attention, CheckpointError> {
    let num_kv_heads = fields.size("num_key_value_heads")?.unwrap_or(num_heads);
    if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
        return Err(fields.error(
            "num_key_value_heads",
            format!("is {num_kv_heads}, which does not divide num_attention_heads = {num_heads}"),
        ));
    }
    let head_dim = match fields.size("head_dim")?.filter(|size| *size > 0) {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            return Err(fields.error(
                "num_attention_heads",
                format!("is {num_heads}, which does not divide hidden_size = {hidden_size}"),
            ));
        }
    };
    if head_dim % 2 != 0 {
        return Err(fields.error(
            "head_dim",
            format!("is {head_dim}; rotary pairs need an even size"),
        ));
    }
    let all_biases = match family {
        Family::Mixtral | Family::Qwen2Moe => false,
        _ => fields.flag("attention_bias", false)?,
    };
    Ok(Attention::Gqa {
        num_heads,
        num_kv_heads,
        head_dim,
        rotary_dim: match family {
            Family::Glm4Moe => rotary_dim(fields, head_dim)?,
            _ => head_dim,
        },
        qkv_bias: match family {
            Family::Qwen2Moe => fields.flag("qkv_bias", true)?,
            _ => all_biases,
        },
        o_bias: all_biases && family != Family::Glm4Moe,
        qk_norm: match family {
            Family::Qwen3Moe => QkNorm::PerHead,
            Family::Glm4Moe if fields.flag("use_qk_norm", false)? => QkNorm::PerHead,
            Family::Olmoe => QkNorm::WholeProjection,
            _ => QkNorm::None,
        },
        sliding_window: sliding_window(fields, family, num_layers)?,
        clip_qkv: match family {
            Family::Olmoe => fields.float("clip_qkv")?,
            _ => None,
        },
    })
}

/// The rotary part of a head: `partial_rotary_factor` of it, the family's default a half.
fn rotary_dim(fields: Fields<'_>, head_dim: usize) -> Result<usize, CheckpointError> {
    const FIELD: &str = "partial_rotary_factor";
    let section = fields.object("rope_parameters")?;
    let factor = match section {
        Some(section) => section.float(FIELD)?,
        None => None,
    };
    let factor = match factor {
        Some(factor) => factor,
        None => fields.float(FIELD)?.unwrap_or(0.5),
    };
    let dim = (head_dim as f64 * factor) as usize;
    if factor > 0.0 && factor <= 1.0 && dim > 0 && dim.is_multiple_of(2) {
        return Ok(dim);
    }
    Err(fields.error(
        FIELD,
        format!("is {factor}, which makes {dim} of {head_dim} elements rotary; pairs are needed"),
    ))
}

fn sliding_window(
    fields: Fields<'_>,
    family: Family,
    num_layers: usize,
) -> Result<Vec<Option<usize>>, CheckpointError> {
    let none = vec![None; num_layers];
    let Some(window) = fields.size("sliding_window")?.filter(|size| *size > 0) else {
        return Ok(none);
    };
    match family {
        Family::Mixtral => return Ok(vec![Some(window); num_layers]),
        Family::Qwen2Moe | Family::Qwen3Moe if fields.flag("use_sliding_window", false)? => {}
        _ => return Ok(none),
    }
    if let Some(types) = fields.list("layer_types")? {
        if types.len() < num_layers {
            return Err(fields.error(
                "layer_types",
                format!("has {} entries for {num_layers} layers", types.len()),
            ));
        }
        return types[..num_layers]
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => Ok(Some(window)),
                _ => Err(fields.error("layer_types", format!("holds the unknown type {kind}"))),
            })
            .collect();
    }
    let first = fields.size("max_window_layers")?.unwrap_or(0);
    Ok((0..num_layers)
        .map(|layer| (layer >= first).then_some(window))
        .collect())
}

pub(super) fn rope(
    fields: Fields<'_>,
    family: Family,
    max_positions: usize,
) -> Result<Rope, CheckpointError> {
    let default_theta = match family {
        Family::Mixtral => 1e6,
        _ => 1e4,
    };
    let section = match fields.object("rope_parameters")? {
        Some(section) => Some(section),
        None => fields.object("rope_scaling")?,
    };
    let theta = match section {
        Some(section) => section.float("rope_theta")?,
        None => None,
    };
    let theta = match theta {
        Some(theta) => theta,
        None => fields.float("rope_theta")?.unwrap_or(default_theta),
    };
    if theta <= 1.0 {
        return Err(fields.error("rope_theta", format!("is {theta}, expected more than 1")));
    }
    let interleaved = match family {
        Family::DeepseekV2 => true,
        Family::DeepseekV3 => fields.flag("rope_interleave", true)?,
        _ => false,
    };
    Ok(Rope {
        theta,
        interleaved,
        scaling: match section {
            Some(section) => scaling(section, max_positions)?,
            None => RopeScaling::None,
        },
    })
}

fn scaling(section: Fields<'_>, max_positions: usize) -> Result<RopeScaling, CheckpointError> {
    if section.map.values().any(serde_json::Value::is_object) {
        return Err(section.error(
            "rope_parameters",
            "differ by layer type, which is not supported",
        ));
    }
    let field = if section.get("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    };
    let kind = section.one_of(field, &["default", "linear", "yarn"], "default")?;
    if kind == "default" {
        return Ok(RopeScaling::None);
    }
    let factor = section.float("factor")?.ok_or_else(|| {
        section.error("factor", format!("is missing from the {kind} rope scaling"))
    })?;
    if factor <= 0.0 {
        return Err(section.error("factor", format!("is {factor}, expected more than 0")));
    }
    if kind == "linear" {
        return Ok(RopeScaling::Linear { factor });
    }
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast: section.float("beta_fast")?.unwrap_or(32.0),
        beta_slow: section.float("beta_slow")?.unwrap_or(1.0),
        mscale: section.float("mscale")?,
        mscale_all_dim: section.float("mscale_all_dim")?,
        attention_factor: section.float("attention_factor")?,
        original_max_positions: section
            .size("original_max_position_embeddings")?
            .filter(|length| *length > 0)
            .unwrap_or(max_positions),
    })
}
