//! How fast a checkpoint's disk reads.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::Instant;

use rustix::fs::{Advice, fadvise};

/// Bytes that are read to measure.
const MEASURED_BYTES: u64 = 256 << 20;

/// Bytes a second of a folder's largest file, its pages forgotten by the system first as far as nobody uses them; `None` where
/// it cannot be read.
pub(super) fn read_rate(dir: &Path) -> Option<f64> {
    let entries = std::fs::read_dir(dir).ok()?;
    let files = entries.filter_map(|entry| {
        let path = entry.ok()?.path();
        // Of what a link leads to: a cache's folders have nothing but links.
        Some((path.metadata().ok()?.len(), path))
    });
    let (_, path) = files.max()?;
    let file = File::open(path).ok()?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn files_behind_links_are_read() {
        let [folder, files] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let file = files.path().join("weights");
        std::fs::write(&file, vec![1; 1 << 20]).unwrap();
        std::os::unix::fs::symlink(&file, folder.path().join("shard")).unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let (started, rate) = (Instant::now(), read_rate(folder.path()).unwrap());
        let seconds = started.elapsed().as_secs_f64();
        assert!(rate * seconds >= f64::from(1 << 20));
    }
}
