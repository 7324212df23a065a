//! The scripts that check a GPU machine, on made-up results and pretended binaries.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

/// Runs a script of the project with the last of `tools`. Where one is missing the test says so and passes.
fn passes(name: &str, tools: &[&str], script: &str, arguments: &[&str]) {
    for tool in tools {
        let found = Command::new(tool).arg("--version").output();
        if !found.is_ok_and(|o| o.status.success()) {
            // Past the capture of the test harness.
            let _ = writeln!(std::io::stderr(), "skipped: {name}: no {tool}");
            return;
        }
    }
    let tool = tools[tools.len() - 1];
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    let output = Command::new(tool).arg(path).args(arguments).output();
    let output = output.unwrap_or_else(|e| panic!("{tool}: {e}"));
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success() && text.contains("passed"), "{text}");
}

#[test]
fn reports_are_made_of_results() {
    let name = "reports_are_made_of_results";
    passes(
        name,
        &["python3"],
        "scripts/gpu-report.py",
        &["--self-test"],
    );
}

#[test]
fn the_check_runs_its_steps_and_sees_failures() {
    let name = "the_check_runs_its_steps_and_sees_failures";
    passes(name, &["python3", "bash"], "scripts/gpu-check-test.sh", &[]);
}

#[test]
fn the_peers_cases_are_those_of_our_own_bench() {
    let name = "the_peers_cases_are_those_of_our_own_bench";
    passes(name, &["python3"], "tests/peers/check_cases.py", &[]);
}

#[test]
fn peers_are_reported_beside_our_own_figures() {
    let name = "peers_are_reported_beside_our_own_figures";
    passes(name, &["python3"], "tests/peers/check_report.py", &[]);
}
