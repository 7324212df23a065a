//! Runs that SIGKILL ends, at any moment.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tenp_checkpoint::{Dtype, SynthesiseOptions, synthesise};

use crate::plans::demo_statistics;
use crate::support::fixtures::{
    DOMAINS, assert_same_files, demo, demo_file, golden, names, read_json, snapshot,
};
use crate::support::{Outcome, Scratch, command, tenp, words};

/// A command that makes something.
pub(crate) struct Job<'a> {
    pub(crate) line: &'a str,
    /// The model and other files; the output comes last.
    pub(crate) paths: Vec<&'a Path>,
}

impl Job<'_> {
    pub(crate) fn words(&self, out: &Path) -> Vec<String> {
        let mut paths = self.paths.clone();
        paths.push(out);
        words(self.line, &paths)
    }

    pub(crate) fn start(&self, out: &Path) -> Child {
        let mut command = command(&self.words(out));
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    pub(crate) fn run(&self, out: &Path) -> Outcome {
        let mut paths = self.paths.clone();
        paths.push(out);
        tenp(self.line, &paths)
    }
}

pub(crate) fn assert_same(left: &Path, right: &Path) {
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
/// the end with what an undisturbed run makes. The model stays as it was.
fn killed(job: &Job<'_>, kills: usize, seed: u64) {
    let (calm, scratch) = (Scratch::new(), Scratch::new());
    let (expected, out) = (calm.join("out"), scratch.join("out"));
    let before = snapshot(job.paths[0]);
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
    assert!(snapshot(job.paths[0]) == before);
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

/// Weights and outputs in fp8, a layer for multi-token prediction, hidden states in a file.
#[test]
fn prune_of_fp8_killed_at_any_moment() {
    let scratch = Scratch::new();
    let ids = golden("deepseek_v3").join("golden.safetensors");
    let model = scratch.join("model");
    std::fs::create_dir(&model).unwrap();
    let options = SynthesiseOptions {
        dtype: Dtype::F8E4M3,
        mtp: true,
        ..SynthesiseOptions::default()
    };
    let config = golden("deepseek_v3").join("config.json");
    synthesise(&config, &model, options, &mut |_, _| ()).unwrap();
    let job = Job {
        line: "prune {} --data all={} --keep 0.6 --recover least-squares --hidden-memory 1 --shard-size 300kB \
               --threads 1 --keep-every 0 -o {}",
        paths: vec![&model, &ids],
    };
    killed(&job, 12, 6);
}

#[test]
fn plan_killed_at_any_moment() {
    let demo = demo();
    let job = Job {
        line: "plan {} --stats {} --keep 0.6 -o {}",
        paths: vec![&demo, demo_statistics()],
    };
    killed(&job, 8, 5);
}

#[test]
fn prune_killed_at_any_moment() {
    let (demo, facts) = (demo(), demo_file("calibration", "facts"));
    let recovering = "prune {} --data {} --samples 40 --folds 3 --keep 0.6 --recover least-squares --shard-size 500kB \
                      --keep-every 0 --save-stats {} -o {}";
    let merging = "prune {} --data {} --samples 40 --method dern --experts 12 --shard-size 500kB --keep-every 0 -o {}";
    let saved = Scratch::new();
    let stats = saved.join("stats");
    let recovering = (recovering, vec![demo.as_path(), &facts, &stats]);
    for ((line, paths), seed) in [recovering, (merging, vec![&demo, &facts])]
        .into_iter()
        .zip(3..)
    {
        killed(&Job { line, paths }, 10, seed);
    }
    assert_eq!(names(saved.path()), ["stats"]);
}

pub(crate) fn everything() -> [PathBuf; 4] {
    DOMAINS.map(|domain| demo_file("calibration", domain))
}

/// Waits until a running job has made a file; false if it ended before that was seen.
pub(crate) fn comes(path: &Path, child: &mut Child) -> bool {
    let started = Instant::now();
    while !path.exists() {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        let waited = started.elapsed();
        assert!(waited < Duration::from_mins(1), "no {}", path.display());
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// The same where it must not have ended.
#[track_caller]
pub(crate) fn wait_for(path: &Path, child: &mut Child) {
    assert!(comes(path, child), "it ended without {}", path.display());
}

/// A calibration of a second or more: slow enough to be met on its way on a busy machine.
pub(crate) fn long_calibration<'a>(demo: &'a Path, files: &'a [PathBuf; 4]) -> Job<'a> {
    let twice = files.iter().chain(files).map(PathBuf::as_path);
    Job {
        line: "calibrate {} --data a={} b={} c={} d={} e={} f={} g={} h={} --samples 100 --threads 1 --keep-every 0 -o {}",
        paths: std::iter::once(demo).chain(twice).collect(),
    }
}

/// Another form, or another plan, of an output that is not finished; nothing is calibrated for what cannot be written.
#[test]
fn an_unfinished_output_is_not_mixed_with_another() {
    let scratch = Scratch::new();
    let (demo, facts, out) = (
        demo(),
        demo_file("calibration", "facts"),
        scratch.join("out"),
    );
    let job = Job {
        line: "prune {} --data {} --samples 60 --keep 0.6 --recover least-squares --threads 1 --keep-every 0 -o {}",
        paths: vec![&demo, &facts],
    };
    let mut child = job.start(&out);
    wait_for(
        &scratch.join(".out.tenp-work/layer-1.safetensors"),
        &mut child,
    );
    child.kill().unwrap();
    child.wait().unwrap();
    let paths: [&Path; 3] = [&demo, &facts, &out];
    let changed = |from: &str, to: &str| tenp(&job.line.replace(from, to), &paths);
    let padded = changed("--keep 0.6", "--keep 0.6 --form padded --shard-size 1MB");
    padded.refused(
        2,
        &["differ: form, shard size;", ".out.tenp-work", "--restart"],
    );
    padded.check(
        !padded.stderr.contains("tokens in"),
        "refused before the calibration",
    );
    let other = changed("--keep 0.6", "--keep 0.5");
    other.refused(2, &["differ: plan", "--restart"]);
    changed("--keep 0.6", "--keep 0.5 --restart").ok();
    assert_eq!(names(scratch.path()), ["out"]);
}

/// A job that calibrates on its way to something else, killed behind the first layers: the next run goes on there.
fn goes_on_at_a_layer(job: &Job<'_>, out: &Path, kept: &Path) {
    let mut child = job.start(out);
    wait_for(&kept.join("layer-1.safetensors"), &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(kept.join("journal.json").exists());
    let run = job.run(out).ok();
    let next = run.stderr.find("going on with the calibration at layer ");
    run.check(next.is_some(), "it goes on");
    assert!(!kept.exists());
}

#[test]
fn a_killed_calibration_for_rescaling_goes_on() {
    let (scratch, calm) = (Scratch::new(), Scratch::new());
    let (demo, files, plan) = (demo(), everything(), calm.join("plan.json"));
    let paths: [&Path; 3] = [&demo, demo_statistics(), &plan];
    tenp("plan {} --stats {} --keep 0.6 -o {}", &paths).ok();
    let inputs = [demo.as_path(), &plan].into_iter();
    let twice = files.iter().chain(&files).map(PathBuf::as_path);
    let job = Job {
        line: "apply {} --plan {} --recover rescale --data a={} b={} c={} d={} e={} f={} g={} h={} --samples 100 \
               --threads 1 --keep-every 0 -o {}",
        paths: inputs.chain(twice).collect(),
    };
    let (out, whole) = (scratch.join("out"), calm.join("out"));
    job.run(&out).ok();
    std::fs::rename(&out, &whole).unwrap();
    goes_on_at_a_layer(&job, &out, &scratch.join(".out.tenp-calibration"));
    assert_same(&whole, &out);
    assert_eq!(names(scratch.path()), ["out"]);
}

#[test]
fn a_killed_comparison_goes_on_in_its_calibration() {
    let scratch = Scratch::new();
    let (demo, files, tasks) = (demo(), everything(), demo_file("tasks", "arith"));
    let twice = files.iter().chain(&files).map(PathBuf::as_path);
    let job = Job {
        line: "compare {} --tasks {} --data a={} b={} c={} d={} e={} f={} g={} h={} --samples 100 --methods tenp --keep 0.6 \
               --seeds 1 --threads 1 --device cpu --keep-every 0 -o {}",
        paths: [demo.as_path(), &tasks].into_iter().chain(twice).collect(),
    };
    let (out, calm) = (scratch.join("out"), scratch.join("calm"));
    job.run(&calm).ok();
    let statistics = "statistics-0.safetensors";
    goes_on_at_a_layer(
        &job,
        &out,
        &out.join(format!(".{statistics}.tenp-calibration")),
    );
    assert_eq!(names(&out), names(&calm));
    let same = |name: &str| {
        std::fs::read(out.join(name)).unwrap() == std::fs::read(calm.join(name)).unwrap()
    };
    assert!(same(statistics) && same("full.json"));
    let cell = |folder: &Path| {
        let mut cell = read_json(&folder.join("cells/tenp-0.6-0.json"));
        for seconds in ["prune_seconds", "measure_seconds"] {
            cell[seconds].take();
        }
        cell
    };
    assert_eq!(cell(&out), cell(&calm));
}
