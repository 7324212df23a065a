//! The same moment for two things: two runs of one output, a signal while the output is put in its place, a disk that is
//! full in the middle of a shard, what a killed run leaves.

use std::path::{Path, PathBuf};

use rustix::process::Signal;

use super::changing::{end, planned, stopped_at, stopped_near};
use super::options::statistics;
use super::outputs::Disk;
use super::{FAILED, Place, USAGE};
use crate::support::fixtures::{assert_same_files, demo_file, golden, names, read_json, snapshot};
use crate::support::{signal, tenp};

const APPLY: &str = "apply {} --plan {} --shard-size 20kB -o {}";

/// What says how and where it was made.
const MADE_ANEW: [&str; 3] = ["README.md", "report.json", "report.html"];

#[test]
fn two_runs_of_one_output_at_once() {
    let place = Place::demo();
    let (plan, out) = (planned(&place), place.join("out"));
    let data = demo_file("calibration", "facts");
    let before = snapshot(&place.model);
    let paths = [place.model.as_path(), &plan, &out];
    let first = stopped_at(APPLY, &paths, &place.join(".out.tenp-work/journal.json"));
    let needles = &["out", "another run is writing it", "wait for it"];
    place.refuses(APPLY, &paths, USAGE, needles);
    let restarted = APPLY.replace("-o", "--restart -o");
    place.refuses(&restarted, &paths, USAGE, needles);
    let prune = "prune {} --data {} --samples 8 --keep 0.6 --restart -o {}";
    tenp(prune, &[&place.model, &data, &out]).refused(USAGE, needles);
    let (code, text) = end(first);
    assert_eq!(code, Some(0), "{text}");
    let _ = std::fs::remove_dir_all(place.join(".out.tenp-calibration"));
    assert_eq!(names(place.scratch.path()), ["model", "out", "plan.json"]);
    assert!(snapshot(&place.model) == before);
}

/// From the last shard on until the work folder is gone: either the run is finished, or the same command finishes it.
#[test]
fn sigterm_while_the_output_is_put_in_its_place() {
    let place = Place::demo();
    let (plan, out) = (planned(&place), place.join("out"));
    let calm = place.join("calm");
    let line = "apply {} --plan {} --shard-size 1MB -o {}";
    tenp(line, &[&place.model, &plan, &out]).ok();
    std::fs::rename(&out, &calm).unwrap();
    let before = snapshot(&place.model);
    let paths = [place.model.as_path(), &plan, &out];
    let work = place.join(".out.tenp-work/output");
    for moment in [
        work.join("config.json"),
        work.join("report.json"),
        out.clone(),
    ] {
        for line in [line.to_owned(), line.replace("-o", "--force -o")] {
            let mut child = stopped_near(&line, &paths, &moment);
            signal(&mut child, Signal::TERM);
            let (code, text) = end(child);
            match code {
                Some(0) => assert!(!place.join(".out.tenp-work").exists()),
                Some(143) => assert!(text.contains("same command"), "{text}"),
                _ => panic!("{code:?}: {text}"),
            }
            tenp(&line, &paths).ok();
            assert_same_files(&out, &calm, &MADE_ANEW);
            assert_eq!(
                names(place.scratch.path()),
                ["calm", "model", "out", "plan.json"]
            );
            // The next one finds the place taken, or free.
            if !line.contains("--force") {
                std::fs::remove_dir_all(&out).unwrap();
            }
        }
        std::fs::remove_dir_all(&out).unwrap();
    }
    assert!(snapshot(&place.model) == before);
}

