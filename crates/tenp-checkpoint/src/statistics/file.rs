//! The statistics file: one safetensors file, read strictly.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::fields::FIELDS;
use super::parts::read_domain;
use super::{LayerStatistics, Statistics};
use crate::atomic::{Sink, replace_file};
use crate::header::{self, Entry, PlannedTensor};
use crate::shard::Shard;
use crate::{CheckpointError, Dtype};

const FORMAT: &str = "tenp-statistics";
const FORMAT_VERSION: &str = "1";

impl Statistics {
    /// Reads a statistics file.
    ///
    /// # Errors
    /// The file is damaged or of another kind; a statistic is missing, has the wrong shape, or holds a value that is not
    /// finite. The message names the statistic.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        Self::read_tables(path, &|_| true)
    }

    /// Reads a statistics file without the `[N,K]` tables that are not `wanted`, by name: these stay empty. They are most
    /// of a file.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_tables(
        path: &Path,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<Self, CheckpointError> {
        let shard = Shard::open_file(path.to_path_buf(), "statistics")?;
        let release = |range| shard.release(range);
        let file = StatisticsFile {
            path,
            entries: &shard.entries,
            metadata: &shard.metadata,
            bytes: shard.slice(0..shard.num_bytes() as usize),
            release: &release,
            wanted,
            partial: false,
        };
        file.read()
    }

    /// The bytes of [`Self::read`]; `path` is only named in errors.
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let header = header::parse(bytes).map_err(|problem| CheckpointError::Shard {
            path: path.to_path_buf(),
            problem,
        })?;
        let file = StatisticsFile {
            path,
            entries: &header.entries,
            metadata: &header.metadata,
            bytes,
            release: &|_| (),
            wanted: &|_| true,
            partial: false,
        };
        file.read()
    }

    /// Writes the file, replacing it as a whole.
    ///
    /// # Errors
    /// A statistic of the wrong length, or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), CheckpointError> {
        self.write_from(path, None)
    }

    /// [`Self::write`] where the `[N,K]` tables of some layers were let go of: they are in the file of [`super::write_parts`] that `part`
    /// names for a layer.
    ///
    /// # Errors
    /// As [`Self::write`]; such a file cannot be read.
    pub fn write_with_parts(
        &self,
        path: &Path,
        part: &dyn Fn(usize) -> PathBuf,
    ) -> Result<(), CheckpointError> {
        self.write_from(path, Some(part))
    }

    fn write_from(
        &self,
        path: &Path,
        part: Option<&dyn Fn(usize) -> PathBuf>,
    ) -> Result<(), CheckpointError> {
        let mut planned = Vec::new();
        let gone = |statistics: &LayerStatistics| part.filter(|_| statistics.table_bytes() == 0);
        for (domain, layers) in &self.domains {
            for (layer, statistics) in layers {
                let gone = gone(statistics).is_some();
                plan_layer(&mut planned, domain, *layer, statistics, gone)?;
            }
        }
        let refs: Vec<&PlannedTensor> = planned.iter().collect();
        let header = header::build(&self.metadata(), &refs);
        let data: u64 = planned.iter().map(PlannedTensor::num_bytes).sum();
        replace_file(path, header.len() as u64 + data, |sink| {
            sink.write(&header)?;
            for (domain, layers) in &self.domains {
                for (layer, statistics) in layers {
                    match gone(statistics) {
                        None => write_layer(sink, statistics)?,
                        Some(part) => {
                            write_layer(sink, &read_domain(&part(*layer), domain, *layer)?)?;
                        }
                    }
                }
            }
            Ok(())
        })
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        let run = (!self.run.is_empty()).then(|| ("run", self.run.clone()));
        let shares = (!self.shares.is_empty())
            .then(|| ("shares", serde_json::json!(self.shares).to_string()));
        [
            ("format", FORMAT.to_owned()),
            ("format_version", FORMAT_VERSION.to_owned()),
            ("checkpoint", self.checkpoint.clone()),
            ("tokens", serde_json::json!(self.tokens).to_string()),
            ("version", self.version.clone()),
            ("compute", serde_json::json!(self.compute).to_string()),
        ]
        .into_iter()
        .chain(run)
        .chain(shares)
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
    }
}

