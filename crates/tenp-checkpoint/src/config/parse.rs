//! From JSON to [`ModelConfig`].

use std::path::Path;

use serde_json::{Map, Value};

use super::fields::Fields;
use super::{Family, ModelConfig, attention, moe};
use crate::CheckpointError;
use crate::fp8::FP8_BLOCK;

/// Prefix that a ragged checkpoint puts before its `model_type`.
pub(crate) const RAGGED_PREFIX: &str = "tenp_";

/// Far above every published model; bounds what a damaged config can make us allocate.
const MAX_LAYERS: usize = 512;

/// A `config.json`, read.
pub(crate) struct ConfigFile {
    pub(crate) json: Map<String, Value>,
    pub(crate) model: ModelConfig,
    /// Whether the weights are said to be fp8.
    pub(crate) fp8: bool,
}

impl ConfigFile {
    /// `path` is only named in errors.
    pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<Self, CheckpointError> {
        let json: Map<String, Value> =
            serde_json::from_slice(text).map_err(|source| CheckpointError::Json {
                path: path.to_path_buf(),
                source,
            })?;
        Ok(Self {
            model: ModelConfig::from_json(path, &json)?,
            fp8: is_fp8(path, &json)?,
            json,
        })
    }
}

impl ModelConfig {
    /// Reads a `config.json` already parsed as JSON; `path` is only named in errors.
    ///
    /// # Errors
    /// [`CheckpointError::UnknownFamily`] for an unknown `model_type`, [`CheckpointError::Config`] for a field that is
    /// missing, of the wrong type, contradictory, or asks for something this
    /// version cannot do (another activation, another rope scaling). Quantisation is refused when a checkpoint is opened.
    pub fn from_json(path: &Path, json: &Map<String, Value>) -> Result<Self, CheckpointError> {
        let fields = Fields { path, map: json };
        let (family, ragged) = family(fields)?;
        fields.one_of("hidden_act", &["silu", "swish"], "silu")?;
        let hidden_size = fields.required("hidden_size")?;
        let num_layers = fields.required("num_hidden_layers")?;
        if num_layers > MAX_LAYERS {
            return Err(fields.error(
                "num_hidden_layers",
                format!("is {num_layers}, more than the {MAX_LAYERS} supported"),
            ));
        }
        let max_positions = fields.required("max_position_embeddings")?;
        let moe = moe::moe(fields, family)?;
        let moe_layers = moe::moe_layers(fields, family, num_layers)?;
        let widths = if ragged {
            Some(moe::widths(fields, &moe, moe_layers.len())?)
        } else {
            None
        };
        let dense_width = if moe_layers.len() < num_layers {
            fields.required("intermediate_size")?
        } else {
            fields.size("intermediate_size")?.unwrap_or(0)
        };
        let rms_norm_eps = fields
            .float("rms_norm_eps")?
            .ok_or_else(|| fields.error("rms_norm_eps", "is missing"))?;
        Ok(Self {
            family,
            hidden_size,
            num_layers,
            vocab_size: fields.required("vocab_size")?,
            rms_norm_eps,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            dense_width,
            attention: attention::attention(fields, family, hidden_size, num_layers)?,
            rope: attention::rope(fields, family, max_positions)?,
            moe,
            moe_layers,
            widths,
            num_mtp_layers: fields.size("num_nextn_predict_layers")?.unwrap_or(0),
            max_positions,
            bos_token_id: token_ids(fields, "bos_token_id")?.first().copied(),
            eos_token_ids: token_ids(fields, "eos_token_id")?,
        })
    }

    /// Position of a layer among the MoE layers; `None` for a dense layer.
    pub fn moe_index(&self, layer: usize) -> Option<usize> {
        self.moe_layers.binary_search(&layer).ok()
    }

    /// Routed experts of an MoE layer, numbered in depth order.
    pub fn num_experts(&self, index: usize) -> usize {
        match &self.widths {
            Some(widths) => widths.get(index).map_or(0, Vec::len),
            None => self.moe.num_experts,
        }
    }

