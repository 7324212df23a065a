//! `doctor`: what it says of the machine it runs on.

use super::support::tenp;

#[test]
fn the_machine_is_described() {
    let dir = tempfile::tempdir().unwrap();
    let said = tenp("doctor --json --folder {}", &[dir.path()]).ok().json();
    assert!(said["cpu"]["threads"].as_u64() > Some(0), "{said}");
    let bytes = |part: &str, what: &str| said[part][what].as_u64().unwrap();
    assert!(bytes("memory", "available_bytes") <= bytes("memory", "total_bytes"));
    assert!(bytes("disk", "free_bytes") > 0);
    // Not measured where there is no room, which is said then.
    let measured = ["write_bytes_per_second", "read_bytes_per_second"]
        .iter()
        .all(|rate| said["disk"][rate].as_f64() > Some(0.0));
    let missing: Vec<&str> = said["missing"]
        .as_array()
        .unwrap()
        .iter()
        .map(|what| what.as_str().unwrap())
        .collect();
    let says = |what: &str| missing.iter().any(|line| line.contains(what));
    assert!(measured != says("to measure the disk"), "{said}");
    let built = !said["cuda"]["built_for"].as_array().unwrap().is_empty();
    assert_eq!(built, cfg!(feature = "cuda"));
    assert!(built != says("GPU kernels"), "{said}");
    // The measured file is gone.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let text = tenp("doctor --folder {}", &[dir.path()]).ok();
    for what in ["CPU", "memory", "disk", "GPU kernels"] {
        text.check(text.stdout.contains(what), what);
    }
}

#[test]
fn folders_that_are_not_there_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("nowhere");
    tenp("doctor --folder {}", &[&nowhere]).refused(1, &["--folder", "nowhere"]);
}
