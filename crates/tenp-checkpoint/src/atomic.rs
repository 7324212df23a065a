//! Replacing single files atomically, and writing with errors that name the file.

use std::fs::{File, TryLockError};
use std::io::{BufWriter, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

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

    pub(crate) fn path(&self) -> &Path {
        self.path
    }

    /// Bytes appended so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Hands everything to the system.
    pub(crate) fn flush(mut self) -> Result<(), CheckpointError> {
        let flushed = self.file.flush();
        flushed.map_err(|error| write_error(error, self.path, self.needed))
    }

    /// Hands everything to the disk.
    pub(crate) fn finish(self) -> Result<(), CheckpointError> {
        let (file, path, needed) = (*self.file.get_ref(), self.path, self.needed);
        self.flush()?;
        sync(file, path, needed)
    }
}

/// Waits until a file is on the disk.
pub(crate) fn sync(file: &File, path: &Path, needed: u64) -> Result<(), CheckpointError> {
    file.sync_all()
        .map_err(|error| write_error(error, path, needed))
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
    let temporary = Temporary::hold(path)?;
    let mut sink = Sink::new(&temporary.file, path, num_bytes);
    write(&mut sink)?;
    sink.finish()?;
    temporary.persist(path)?;
    sync_folder(folder_of(path));
    Ok(())
}

/// A file while it is written, under the name `.NAME.tenp.tmp` beside its place and locked. What a run that was killed left
/// there is not locked any more, and makes room for the next one.
struct Temporary {
    file: File,
    place: PathBuf,
}

impl Temporary {
    fn hold(path: &Path) -> Result<Self, CheckpointError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let place = path.with_file_name(format!(".{name}.tenp.tmp"));
        loop {
            match File::options().write(true).create_new(true).open(&place) {
                Ok(file) => {
                    if is_locked(&file) {
                        return Err(taken(path));
                    }
                    if is_at(&file, &place) {
                        return Ok(Self { file, place });
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    remove_leftover(&place, path)?;
                }
                Err(error) => return Err(write_error(error, path, 0)),
            }
        }
    }

    /// Gives the file its place. Whatever comes later finds nothing to remove.
    fn persist(self, path: &Path) -> Result<(), CheckpointError> {
        std::fs::rename(&self.place, path).map_err(CheckpointError::io("replace", path))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Not what another run has there by now.
        if is_at(&self.file, &self.place) {
            let _ = std::fs::remove_file(&self.place);
        }
    }
}

/// Whether another process holds a file; if none does, this one holds it from here on. A file system without locks cannot
/// tell two runs apart.
fn is_locked(file: &File) -> bool {
    matches!(file.try_lock(), Err(TryLockError::WouldBlock))
}

/// Removes the temporary file of a run of the same output that is no more.
fn remove_leftover(place: &Path, path: &Path) -> Result<(), CheckpointError> {
    let Ok(there) = place.symlink_metadata() else {
        return Ok(());
    };
    if !there.is_file() {
        return Err(stands_in_the_way(place, path));
    }
    let file = match File::options().append(true).open(place) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(CheckpointError::io("remove", place)(error)),
    };
    if is_locked(&file) {
        return Err(taken(path));
    }
    if is_at(&file, place) {
        std::fs::remove_file(place).map_err(CheckpointError::io("remove", place))?;
    }
    Ok(())
}

/// Something of others at a place that this program uses on the way to `output`.
pub(crate) fn stands_in_the_way(place: &Path, output: &Path) -> CheckpointError {
    CheckpointError::Output {
        path: output.to_path_buf(),
        problem: format!(
            "{} stands where its unfinished work goes, and is not of this program; move it away, or choose another name",
            place.display()
        ),
    }
}

pub(crate) fn taken(output: &Path) -> CheckpointError {
    CheckpointError::Output {
        path: output.to_path_buf(),
        problem: "another run is writing it at this moment; wait for it, or choose another"
            .to_owned(),
    }
}

