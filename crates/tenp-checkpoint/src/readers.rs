//! The readers of files that may come from anywhere, as functions of a file's bytes: for fuzzing them (docs/faults.md).

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use crate::config::{ConfigFile, ModelConfig};
use crate::{CheckpointError, Plan, PlannedTensor, Statistics, header, index};

/// What an error calls the file.
const NAME: &str = "bytes";

/// `model.safetensors.index.json`: tensor to shard.
///
/// # Errors
/// It is no index, or names a file that is not in its folder.
pub fn index(text: &[u8]) -> Result<BTreeMap<String, String>, CheckpointError> {
    index::parse(Path::new(NAME), text)
}

/// A safetensors file: its tensors, and where in the file each one's data is.
///
/// # Errors
/// The rule that its header breaks.
pub fn header(file: &[u8]) -> Result<Vec<(PlannedTensor, Range<usize>)>, String> {
    let header = header::parse(file)?;
    let tensors = header.entries.into_iter().map(|entry| {
        let range = entry.start..entry.end;
        let tensor = PlannedTensor {
            name: entry.name,
            dtype: entry.dtype,
            shape: entry.shape,
        };
        (tensor, range)
    });
    Ok(tensors.collect())
}

/// `config.json`, and whether it says that the weights are fp8.
///
/// # Errors
/// It is no config of a model that can be read.
pub fn config(text: &[u8]) -> Result<(ModelConfig, bool), CheckpointError> {
    ConfigFile::parse(Path::new(NAME), text).map(|file| (file.model, file.fp8))
}

/// `plan.json`, for a model of this config.
///
/// # Errors
/// It is no plan, or none for such a model.
pub fn plan(text: &[u8], config: &ModelConfig) -> Result<Plan, CheckpointError> {
    let plan = Plan::parse(Path::new(NAME), text)?;
    plan.check_model(config)?;
    Ok(plan)
}

/// The text of a plan.
///
/// # Errors
/// None of its own.
pub fn plan_text(plan: &Plan) -> Result<Vec<u8>, CheckpointError> {
    plan.to_json(Path::new(NAME))
}

/// A statistics file.
///
/// # Errors
/// It is none, or damaged.
pub fn statistics(file: &[u8]) -> Result<Statistics, CheckpointError> {
    Statistics::parse(Path::new(NAME), file)
}
