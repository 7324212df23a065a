//! An output folder as it stands, whatever is wrong with it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::checkpoint::{by_name, view};
use crate::index::{self, ShardList};
use crate::plan::Plan;
use crate::shard::Shard;
use crate::{CheckpointError, TensorView};

pub(super) struct Written {
    dir: PathBuf,
    shards: Vec<Shard>,
    /// Tensor name to shard and entry.
    by_name: HashMap<String, (usize, usize)>,
    /// Tensor to shard, as the index says; empty for a single file.
    promised: BTreeMap<String, String>,
}

impl Written {
    /// Shards that are not there are found by the tensors that they should hold.
    pub(super) fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let ShardList {
            present, promised, ..
        } = index::locate(dir)?;
        let shards = present
            .iter()
            .map(|name| Shard::open(dir, name))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            dir: dir.to_path_buf(),
            by_name: by_name(&shards)?,
            shards,
            promised,
        })
    }

    pub(super) fn plan(&self) -> Result<Plan, CheckpointError> {
        Plan::read(&self.dir.join("tenp_plan.json"))
    }

    pub(super) fn config(&self) -> Result<Value, CheckpointError> {
        let path = self.dir.join("config.json");
        let text = std::fs::read(&path).map_err(CheckpointError::io("read", &path))?;
        serde_json::from_slice(&text).map_err(|source| CheckpointError::Json { path, source })
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
