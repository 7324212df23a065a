//! What an unfinished run leaves for the same run to go on with: a folder beside the output, held by one process at a
//! time.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use crate::CheckpointError;
use crate::atomic::{is_at, replace_file, stands_in_the_way, taken};
use crate::writer::pretty;

const JOURNAL: &str = "journal.json";
const LOCK: &str = "lock";

/// What decides the bytes of a result, by a name that tells people what it is.
pub type Inputs = BTreeMap<String, String>;

/// A folder for the parts of a result that are done. Nothing in it counts before [`Self::begin`], and a run of other inputs
/// is refused.
#[derive(Debug)]
pub struct Work {
    dir: PathBuf,
    /// What is being made, for messages.
    output: PathBuf,
    /// Held as long as this value lives.
    _lock: File,
    inputs: Inputs,
    begun: bool,
}

impl Work {
    /// Purpose of the folder of an output that is being written.
    pub const OUTPUT: &str = "work";

    /// `.NAME.tenp-PURPOSE` beside `output`.
    pub fn place(output: &Path, purpose: &str) -> PathBuf {
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        output.with_file_name(format!(".{name}.tenp-{purpose}"))
    }

    /// Whether there is something to go on with in a folder.
    pub fn is_unfinished(dir: &Path) -> bool {
        dir.join(JOURNAL).exists()
    }

    /// Makes the folder `dir`, if need be, and holds it. Nothing else in it is looked at.
    ///
    /// # Errors
    /// Another process holds it; the folder cannot be made.
    pub fn hold(dir: PathBuf, output: &Path) -> Result<Self, CheckpointError> {
        let lock = loop {
            make_folder(&dir, output)?;
            let path = dir.join(LOCK);
            let lock = match File::options().create(true).append(true).open(&path) {
                Ok(lock) => lock,
                // The run that held it has just finished and removed it.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(CheckpointError::io("create", &path)(error)),
            };
            match lock.try_lock() {
                Err(TryLockError::WouldBlock) => return Err(taken(output)),
                // A file system without locks: two runs at once are not told apart there.
                Err(TryLockError::Error(_)) => break lock,
                Ok(()) if is_at(&lock, &path) => break lock,
                Ok(()) => {}
            }
        };
        Ok(Self {
            dir,
            output: output.to_path_buf(),
            _lock: lock,
            inputs: Inputs::new(),
            // Until it is looked at, what is there is not this value's to remove.
            begun: true,
        })
    }

    /// Goes on with what an earlier run of the same `inputs` left, or with nothing. `restart` discards what is there.
    ///
    /// # Errors
    /// What is there was made from other inputs, which are named; files that cannot be removed.
    pub fn resume(&mut self, inputs: Inputs, restart: bool) -> Result<(), CheckpointError> {
        self.inputs = inputs;
        let Some(journal) = read_journal(&self.dir).filter(|_| !restart) else {
            self.begun = false;
            return self.clear();
        };
        let names = journal.keys().chain(self.inputs.keys());
        refuse_other(names, (&journal, &self.inputs), &self.dir, &self.output)?;
        self.remove_temporaries()
    }

    /// Refuses an unfinished run in a folder that nobody holds yet, if it differs in one of these inputs.
    ///
    /// # Errors
    /// As [`Self::resume`].
    pub fn check(dir: &Path, output: &Path, inputs: &Inputs) -> Result<(), CheckpointError> {
        match read_journal(dir) {
            Some(journal) => refuse_other(inputs.keys(), (&journal, inputs), dir, output),
            None => Ok(()),
        }
    }

