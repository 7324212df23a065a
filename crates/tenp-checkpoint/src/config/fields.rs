//! Typed access to the fields of `config.json`; `null` counts as absent.

use std::path::Path;

use serde_json::{Map, Value};

use crate::CheckpointError;

/// A JSON object together with the file it came from, for error messages.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    pub(super) path: &'a Path,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn error(&self, field: &str, problem: impl Into<String>) -> CheckpointError {
        CheckpointError::Config {
            path: self.path.to_path_buf(),
            field: field.to_owned(),
            problem: problem.into(),
        }
    }

    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        field: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.error(field, format!("is {value}, expected {kind}"))),
        }
    }

    pub(super) fn size(&self, field: &str) -> Result<Option<usize>, CheckpointError> {
        self.typed(field, "a whole number below 2^28", bounded)
    }

    /// A size that must be there and at least 1.
    pub(super) fn required(&self, field: &str) -> Result<usize, CheckpointError> {
        match self.size(field)? {
            Some(0) => Err(self.error(field, "is 0, expected at least 1")),
            Some(size) => Ok(size),
            None => Err(self.error(field, "is missing")),
        }
    }

    pub(super) fn float(&self, field: &str) -> Result<Option<f64>, CheckpointError> {
        self.typed(field, "a number", |value| {
            value.as_f64().filter(|number| number.is_finite())
        })
    }

    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool, CheckpointError> {
        Ok(self
            .typed(field, "true or false", Value::as_bool)?
            .unwrap_or(default))
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<&'a str>, CheckpointError> {
        self.typed(field, "a string", Value::as_str)
    }

    pub(super) fn list(&self, field: &str) -> Result<Option<&'a [Value]>, CheckpointError> {
        self.typed(field, "a list", |value| value.as_array().map(Vec::as_slice))
    }

    pub(super) fn sizes(&self, field: &str) -> Result<Option<Vec<usize>>, CheckpointError> {
        self.typed(field, "a list of whole numbers", sizes)
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<Fields<'a>>, CheckpointError> {
        let map = self.typed(field, "an object", Value::as_object)?;
        Ok(map.map(|map| Fields {
            path: self.path,
            map,
        }))
    }

    /// Refuses a present field whose text is not one of `known`.
    pub(super) fn one_of(
        &self,
        field: &str,
        known: &[&'static str],
        default: &'static str,
    ) -> Result<&'static str, CheckpointError> {
        let Some(text) = self.text(field)? else {
            return Ok(default);
        };
        known
            .iter()
            .copied()
            .find(|name| *name == text)
            .ok_or_else(|| {
                self.error(
                    field,
                    format!(
                        "is `{text}`, which is not supported here; known: {}",
                        known.join(", ")
                    ),
                )
            })
    }
}

/// The bound keeps products of two sizes far from overflow, whatever a hostile config says.
fn bounded(value: &Value) -> Option<usize> {
    let number = usize::try_from(value.as_u64()?).ok()?;
    (number < 1 << 28).then_some(number)
}

/// A list of whole numbers, or nothing.
pub(super) fn sizes(value: &Value) -> Option<Vec<usize>> {
    value.as_array()?.iter().map(bounded).collect()
}
