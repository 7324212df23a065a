//! A layer's new matrices, which may be more than memory should hold: some stay there, the others go to files without names.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::Mmap;

use crate::atomic::write_error;
use crate::{CheckpointError, Dtype, Matrix, OwnedMatrix};

/// Bytes of a layer's matrices that stay in memory. DeepSeek-V3 has 6.8 GB of them in a layer at `--keep 0.6`.
const MEMORY_BYTES: usize = 512 << 20;

/// Room for the new matrices of a layer.
#[derive(Debug)]
pub struct Room {
    dir: PathBuf,
    /// Bytes that memory still takes.
    left: AtomicUsize,
}

impl Room {
    /// Room in memory, and for what is too much for it in files in the folder `dir`, which have no names there: the system
    /// keeps of them in memory what it has room for.
    pub fn new(dir: &Path) -> Self {
        Self::with_memory(dir, MEMORY_BYTES)
    }

    /// The same with other bytes of memory.
    pub fn with_memory(dir: &Path, bytes: usize) -> Self {
        Self {
            dir: dir.to_path_buf(),
            left: AtomicUsize::new(bytes),
        }
    }

    /// Bytes in memory, and in files, of matrices that have `bytes` together.
    pub fn split(bytes: usize) -> [usize; 2] {
        Self::split_at(bytes, MEMORY_BYTES)
    }

    fn split_at(bytes: usize, memory: usize) -> [usize; 2] {
        let in_memory = bytes.min(memory);
        [in_memory, bytes - in_memory]
    }

    /// Takes a matrix in. Which ones go to files is no part of any result.
    ///
    /// # Errors
    /// A full disk, a folder that cannot be written to.
    pub fn keep(&self, matrix: OwnedMatrix) -> Result<StoredMatrix, CheckpointError> {
        let OwnedMatrix {
            dtype,
            rows,
            cols,
            bytes,
            scales,
        } = matrix;
        let taken = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(bytes.len())
            });
        Ok(StoredMatrix {
            dtype,
            rows,
            cols,
            bytes: match taken {
                Ok(_) => Bytes::Memory(bytes),
                Err(_) => Bytes::File(self.file(&bytes)?),
            },
            scales,
        })
    }

    fn file(&self, bytes: &[u8]) -> Result<Mmap, CheckpointError> {
        let dir = &self.dir;
        let mut file =
            tempfile::tempfile_in(dir).map_err(CheckpointError::io("create a file in", dir))?;
        // Written, and not through the map: a full disk is an error here and the end of the process there.
        file.write_all(bytes)
            .map_err(|error| write_error(error, dir, bytes.len() as u64))?;
        // SAFETY: the file has no name and its only handle is here, so nobody writes to it or cuts it short.
        let map = unsafe { Mmap::map(&file) };
        map.map_err(CheckpointError::io("map a file in", dir))
    }
}

/// A matrix in some [`Room`], as a checkpoint stores it.
#[derive(Debug)]
pub struct StoredMatrix {
    /// `F32`, `F16`, `BF16` or `F8E4M3`.
    pub dtype: Dtype,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    bytes: Bytes,
    scales: Vec<u8>,
}

#[derive(Debug)]
enum Bytes {
    Memory(Vec<u8>),
    File(Mmap),
}

impl StoredMatrix {
    /// The matrix as one of a checkpoint.
    pub fn view(&self) -> Matrix<'_> {
        Matrix {
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            bytes: match &self.bytes {
                Bytes::Memory(bytes) => bytes,
                Bytes::File(bytes) => bytes,
            },
            scales: &self.scales,
        }
    }
}

impl PartialEq for StoredMatrix {
    fn eq(&self, other: &Self) -> bool {
        self.view() == other.view()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, value: u8) -> OwnedMatrix {
        OwnedMatrix {
            dtype: Dtype::F8E4M3,
            rows,
            cols: 3,
            bytes: vec![value; rows * 3],
            scales: vec![value; 4],
        }
    }

    #[test]
    fn what_is_too_much_for_memory_goes_to_files_without_names() {
        let dir = tempfile::tempdir().unwrap();
        let room = Room::with_memory(dir.path(), 32);
        let kept: Vec<StoredMatrix> = [(10, 1), (5, 2), (0, 3), (1, 4)]
            .map(|(rows, value)| room.keep(matrix(rows, value)).unwrap())
            .into();
        let in_file = |matrix: &StoredMatrix| matches!(matrix.bytes, Bytes::File(_));
        // 30 bytes fit, 15 more do not; of the two that are left, nothing and three bytes.
        assert_eq!(
            kept.iter().map(in_file).collect::<Vec<_>>(),
            [false, true, false, true]
        );
        for (kept, (rows, value)) in kept.iter().zip([(10, 1), (5, 2), (0, 3), (1, 4)]) {
            assert_eq!(kept.view(), matrix(rows, value).view());
        }
        assert_ne!(kept[0], kept[1]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let nowhere = Room::with_memory(&dir.path().join("nowhere"), 0);
        let error = nowhere.keep(matrix(1, 1)).unwrap_err().to_string();
        assert!(error.contains("nowhere"), "{error}");
    }

    #[test]
    fn what_is_foreseen_is_what_equal_matrices_take() {
        let dir = tempfile::tempdir().unwrap();
        for count in 0..9 {
            let room = Room::with_memory(dir.path(), 60);
            let kept = (0..count).map(|_| room.keep(matrix(5, 1)).unwrap());
            let mut taken = [0; 2];
            for matrix in kept {
                taken[usize::from(matches!(matrix.bytes, Bytes::File(_)))] += 15;
            }
            assert_eq!(taken, Room::split_at(15 * count, 60));
        }
        assert_eq!(Room::split(6 << 30), [512 << 20, (6 << 30) - (512 << 20)]);
    }
}
