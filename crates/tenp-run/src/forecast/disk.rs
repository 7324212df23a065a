//! How fast a checkpoint's disk reads.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{Advice, fadvise};

/// Bytes that are read to measure.
const MEASURED_BYTES: u64 = 256 << 20;

/// Bytes a second of a folder's largest file, its pages forgotten by the system first as far as nobody uses them; `None` where
/// it cannot be read.
pub(super) fn read_rate(dir: &Path) -> Option<f64> {
    let file = File::open(largest_file(dir)?).ok()?;
    let _ = fadvise(&file, 0, None, Advice::DontNeed);
    let mut part = file.take(MEASURED_BYTES);
    let mut chunk = vec![0; 8 << 20];
    let (started, mut bytes) = (Instant::now(), 0);
    loop {
        match part.read(&mut chunk).ok()? {
            0 => break,
            more => bytes += more,
        }
    }
    Some(bytes as f64 / started.elapsed().as_secs_f64().max(1e-6))
}

/// By what links lead to: a cache's folders have nothing but links.
fn largest_file(dir: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir).ok()?;
    let files = entries.filter_map(|entry| {
        let path = entry.ok()?.path();
        Some((path.metadata().ok()?.len(), path))
    });
    Some(files.max()?.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn the_largest_file_may_lie_behind_a_link() {
        let [folder, files] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let (file, link) = (files.path().join("weights"), folder.path().join("shard"));
        std::fs::write(&file, vec![1; 1 << 20]).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        // Longer than the path that the link is.
        std::fs::write(folder.path().join("config.json"), " ".repeat(5000)).unwrap();
        assert_eq!(largest_file(folder.path()), Some(link));
        assert!(read_rate(folder.path()).unwrap() > 0.0);
    }
}