/// There is room for the tensors, but not for what a file system adds to many small files: nobody knows that before.
#[test]
#[allow(clippy::print_stderr)]
fn a_disk_that_becomes_full_in_the_middle_of_a_shard() {
    let place = Place::demo();
    let (plan, calm) = (planned(&place), place.join("calm"));
    tenp(APPLY, &[&place.model, &plan, &calm]).ok();
    let index = read_json(&calm.join("model.safetensors.index.json"));
    let kilobytes = index["metadata"]["total_size"].as_u64().unwrap() / 1024;
    let Some(disk) = Disk::new(kilobytes + 64) else {
        eprintln!(
            "skipped: a_disk_that_becomes_full_in_the_middle_of_a_shard (needs root, to mount a small tmpfs)"
        );
        return;
    };
    let out = disk.join("out");
    let paths = [place.model.as_path(), &plan, &out];
    let needles = [
        "no space left",
        "model-00",
        "bytes",
        "free some",
        "same command",
    ];
    place.refuses(APPLY, &paths, FAILED, &needles);
    // The shards that are whole wait for the same command.
    assert_eq!(names(disk.path()), [".out.tenp-work"]);
    disk.resize(kilobytes * 2);
    let run = tenp(APPLY, &paths).ok();
    run.check(run.stderr.contains("by an earlier run"), "it goes on");
    assert_same_files(&out, &calm, &MADE_ANEW);
    assert_eq!(names(disk.path()), ["out"]);
}

/// A run that is killed has no time to clear away; the next of the same file does it, and of no other.
#[test]
fn what_killed_runs_leave_beside_single_files() {
    let place = Place::demo();
    let data = demo_file("calibration", "facts");
    let (plan, stats, out) = (
        place.join("plan.json"),
        place.join("stats"),
        place.join("out"),
    );
    let left = |name: &str| {
        let path = place.join(&format!(".{name}.tenp.tmp"));
        std::fs::write(&path, "half of it").unwrap();
        path
    };
    let lefts: Vec<PathBuf> = ["plan.json", "stats", "other"].map(left).into();
    let line = "plan {} --stats {} --keep 0.6 -o {}";
    tenp(line, &[&place.model, statistics(), &plan]).ok();
    let line = "prune {} --data {} --samples 8 --keep 0.6 --save-stats {} -o {}";
    tenp(line, &[&place.model, &data, &stats, &out]).ok();
    let there: Vec<bool> = lefts.iter().map(|path| path.exists()).collect();
    assert_eq!(there, [false, false, true]);
    assert_eq!(
        names(place.scratch.path()),
        [".other.tenp.tmp", "model", "out", "plan.json", "stats"]
    );
}

#[test]
#[allow(clippy::print_stderr)]
fn places_that_cannot_be_written_to() {
    let Some(disk) = Disk::new(2000) else {
        eprintln!("skipped: places_that_cannot_be_written_to (needs root, to mount a tmpfs)");
        return;
    };
    let small = golden("olmoe");
    let ids = small.join("golden.safetensors");
    let (stats, done) = (disk.join("stats"), disk.join("done"));
    let finished: [(&str, &[&Path]); 2] = [
        ("calibrate {} --data {} -o {}", &[&small, &ids, &stats]),
        (
            "prune {} --data {} --keep 0.6 -o {}",
            &[&small, &ids, &done],
        ),
    ];
    for (line, paths) in finished {
        tenp(line, paths).ok();
    }
    disk.make_read_only();
    for (line, paths) in finished {
        let run = tenp(line, paths).ok();
        run.check(run.stderr.contains("already"), "nothing is to be written");
    }
    let place = Place::demo();
    let plan = planned(&place);
    let data = demo_file("calibration", "facts");
    let (model, file, out) = (place.model.as_path(), disk.join("file"), place.join("out"));
    let paths: [(&str, &[&Path]); 7] = [
        (APPLY, &[model, &plan, &file]),
        (
            "prune {} --data {} --keep 0.6 -o {}",
            &[model, &data, &file],
        ),
        ("calibrate {} --data {} -o {}", &[model, &data, &file]),
        (
            "plan {} --stats {} --keep 0.6 -o {}",
            &[model, statistics(), &file],
        ),
        (
            "stats merge {} {} -o {}",
            &[statistics(), statistics(), &file],
        ),
        ("logits {} --input {} --output {}", &[model, &ids, &file]),
        (
            "prune {} --data {} --keep 0.6 --save-stats {} -o {}",
            &[model, &data, &file, &out],
        ),
    ];
    for (line, paths) in paths {
        let needles = &[
            "file",
            "nothing can be written in",
            "Read-only",
            "choose another",
        ];
        place.refuses(line, paths, USAGE, needles);
        let run = tenp(line, paths);
        run.check(!run.stderr.contains("tokens in"), "before the calibration");
    }
    assert_eq!(names(disk.path()), ["done", "stats"]);
}
