//! Which shards a folder has, and which tensors its index promises.

use std::collections::BTreeMap;
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
    let index: Index = serde_json::from_slice(&text).map_err(|source| CheckpointError::Json {
        path: path.clone(),
        source,
    })?;
    let mut shards: Vec<&String> = index.weight_map.values().collect();
    shards.sort_unstable();
    shards.dedup();
    if shards.is_empty() {
        return Err(CheckpointError::Index {
            path,
            problem: "names no tensor; download it again".to_owned(),
        });
    }
    let (mut present, mut missing) = (Vec::new(), Vec::new());
    for shard in shards {
        if !is_plain_name(shard) {
            return Err(CheckpointError::Index {
                path,
                problem: format!(
                    "names the file `{shard}`, which is not a plain name inside the folder; do not trust this checkpoint"
                ),
            });
        }
        if dir.join(shard).is_file() {
            present.push(shard.clone());
        } else {
            missing.push(shard.clone());
        }
    }
    Ok(ShardList {
        present,
        missing,
        promised: index.weight_map,
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
