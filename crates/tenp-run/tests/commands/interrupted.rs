//! Runs that are ended by a signal, or meet one another.

use std::io::Read as _;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use rustix::process::Signal;

use crate::killed::{Job, assert_same, comes, everything, long_calibration, wait_for};
use crate::plans::demo_statistics;
use crate::support::fixtures::{demo, demo_file, names, snapshot};
use crate::support::{Scratch, signal, stop, tenp, wait_for_stderr};

/// Ends a run with a signal, and says what it wrote to stderr since.
fn ended_by(mut child: Child, name: Signal, code: i32) -> String {
    signal(&mut child, name);
    // One that stands still gets it when it goes on.
    signal(&mut child, Signal::CONT);
    let mut text = String::new();
    let stderr = child.stderr.as_mut().unwrap();
    stderr.read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(code), "{text}");
    text
}

#[test]
fn a_signal_ends_a_calibration_that_goes_on_later() {
    let scratch = Scratch::new();
    let (demo, files) = (demo(), everything());
    let (whole, out) = (scratch.join("whole"), scratch.join("out"));
    let job = long_calibration(&demo, &files);
    job.run(&whole).ok();
    let kept = "the same command goes on";
    let mut child = job.start(&out);
    wait_for(
        &scratch.join(".out.tenp-work/layer-1.safetensors"),
        &mut child,
    );
    let text = ended_by(child, Signal::TERM, 143);
    assert!(
        text.contains(kept) && text.contains("interrupted"),
        "{text}"
    );
    let mut child = job.start(&out);
    // The first thing that is said.
    wait_for_stderr(&mut child);
    let text = ended_by(child, Signal::INT, 130);
    assert!(
        text.contains("oing on with") && text.contains(kept),
        "{text}"
    );
    assert!(!out.exists());
    // Other text is refused without harm.
    let paths: Vec<&Path> = job.paths.iter().copied().chain([out.as_path()]).collect();
    let other = job.line.replace("--samples 100", "--samples 99");
    let differ = "differ: text of domain a, text of domain b";
    tenp(&other, &paths).refused(2, &["out", differ, "--restart"]);
    let run = job.run(&out).ok();
    run.check(run.stderr.contains("going on with"), "it goes on");
    assert_same(&whole, &out);
    assert_eq!(names(scratch.path()), ["out", "whole"]);
    let run = job.run(&out).ok();
    run.check(run.stderr.contains("already the finished"), "nothing to do");
}

#[test]
fn two_calibrations_of_one_file() {
    let scratch = Scratch::new();
    let (demo, files, out) = (demo(), everything(), scratch.join("out"));
    let job = long_calibration(&demo, &files);
    let mut first = job.start(&out);
    wait_for(
        &scratch.join(".out.tenp-work/layer-1.safetensors"),
        &mut first,
    );
    stop(&mut first);
    job.run(&out)
        .refused(2, &["out", "another run is writing it"]);
    first.kill().unwrap();
    first.wait().unwrap();
    let paths: Vec<&Path> = job.paths.iter().copied().chain([out.as_path()]).collect();
    let other = job.line.replace("--samples 100", "--samples 10 --restart");
    tenp(&other, &paths).ok();
    assert_eq!(names(scratch.path()), ["out"]);
}

/// Work that took no time is not kept.
#[test]
fn a_short_calibration_that_is_killed_leaves_nothing_to_go_on_with() {
    let scratch = Scratch::new();
    let (demo, files, out) = (demo(), everything(), scratch.join("out"));
    let mut job = long_calibration(&demo, &files);
    let line = job.line.replace("--keep-every 0 ", "");
    job.line = &line;
    let mut child = job.start(&out);
    let work = scratch.join(".out.tenp-work");
    wait_for(&work.join("lock"), &mut child);
    std::thread::sleep(Duration::from_millis(200));
    stop(&mut child);
    assert_eq!(names(&work), ["lock"]);
    let text = ended_by(child, Signal::TERM, 143);
    assert!(text.contains("nothing is kept of"), "{text}");
    assert_eq!(names(scratch.path()), [""; 0]);
}

