//! Files that change, or limits that are met, while the program is at work.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::options::statistics;
use super::{FAILED, Place};
use crate::support::fixtures::{
    DOMAINS, assert_same_files, copy, demo_file, names, snapshot, write_ids,
};
use crate::support::{command, signal, stop, tenp, wait_for_stderr, words};

/// Starts a command, and stops it once a file is there.
#[track_caller]
pub(crate) fn stopped_at(line: &str, paths: &[&Path], file: &Path) -> Child {
    let child = stopped_near(line, paths, file);
    assert!(file.exists(), "it ended too early");
    child
}

/// The same for a file that is there for a moment: the process may have ended when that is noticed.
#[track_caller]
pub(crate) fn stopped_near(line: &str, paths: &[&Path], file: &Path) -> Child {
    let mut command = command(&words(line, paths));
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let started = Instant::now();
    while !file.exists() && child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_mins(1));
        std::thread::sleep(Duration::from_millis(1));
    }
    stop(&mut child);
    child
}

/// Lets it go on, and gives its exit code and what it said.
pub(crate) fn end(mut child: Child) -> (Option<i32>, String) {
    signal(&mut child, Signal::CONT);
    let mut text = String::new();
    let stderr = child.stderr.as_mut().unwrap();
    stderr.read_to_string(&mut text).unwrap();
    (child.wait().unwrap().code(), text)
}

fn shards(model: &Path) -> Vec<PathBuf> {
    let names = names(model).into_iter();
    let shards = names.filter(|name| name.ends_with(".safetensors"));
    shards.map(|name| model.join(name)).collect()
}

/// A calibration that is stopped behind its first layers.
fn stopped_calibration(place: &Place, out: &Path) -> (String, Vec<PathBuf>, Child) {
    let line =
        "calibrate {} --data a={} b={} c={} d={} --samples 100 --threads 1 --keep-every 0 -o {}";
    let mut paths = vec![place.model.clone()];
    paths.extend(DOMAINS.map(|domain| demo_file("calibration", domain)));
    paths.push(out.to_path_buf());
    let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let name = out.file_name().unwrap().to_string_lossy();
    let kept = place.join(&format!(".{name}.tenp-work/layer-1.safetensors"));
    let child = stopped_at(line, &all, &kept);
    (line.to_owned(), paths, child)
}

#[test]
fn a_shard_that_is_truncated_while_it_is_read() {
    let place = Place::demo();
    let out = place.join("out");
    let (line, paths, child) = stopped_calibration(&place, &out);
    let whole: Vec<_> = shards(&place.model)
        .into_iter()
        .map(|shard| (std::fs::read(&shard).unwrap(), shard))
        .collect();
    for (_, shard) in &whole {
        let file = std::fs::File::options().write(true).open(shard).unwrap();
        file.set_len(4096).unwrap();
    }
    let (code, text) = end(child);
    assert_eq!(code, Some(FAILED), "{text}");
    for needle in ["model-0000", "same command again"] {
        assert!(text.contains(needle), "{text}");
    }
    // Where it had come to its end before it was stopped, it looks at the files once more.
    let found = ["became shorter", "was changed while it was read"];
    assert!(found.iter().any(|found| text.contains(found)), "{text}");
    assert!(!out.exists());
    // What was kept before is as good as it was.
    for (bytes, shard) in &whole {
        std::fs::write(shard, bytes).unwrap();
    }
    let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    tenp(&line, &all).ok();
    assert_eq!(names(place.scratch.path()), ["model", "out"]);
}

/// A rename leaves what is being read as it was.
#[test]
fn a_shard_that_is_replaced_while_it_is_read() {
    let place = Place::demo();
    let (calm, out) = (place.join("calm"), place.join("out"));
    let (line, mut paths, child) = stopped_calibration(&place, &out);
    let shard = &shards(&place.model)[1];
    let aside = place.join("aside");
    std::fs::rename(shard, &aside).unwrap();
    std::fs::write(shard, "another file").unwrap();
    let (code, text) = end(child);
    assert_eq!(code, Some(0), "{text}");
    std::fs::rename(&aside, shard).unwrap();
    *paths.last_mut().unwrap() = calm.clone();
    let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    tenp(&line, &all).ok();
    assert!(std::fs::read(&calm).unwrap() == std::fs::read(&out).unwrap());
}

/// Writes to every shard in its place while the command stands still, which then fails and names one.
#[track_caller]
fn assert_written_shards_are_noticed(model: &Path, child: Child) -> String {
    for shard in shards(model) {
        let bytes = std::fs::read(&shard).unwrap();
        std::fs::write(&shard, &bytes).unwrap();
    }
    let (code, text) = end(child);
    assert_eq!(code, Some(FAILED), "{text}");
    for needle in ["model-0000", "while it was read", "same command again"] {
        assert!(text.contains(needle), "{text}");
    }
    text
}

pub(crate) fn planned(place: &Place) -> PathBuf {
    let plan = place.join("plan.json");
    let line = "plan {} --stats {} --keep 0.6 -o {}";
    tenp(line, &[&place.model, statistics(), &plan]).ok();
    plan
}

