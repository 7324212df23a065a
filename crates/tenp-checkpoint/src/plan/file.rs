//! `plan.json`.

use std::path::Path;

use super::Plan;
use crate::CheckpointError;
use crate::atomic::replace_file;

/// Value of a plan's `format`.
pub const FORMAT: &str = "tenp-plan";
/// Value of a plan's `version`.
pub const VERSION: u32 = 1;

impl Plan {
    /// Reads a plan. Whether it fits a checkpoint is for [`Self::validate`] to say.
    ///
    /// # Errors
    /// The file is unreadable, not JSON of this form, or of another version.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        let text = std::fs::read(path).map_err(CheckpointError::io("read", path))?;
        Self::parse(path, &text)
    }

    /// The text of [`Self::read`]; `path` is only named in errors.
    pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<Self, CheckpointError> {
        let plan: Self = serde_json::from_slice(text).map_err(|source| CheckpointError::Json {
            path: path.to_path_buf(),
            source,
        })?;
        plan.check_format()?;
        Ok(plan)
    }

    /// Writes the plan, replacing the file as a whole.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), CheckpointError> {
        let text = self.to_json(path)?;
        replace_file(path, text.len() as u64, |sink| sink.write(&text))
    }

    /// The bytes of [`Self::write`]; `path` is only named in errors.
    pub(crate) fn to_json(&self, path: &Path) -> Result<Vec<u8>, CheckpointError> {
        let mut text = serde_json::to_vec(self).map_err(|source| CheckpointError::Json {
            path: path.to_path_buf(),
            source,
        })?;
        text.push(b'\n');
        Ok(text)
    }

    pub(crate) fn check_format(&self) -> Result<(), CheckpointError> {
        if self.format == FORMAT && self.version == VERSION {
            return Ok(());
        }
        Err(CheckpointError::Plan {
            place: String::new(),
            problem: format!(
                "is `{}` version {}, this program reads `{FORMAT}` version {VERSION}; make it again with `plan`",
                self.format, self.version
            ),
        })
    }
}
