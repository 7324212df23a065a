//! Replacing single files atomically, and writing with errors that name the file.

use std::fs::File;
use std::io::{BufWriter, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::path::Path;

use crate::CheckpointError;

pub(crate) const BUFFER_BYTES: usize = 1 << 20;

/// Bytes after which the system is asked to begin writing them, so that little is left to wait for at the end.
const WRITE_BACK_BYTES: u64 = 32 << 20;

/// A file being written. Errors name the file; a full disk is told apart.
pub struct Sink<'a> {
    file: BufWriter<&'a File>,
    path: &'a Path,
    /// What the whole output needs, for the message when the disk is full.
    needed: u64,
    written: u64,
    /// Bytes that the system was asked to write.
    asked: u64,
}

impl<'a> Sink<'a> {
    pub(crate) fn new(file: &'a File, path: &'a Path, needed: u64) -> Self {
        Self {
            file: BufWriter::with_capacity(BUFFER_BYTES, file),
            path,
            needed,
            written: 0,
            asked: 0,
        }
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`CheckpointError::DiskFull`], or [`CheckpointError::Io`] naming the file.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        let result = self.file.write_all(bytes);
        self.advance(bytes.len() as u64);
        result.map_err(|error| write_error(error, self.path, self.needed))
    }

    /// Appends bytes of another file from its position on, in the kernel where it can do so.
    pub(crate) fn copy(&mut self, mut from: &File, bytes: u64) -> Result<(), CheckpointError> {
        let copied = self.file.flush().and_then(|()| {
            let mut part = std::io::Read::take(&mut from, bytes);
            std::io::copy(&mut part, self.file.get_mut())
        });
        match copied {
            Ok(copied) if copied == bytes => {
                self.advance(bytes);
                Ok(())
            }
            Ok(_) => Err(write_error(
                std::io::Error::other("its source is shorter than it was; is it being changed?"),
                self.path,
                self.needed,
            )),
            Err(error) => Err(write_error(error, self.path, self.needed)),
        }
    }

    fn advance(&mut self, bytes: u64) {
        self.written += bytes;
        let flushed = self.written - self.file.buffer().len() as u64;
        if flushed >= self.asked + WRITE_BACK_BYTES {
            begin_write_back(self.file.get_ref(), self.asked..flushed);
            self.asked = flushed;
        }
    }

    /// Appends zeros, as a hole where the file system has holes.
    pub(crate) fn skip(&mut self, bytes: u64) -> Result<(), CheckpointError> {
        self.written += bytes;
        let end = self.written;
        let moved = self.file.seek(SeekFrom::Start(end));
        moved
            .and_then(|_| self.file.get_ref().set_len(end))
            .map_err(|error| write_error(error, self.path, self.needed))
    }

    /// Bytes appended so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Hands everything to the disk.
    pub(crate) fn finish(mut self) -> Result<(), CheckpointError> {
        self.file
            .flush()
            .and_then(|()| self.file.get_ref().sync_all())
            .map_err(|error| write_error(error, self.path, self.needed))
    }
}

/// Asks the system to begin writing a range to the disk. Advice only: a refusal changes nothing.
#[cfg(target_os = "linux")]
fn begin_write_back(file: &File, range: Range<u64>) {
    use std::os::fd::AsRawFd as _;
    let (start, length) = (range.start as i64, (range.end - range.start) as i64);
    // SAFETY: the descriptor is open while `file` is borrowed; the call touches no memory of this process.
    let _ = unsafe {
        libc::sync_file_range(file.as_raw_fd(), start, length, libc::SYNC_FILE_RANGE_WRITE)
    };
}

#[cfg(not(target_os = "linux"))]
fn begin_write_back(_file: &File, _range: Range<u64>) {}

pub(crate) fn write_error(error: std::io::Error, path: &Path, needed: u64) -> CheckpointError {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            CheckpointError::DiskFull {
                path: path.to_path_buf(),
                needed,
            }
        }
        std::io::ErrorKind::FileTooLarge => CheckpointError::Io {
            action: "write",
            path: path.to_path_buf(),
            source: std::io::Error::new(
                error.kind(),
                "it would be larger than its disk or `ulimit -f` allows; raise the limit, or write smaller shards with \
                 --shard-size",
            ),
        },
        _ => CheckpointError::Io {
            action: "write",
            path: path.to_path_buf(),
            source: error,
        },
    }
}

