//! Runs the program on copies of the repository's fixtures, and shows the command and both outputs where it does not
//! do what was expected.

// Every test binary uses its own part of this.
#![allow(dead_code)]

pub(crate) mod fixtures;
pub(crate) mod json;

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use serde_json::Value;

/// Sends a signal to a process that may have ended, without a program for it: on a busy machine that takes as long as
/// a run.
pub(crate) fn signal(child: &mut Child, signal: Signal) {
    if child.try_wait().expect("asked").is_none() {
        kill_process(Pid::from_child(child), signal).expect("sent");
    }
}

/// Stops a process that may have ended, and waits until each of its threads stands still: a signal that was sent has
/// not yet arrived.
pub(crate) fn stop(child: &mut Child) {
    signal(child, Signal::STOP);
    if child.try_wait().expect("asked").is_none() {
        let options = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(Pid::from_child(child)), options).expect("it stops or ends");
    }
}

/// Waits until something is said on a piped stderr.
pub(crate) fn wait_for_stderr(child: &mut Child) {
    let mut byte = [0];
    let stderr = child.stderr.as_mut().expect("piped");
    stderr.read_exact(&mut byte).expect("something is said");
}

/// A finished run of the program.
#[derive(Debug)]
pub(crate) struct Outcome {
    command: String,
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs the program. The line is split at blanks; every `{}` stands for the next path.
pub(crate) fn tenp(line: &str, paths: &[&Path]) -> Outcome {
    let words = words(line, paths);
    run(&mut command(&words), &words)
}

/// The words of a command line.
pub(crate) fn words(line: &str, paths: &[&Path]) -> Vec<String> {
    let mut paths = paths.iter();
    let words = line
        .split_whitespace()
        .map(|word| match word.split_once("{}") {
            None => word.to_owned(),
            Some((before, after)) => {
                let path = paths.next().expect("a path for every {}");
                format!("{before}{}{after}", path.display())
            }
        });
    let words = words.collect();
    assert!(paths.next().is_none(), "more paths than {{}} in `{line}`");
    words
}

/// The program with these words, outside any terminal.
pub(crate) fn command(words: &[String]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tenp-run"));
    command.args(words).stdin(Stdio::null());
    command
}

/// Runs a prepared command to its end.
pub(crate) fn run(command: &mut Command, words: &[String]) -> Outcome {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().expect("the program starts");
    let outcome = Outcome {
        command: format!("tenp-run {}", words.join(" ")),
        code: status.code(),
        stdout: String::from_utf8(stdout).expect("stdout is UTF-8"),
        stderr: String::from_utf8(stderr).expect("stderr is UTF-8"),
    };
    outcome.check(
        !outcome.stderr.contains("panicked") && outcome.code.is_some(),
        "it must not panic or die of a signal",
    );
    outcome
}

impl Outcome {
    /// Asserts something about this run.
    #[track_caller]
    pub(crate) fn check(&self, holds: bool, what: &str) {
        assert!(
            holds,
            "{what}\n$ {}\nexit code {:?}\n--- stdout\n{}--- stderr\n{}",
            self.command, self.code, self.stdout, self.stderr
        );
    }

    /// It succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        self.check(self.code == Some(0), "it must succeed");
        self
    }

    /// It refused with this exit code, said all of `needles`, and printed no data.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, needles: &[&str]) {
        self.check(
            self.code == Some(code),
            &format!("it must end with exit code {code}"),
        );
        for needle in needles {
            self.check(
                self.stderr.contains(needle),
                &format!("the message must contain `{needle}`"),
            );
        }
        self.check(self.stdout.is_empty(), "a refusal prints no data");
    }

    /// Everything on stdout as one JSON value.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let value = serde_json::from_str(&self.stdout);
        self.check(value.is_ok(), "stdout must be JSON and nothing else");
        value.expect("just checked")
    }
}

/// A folder that goes away with the test.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}
