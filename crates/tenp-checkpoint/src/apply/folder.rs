//! The output folder: refused early, built in a folder beside its place, moved into it last.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::atomic::{check_not_linked, check_writable, folder_of, sync_folder, write_error};
use crate::work::{Inputs, Work};
use crate::{Checkpoint, CheckpointError};

/// In the work folder: the output as far as it is done.
const OUTPUT: &str = "output";

/// In the work folder: the output that is being replaced, while the new one takes its place.
const REPLACED: &str = "replaced";

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
        let target = Self::look(out, input, force, fingerprint)?;
        // An output that is there may be finished, and lie where nothing can be written any more.
        if let Some(target) = target.as_ref().filter(|target| !target.replaces) {
            check_writable(&target.parent, out)?;
        }
        Ok(target)
    }

    fn look(
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
        check_not_linked(&path, &input)?;
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

    /// The folder that an unfinished run leaves.
    fn work_place(&self) -> PathBuf {
        Work::place(&self.path, Work::OUTPUT)
    }

    /// Refuses an unfinished run that differs in one of these inputs.
    pub(super) fn check_unfinished(&self, inputs: &Inputs) -> Result<(), CheckpointError> {
        Work::check(&self.work_place(), &self.path, inputs)
    }

    /// Whether the disk has room for `needed` bytes, of which an unfinished run may have written some.
    pub(super) fn check_room(&self, needed: u64) -> Result<(), CheckpointError> {
        let there = bytes_in(&self.work_place().join(OUTPUT));
        match free_bytes(&self.parent) {
            Some(free) if free < needed.saturating_sub(there) => Err(CheckpointError::DiskFull {
                path: self.path.clone(),
                needed,
            }),
            _ => Ok(()),
        }
    }

    /// Holds the folder that the output is built in, and goes on with what is there, if the disk has room for `needed`
    /// bytes.
    pub(super) fn begin(
        self,
        inputs: Inputs,
        restart: bool,
        needed: u64,
    ) -> Result<Folder, CheckpointError> {
        let mut work = Work::hold(self.work_place(), &self.path)?;
        let replaced = work.dir().join(REPLACED);
        if replaced.exists() {
            if self.path.exists() {
                std::fs::remove_dir_all(&replaced)
            } else {
                std::fs::rename(&replaced, &self.path)
            }
            .map_err(CheckpointError::io("clear away", &replaced))?;
        }
        work.resume(inputs, restart)?;
        self.check_room(needed)?;
        let output = work.dir().join(OUTPUT);
        std::fs::create_dir_all(&output).map_err(|error| write_error(error, &output, needed))?;
        Ok(Folder {
            target: self,
            output,
            work,
        })
    }
}

fn bytes_in(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some(entry.metadata().ok()?.len()))
        .sum()
}

/// Removes what a run that was killed in its last moments left beside its finished output.
pub(super) fn remove_leftover(out: &Path) {
    if let Ok((path, _)) = resolve(out) {
        Work::remove_leftover(Work::place(&path, Work::OUTPUT), &path);
    }
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
    match folder_of(out).canonicalize() {
        Ok(parent) if parent.is_dir() => Ok((parent.join(name), parent)),
        Ok(_) => refuse("lies below a file; choose another"),
        Err(_) => refuse("lies in a folder that does not exist; create that folder first"),
    }
}

/// Room on the disk for unprivileged users, where the system tells.
#[cfg(unix)]
fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

#[cfg(not(unix))]
fn free_bytes(_dir: &Path) -> Option<u64> {
    None
}

/// The folder being built. Dropped before [`Folder::commit`] it stays for a later run, once something in it is done.
pub(super) struct Folder {
    pub(super) target: Target,
    output: PathBuf,
    work: Work,
}

impl Folder {
    pub(super) fn path(&self) -> &Path {
        &self.output
    }

    pub(super) fn work(&mut self) -> &mut Work {
        &mut self.work
    }

    /// Removes what was built.
    pub(super) fn abandon(self) {
        self.work.finish();
    }

    /// Moves the folder to its place. An old one is moved aside first, and removed when the new one is in place.
    pub(super) fn commit(self) -> Result<(), CheckpointError> {
        let Self {
            target,
            output,
            work,
        } = self;
        sync_folder(&output);
        let failed = |error| write_error(error, &target.path, 0);
        let aside = work.dir().join(REPLACED);
        if target.replaces {
            std::fs::rename(&target.path, &aside).map_err(failed)?;
        }
        if let Err(error) = std::fs::rename(&output, &target.path) {
            if target.replaces {
                // Back in its place, or left under the other name: never removed.
                let _ = std::fs::rename(&aside, &target.path);
            }
            return Err(failed(error));
        }
        sync_folder(&target.parent);
        work.finish();
        Ok(())
    }
}
