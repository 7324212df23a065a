//! An output folder as it stands, whatever is wrong with it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Difference;
use crate::checkpoint::view;
use crate::header::Entry;
use crate::index::{self, ShardList};
use crate::plan::Plan;
use crate::shard::Shard;
use crate::{CheckpointError, TensorView};

const PLAN_FILE: &str = "tenp_plan.json";

pub(super) struct Written {
    dir: PathBuf,
    shards: Vec<Shard>,
    /// Tensor name to shard and entry.
    by_name: HashMap<String, (usize, usize)>,
    /// Tensor to shard, as the index says; empty for a single file.
    promised: BTreeMap<String, String>,
}

impl Written {
    /// Shards that are not there are found by the tensors that they should hold; damaged ones are noted, and so are tensors
    /// that several have.
    pub(super) fn open(dir: &Path, found: &mut Vec<Difference>) -> Result<Self, CheckpointError> {
        let ShardList {
            present, promised, ..
        } = index::locate(dir)?;
        let mut shards = Vec::new();
        for name in &present {
            shards.extend(undamaged(Shard::open(dir, name), name, found)?);
        }
        let mut by_name = HashMap::new();
        for (index, shard) in shards.iter().enumerate() {
            for (entry, Entry { name, .. }) in shard.entries.iter().enumerate() {
                if let Some((first, _)) = by_name.insert(name.clone(), (index, entry)) {
                    let [first, second] = [first, index].map(|index: usize| &shards[index].name);
                    found.push(Difference {
                        place: name.clone(),
                        problem: format!("is in {first} and in {second}"),
                    });
                }
            }
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            by_name,
            shards,
            promised,
        })
    }

    /// Its plan; `None` if that is damaged, which is noted.
    pub(super) fn plan(
        &self,
        found: &mut Vec<Difference>,
    ) -> Result<Option<Plan>, CheckpointError> {
        undamaged(Plan::read(&self.dir.join(PLAN_FILE)), PLAN_FILE, found)
    }

    /// Its config; `None` if that is damaged, which is noted.
    pub(super) fn config(
        &self,
        found: &mut Vec<Difference>,
    ) -> Result<Option<Value>, CheckpointError> {
        let path = self.dir.join("config.json");
        let text = std::fs::read(&path).map_err(CheckpointError::io("read", &path))?;
        let config = serde_json::from_slice(&text);
        let config = config.map_err(|source| CheckpointError::Json { path, source });
        undamaged(config, "config.json", found)
    }

    /// Names of all tensors, ascending.
    pub(super) fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.by_name.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    pub(super) fn find(&self, name: &str) -> Option<TensorView<'_>> {
        let (shard, entry) = *self.by_name.get(name)?;
        let shard = &self.shards[shard];
        Some(view(shard, &shard.entries[entry]))
    }

    /// Tensors that the index places where they are not.
    pub(super) fn index_problems(&self) -> Vec<(&str, String)> {
        let holder = |name: &str| {
            let (shard, _) = self.by_name.get(name)?;
            Some(self.shards[*shard].name.as_str())
        };
        let names = self.names().into_iter();
        names
            .filter(|_| !self.promised.is_empty())
            .filter_map(|name| {
                let (said, is) = (self.promised.get(name), holder(name)?);
                let problem = match said {
                    Some(said) if said == is => return None,
                    Some(said) => format!("is in {is}, but in {said} by the index"),
                    None => "is not in the index".to_owned(),
                };
                Some((name, problem))
            })
            .collect()
    }

    /// Starts reading a tensor.
    pub(super) fn prefetch(&self, name: &str) {
        if let Some((shard, entry)) = self.by_name.get(name) {
            let shard = &self.shards[*shard];
            let entry = &shard.entries[*entry];
            shard.prefetch(entry.start..entry.end);
        }
    }

    /// Lets go of a tensor's pages.
    pub(super) fn release(&self, name: &str) {
        if let Some((shard, entry)) = self.by_name.get(name) {
            let shard = &self.shards[*shard];
            let entry = &shard.entries[*entry];
            shard.release(entry.start..entry.end);
        }
    }
}

/// What was read of a file, or nothing where its bytes are not what they should be.
fn undamaged<T>(
    read: Result<T, CheckpointError>,
    name: &str,
    found: &mut Vec<Difference>,
) -> Result<Option<T>, CheckpointError> {
    let problem = match read {
        Ok(value) => return Ok(Some(value)),
        Err(CheckpointError::Shard { problem, .. }) => problem,
        Err(CheckpointError::Json { source, .. }) => source.to_string(),
        Err(error) => return Err(error),
    };
    found.push(Difference {
        place: name.to_owned(),
        problem,
    });
    Ok(None)
}
