//! Values that need not fit in memory: an unnamed file, mapped.

use std::fs::File;
use std::ops::{Deref, DerefMut};
use std::path::Path;

use memmap2::MmapMut;

use crate::CheckpointError;
use crate::atomic::write_error;

/// f32 values, zero at first, in a file without a name: the system keeps of it in memory what it has room for, and it is
/// gone when this value is, or the process.
#[derive(Debug)]
pub struct ScratchValues(MmapMut);

impl ScratchValues {
    /// `len` values in a file in the folder `dir`, whose disk has room for all of them.
    ///
    /// # Errors
    /// A full disk, a folder that cannot be written to.
    pub fn new(dir: &Path, len: usize) -> Result<Self, CheckpointError> {
        let file =
            tempfile::tempfile_in(dir).map_err(CheckpointError::io("create a file in", dir))?;
        let num_bytes = (len * size_of::<f32>()) as u64;
        allocate(&file, num_bytes).map_err(|error| write_error(error, dir, num_bytes))?;
        // SAFETY: the file has no name and its only handle is here, so nobody else writes to it or cuts it short; its
        // blocks are allocated, so that no write to the map can lack room on the disk.
        let map = unsafe { MmapMut::map_mut(&file) };
        Ok(Self(
            map.map_err(CheckpointError::io("map a file in", dir))?,
        ))
    }
}

/// Gives a new file its length and its blocks.
#[cfg(target_os = "linux")]
fn allocate(file: &File, num_bytes: u64) -> std::io::Result<()> {
    use std::os::fd::AsRawFd as _;
    if num_bytes == 0 {
        return Ok(());
    }
    let length = i64::try_from(num_bytes).map_err(std::io::Error::other)?;
    // SAFETY: the descriptor is open while `file` is borrowed; the call touches no memory of this process.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, length) } {
        0 => Ok(()),
        code => Err(std::io::Error::from_raw_os_error(code)),
    }
}

#[cfg(not(target_os = "linux"))]
fn allocate(mut file: &File, num_bytes: u64) -> std::io::Result<()> {
    use std::io::{Read as _, Write as _};
    std::io::copy(&mut std::io::repeat(0).take(num_bytes), &mut file)?;
    file.flush()
}

impl Deref for ScratchValues {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // A map begins at a page, and its length is a multiple of the element's.
        bytemuck::cast_slice(&self.0)
    }
}

impl DerefMut for ScratchValues {
    fn deref_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stay_and_the_folder_stays_empty() {
        let dir = tempfile::tempdir().unwrap();
        let mut values = ScratchValues::new(dir.path(), 5000).unwrap();
        assert!(values.iter().all(|v| *v == 0.0) && values.len() == 5000);
        values[4999] = 7.0;
        assert_eq!(values[4999], 7.0);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(ScratchValues::new(dir.path(), 0).unwrap().is_empty());
        let nowhere = ScratchValues::new(&dir.path().join("nowhere"), 1);
        assert!(nowhere.unwrap_err().to_string().contains("nowhere"));
    }
}
