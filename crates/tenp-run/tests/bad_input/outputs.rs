//! Output places that are taken, forbidden or full.

use std::path::{Path, PathBuf};

use super::options::statistics;
use super::{FAILED, Place, USAGE};
use crate::support::fixtures::{demo, demo_file, golden, names};
use crate::support::{Scratch, command, tenp, words};

#[test]
fn folders_that_are_taken_or_forbidden() {
    let place = Place::demo();
    let (plan, data) = (place.join("plan.json"), demo_file("calibration", "facts"));
    tenp(
        "plan {} --stats {} --keep 0.6 -o {}",
        &[&place.model, statistics(), &plan],
    )
    .ok();
    let taken = place.join("taken");
    std::fs::create_dir(&taken).unwrap();
    std::fs::write(taken.join("thesis.txt"), "years of work").unwrap();
    let file = place.join("file");
    std::fs::write(&file, "").unwrap();
    let model = place.model.as_path();
    let inside = place.model.join("inside");
    let nowhere = place.join("no/where");
    let refused = |out: &Path, more: &str, needles: &[&str]| {
        let apply = format!("apply {{}} --plan {{}} {more} -o {{}}");
        place.refuses(&apply, &[model, &plan, out], USAGE, needles);
        for dry in ["", "--dry-run"] {
            let prune = format!("prune {{}} --data {{}} --keep 0.6 {more} {dry} -o {{}}");
            place.refuses(&prune, &[model, &data, out], USAGE, needles);
            let run = tenp(&prune, &[model, &data, out]);
            run.check(
                !run.stderr.contains("tokens in"),
                "refused before the calibration",
            );
        }
    };
    refused(&taken, "", &["taken", "not empty", "--force"]);
    refused(&file, "", &["file", "choose another"]);
    refused(&nowhere, "", &["no/where", "create that folder first"]);
    for more in ["", "--force"] {
        refused(model, more, &["is the input folder", "choose another"]);
        refused(
            &inside,
            more,
            &["inside the input folder", "choose another"],
        );
        refused(
            place.scratch.path(),
            more,
            &["contains the input folder", "choose another"],
        );
    }
    refused(
        &taken,
        "--force",
        &["taken", "not written by this program", "remove it yourself"],
    );
}

#[test]
fn single_files_never_go_into_the_checkpoint() {
    let place = Place::demo();
    let data = demo_file("calibration", "facts");
    let ids = golden("olmoe").join("golden.safetensors");
    let model = place.model.as_path();
    let shard = model.join("model-00001-of-00002.safetensors");
    let inside = model.join("new.safetensors");
    let out = place.join("out");
    for file in [&shard, &inside] {
        let needles = &["inside the input folder", "choose another"];
        for (line, paths) in [
            ("calibrate {} --data {} -o {}", &[model, &data, file][..]),
            (
                "plan {} --stats {} --keep 0.6 -o {}",
                &[model, statistics(), file],
            ),
            ("logits {} --input {} --output {}", &[model, &ids, file]),
            (
                "prune {} --data {} --keep 0.6 --save-stats {} -o {}",
                &[model, &data, file, &out],
            ),
        ] {
            place.refuses(line, paths, USAGE, needles);
        }
    }
}

