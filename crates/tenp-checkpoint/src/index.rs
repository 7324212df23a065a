//! Which shards a folder has, and which tensors its index promises.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

use crate::CheckpointError;

pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
pub(crate) const SINGLE_FILE: &str = "model.safetensors";

/// Shards of a folder, ascending by name.
#[derive(Debug)]
pub(crate) struct ShardList {
    pub(crate) present: Vec<String>,
    pub(crate) missing: Vec<String>,
    /// Tensor to shard, as the index says; empty for a single file.
    pub(crate) promised: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Finds a folder's shards without opening them.
pub(crate) fn locate(dir: &Path) -> Result<ShardList, CheckpointError> {
    let path = dir.join(INDEX_FILE);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return single(dir),
        Err(error) => return Err(CheckpointError::io("read", path)(error)),
    };
    let promised = parse(&path, &text)?;
    let shards: BTreeSet<&String> = promised.values().collect();
    let (present, missing) = shards
        .into_iter()
        .cloned()
        .partition(|shard| dir.join(shard).is_file());
    Ok(ShardList {
        present,
        missing,
        promised,
    })
}

/// Tensor to shard; every shard a plain name. `path` is only named in errors.
pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<BTreeMap<String, String>, CheckpointError> {
    let index: Index = serde_json::from_slice(text).map_err(|source| CheckpointError::Json {
        path: path.to_path_buf(),
        source,
    })?;
    let problem = if index.weight_map.is_empty() {
        "names no tensor; download it again".to_owned()
    } else if let Some(shard) = index.weight_map.values().find(|name| !is_plain_name(name)) {
        format!(
            "names the file `{shard}`, which is not a plain name inside the folder; do not trust this checkpoint"
        )
    } else {
        return Ok(index.weight_map);
    };
    Err(CheckpointError::Index {
        path: path.to_path_buf(),
        problem,
    })
}

fn single(dir: &Path) -> Result<ShardList, CheckpointError> {
    if !dir.join(SINGLE_FILE).is_file() {
        return Err(CheckpointError::NoWeights {
            dir: dir.to_path_buf(),
        });
    }
    Ok(ShardList {
        present: vec![SINGLE_FILE.to_owned()],
        missing: Vec::new(),
        promised: BTreeMap::new(),
    })
}

/// Separators of other systems are refused too: the same folder may be opened there.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
}

#[cfg(test)]
mod tests {
    use super::is_plain_name;

    #[test]
    fn only_names_inside_the_folder_are_plain() {
        for name in [
            "",
            ".",
            "..",
            "/etc/passwd",
            "../x",
            "a/b",
            "a\\b",
            "C:x",
            "a\0b",
        ] {
            assert!(!is_plain_name(name), "{name}");
        }
        assert!(is_plain_name("model-00001-of-00002.safetensors"));
    }
}
