//! Symbolic links: read through, as a download cache has them, and never written through.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::options::statistics;
use super::{Place, USAGE};
use crate::support::fixtures::{assert_same_files, demo_file, golden, names, snapshot};
use crate::support::tenp;

/// A checkpoint as a download cache has it: the files in one folder, links to them in another.
fn cached() -> (Place, PathBuf) {
    let mut place = Place::demo();
    let files = place.join("blobs");
    std::fs::rename(&place.model, &files).unwrap();
    place.model = place.join("snapshot");
    std::fs::create_dir(&place.model).unwrap();
    for name in names(&files) {
        symlink(Path::new("../blobs").join(&name), place.model.join(name)).unwrap();
    }
    (place, files)
}

#[test]
fn a_checkpoint_of_links_is_read() {
    let (place, files) = cached();
    let (data, out, calm) = (
        demo_file("calibration", "facts"),
        place.join("out"),
        place.join("calm"),
    );
    let before = snapshot(&files);
    let line = "prune {} --data {} --samples 8 --keep 0.6 -o {}";
    tenp(line, &[&place.model, &data, &out]).ok();
    tenp(line, &[&files, &data, &calm]).ok();
    assert_same_files(&out, &calm, &["README.md", "report.json", "report.html"]);
    assert!(snapshot(&files) == before);
    let links = names(&place.model).into_iter();
    assert!(
        links
            .map(|name| place.model.join(name))
            .all(|l| l.is_symlink())
    );
}

#[test]
fn a_file_behind_a_link_of_the_checkpoint_is_not_replaced() {
    let (place, files) = cached();
    let (data, out) = (demo_file("calibration", "facts"), place.join("out"));
    let ids = golden("olmoe").join("golden.safetensors");
    let (model, shard) = (
        place.model.as_path(),
        files.join("model-00001-of-00002.safetensors"),
    );
    for (line, paths) in [
        ("calibrate {} --data {} -o {}", &[model, &data, &shard][..]),
        (
            "plan {} --stats {} --keep 0.6 -o {}",
            &[model, statistics(), &shard],
        ),
        ("logits {} --input {} --output {}", &[model, &ids, &shard]),
        (
            "prune {} --data {} --keep 0.6 --save-stats {} -o {}",
            &[model, &data, &shard, &out],
        ),
    ] {
        place.refuses(
            line,
            paths,
            USAGE,
            &["model-00001", "is a link to it", "choose another"],
        );
    }
    // Not even where the files would pass for an earlier output.
    std::fs::write(files.join("tenp_plan.json"), "{}").unwrap();
    place.refuses(
        "prune {} --data {} --keep 0.6 --force -o {}",
        &[model, &data, &files],
        USAGE,
        &["blobs", "is a link to it", "choose another"],
    );
}

#[test]
fn outputs_that_are_links_or_lie_behind_one() {
    let place = Place::demo();
    let data = demo_file("calibration", "facts");
    let model = place.model.as_path();
    let (to_model, to_nothing) = (place.join("to-model"), place.join("to-nothing"));
    symlink(model, &to_model).unwrap();
    symlink("nowhere", &to_nothing).unwrap();
    for (out, needles) in [
        (&to_model, &["is the input folder", "choose another"][..]),
        (
            &to_model.join("out"),
            &["inside the input folder", "choose another"],
        ),
        (&to_nothing, &["symbolic link to nothing"]),
    ] {
        let line = "prune {} --data {} --keep 0.6 --force -o {}";
        place.refuses(line, &[model, &data, out], USAGE, needles);
    }
    place.refuses(
        "calibrate {} --data {} -o {}",
        &[model, &data, &to_model.join("stats")],
        USAGE,
        &["inside the input folder"],
    );
}

/// The folder that it stands for is replaced, not the link; what an old output's own links lead to stays.
#[test]
fn a_link_to_an_output_stays_one() {
    let place = Place::demo();
    let data = demo_file("calibration", "facts");
    let (real, link, kept) = (place.join("real"), place.join("link"), place.join("kept"));
    std::fs::create_dir(&real).unwrap();
    symlink(&real, &link).unwrap();
    let line = "prune {} --data {} --samples 8 --keep 0.6 -o {}";
    tenp(line, &[&place.model, &data, &link]).ok();
    std::fs::create_dir(&kept).unwrap();
    std::fs::write(kept.join("thesis.txt"), "years of work").unwrap();
    symlink(&kept, real.join("notes")).unwrap();
    let again = "prune {} --data {} --samples 8 --keep 0.5 --force -o {}";
    tenp(again, &[&place.model, &data, &link]).ok();
    assert!(link.is_symlink() && real.join("tenp_plan.json").is_file());
    assert!(!real.join("notes").exists() && kept.join("thesis.txt").exists());
    assert_eq!(
        names(place.scratch.path()),
        ["kept", "link", "model", "real"]
    );
}

/// The name of a work folder is no licence to clear away what is not one.
#[test]
fn a_work_folder_that_is_somebody_elses() {
    let place = Place::demo();
    let (data, out) = (demo_file("calibration", "facts"), place.join("out"));
    let needles = &[".out.tenp-", "not of this program", "move it away"];
    for purpose in ["work", "calibration"] {
        let work = place.join(&format!(".out.tenp-{purpose}"));
        symlink(&place.model, &work).unwrap();
        for line in [
            "prune {} --data {} --samples 8 --keep 0.6 -o {}",
            "prune {} --data {} --samples 8 --keep 0.6 --restart -o {}",
        ] {
            let paths: &[&Path] = &[&place.model, &data, &out];
            let before = snapshot(&place.model);
            tenp(line, paths).refused(USAGE, needles);
            assert!(snapshot(&place.model) == before && !out.exists());
        }
        std::fs::remove_file(&work).unwrap();
        let _ = std::fs::remove_dir_all(place.join(".out.tenp-calibration"));
    }
    let work = place.join(".stats.tenp-work");
    std::fs::rename(&place.model, &work).unwrap();
    place.refuses(
        "calibrate {} --data {} -o {}",
        &[&work, &data, &place.join("stats")],
        USAGE,
        &[".stats.tenp-work", "not of this program"],
    );
}