#[test]
fn single_files_that_cannot_be_written_are_refused_before_the_work() {
    let place = Place::demo();
    let data = demo_file("calibration", "facts");
    let ids = golden("olmoe").join("golden.safetensors");
    let model = place.model.as_path();
    let (nowhere, out) = (place.join("no/where"), place.join("out"));
    for (file, needles) in [
        (&nowhere, &["where", "create that folder first"][..]),
        (&place.model, &["is a folder", "file name"]),
    ] {
        for (line, paths) in [
            (
                "calibrate {} --data {} -o {}",
                &[model, &data, file.as_path()][..],
            ),
            (
                "plan {} --stats {} --keep 0.6 -o {}",
                &[model, statistics(), file],
            ),
            (
                "stats merge {} {} -o {}",
                &[statistics(), statistics(), file],
            ),
            ("logits {} --input {} --output {}", &[model, &ids, file]),
            (
                "prune {} --data {} --keep 0.6 --save-stats {} -o {}",
                &[model, &data, file, &out],
            ),
        ] {
            place.refuses(line, paths, USAGE, needles);
            let run = tenp(line, paths);
            run.check(
                !run.stderr.contains("tokens in"),
                "refused before the calibration",
            );
        }
    }
    let scratch = Scratch::new();
    // What is read is not written over, and what is no file is not replaced by one.
    let copy = |from: &Path, name: &str| {
        let to = place.join(name);
        std::fs::copy(from, &to).unwrap();
        to
    };
    let (ids, data) = (copy(&ids, "ids.safetensors"), copy(&data, "text.jsonl"));
    let stats = copy(statistics(), "stats.safetensors");
    let (link, socket) = (place.join("link"), scratch.join("socket"));
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    std::os::unix::fs::symlink(&stats, &link).unwrap();
    let read = &["is a file that is read", "choose another"][..];
    for (line, paths, needles) in [
        (
            "logits {} --input {} --output {}",
            &[model, &ids, &ids][..],
            read,
        ),
        ("calibrate {} --data {} -o {}", &[model, &data, &data], read),
        (
            "plan {} --stats {} --keep 0.6 -o {}",
            &[model, &stats, &stats],
            read,
        ),
        (
            "stats merge {} {} -o {}",
            &[&stats, statistics(), &stats],
            read,
        ),
        (
            "plan {} --stats {} --keep 0.6 -o {}",
            &[model, statistics(), &link],
            &["symbolic link"],
        ),
        (
            "plan {} --stats {} --keep 0.6 -o {}",
            &[model, statistics(), &socket],
            &["no regular file"],
        ),
    ] {
        place.refuses(line, paths, USAGE, needles);
    }
}

/// A small file system in memory, while the test runs.
pub(crate) struct Disk(Scratch);

impl Disk {
    pub(crate) fn new(kilobytes: u64) -> Option<Self> {
        let scratch = Scratch::new();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={kilobytes}k"), "tmpfs"])
            .arg(scratch.path())
            .output();
        mounted
            .is_ok_and(|o| o.status.success())
            .then_some(Self(scratch))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn make_read_only(&self) {
        self.remount("ro");
    }

    pub(crate) fn resize(&self, kilobytes: u64) {
        self.remount(&format!("size={kilobytes}k"));
    }

    fn remount(&self, option: &str) {
        let mut mount = std::process::Command::new("mount");
        let mount = mount.arg(format!("-oremount,{option}")).arg(self.path());
        assert!(mount.status().unwrap().success());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg(self.0.path())
            .status();
    }
}

#[test]
#[allow(clippy::print_stderr)]
fn a_full_disk() {
    let Some(disk) = Disk::new(512) else {
        eprintln!("skipped: a_full_disk (needs root, to mount a small tmpfs)");
        return;
    };
    let data = demo_file("calibration", "facts");
    let ids = golden("olmoe").join("golden.safetensors");
    let out = disk.join("out");
    let (work, plan) = (Scratch::new(), disk.join("plan.json"));
    let fitting = work.join("plan.json");
    tenp(
        "plan {} --stats {} --keep 0.6 -o {}",
        &[&demo(), statistics(), &fitting],
    )
    .ok();
    let full = &["no space left", "out", "bytes", "free some"];
    for (line, paths) in [
        (
            "apply {} --plan {} -o {}",
            &[&demo(), fitting.as_path(), &out][..],
        ),
        (
            "prune {} --data {} --keep 0.6 -o {}",
            &[&demo(), &data, &out],
        ),
        ("calibrate {} --data {} -o {}", &[&demo(), &data, &out]),
        ("logits {} --input {} --output {}", &[&demo(), &ids, &out]),
    ] {
        tenp(line, paths).refused(FAILED, full);
        assert_eq!(names(disk.path()), [""; 0], "{line} left something behind");
    }
    let filler = disk.join("filler");
    let _ = std::fs::write(&filler, vec![0; 600_000]);
    tenp(
        "plan {} --stats {} --keep 0.6 -o {}",
        &[&demo(), statistics(), &plan],
    )
    .refused(FAILED, &["no space left", "plan.json"]);
    assert_eq!(names(disk.path()), ["filler"]);
}

#[test]
fn data_that_cannot_be_printed() {
    let Ok(full) = std::fs::File::options().write(true).open("/dev/full") else {
        return;
    };
    let words = words("inspect {} --json", &[&demo()]);
    let output = command(&words).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(FAILED));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("standard output"), "{text}");
}