    /// Width of a routed expert, ragged or not; `index` is the layer's position among the MoE layers.
    pub fn width(&self, index: usize, expert: usize) -> usize {
        match &self.widths {
            Some(widths) => widths
                .get(index)
                .and_then(|layer| layer.get(expert))
                .copied()
                .unwrap_or(0),
            None => self.moe.expert_width,
        }
    }
}

fn family(fields: Fields<'_>) -> Result<(Family, bool), CheckpointError> {
    let model_type = fields
        .text("model_type")?
        .ok_or_else(|| fields.error("model_type", "is missing"))?;
    let stock = model_type.strip_prefix(RAGGED_PREFIX);
    if stock.unwrap_or(model_type) == "gpt_oss" {
        return Err(fields.error(
            "model_type",
            "is gpt_oss, whose clamped experts with biases in mxfp4 blocks are not supported yet; use another model",
        ));
    }
    match Family::from_model_type(stock.unwrap_or(model_type)) {
        Some(family) => Ok((family, stock.is_some())),
        None => Err(CheckpointError::UnknownFamily {
            path: fields.path.to_path_buf(),
            model_type: model_type.to_owned(),
        }),
    }
}

/// `scale_fmt` of checkpoints whose scales are powers of two (DeepSeek-V3.1); they are stored as f32 all the same.
const POWERS_OF_TWO: &str = "ue8m0";

/// Whether an fp8 checkpoint promises scales that are powers of two.
pub(crate) fn has_scales_of_powers_of_two(json: &Map<String, Value>) -> bool {
    json.get("quantization_config")
        .is_some_and(|quantization| quantization["scale_fmt"] == POWERS_OF_TWO)
}

/// Whether a checkpoint's weights are fp8 in blocks of 128 × 128; any other quantisation is refused.
fn is_fp8(path: &Path, json: &Map<String, Value>) -> Result<bool, CheckpointError> {
    let fields = Fields { path, map: json };
    let Some(quantization) = fields.object("quantization_config")? else {
        return Ok(false);
    };
    let method = quantization.text("quant_method")?.unwrap_or("unknown");
    if method != "fp8" {
        return Err(fields.error(
            "quantization_config",
            format!(
                "says the checkpoint is quantised with {method}; use the bf16, f16 or fp8 original"
            ),
        ));
    }
    let refuse = |field: &str, value: &str| {
        fields.error(
            "quantization_config",
            format!(
                "has {field} {value}; of fp8, e4m3 with dynamic activations and f32 scales for blocks of 128 × 128 is supported, \
                 as DeepSeek-V3 has it: use the bf16 original"
            ),
        )
    };
    let block = quantization.sizes("weight_block_size")?;
    if block.as_deref() != Some(&[FP8_BLOCK; 2]) {
        let got = block.map_or("null".to_owned(), |block| format!("{block:?}"));
        return Err(refuse("weight_block_size", &got));
    }
    let known = [
        ("fmt", "e4m3"),
        ("activation_scheme", "dynamic"),
        ("scale_fmt", POWERS_OF_TWO),
    ];
    for (field, known) in known {
        if let Some(other) = quantization.text(field)?.filter(|text| *text != known) {
            return Err(refuse(field, other));
        }
    }
    Ok(true)
}

fn token_ids(fields: Fields<'_>, field: &str) -> Result<Vec<u32>, CheckpointError> {
    let Some(value) = fields.get(field) else {
        return Ok(Vec::new());
    };
    let single = std::slice::from_ref(value);
    let items = value.as_array().map_or(single, Vec::as_slice);
    items
        .iter()
        .map(|item| item.as_u64().and_then(|id| id.try_into().ok()))
        .collect::<Option<_>>()
        .ok_or_else(|| fields.error(field, format!("is {value}, expected token ids")))
}
