//! One memory-mapped safetensors file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::{Advice, Mmap, UncheckedAdvice};
use sha2::{Digest, Sha256};

use crate::CheckpointError;
use crate::atomic::Sink;
use crate::fingerprint;
use crate::header::{self, Entry};
#[cfg(unix)]
use crate::mapped::Named;

/// Bytes of a tensor that a fingerprint has.
const SAMPLE_BYTES: usize = 64;

/// A shard: mapped, its header checked.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    /// File name inside the folder.
    pub(crate) name: String,
    file: File,
    /// When the file was last changed, as it was opened.
    changed: Option<SystemTime>,
    // Before the map: its name goes first.
    #[cfg(unix)]
    _named: Named,
    map: Mmap,
    pub(crate) entries: Vec<Entry>,
    pub(crate) metadata: BTreeMap<String, String>,
    data_start: usize,
}

impl Shard {
    pub(crate) fn open(dir: &Path, name: &str) -> Result<Self, CheckpointError> {
        Self::open_file(dir.join(name), name)
    }

    /// Any safetensors file.
    pub(crate) fn open_file(path: PathBuf, name: &str) -> Result<Self, CheckpointError> {
        let file = File::open(&path).map_err(CheckpointError::io("open", &path))?;
        // SAFETY: the map is read-only and lives as long as the shard. A file that another process truncates meanwhile
        // faults, which `explain_faults` tells; checkpoints are written once, and this program replaces files only by rename, which leaves the
        // mapped inode alone.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::io("map", &path))?;
        let header = header::parse(&map).map_err(|problem| CheckpointError::Shard {
            path: path.clone(),
            problem,
        })?;
        Ok(Self {
            #[cfg(unix)]
            _named: Named::new(&map, &path),
            path,
            name: name.to_owned(),
            changed: last_change(&file),
            file,
            map,
            entries: header.entries,
            metadata: header.metadata,
            data_start: header.data_start,
        })
    }

    /// Refuses a file that was written to since it was opened. One that was replaced stays what it was.
    pub(crate) fn check_unchanged(&self) -> Result<(), CheckpointError> {
        if last_change(&self.file) == self.changed {
            return Ok(());
        }
        Err(CheckpointError::Changed {
            path: self.path.clone(),
        })
    }

    pub(crate) fn bytes(&self, entry: &Entry) -> &[u8] {
        self.slice(entry.start..entry.end)
    }

    /// A byte range of the file, inside an entry's.
    pub(crate) fn slice(&self, range: Range<usize>) -> &[u8] {
        &self.map[range]
    }

    /// Copies a byte range of the file, which the system can do without showing it to this process.
    pub(crate) fn copy(
        &self,
        range: Range<usize>,
        sink: &mut Sink<'_>,
    ) -> Result<(), CheckpointError> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(range.start as u64))
            .map_err(CheckpointError::io("read", &self.path))?;
        sink.copy(&self.file, range.len() as u64)
    }

    /// Where bytes of the map are in the file; `None` for other bytes.
    pub(crate) fn range_of(&self, bytes: &[u8]) -> Option<Range<usize>> {
        let start = bytes
            .as_ptr()
            .addr()
            .checked_sub(self.map.as_ptr().addr())?;
        let end = start.checked_add(bytes.len())?;
        (end <= self.map.len()).then_some(start..end)
    }

    pub(crate) fn num_bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// Adds name, length, header, and the middle of up to `samples` tensors to a checkpoint's fingerprint.
    pub(crate) fn fingerprint(
        &self,
        samples: usize,
        hash: &mut Sha256,
    ) -> Result<(), CheckpointError> {
        hash.update((self.name.len() as u64).to_le_bytes());
        hash.update(self.name.as_bytes());
        hash.update(self.num_bytes().to_le_bytes());
        hash.update(&self.map[..self.data_start]);
        for place in fingerprint::spread(samples, self.entries.len()) {
            let Entry { start, end, .. } = self.entries[place];
            let middle = start + (end - start) / 2;
            let bytes = &mut [0; SAMPLE_BYTES][..SAMPLE_BYTES.min(end - middle)];
            // A mapped page would bring its neighbours from the disk.
            let mut file = &self.file;
            file.seek(SeekFrom::Start(middle as u64))
                .and_then(|_| file.read_exact(bytes))
                .map_err(CheckpointError::io("read", &self.path))?;
            hash.update(bytes);
        }
        Ok(())
    }

    /// Asks the system to read a byte range ahead. Advice only: a refusal changes nothing.
    pub(crate) fn prefetch(&self, range: Range<usize>) {
        let _ = self
            .map
            .advise_range(Advice::WillNeed, range.start, range.len());
    }

    /// Lets go of the whole pages inside a byte range.
    pub(crate) fn release(&self, range: Range<usize>) {
        let page = rustix::param::page_size();
        let start = range.start.next_multiple_of(page);
        let end = range.end / page * page;
        if start >= end {
            return;
        }
        // SAFETY: the mapping is file-backed, shared and read-only, so a dropped page is read again from the file on
        // the next access; nothing can be lost.
        let _ = unsafe {
            self.map
                .unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start)
        };
    }
}

fn last_change(file: &File) -> Option<SystemTime> {
    file.metadata().ok()?.modified().ok()
}