/// Whether an opened file still has its name: the lock of a file that is gone protects nothing.
#[cfg(unix)]
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match (file.metadata(), path.symlink_metadata()) {
        (Ok(own), Ok(there)) => (own.dev(), own.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

#[cfg(not(unix))]
pub(crate) fn is_at(_file: &File, path: &Path) -> bool {
    path.exists()
}

/// Refuses an output in a folder in which nothing can be made.
///
/// # Errors
/// [`CheckpointError::Output`].
pub fn check_writable(folder: &Path, output: &Path) -> Result<(), CheckpointError> {
    access(folder).map_err(|error| CheckpointError::Output {
        path: output.to_path_buf(),
        problem: format!(
            "nothing can be written in {}: {error}; choose another place, or make that one writable",
            folder.display()
        ),
    })
}

#[cfg(unix)]
fn access(folder: &Path) -> std::io::Result<()> {
    use rustix::fs::Access;
    Ok(rustix::fs::access(
        folder,
        Access::WRITE_OK | Access::EXEC_OK,
    )?)
}

#[cfg(not(unix))]
fn access(_folder: &Path) -> std::io::Result<()> {
    Ok(())
}

/// Refuses an output in whose place there are files to which links in the input folder lead, as those of a download cache
/// do: they are input, wherever they lie.
///
/// # Errors
/// [`CheckpointError::Output`].
pub fn check_not_linked(output: &Path, input: &Path) -> Result<(), CheckpointError> {
    let Ok(place) = output.canonicalize() else {
        return Ok(());
    };
    let entries = std::fs::read_dir(input).map_err(CheckpointError::io("list", input))?;
    let mut links = entries.flatten().map(|entry| entry.path());
    let linked = |link: &PathBuf| {
        link.is_symlink()
            && link
                .canonicalize()
                .is_ok_and(|file| file.starts_with(&place))
    };
    match links.find(linked) {
        None => Ok(()),
        Some(link) => Err(CheckpointError::Output {
            path: output.to_path_buf(),
            problem: format!(
                "the input's {} is a link to it, so it is never touched; choose another",
                link.display()
            ),
        }),
    }
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

/// The folder in which a path without `..` at its end is.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes a rename durable where the system can; the data itself is already on the disk.
pub fn sync_folder(dir: &Path) {
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
    fn what_a_killed_run_left_makes_room_and_a_living_run_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plan.json");
        let left = dir.path().join(".plan.json.tenp.tmp");
        let other = dir.path().join(".other.json.tenp.tmp");
        std::fs::write(&left, "half of a plan").unwrap();
        std::fs::write(&other, "of another file").unwrap();
        replace_file(&path, 3, |sink| {
            let again = replace_file(&path, 3, |sink| sink.write(b"two"));
            let error = again.unwrap_err().to_string();
            assert!(error.contains("another run"), "{error}");
            sink.write(b"one")
        })
        .unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        assert!(!left.exists() && other.exists());
    }

    /// A link or a folder of that name is somebody else's, and so is what a hard link shares.
    #[cfg(unix)]
    #[test]
    fn what_is_not_left_by_a_run_is_not_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let (path, kept) = (dir.path().join("plan.json"), dir.path().join("kept"));
        let left = dir.path().join(".plan.json.tenp.tmp");
        std::fs::write(&kept, "kept").unwrap();
        std::os::unix::fs::symlink(&kept, &left).unwrap();
        let error = replace_file(&path, 3, |sink| sink.write(b"new")).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains(".plan.json.tenp.tmp") && error.contains("move it away"),
            "{error}"
        );
        std::fs::remove_file(&left).unwrap();
        std::fs::hard_link(&kept, &left).unwrap();
        replace_file(&path, 3, |sink| sink.write(b"new")).unwrap();
        assert_eq!(std::fs::read(&kept).unwrap(), b"kept");
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
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