/// `gone`: the `[N,K]` tables come from elsewhere when they are written.
pub(super) fn plan_layer(
    planned: &mut Vec<PlannedTensor>,
    domain: &str,
    layer: usize,
    statistics: &LayerStatistics,
    gone: bool,
) -> Result<(), CheckpointError> {
    let (experts, width) = (statistics.num_experts, statistics.width);
    let prefix = format!("{domain}/layers.{layer}");
    let mut add = |name: &str, dtype, shape: Vec<usize>, length: usize| {
        let name = format!("{prefix}/{name}");
        if shape.iter().product::<usize>() != length {
            return Err(CheckpointError::Statistics {
                place: name,
                problem: format!("has {length} values for the shape {shape:?}"),
            });
        }
        planned.push(PlannedTensor { name, dtype, shape });
        Ok(())
    };
    add("tokens", Dtype::I64, vec![experts], statistics.tokens.len())?;
    add("total_tokens", Dtype::I64, vec![1], 1)?;
    for field in FIELDS {
        let values = (field.get)(statistics);
        if gone && field.per_neuron {
            let length = field.length(experts, width);
            add(field.name, Dtype::F64, field.shape(experts, width), length)?;
            continue;
        }
        // Tables that were not kept of a group: the width is told all the same.
        let shape = match values.len() {
            0 if field.per_neuron => vec![0, width],
            _ => field.shape(experts, width),
        };
        add(field.name, Dtype::F64, shape, values.len())?;
    }
    Ok(())
}

pub(super) fn write_layer(
    sink: &mut Sink<'_>,
    layer: &LayerStatistics,
) -> Result<(), CheckpointError> {
    let mut bytes = Vec::new();
    let counts = layer.tokens.iter().chain([&layer.total_tokens]);
    bytes.extend(counts.flat_map(|count| count.to_le_bytes()));
    sink.write(&bytes)?;
    for field in FIELDS {
        bytes.clear();
        bytes.extend(
            (field.get)(layer)
                .iter()
                .flat_map(|value| value.to_le_bytes()),
        );
        sink.write(&bytes)?;
    }
    Ok(())
}

pub(super) struct StatisticsFile<'a> {
    pub(super) path: &'a Path,
    pub(super) entries: &'a [Entry],
    pub(super) metadata: &'a BTreeMap<String, String>,
    /// The whole file.
    pub(super) bytes: &'a [u8],
    /// Told a byte range that has been read.
    pub(super) release: &'a dyn Fn(Range<usize>),
    /// Which `[N,K]` tables are read.
    pub(super) wanted: &'a dyn Fn(&str) -> bool,
    /// Whether such tables may be missing.
    pub(super) partial: bool,
}

