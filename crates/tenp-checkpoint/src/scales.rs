//! Whether fp8 matrices and the tensors of their scales belong together.

use std::sync::OnceLock;

use crate::checkpoint::{Checkpoint, unreadable};
use crate::fp8::{scale_name, scale_shape, weight_of_scale};
use crate::header::Entry;
use crate::shard::Shard;
use crate::{CheckpointError, Dtype};

impl Checkpoint {
    /// Scales of an fp8 matrix, in f32. Those stored in bf16 are widened when they are first needed, and stay.
    pub(crate) fn scales(&self, weight: &str) -> &[u8] {
        let name = scale_name(weight);
        let Some((shard, entry)) = self.find(&name) else {
            return &[];
        };
        match self.wide_scales.get(&name) {
            Some(wide) => wide.get_or_init(|| widened(entry.dtype, shard.bytes(entry))),
            None => shard.bytes(entry),
        }
    }

    /// A place for every scale that has to be widened.
    pub(crate) fn note_wide_scales(&mut self) {
        let scales = self.shards.iter().flat_map(|shard| &shard.entries);
        let scales = scales
            .filter(|entry| weight_of_scale(&entry.name).is_some() && entry.dtype == Dtype::BF16);
        self.wide_scales = scales
            .map(|entry| (entry.name.clone(), OnceLock::new()))
            .collect();
    }

    /// Checks that every fp8 matrix has its scales and every scale its matrix. Scales in a shard that is missing, and
    /// known to be, are not asked for. Returns whether there is any fp8 matrix, which only a config that says `fp8` may have.
    pub(crate) fn check_scales(&self, fp8: bool) -> Result<bool, CheckpointError> {
        let mut found = false;
        for shard in &self.shards {
            for entry in &shard.entries {
                if entry.dtype == Dtype::F8E4M3 {
                    if !fp8 {
                        return Err(self.fp8_without_config(&entry.name));
                    }
                    self.check_scales_of(shard, entry)?;
                    found = true;
                } else if let Some(weight) = weight_of_scale(&entry.name)
                    && !self.may_be_fp8(weight)
                {
                    return Err(scale_error(
                        &entry.name,
                        shard,
                        format!("there is no fp8 tensor {weight} for these scales"),
                    ));
                }
            }
        }
        Ok(found)
    }

    fn may_be_fp8(&self, weight: &str) -> bool {
        match self.find(weight) {
            Some((_, entry)) => entry.dtype == Dtype::F8E4M3,
            None => self.is_in_missing_shard(weight),
        }
    }

    fn check_scales_of(&self, shard: &Shard, entry: &Entry) -> Result<(), CheckpointError> {
        let [rows, cols] = entry.shape[..] else {
            return Err(unreadable(shard, entry));
        };
        let (name, shape) = (scale_name(&entry.name), scale_shape(rows, cols));
        let Some((scale_shard, scale)) = self.find(&name) else {
            if self.is_in_missing_shard(&name) {
                return Ok(());
            }
            let problem = format!("is fp8, but its scales {name} {shape:?} are missing");
            return Err(scale_error(&entry.name, shard, problem));
        };
        if [Dtype::F32, Dtype::BF16].contains(&scale.dtype) && scale.shape == shape {
            return Ok(());
        }
        let problem = format!(
            "{} of shape {:?}, but the fp8 tensor {} {:?} needs f32 of shape {shape:?} (or bf16)",
            scale.dtype, scale.shape, entry.name, entry.shape
        );
        Err(scale_error(&name, scale_shard, problem))
    }

    fn fp8_without_config(&self, tensor: &str) -> CheckpointError {
        CheckpointError::Config {
            path: self.dir().join("config.json"),
            field: "quantization_config".to_owned(),
            problem: format!("is missing, but tensor {tensor} is fp8; download config.json again"),
        }
    }
}

/// Little-endian f32 of scales of another type.
fn widened(dtype: Dtype, bytes: &[u8]) -> Vec<u8> {
    let mut values = vec![0.0; bytes.len() / dtype.size()];
    dtype.widen(bytes, &mut values);
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn scale_error(tensor: &str, shard: &Shard, problem: String) -> CheckpointError {
    CheckpointError::Scale {
        tensor: tensor.to_owned(),
        shard: shard.path.display().to_string(),
        problem,
    }
}