/// Ends a job with a signal that comes while it stands still, when the first file is there and the second is not. On a
/// busy machine it may take several tries to meet it there.
#[track_caller]
fn interrupted(
    job: &Job<'_>,
    out: &Path,
    (there, not_there): (&Path, Option<&Path>),
    (name, code): (Signal, i32),
) {
    for _ in 0..20 {
        let mut child = job.start(out);
        if comes(there, &mut child) {
            stop(&mut child);
            let early = not_there.is_none_or(|path| !path.exists());
            if early && there.exists() && child.try_wait().unwrap().is_none() {
                let text = ended_by(child, name, code);
                assert!(text.contains("interrupted"), "{text}");
                assert!(text.contains("the same command goes on"), "{text}");
                assert!(!out.exists());
                return;
            }
            signal(&mut child, Signal::CONT);
        }
        assert!(child.wait().unwrap().success());
        std::fs::remove_dir_all(out).unwrap();
    }
    panic!("never met at {}", there.display());
}

/// The same command goes on to what an undisturbed run makes, at the same place.
#[track_caller]
fn goes_on_to_the_same(job: &Job<'_>, out: &Path, whole: &Path) {
    job.run(out).ok();
    assert_same(whole, out);
    std::fs::remove_dir_all(out).unwrap();
}

#[test]
fn a_signal_ends_a_pruning_that_goes_on_later() {
    let (scratch, calm) = (Scratch::new(), Scratch::new());
    let (demo, facts) = (demo(), demo_file("calibration", "facts"));
    let (out, whole) = (scratch.join("out"), calm.join("out"));
    let job = Job {
        line: "prune {} --data {} --samples 60 --keep 0.6 --recover least-squares --threads 1 --keep-every 0 -o {}",
        paths: vec![&demo, &facts],
    };
    let before = snapshot(&demo);
    job.run(&out).ok();
    std::fs::rename(&out, &whole).unwrap();
    // In the calibration, then among the fits, whose first layer is there when the second one's is not.
    for (moment, name, code) in [
        (
            ".out.tenp-calibration/layer-1.safetensors",
            Signal::INT,
            130,
        ),
        (".out.tenp-work/layer-1.safetensors", Signal::TERM, 143),
    ] {
        interrupted(&job, &out, (&scratch.join(moment), None), (name, code));
    }
    goes_on_to_the_same(&job, &out, &whole);
    assert!(snapshot(&demo) == before);
    assert_eq!(names(scratch.path()), [""; 0]);
}

#[test]
fn a_signal_ends_an_apply_that_goes_on_later() {
    let (scratch, calm) = (Scratch::new(), Scratch::new());
    let (demo, plan) = (demo(), calm.join("plan.json"));
    let (out, whole) = (scratch.join("out"), calm.join("out"));
    let paths: [&Path; 3] = [&demo, demo_statistics(), &plan];
    tenp("plan {} --stats {} --keep 0.6 -o {}", &paths).ok();
    let job = Job {
        line: "apply {} --plan {} --shard-size 20kB -o {}",
        paths: vec![&demo, &plan],
    };
    job.run(&out).ok();
    std::fs::rename(&out, &whole).unwrap();
    let output = scratch.join(".out.tenp-work/output");
    let shards = names(&whole).into_iter();
    let shards: Vec<String> = shards
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    // Among its shards.
    let (there, not_there) = (
        output.join(&shards[0]),
        output.join(&shards[shards.len() - 1]),
    );
    interrupted(&job, &out, (&there, Some(&not_there)), (Signal::TERM, 143));
    goes_on_to_the_same(&job, &out, &whole);
    assert_eq!(names(scratch.path()), [""; 0]);
}
