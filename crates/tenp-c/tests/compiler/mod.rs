//! The system's C compiler, and the libraries that cargo built for these tests.
#![allow(unreachable_pub, dead_code, reason = "each test binary uses a part")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// The header.
pub const HEADER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/include/tenp.h");

/// A folder that goes with the test.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// The shared (`so`) or the static (`a`) library, which cargo built beside this test.
pub fn library(kind: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.with_file_name(format!("libtenp.{kind}"));
    assert!(path.exists(), "{} is missing", path.display());
    path
}

/// Compiles and links, with every warning an error.
pub fn compile(language: &str, sources: &[&Path], library: &Path, program: &Path) {
    let mut command = Command::new(if language.contains("++") { "c++" } else { "cc" });
    command
        .args([language, "-Wall", "-Wextra", "-Werror", "-pedantic", "-I"])
        .arg(Path::new(HEADER).parent().unwrap())
        .args(sources)
        .arg("-o")
        .arg(program)
        .arg(library);
    let folder = library.parent().unwrap().display();
    command.arg(format!("-Wl,-rpath,{folder}"));
    // What the static library needs of the system.
    command.args(["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"]);
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}\n{errors}");
}

/// Runs a program that must succeed; what it printed.
pub fn run(program: &Path) -> String {
    let output = Command::new(program).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{text}{errors}", output.status);
    text
}
