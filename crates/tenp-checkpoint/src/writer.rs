//! Sharded safetensors out: the layout is fixed first, then tensors are streamed into it one at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::thread::{Scope, ScopedJoinHandle};

use crate::CheckpointError;
use crate::atomic::{self, Sink, write_error, write_new};
use crate::header::{self, PlannedTensor};
use crate::index::INDEX_FILE;

/// Hugging Face's own limit.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// What [`write_shards`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenShards {
    /// Shard file names.
    pub shards: Vec<String>,
    /// Bytes of the shard files.
    pub bytes: u64,
}

/// Writes `model-XXXXX-of-XXXXX.safetensors` and the index into a folder.
///
/// Tensors go to shards in the given order, a new shard beginning where the next tensor would exceed `shard_bytes`.
/// Every tensor is aligned to its element: where the given order does not make it so, larger element types come first in
/// that shard. `fill` is called once per tensor with its position in `tensors` and must write exactly the tensor's bytes.
///
/// # Errors
/// Those of `fill`, a `fill` that writes too much or too little, a full disk, an unwritable folder. Files written so far
/// stay: the folder is the caller's to remove.
pub fn write_shards(
    dir: &Path,
    tensors: &[PlannedTensor],
    shard_bytes: u64,
    fill: &mut dyn FnMut(usize, &mut Sink<'_>) -> Result<(), CheckpointError>,
) -> Result<WrittenShards, CheckpointError> {
    struct All<'a>(&'a mut dyn FnMut(usize, &mut Sink<'_>) -> Result<(), CheckpointError>);
    impl Source for All<'_> {
        fn fill(&mut self, index: usize, sink: &mut Sink<'_>) -> Result<(), CheckpointError> {
            (self.0)(index, sink)
        }
    }
    write_from(dir, tensors, shard_bytes, &mut All(fill))
}

/// Where [`write_from`] takes tensors from.
pub(crate) trait Source {
    /// A shard of these tensors comes next, in this order.
    fn begins(&mut self, _tensors: &[usize]) {}

    /// Writes exactly the bytes of the tensor at a position of the list.
    fn fill(&mut self, index: usize, sink: &mut Sink<'_>) -> Result<(), CheckpointError>;

    /// Whether a whole shard of that name and length, from an earlier run of the same inputs, may stay with its tensors.
    fn keeps(&mut self, _shard: &Path, _num_bytes: u64, _tensors: &[usize]) -> bool {
        false
    }

    /// A shard is whole, and is about to get its name.
    fn completed(&mut self) -> Result<(), CheckpointError> {
        Ok(())
    }
}

/// [`write_shards`], but for shards that `source` keeps.
pub(crate) fn write_from(
    dir: &Path,
    tensors: &[PlannedTensor],
    shard_bytes: u64,
    source: &mut dyn Source,
) -> Result<WrittenShards, CheckpointError> {
    let groups = assign(tensors, shard_bytes);
    let total: u64 = tensors.iter().map(PlannedTensor::num_bytes).sum();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut written = WrittenShards {
        shards: Vec::with_capacity(groups.len()),
        bytes: 0,
    };
    let mut weight_map = BTreeMap::new();
    std::thread::scope(|scope| {
        let mut naming = Naming::new(scope, total);
        let shards = groups.iter().enumerate().try_for_each(|(number, group)| {
            let name = shard_name(number, groups.len());
            let path = dir.join(&name);
            let planned: Vec<&PlannedTensor> = group.iter().map(|index| &tensors[*index]).collect();
            let header = header::build(&metadata, &planned);
            let data: u64 = planned.iter().map(|tensor| tensor.num_bytes()).sum();
            let num_bytes = header.len() as u64 + data;
            if !source.keeps(&path, num_bytes, group) {
                let (partial, file) = create_partial(&path, total)?;
                source.begins(group);
                let sink = Sink::new(&file, &path, total);
                let shard = group.iter().zip(&planned);
                fill(sink, &header, shard, source, &mut naming)?;
                naming.add(file, partial, path, &mut || source.completed())?;
            }
            for tensor in planned {
                weight_map.insert(tensor.name.as_str(), name.clone());
            }
            written.bytes += num_bytes;
            written.shards.push(name);
            Ok(())
        });
        let named = naming.finish(&mut || source.completed());
        shards.and(named)
    })?;
    let index = serde_json::json!({
        "metadata": { "total_size": total },
        "weight_map": weight_map,
    });
    write_new(&dir.join(INDEX_FILE), &pretty(&index), total)?;
    Ok(written)
}

/// Writes header and tensors of a shard.
fn fill<'t>(
    mut sink: Sink<'_>,
    header: &[u8],
    tensors: impl Iterator<Item = (&'t usize, &'t &'t PlannedTensor)>,
    source: &mut dyn Source,
    naming: &mut Naming<'_, '_>,
) -> Result<(), CheckpointError> {
    sink.write(header)?;
    for (index, tensor) in tensors {
        let end = sink.written() + tensor.num_bytes();
        source.fill(*index, &mut sink)?;
        if sink.written() != end {
            return Err(wrong_length(sink.path(), tensor, end, sink.written()));
        }
        naming.name_synced(&mut || source.completed())?;
    }
    sink.flush()
}

/// Gives whole shards their names, each when it is on the disk, while the next one is written.
pub(crate) struct Naming<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    /// Bytes of all shards, for the error of a full disk.
    needed: u64,
    last: Option<Unnamed<'scope>>,
}

/// A whole shard on its way to the disk.
struct Unnamed<'scope> {
    synced: ScopedJoinHandle<'scope, Result<(), CheckpointError>>,
    partial: PathBuf,
    path: PathBuf,
}