#[test]
fn a_shard_that_is_written_to_while_it_is_copied() {
    let place = Place::demo();
    let (plan, out) = (planned(&place), place.join("out"));
    let paths = [place.model.as_path(), &plan, &out];
    let line = "apply {} --plan {} --shard-size 20kB -o {}";
    let partial = place.join(".out.tenp-work/journal.json");
    let child = stopped_at(line, &paths, &partial);
    assert_written_shards_are_noticed(&place.model, child);
    assert_eq!(names(place.scratch.path()), ["model", "plan.json"]);
    tenp(line, &paths).ok();
}

/// A limit that is met in the middle of a shard is an error, not a death by a signal; shards that fit go through.
#[test]
fn a_limit_of_file_sizes() {
    let place = Place::demo();
    let (plan, out) = (planned(&place), place.join("out"));
    let before = snapshot(place.scratch.path());
    let limited = |more: &str| {
        let line = format!("apply {{}} --plan {{}} {more} -o {{}}");
        let words = words(&line, &[&place.model, &plan, &out]);
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -f 400; exec \"$@\"", "sh"]);
        shell
            .arg(env!("CARGO_BIN_EXE_tenp-run"))
            .args(&words)
            .output()
            .unwrap()
    };
    let run = limited("");
    let text = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(FAILED), "{text}");
    for needle in ["model-0000", "ulimit -f", "--shard-size"] {
        assert!(text.contains(needle), "{text}");
    }
    assert!(snapshot(place.scratch.path()) == before);
    let run = limited("--shard-size 100kB");
    assert!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    let free = place.join("free");
    let line = "apply {} --plan {} --shard-size 100kB -o {}";
    tenp(line, &[&place.model, &plan, &free]).ok();
    assert_same_files(&out, &free, &["README.md", "report.json", "report.html"]);
}

/// A shard that keeps its name, its length and its header, and holds other weights in the middle of the pass.
#[test]
fn a_shard_that_is_written_to_while_it_is_calibrated() {
    let place = Place::demo();
    let (calm, out) = (place.join("calm"), place.join("out"));
    let (line, mut paths, child) = stopped_calibration(&place, &out);
    assert_written_shards_are_noticed(&place.model, child);
    // Nor is what was kept of it gone on with.
    assert_eq!(names(place.scratch.path()), ["model"]);
    for out in [calm, out] {
        *paths.last_mut().unwrap() = out;
        let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
        let run = tenp(&line, &all).ok();
        run.check(!run.stderr.contains("going on"), "it begins again");
    }
    let (calm, out) = (place.join("calm"), place.join("out"));
    assert!(std::fs::read(calm).unwrap() == std::fs::read(out).unwrap());
}

#[test]
fn a_shard_that_is_written_to_while_logits_are_computed() {
    let place = Place::demo();
    let (ids, out) = (place.join("ids.safetensors"), place.join("out"));
    write_ids(&ids, &vec![vec![7; 128]; 100]);
    let paths = [place.model.as_path(), &ids, &out];
    let line = "logits {} --input {} --output {} --threads 1";
    let child = stopped_at(line, &paths, &place.join(".out.tenp.tmp"));
    assert_written_shards_are_noticed(&place.model, child);
    assert_eq!(names(place.scratch.path()), ["ids.safetensors", "model"]);
}

#[test]
fn a_shard_that_is_written_to_while_a_model_is_evaluated() {
    let place = Place::demo();
    let reference = copy(&place.model, &place.join("reference"));
    let tasks = demo_file("tasks", "arith");
    let text = demo_file("calibration", "facts");
    let paths = [place.model.as_path(), &reference, &tasks, &text];
    let line = "eval {} --reference {} --tasks {} --text {} --threads 1 --device cpu";
    for written in [&place.model, &reference] {
        let mut command = command(&words(line, &paths));
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = child.spawn().unwrap();
        // The first thing that is said: the tasks are done, and the texts are not.
        wait_for_stderr(&mut child);
        stop(&mut child);
        let mut stdout = child.stdout.take().unwrap();
        assert_written_shards_are_noticed(written, child);
        let mut figures = String::new();
        stdout.read_to_string(&mut figures).unwrap();
        assert_eq!(figures, "");
    }
}

#[test]
fn a_shard_that_is_written_to_while_methods_are_compared() {
    let place = Place::demo();
    let (tasks, out) = (demo_file("tasks", "arith"), place.join("out"));
    let data = demo_file("calibration", "arith");
    let paths = [place.model.as_path(), &data, &tasks, &out];
    let line = "compare {} --data {} --tasks {} --methods enp --keep 0.5,0.6 --seeds 1 --threads 1 --device cpu -o {}";
    let child = stopped_at(line, &paths, &out.join("cells/enp-0.5-0.json"));
    let text = assert_written_shards_are_noticed(&place.model, child);
    assert!(text.contains("goes on with the cells"), "{text}");
    assert_eq!(names(&out.join("cells")), ["enp-0.5-0.json"]);
    assert!(!out.join("results.json").exists());
    let run = tenp(line, &paths).ok();
    run.check(!run.stderr.contains("1/2"), "the first cell is read");
}
