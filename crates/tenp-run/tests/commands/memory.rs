//! What `--dry-run` says of memory, against what a run holds.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::support::fixtures::{demo, demo_file};
use crate::support::json::number;
use crate::support::{Scratch, command, tenp, words};

/// Most anonymous memory of a process, looked at every millisecond until it has ended.
#[cfg(target_os = "linux")]
fn most_anonymous(child: &mut Child) -> f64 {
    let status = format!("/proc/{}/status", child.id());
    let mut most: f64 = 0.0;
    while child.try_wait().unwrap().is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
        most = most.max(1024.0 * kilobytes.unwrap_or(0.0));
        std::thread::sleep(Duration::from_millis(1));
    }
    most
}

#[cfg(target_os = "linux")]
#[test]
fn the_memory_that_was_said_is_taken() {
    let scratch = Scratch::new();
    let (demo, facts, code) = (
        demo(),
        demo_file("calibration", "facts"),
        demo_file("calibration", "code"),
    );
    let text: [&Path; 3] = [&demo, &facts, &code];
    let commands = [
        ("calibrate {} --data a={} b={} --threads 1", &text[..]),
        ("prune {} --data a={} b={} --keep 0.6 --threads 2", &text),
        (
            "prune {} --data {} --keep 0.5 --recover least-squares --threads 2",
            &text[..2],
        ),
        (
            "prune {} --data {} --method dern --experts 8 --threads 1",
            &text[..2],
        ),
    ];
    for (place, (line, paths)) in commands.into_iter().enumerate() {
        let out = scratch.join(&format!("out-{place}"));
        let line = format!("{line} -o {{}}");
        let paths: Vec<&Path> = paths.iter().copied().chain([out.as_path()]).collect();
        let dry = tenp(&format!("{line} --dry-run --json"), &paths).ok();
        let said = number(&dry.json()["memory_bytes"]);
        let mut taken: f64 = 0.0;
        for attempt in 0..5 {
            let flag = if attempt > 0 { " --force" } else { "" };
            let flag = if line.starts_with("prune") { flag } else { "" };
            let mut command = command(&words(&format!("{line}{flag}"), &paths));
            let child = command.stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = child.spawn().unwrap();
            taken = taken.max(most_anonymous(&mut child));
            assert!(child.wait().unwrap().success(), "{line}");
            if taken >= 0.8 * said {
                break;
            }
            // On a busy machine the moment may have passed unseen.
            let _ = std::fs::remove_file(&out);
        }
        let share = taken / said;
        assert!((0.8..1.05).contains(&share), "{line}: {taken} of {said}");
    }
}
