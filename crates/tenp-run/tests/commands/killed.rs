//! Runs that are stopped on the way: by SIGKILL at any moment, by signals, by one another.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::plans::demo_statistics;
use crate::support::fixtures::{DOMAINS, assert_same_files, demo, demo_file, names};
use crate::support::{Outcome, Scratch, command, tenp, words};

/// A command that makes something.
struct Job<'a> {
    line: &'a str,
    /// Input files; the output comes last.
    paths: Vec<&'a Path>,
}

impl Job<'_> {
    fn words(&self, out: &Path) -> Vec<String> {
        let mut paths = self.paths.clone();
        paths.push(out);
        words(self.line, &paths)
    }

    fn start(&self, out: &Path) -> Child {
        let mut command = command(&self.words(out));
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    fn run(&self, out: &Path) -> Outcome {
        let mut paths = self.paths.clone();
        paths.push(out);
        tenp(self.line, &paths)
    }
}

fn assert_same(left: &Path, right: &Path) {
    if left.is_dir() {
        assert_same_files(left, right, &[]);
    } else {
        assert!(std::fs::read(left).unwrap() == std::fs::read(right).unwrap());
    }
}

fn remove(out: &Path) {
    if out.is_dir() {
        std::fs::remove_dir_all(out).unwrap();
    } else {
        std::fs::remove_file(out).unwrap();
    }
}

/// Kills the job `kills` times at moments that a seed decides, starting it again each time, and compares what comes out in
/// the end with what an undisturbed run makes.
fn killed(job: &Job<'_>, kills: usize, seed: u64) {
    let (calm, scratch) = (Scratch::new(), Scratch::new());
    let (expected, out) = (calm.join("out"), scratch.join("out"));
    let started = Instant::now();
    job.run(&out).ok();
    let whole = started.elapsed();
    // Made at the same place, as the model card names it.
    std::fs::rename(&out, &expected).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut done = 0;
    while done < kills {
        let mut child = job.start(&out);
        std::thread::sleep(whole.mul_f64(rng.random_range(0.0..1.0)));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            done += 1;
        }
        let status = child.wait().unwrap();
        if status.success() {
            assert_same(&expected, &out);
            assert_eq!(names(scratch.path()), ["out"]);
            remove(&out);
        }
    }
    job.run(&out).ok();
    assert_same(&expected, &out);
    assert_eq!(names(scratch.path()), ["out"]);
}

#[test]
fn calibrate_killed_at_any_moment() {
    let (demo, facts, code) = (
        demo(),
        demo_file("calibration", "facts"),
        demo_file("calibration", "code"),
    );
    let job = Job {
        line: "calibrate {} --data facts={} code={} --samples 60 --keep-every 0 -o {}",
        paths: vec![&demo, &facts, &code],
    };
    killed(&job, 16, 1);
}

#[test]
fn apply_killed_at_any_moment() {
    let scratch = Scratch::new();
    let (demo, plan) = (demo(), scratch.join("plan.json"));
    let paths: [&Path; 3] = [&demo, demo_statistics(), &plan];
    tenp("plan {} --stats {} --keep 0.6 -o {}", &paths).ok();
    let job = Job {
        line: "apply {} --plan {} --shard-size 100kB -o {}",
        paths: vec![&demo, &plan],
    };
    killed(&job, 14, 2);
}

#[test]
fn prune_killed_at_any_moment() {
    let (demo, facts) = (demo(), demo_file("calibration", "facts"));
    let recovering = "prune {} --data {} --samples 40 --folds 3 --keep 0.6 --recover least-squares --shard-size 500kB \
                      --keep-every 0 -o {}";
    let merging = "prune {} --data {} --samples 40 --method dern --experts 12 --shard-size 500kB --keep-every 0 -o {}";
    for (line, seed) in [(recovering, 3), (merging, 4)] {
        let job = Job {
            line,
            paths: vec![&demo, &facts],
        };
        killed(&job, 10, seed);
    }
}

fn everything() -> [PathBuf; 4] {
    DOMAINS.map(|domain| demo_file("calibration", domain))
}

/// Waits until a file is there.
#[track_caller]
fn wait_for(path: &Path) {
    let started = Instant::now();
    while !path.exists() {
        assert!(
            started.elapsed() < Duration::from_mins(1),
            "{} never came",
            path.display()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn signal(child: &Child, name: &str) {
    let mut kill = std::process::Command::new("kill");
    let sent = kill.args([name, &child.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

#[test]
fn a_signal_ends_a_calibration_that_goes_on_later() {
    let scratch = Scratch::new();
    let (demo, files) = (demo(), everything());
    let (whole, out) = (scratch.join("whole"), scratch.join("out"));
    let job = Job {
        line: "calibrate {} --data a={} b={} c={} d={} --samples 100 --keep-every 0 -o {}",
        paths: std::iter::once(&demo)
            .chain(&files)
            .map(PathBuf::as_path)
            .collect(),
    };
    job.run(&whole).ok();
    let work = scratch.join(".out.tenp-work");
    for (name, code, sign) in [("-TERM", 143, "layer-1"), ("-INT", 130, "layer-5")] {
        let child = job.start(&out);
        wait_for(&work.join(format!("{sign}.safetensors")));
        signal(&child, name);
        let ended = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(code), "{text}");
        assert!(
            text.contains("the same command goes on") && text.contains("interrupted"),
            "{text}"
        );
        assert!(!out.exists());
    }
    // Other text, and a second process, are refused without harm.
    let paths: Vec<&Path> = job.paths.iter().copied().chain([out.as_path()]).collect();
    let other = job.line.replace("--samples 100", "--samples 99");
    tenp(&other, &paths).refused(
        2,
        &[
            "out",
            "differ: text of domain a, text of domain b",
            "--restart",
        ],
    );
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
    let job = Job {
        line: "calibrate {} --data a={} b={} c={} d={} --samples 100 --keep-every 0 -o {}",
        paths: std::iter::once(&demo)
            .chain(&files)
            .map(PathBuf::as_path)
            .collect(),
    };
    let mut first = job.start(&out);
    wait_for(&scratch.join(".out.tenp-work/layer-1.safetensors"));
    signal(&first, "-STOP");
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
    let job = Job {
        line: "calibrate {} --data a={} b={} c={} d={} --samples 100 -o {}",
        paths: std::iter::once(&demo)
            .chain(&files)
            .map(PathBuf::as_path)
            .collect(),
    };
    let child = job.start(&out);
    let work = scratch.join(".out.tenp-work");
    wait_for(&work.join("lock"));
    std::thread::sleep(Duration::from_millis(100));
    signal(&child, "-STOP");
    assert_eq!(names(&work), ["lock"]);
    signal(&child, "-TERM");
    signal(&child, "-CONT");
    let ended = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(143), "{text}");
    assert!(text.contains("nothing is kept of"), "{text}");
    assert_eq!(names(scratch.path()), [""; 0]);
}