    /// Files that were being replaced when their process died.
    fn remove_temporaries(&self) -> Result<(), CheckpointError> {
        let list = CheckpointError::io("list", &self.dir);
        for entry in std::fs::read_dir(&self.dir).map_err(list)?.flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|kind| kind == "tmp") {
                std::fs::remove_file(&path).map_err(CheckpointError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether something is there to go on with.
    pub fn is_begun(&self) -> bool {
        self.begun
    }

    /// From here on what is in the folder counts, also for a later process.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub fn begin(&mut self) -> Result<(), CheckpointError> {
        if !self.begun {
            let text = pretty(&serde_json::json!(self.inputs));
            let path = self.dir.join(JOURNAL);
            replace_file(&path, text.len() as u64, |sink| sink.write(&text))?;
            self.begun = true;
        }
        Ok(())
    }

    /// Removes the folder: the result is where it belongs.
    pub fn finish(mut self) {
        self.begun = false;
    }

    /// Removes a folder that a finished run left because it was killed in its last moments.
    pub fn remove_leftover(dir: PathBuf, output: &Path) {
        if dir.is_dir()
            && let Ok(work) = Self::hold(dir, output)
        {
            work.finish();
        }
    }

    /// Empties the folder, apart from the lock. The journal goes first: without it the rest counts for nothing.
    fn clear(&self) -> Result<(), CheckpointError> {
        let failed = |path: &Path| CheckpointError::io("remove", path.to_path_buf());
        let journal = self.dir.join(JOURNAL);
        if journal.exists() {
            std::fs::remove_file(&journal).map_err(failed(&journal))?;
        }
        let list = CheckpointError::io("list", &self.dir);
        for entry in std::fs::read_dir(&self.dir).map_err(list)?.flatten() {
            let path = entry.path();
            if entry.file_name() == LOCK {
                continue;
            }
            let removed = if path.is_dir() && !path.is_symlink() {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
            removed.map_err(failed(&path))?;
        }
        Ok(())
    }
}

impl Drop for Work {
    /// A run that has nothing to go on with leaves nothing.
    fn drop(&mut self) {
        if self.begun || self.clear().is_err() {
            return;
        }
        // A process that opens the lock file before it goes finds it held, one that comes later makes a new one, which
        // keeps the folder.
        let _ = std::fs::remove_file(self.dir.join(LOCK));
        let _ = std::fs::remove_dir(&self.dir);
    }
}

fn read_journal(dir: &Path) -> Option<Inputs> {
    let text = std::fs::read(dir.join(JOURNAL)).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Names the inputs in which an unfinished run differs from the one that is asked for.
fn refuse_other<'n>(
    names: impl Iterator<Item = &'n String>,
    (there, asked): (&Inputs, &Inputs),
    dir: &Path,
    output: &Path,
) -> Result<(), CheckpointError> {
    let differing = names.filter(|name| there.get(*name) != asked.get(*name));
    let mut differing: Vec<&str> = differing.map(String::as_str).collect();
    differing.sort_unstable();
    differing.dedup();
    if differing.is_empty() {
        return Ok(());
    }
    Err(CheckpointError::Output {
        path: output.to_path_buf(),
        problem: format!(
            "an unfinished run of it is in {}, whose inputs differ: {}; repeat that run's command to finish it, or discard \
             it: by removing that folder, or with --restart, which begins everything again",
            dir.display(),
            differing.join(", ")
        ),
    })
}

/// Makes a work folder. What stands there already is gone on with if it is one, and refused otherwise.
fn make_folder(dir: &Path, output: &Path) -> Result<(), CheckpointError> {
    match std::fs::create_dir(dir) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(crate::atomic::write_error(error, dir, 0));
        }
        Err(_) => {}
    }
    // Of several looks at a folder that another run may be removing, none may fail for that.
    let is_folder = dir.symlink_metadata().is_ok_and(|there| there.is_dir());
    let is_empty = || std::fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_none());
    let lock = dir.join(LOCK).symlink_metadata();
    let is_ours = is_folder && (lock.is_ok_and(|lock| lock.is_file()) || is_empty());
    if is_ours || dir.symlink_metadata().is_err() {
        return Ok(());
    }
    Err(stands_in_the_way(dir, output))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(pairs: &[(&str, &str)]) -> Inputs {
        let pairs = pairs.iter();
        pairs.map(|(k, v)| ((*k).into(), (*v).into())).collect()
    }

    fn open(output: &Path, pairs: &[(&str, &str)], restart: bool) -> Result<Work, CheckpointError> {
        let mut work = Work::hold(Work::place(output, "work"), output)?;
        work.resume(inputs(pairs), restart)?;
        Ok(work)
    }

    #[test]
    fn what_differs_is_named_and_stays_until_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        let old = [("plan", "a"), ("form", "ragged")];
        let mut work = open(&out, &old, false).unwrap();
        std::fs::write(work.dir().join("before"), "x").unwrap();
        assert!(!work.is_begun());
        work.begin().unwrap();
        std::fs::write(work.dir().join("part"), "x").unwrap();
        drop(work);
        let work = open(&out, &old, false).unwrap();
        assert!(work.is_begun() && work.dir().join("part").exists());
        drop(work);
        let other = [("plan", "b"), ("form", "ragged"), ("recovery", "c")];
        let message = open(&out, &other, false).unwrap_err().to_string();
        assert!(
            message.contains("differ: plan, recovery;") && message.contains("--restart"),
            "{message}"
        );
        assert!(root.path().join(".out.tenp-work/part").exists());
        let work = open(&out, &other, true).unwrap();
        assert!(!work.is_begun() && !work.dir().join("part").exists());
        drop(work);
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }

    /// A folder of that name that no run made is somebody's, a checkpoint's perhaps.
    #[cfg(unix)]
    #[test]
    fn a_folder_that_is_no_work_folder_stays() {
        let root = tempfile::tempdir().unwrap();
        let (out, kept) = (root.path().join("out"), root.path().join("kept"));
        std::fs::create_dir(&kept).unwrap();
        std::fs::write(kept.join("config.json"), "{}").unwrap();
        let place = Work::place(&out, "work");
        std::os::unix::fs::symlink(&kept, &place).unwrap();
        let refused = || {
            let error = open(&out, &[], true).unwrap_err().to_string();
            assert!(
                error.contains(".out.tenp-work") && error.contains("move it away"),
                "{error}"
            );
        };
        refused();
        std::fs::remove_file(&place).unwrap();
        std::fs::rename(&kept, &place).unwrap();
        refused();
        assert!(place.join("config.json").exists());
        std::fs::remove_file(place.join("config.json")).unwrap();
        open(&out, &[], true).unwrap();
    }

    #[test]
    fn a_second_run_is_refused_while_the_first_one_lives() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        let work = open(&out, &[], false).unwrap();
        let error = open(&out, &[], true).unwrap_err().to_string();
        assert!(error.contains("another run"), "{error}");
        assert!(work.dir().join(LOCK).exists());
        work.finish();
        open(&out, &[], false).unwrap();
    }
}