impl<'scope, 'env> Naming<'scope, 'env> {
    pub(crate) fn new(scope: &'scope Scope<'scope, 'env>, needed: u64) -> Self {
        Self {
            scope,
            needed,
            last: None,
        }
    }

    /// Takes a shard over, and names the one before once it is on the disk. `completed` is called before a shard gets its
    /// name.
    pub(crate) fn add(
        &mut self,
        file: File,
        partial: PathBuf,
        path: PathBuf,
        completed: &mut dyn FnMut() -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let (place, needed) = (path.clone(), self.needed);
        let next = Unnamed {
            synced: self
                .scope
                .spawn(move || atomic::sync(&file, &place, needed)),
            partial,
            path,
        };
        let before = self.last.replace(next);
        before.map_or(Ok(()), |shard| shard.name(completed))
    }

    /// Names a shard that is on the disk by now, so that a run which is killed later need not write it again.
    pub(crate) fn name_synced(
        &mut self,
        completed: &mut dyn FnMut() -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let synced = self.last.take_if(|shard| shard.synced.is_finished());
        synced.map_or(Ok(()), |shard| shard.name(completed))
    }

    /// Names the last one. To be called whatever became of the next: it is whole.
    pub(crate) fn finish(
        self,
        completed: &mut dyn FnMut() -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        self.last.map_or(Ok(()), |shard| shard.name(completed))
    }
}

impl Unnamed<'_> {
    fn name(
        self,
        completed: &mut dyn FnMut() -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        self.synced.join().expect("syncing does not panic")?;
        completed()?;
        std::fs::rename(&self.partial, &self.path)
            .map_err(CheckpointError::io("rename to", &self.path))
    }
}

/// A file under another name than the one it gets when it is whole.
pub(crate) fn create_partial(path: &Path, needed: u64) -> Result<(PathBuf, File), CheckpointError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = path.with_file_name(name);
    let file = File::create(&partial).map_err(|error| write_error(error, path, needed))?;
    Ok((partial, file))
}

/// JSON as people read it, ending in a newline.
pub(crate) fn pretty(value: &serde_json::Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn wrong_length(path: &Path, tensor: &PlannedTensor, end: u64, got: u64) -> CheckpointError {
    CheckpointError::Io {
        action: "write",
        path: path.to_path_buf(),
        source: std::io::Error::other(format!(
            "tensor {} was laid out to end at byte {end}, but ended at {got}",
            tensor.name
        )),
    }
}

fn shard_name(number: usize, total: usize) -> String {
    format!("model-{:05}-of-{total:05}.safetensors", number + 1)
}

/// Positions of every shard's tensors.
fn assign(tensors: &[PlannedTensor], shard_bytes: u64) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut size = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.num_bytes();
        match groups.last_mut() {
            Some(group) if size + bytes <= shard_bytes => {
                group.push(index);
                size += bytes;
            }
            _ => {
                groups.push(vec![index]);
                size = bytes;
            }
        }
    }
    for group in &mut groups {
        if !is_aligned(tensors, group) {
            group.sort_by_key(|index| std::cmp::Reverse(tensors[*index].dtype.size()));
        }
    }
    groups
}

/// Whether tensors one behind the other, the first at a multiple of 8 bytes, begin at multiples of their elements' sizes.
fn is_aligned(tensors: &[PlannedTensor], group: &[usize]) -> bool {
    let mut start = 0;
    group.iter().all(|index| {
        let tensor = &tensors[*index];
        let aligned = start % tensor.dtype.size() as u64 == 0;
        start += tensor.num_bytes();
        aligned
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    fn tensor(name: &str, dtype: Dtype, length: usize) -> PlannedTensor {
        PlannedTensor {
            name: name.to_owned(),
            dtype,
            shape: vec![length],
        }
    }

    #[test]
    fn shards_stay_below_the_limit_and_aligned() {
        let tensors = [
            tensor("a", Dtype::BF16, 3),
            tensor("b", Dtype::F32, 2),
            tensor("c", Dtype::BF16, 100),
            tensor("d", Dtype::BF16, 1),
        ];
        assert_eq!(assign(&tensors, 14), [vec![1, 0], vec![2], vec![3]]);
        assert_eq!(assign(&tensors, 1000), [vec![1, 0, 2, 3]]);
        let in_order = [tensor("a", Dtype::U8, 4), tensor("b", Dtype::F32, 1)];
        assert_eq!(assign(&in_order, 1000), [vec![0, 1]]);
        assert!(assign(&[], 10).is_empty());
    }

    #[test]
    fn a_fill_of_the_wrong_length_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = [tensor("a", Dtype::U8, 3)];
        let error = write_shards(dir.path(), &tensors, 10, &mut |_, sink| sink.write(b"12"));
        assert!(error.unwrap_err().to_string().contains("tensor a"));
    }
}