impl StatisticsFile<'_> {
    fn read(&self) -> Result<Statistics, CheckpointError> {
        let metadata = self.metadata;
        if metadata.get("format").map(String::as_str) != Some(FORMAT) {
            return Err(self.error("this is not a statistics file; make one with `calibrate`"));
        }
        if metadata.get("format_version").map(String::as_str) != Some(FORMAT_VERSION) {
            return Err(self.error("written by another version of this program; calibrate again"));
        }
        let entries = self.by_name();
        let mut statistics = Statistics {
            checkpoint: self.text("checkpoint")?.to_owned(),
            tokens: self.json("tokens")?,
            version: self.text("version")?.to_owned(),
            compute: self.json("compute")?,
            run: metadata.get("run").cloned().unwrap_or_default(),
            shares: if metadata.contains_key("shares") {
                self.json("shares")?
            } else {
                Vec::new()
            },
            domains: BTreeMap::new(),
        };
        statistics
            .check_own_shares()
            .map_err(|problem| self.error(problem))?;
        for name in entries.keys() {
            let parsed = name
                .rsplit_once('/')
                .and_then(|(prefix, _)| Some((prefix, prefix.rsplit_once("/layers.")?)))
                .and_then(|(prefix, (domain, layer))| Some((prefix, domain, layer.parse().ok()?)));
            let Some((prefix, domain, layer)) = parsed else {
                return Err(self.error(format!("tensor {name} is no statistic of a layer")));
            };
            let layers = statistics.domains.entry(domain.to_owned()).or_default();
            if let std::collections::btree_map::Entry::Vacant(vacant) = layers.entry(layer) {
                vacant.insert(self.layer(&entries, prefix)?);
            }
        }
        if statistics.domains.is_empty() {
            return Err(self.error("holds no statistic; calibrate again"));
        }
        Ok(statistics)
    }

    pub(super) fn by_name(&self) -> BTreeMap<&str, &Entry> {
        let entries = self.entries.iter();
        entries.map(|entry| (entry.name.as_str(), entry)).collect()
    }

    pub(super) fn layer(
        &self,
        entries: &BTreeMap<&str, &Entry>,
        prefix: &str,
    ) -> Result<LayerStatistics, CheckpointError> {
        let tokens = self.entry(entries, prefix, "tokens")?;
        let contribution = self.entry(entries, prefix, "contribution")?;
        let (&[num_experts], &[_, width]) = (&tokens.shape[..], &contribution.shape[..]) else {
            return Err(self.error(format!(
                "{prefix}: tokens {:?} and contribution {:?} are not [N] and [N,K]",
                tokens.shape, contribution.shape
            )));
        };
        let totals = self.counts(entries, prefix, "total_tokens", &[1])?;
        let mut layer = LayerStatistics {
            num_experts,
            width,
            tokens: self.counts(entries, prefix, "tokens", &[num_experts])?,
            total_tokens: totals.first().copied().unwrap_or(0),
            ..LayerStatistics::default()
        };
        for field in FIELDS {
            let mut shape = field.shape(num_experts, width);
            if self.partial && self.entry(entries, prefix, field.name)?.shape == [0, width] {
                shape[0] = 0;
            }
            let bytes = self.bytes(entries, prefix, field.name, Dtype::F64, &shape)?;
            if field.per_neuron && !(self.wanted)(field.name) {
                continue;
            }
            let chunks = bytes.as_chunks::<8>().0.iter();
            let values: Vec<f64> = chunks.map(|chunk| f64::from_le_bytes(*chunk)).collect();
            if let Some(position) = values.iter().position(|value| !value.is_finite()) {
                let value = values[position];
                return Err(self.error(format!(
                    "{prefix}/{} holds {value} at position {position}; calibrate again, and check the weights for NaN",
                    field.name
                )));
            }
            *(field.get_mut)(&mut layer) = values;
            let Entry { start, end, .. } = self.entry(entries, prefix, field.name)?;
            (self.release)(*start..*end);
        }
        Ok(layer)
    }

    fn counts(
        &self,
        entries: &BTreeMap<&str, &Entry>,
        prefix: &str,
        name: &str,
        shape: &[usize],
    ) -> Result<Vec<i64>, CheckpointError> {
        let bytes = self.bytes(entries, prefix, name, Dtype::I64, shape)?;
        let chunks = bytes.as_chunks::<8>().0.iter();
        let counts: Vec<i64> = chunks.map(|chunk| i64::from_le_bytes(*chunk)).collect();
        if counts.iter().any(|count| *count < 0) {
            return Err(self.error(format!("{prefix}/{name} holds a negative count")));
        }
        Ok(counts)
    }

    fn bytes(
        &self,
        entries: &BTreeMap<&str, &Entry>,
        prefix: &str,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
    ) -> Result<&[u8], CheckpointError> {
        let entry = self.entry(entries, prefix, name)?;
        if entry.dtype != dtype || entry.shape != shape {
            return Err(self.error(format!(
                "{prefix}/{name} is {} {:?}, expected {dtype} {shape:?}",
                entry.dtype, entry.shape
            )));
        }
        Ok(&self.bytes[entry.start..entry.end])
    }

    fn entry<'e>(
        &self,
        entries: &BTreeMap<&str, &'e Entry>,
        prefix: &str,
        name: &str,
    ) -> Result<&'e Entry, CheckpointError> {
        entries
            .get(format!("{prefix}/{name}").as_str())
            .copied()
            .ok_or_else(|| self.error(format!("{prefix}/{name} is missing; calibrate again")))
    }

    fn text(&self, key: &str) -> Result<&str, CheckpointError> {
        self.metadata.get(key).map(String::as_str).ok_or_else(|| {
            self.error(format!(
                "`{key}` is missing from the header; calibrate again"
            ))
        })
    }

    fn json<T: serde::de::DeserializeOwned>(&self, key: &str) -> Result<T, CheckpointError> {
        serde_json::from_str(self.text(key)?)
            .map_err(|error| self.error(format!("`{key}` in the header: {error}")))
    }

    fn error(&self, problem: impl Into<String>) -> CheckpointError {
        CheckpointError::Statistics {
            place: self.path.display().to_string(),
            problem: problem.into(),
        }
    }
}
