//! Replays the fuzz targets' corpus: what the fuzzer once reached stays sound, without the fuzzer.

#[path = "../../../fuzz/properties.rs"]
mod properties;

use std::path::Path;

/// Feeds every file of a target's corpus to its function.
fn replay(target: &str, property: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let mut files = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let sound = std::panic::catch_unwind(|| property(&bytes));
        assert!(sound.is_ok(), "{}", path.display());
        files += 1;
    }
    assert!(files > 10, "{files} inputs of {target}");
}

#[test]
fn indices() {
    replay("index", properties::index);
}

#[test]
fn headers() {
    replay("header", properties::header);
}

#[test]
fn configs() {
    replay("config", properties::config);
}

#[test]
fn plans() {
    replay("plan", properties::plan);
}

#[test]
fn statistics() {
    replay("statistics", properties::statistics);
}

#[test]
fn folders() {
    replay("folder", properties::folder);
}