/// Writes a new file in a folder that nobody else uses yet, flushed to the disk.
pub(crate) fn write_new(path: &Path, bytes: &[u8], needed: u64) -> Result<(), CheckpointError> {
    let file = File::create(path).map_err(|error| write_error(error, path, needed))?;
    let mut sink = Sink::new(&file, path, needed);
    sink.write(bytes)?;
    sink.finish()
}

/// Replaces a file as a whole: readers see the old one or the new one, never a part. On error nothing is left behind.
///
/// # Errors
/// Those of `write`, a full disk, or an unwritable folder.
pub fn replace_file(
    path: &Path,
    num_bytes: u64,
    write: impl FnOnce(&mut Sink<'_>) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    check_replaceable(path)?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tenp-").suffix(".tmp");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        // Narrowed by the umask, as for any file a program creates.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let temporary = builder
        .tempfile_in(parent)
        .map_err(CheckpointError::io("create a file in", parent))?;
    let mut sink = Sink::new(temporary.as_file(), path, num_bytes);
    write(&mut sink)?;
    sink.finish()?;
    temporary
        .persist(path)
        .map_err(|error| CheckpointError::Io {
            action: "replace",
            path: path.to_path_buf(),
            source: error.error,
        })?;
    sync_folder(parent);
    Ok(())
}

/// Refuses a place that something other than a regular file stands at: a rename would put a file in the place of a link,
/// a pipe or a device.
///
/// # Errors
/// [`CheckpointError::Output`].
pub fn check_replaceable(path: &Path) -> Result<(), CheckpointError> {
    let Ok(there) = path.symlink_metadata() else {
        return Ok(());
    };
    let problem = if there.is_file() {
        return Ok(());
    } else if there.is_dir() {
        "is a folder; give a file name"
    } else if there.is_symlink() {
        "is a symbolic link, which would be replaced; give the file it stands for"
    } else {
        "is no regular file (a pipe or a device); give a file name"
    };
    Err(CheckpointError::Output {
        path: path.to_path_buf(),
        problem: problem.to_owned(),
    })
}

/// Makes a rename durable where the system can; the data itself is already on the disk.
pub(crate) fn sync_folder(dir: &Path) {
    if let Ok(dir) = File::open(dir) {
        let _ = dir.sync_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn what_is_no_regular_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        std::fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [link.as_path(), dir.path()] {
            let error = replace_file(path, 3, |sink| sink.write(b"new")).unwrap_err();
            assert!(matches!(error, CheckpointError::Output { .. }), "{error}");
        }
        assert!(link.is_symlink());
        assert_eq!(std::fs::read(&file).unwrap(), b"old");
    }

    #[test]
    fn a_full_disk_is_named_with_the_bytes_needed() {
        let error = write_error(
            std::io::ErrorKind::StorageFull.into(),
            Path::new("/data/out"),
            123_456,
        );
        let message = error.to_string();
        assert!(
            message.contains("/data/out") && message.contains("123456"),
            "{message}"
        );
    }

    #[test]
    fn copied_and_written_bytes_come_in_their_order() {
        use std::io::Seek as _;
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::write(&from, b"0123456789").unwrap();
        let mut source = File::open(&from).unwrap();
        let file = File::create(&to).unwrap();
        let mut sink = Sink::new(&file, &to, 0);
        sink.write(b"<").unwrap();
        source.seek(SeekFrom::Start(3)).unwrap();
        sink.copy(&source, 4).unwrap();
        sink.write(b">").unwrap();
        assert_eq!(sink.written(), 6);
        let error = sink.copy(&source, 4).unwrap_err().to_string();
        assert!(error.contains("shorter"), "{error}");
        sink.finish().unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"<3456>789");
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plan.json");
        replace_file(&path, 3, |sink| sink.write(b"old")).unwrap();
        let failed = replace_file(&path, 3, |sink| {
            sink.write(b"new")?;
            Err(CheckpointError::NotMoe { layer: 0 })
        });
        assert!(failed.is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
