//! The output folder: refused early, built beside its place, moved into it last.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::atomic::{sync_folder, write_error};
use crate::{Checkpoint, CheckpointError};

/// Where the output goes, checked.
pub(super) struct Target {
    /// Absolute, symlinks resolved.
    path: PathBuf,
    parent: PathBuf,
    /// A folder with content stands there and may be replaced.
    replaces: bool,
}

impl Target {
    /// Checks an output folder against the input; `None` when it is this run's finished output and `force` is off.
    pub(super) fn find(
        out: &Path,
        input: &Path,
        force: bool,
        fingerprint: &str,
    ) -> Result<Option<Self>, CheckpointError> {
        let refuse = |problem: &str| {
            Err(CheckpointError::Output {
                path: out.to_path_buf(),
                problem: problem.to_owned(),
            })
        };
        let (path, parent) = resolve(out)?;
        let input = input
            .canonicalize()
            .map_err(CheckpointError::io("resolve", input))?;
        if path == input {
            return refuse("is the input folder, which is never touched; choose another");
        }
        if input.starts_with(&path) {
            return refuse("contains the input folder, which is never touched; choose another");
        }
        if path.starts_with(&input) {
            return refuse("lies inside the input folder, which is never touched; choose another");
        }
        let mut target = Self {
            path,
            parent,
            replaces: false,
        };
        if !target.path.exists() {
            return Ok(Some(target));
        }
        if !target.path.is_dir() {
            return refuse("is a file; choose another name");
        }
        let content = Content::of(&target.path)?;
        if content.empty {
            return Ok(Some(target));
        }
        if !force && target.is_output_of(fingerprint) {
            if Checkpoint::open(&target.path).is_ok() {
                return Ok(None);
            }
            return refuse("is this run's output but damaged; write it again with --force");
        }
        if !force {
            return refuse("exists and is not empty; choose another, or replace it with --force");
        }
        // A mistyped path must not cost someone a folder that has nothing to do with us.
        if !content.ours {
            return refuse(
                "was not written by this program (there is no tenp_plan.json); remove it yourself if it may go",
            );
        }
        target.replaces = true;
        Ok(Some(target))
    }

    fn is_output_of(&self, fingerprint: &str) -> bool {
        let report = std::fs::read(self.path.join("report.json")).ok();
        let report: Option<Value> = report.and_then(|text| serde_json::from_slice(&text).ok());
        report.is_some_and(|report| report["run_fingerprint"] == fingerprint)
    }

    /// Whether the disk has room for `needed` bytes.
    pub(super) fn check_room(&self, needed: u64) -> Result<(), CheckpointError> {
        match free_bytes(&self.parent) {
            Some(free) if free < needed => Err(CheckpointError::DiskFull {
                path: self.path.clone(),
                needed,
            }),
            _ => Ok(()),
        }
    }

    /// Makes the temporary folder, if the disk has room for `needed` bytes.
    pub(super) fn create(self, needed: u64) -> Result<Folder, CheckpointError> {
        self.check_room(needed)?;
        let prefix = temporary_prefix(&self.path);
        let temporary = make_folder(&self.parent, &prefix)
            .map_err(CheckpointError::io("create a folder in", &self.parent))?;
        Ok(Folder {
            target: self,
            temporary,
        })
    }
}

/// `.<name>.tenp-`
fn temporary_prefix(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    format!(".{}.tenp-", name.to_string_lossy())
}

fn make_folder(parent: &Path, prefix: &str) -> std::io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        // Narrowed by the umask: the folder stays, under its final name.
        builder.permissions(std::fs::Permissions::from_mode(0o777));
    }
    builder.tempdir_in(parent)
}

struct Content {
    empty: bool,
    /// It is an earlier output of this program.
    ours: bool,
}

impl Content {
    fn of(dir: &Path) -> Result<Self, CheckpointError> {
        let mut content = Self {
            empty: true,
            ours: dir.join("tenp_plan.json").is_file(),
        };
        for entry in std::fs::read_dir(dir).map_err(CheckpointError::io("list", dir))? {
            entry.map_err(CheckpointError::io("list", dir))?;
            content.empty = false;
        }
        Ok(content)
    }
}

/// The real path of a folder that may not exist yet, and of its parent.
fn resolve(out: &Path) -> Result<(PathBuf, PathBuf), CheckpointError> {
    let refuse = |problem: &str| {
        Err(CheckpointError::Output {
            path: out.to_path_buf(),
            problem: problem.to_owned(),
        })
    };
    if out.exists() {
        let path = out
            .canonicalize()
            .map_err(CheckpointError::io("resolve", out))?;
        return match path.parent() {
            Some(parent) => Ok((path.clone(), parent.to_path_buf())),
            None => refuse("is the root folder; choose another"),
        };
    }
    if out.is_symlink() {
        return refuse("is a symbolic link to nothing; remove it or choose another name");
    }
    let Some(name) = out.file_name() else {
        return refuse("has no name; choose another");
    };
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    match parent.canonicalize() {
        Ok(parent) if parent.is_dir() => Ok((parent.join(name), parent)),
        Ok(_) => refuse("lies below a file; choose another"),
        Err(_) => refuse("lies in a folder that does not exist; create that folder first"),
    }
}

/// Room on the disk for unprivileged users, where the system tells.
#[cfg(unix)]
fn free_bytes(dir: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes()).ok()?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: `path` is a NUL-terminated string and `stat` points to writable memory of the right type, both alive
    // during the call.
    let result = unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) };
    if result != 0 {
        return None;
    }
    // SAFETY: all-zero bytes are a valid value of this plain C struct, and the call succeeded in filling it.
    let stat = unsafe { stat.assume_init() };
    // The fields' types differ between systems.
    wide(stat.f_bavail).checked_mul(wide(stat.f_frsize))
}

#[cfg(unix)]
fn wide(count: impl Into<u64>) -> u64 {
    count.into()
}

#[cfg(not(unix))]
fn free_bytes(_dir: &Path) -> Option<u64> {
    None
}

/// The folder being built; removed when dropped before [`Folder::commit`].
pub(super) struct Folder {
    target: Target,
    temporary: TempDir,
}

impl Folder {
    pub(super) fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// The folder that the output will be in, on the same disk.
    pub(super) fn parent(&self) -> &Path {
        &self.target.parent
    }

    /// Moves the folder to its place. An old one is moved aside first, and removed when the new one is in place.
    pub(super) fn commit(self) -> Result<(), CheckpointError> {
        let Self { target, temporary } = self;
        sync_folder(temporary.path());
        let failed = |error| write_error(error, &target.path, 0);
        let old = if target.replaces {
            let aside =
                make_folder(&target.parent, &temporary_prefix(&target.path)).map_err(failed)?;
            std::fs::rename(&target.path, aside.path()).map_err(failed)?;
            Some(aside)
        } else {
            None
        };
        if let Err(error) = std::fs::rename(temporary.path(), &target.path) {
            if let Some(aside) = old {
                // Back in its place, or left under the other name: never removed.
                let aside = aside.keep();
                let _ = std::fs::rename(aside, &target.path);
            }
            return Err(failed(error));
        }
        let _ = temporary.keep();
        sync_folder(&target.parent);
        Ok(())
    }
}
