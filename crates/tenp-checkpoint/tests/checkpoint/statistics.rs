//! Statistics files: round trip, strict reading, merging.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;
use tenp_checkpoint::statistics::Share;
use tenp_checkpoint::{LayerStatistics, Statistics};

use crate::fixture::{edit_shard, write_shard};

fn layer(start: f64) -> LayerStatistics {
    let mut layer = LayerStatistics::zeros(2, 3);
    layer.tokens = vec![3, 0];
    layer.total_tokens = 5;
    layer.direction = vec![start, 0.0];
    layer.output_peak = vec![start * 2.0, 0.5];
    layer.contribution = (0..6).map(|index| start + f64::from(index)).collect();
    layer.peak = vec![start; 6];
    layer.neuron_weight_norm_sq = vec![1.0 / 3.0; 6];
    layer.down_norm_sq = vec![0.1; 6];
    layer
}

fn file(domain: &str, tokens: &str, start: f64) -> Statistics {
    Statistics {
        checkpoint: "abc".to_owned(),
        tokens: BTreeMap::from([(domain.to_owned(), vec![tokens.to_owned()])]),
        version: "0.1.0".to_owned(),
        run: String::new(),
        shares: Vec::new(),
        compute: vec!["f32".to_owned()],
        domains: BTreeMap::from([(
            domain.to_owned(),
            BTreeMap::from([(1, layer(start)), (12, layer(start + 1.0))]),
        )]),
    }
}

fn saved(dir: &Path, statistics: &Statistics) -> std::path::PathBuf {
    let path = dir.join("stats.safetensors");
    statistics.write(&path).unwrap();
    path
}

#[test]
fn a_file_gives_back_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut statistics = file("with/slash and space", "t1", 0.1);
    statistics.merge(file("other", "t2", -7.5)).unwrap();
    let path = saved(dir.path(), &statistics);
    assert_eq!(Statistics::read(&path).unwrap(), statistics);
    let first = std::fs::read(&path).unwrap();
    statistics.write(&path).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), first);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let reference = safetensors::SafeTensors::deserialize(&first).unwrap();
    let names = reference.names();
    assert!(names.contains(&"other/layers.12/residual_direction"));
    assert_eq!(names.len(), 2 * 2 * 19);
}

#[test]
fn tables_that_nobody_wants_stay_empty() {
    let dir = tempfile::tempdir().unwrap();
    let statistics = file("d", "t", 1.0);
    let path = saved(dir.path(), &statistics);
    let read = Statistics::read_tables(&path, &|name| name == "peak").unwrap();
    let (some, all) = (&read.domains["d"][&12], &statistics.domains["d"][&12]);
    assert_eq!((&some.peak, &some.direction), (&all.peak, &all.direction));
    assert_eq!((some.num_experts, some.width), (2, 3));
    assert!(some.contribution.is_empty() && some.down_norm_sq.is_empty());
    // The same of what is in memory.
    let mut left = statistics.clone();
    left.keep_tables(&["peak"]);
    assert_eq!(left, read);
}

#[test]
fn damaged_statistics_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path, parts: &[&str]| {
        let error = Statistics::read(path).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "`{error}` should contain `{part}`");
        }
    };
    let path = saved(dir.path(), &file("d", "t", 1.0));
    edit_shard(&path, |header, _| {
        let info = header.shift_remove("d/layers.12/energy").unwrap();
        header.insert("d/layers.12/renamed".to_owned(), info);
    });
    refused(
        &path,
        &["stats.safetensors", "d/layers.12/energy is missing"],
    );

    let path = saved(dir.path(), &file("d", "t", 1.0));
    edit_shard(&path, |header, _| {
        header["d/layers.1/mean"]["shape"] = json!([3, 2]);
    });
    refused(&path, &["d/layers.1/mean", "[3, 2]", "[2, 3]"]);

    let path = saved(dir.path(), &file("d", "t", 1.0));
    edit_shard(&path, |header, _| {
        header["d/layers.1/tokens"]["dtype"] = json!("F64");
    });
    refused(&path, &["d/layers.1/tokens", "expected i64"]);

    let path = saved(dir.path(), &file("d", "t", f64::NAN));
    refused(&path, &["d/layers.1/direction", "NaN", "position 0"]);

    let path = saved(dir.path(), &file("d", "t", 1.0));
    edit_shard(&path, |header, _| {
        drop(
            header["__metadata__"]
                .as_object_mut()
                .unwrap()
                .remove("tokens"),
        );
    });
    refused(&path, &["`tokens`"]);

    write_shard(&path, b"{}", b"");
    refused(&path, &["not a statistics file"]);

    let mut short = file("d", "t", 1.0);
    short
        .domains
        .get_mut("d")
        .unwrap()
        .get_mut(&1)
        .unwrap()
        .peak
        .pop();
    let error = short.write(&path).unwrap_err().to_string();
    assert!(error.contains("d/layers.1/peak: has 5 values"), "{error}");
}

#[test]
fn merging_adds_sums_and_takes_maxima() {
    let mut merged = file("d", "t1", 1.0);
    merged.merge(file("d", "t2", 4.0)).unwrap();
    let layer = &merged.domains["d"][&1];
    assert_eq!(layer.tokens, [6, 0]);
    assert_eq!(layer.total_tokens, 10);
    assert_eq!(layer.direction, [5.0, 0.0]);
    assert_eq!(layer.output_peak, [8.0, 0.5]);
    assert_eq!(layer.peak, [4.0; 6]);
    assert_eq!(layer.contribution[5], 6.0 + 9.0);
    assert_eq!(layer.down_norm_sq, [0.1; 6]);
    assert_eq!(merged.tokens["d"], ["t1", "t2"]);
    let mut reversed = file("d", "t2", 4.0);
    reversed.merge(file("d", "t1", 1.0)).unwrap();
    assert_eq!(merged, reversed);
    let mut from_nothing = Statistics::default();
    from_nothing.merge(merged.clone()).unwrap();
    assert_eq!(from_nothing, merged);
}

#[test]
fn files_that_do_not_belong_together() {
    type Damage = fn(&mut Statistics);
    let table: [(Damage, &str); 5] = [
        (
            |other| other.checkpoint = "def".into(),
            "calibrate the same checkpoint",
        ),
        (
            |other| other.tokens.get_mut("d").unwrap()[0] = "t1".into(),
            "the same calibration text is in both files",
        ),
        (
            |other| drop(other.domains.get_mut("d").unwrap().remove(&12)),
            "different layers",
        ),
        (
            |other| {
                let layer = other.domains.get_mut("d").unwrap().get_mut(&12).unwrap();
                layer.down_norm_sq[3] = 0.2;
            },
            "layer 12: down_norm_sq differs",
        ),
        (
            |other| {
                let layers = other.domains.get_mut("d").unwrap();
                layers.insert(1, LayerStatistics::zeros(2, 4));
            },
            "width 4",
        ),
    ];
    for (damage, message) in table {
        let mut statistics = file("d", "t1", 1.0);
        let mut other = file("d", "t2", 1.0);
        damage(&mut other);
        let error = statistics.merge(other).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert_eq!(
            statistics,
            file("d", "t1", 1.0),
            "a failed merge changes nothing"
        );
    }
}

#[test]
fn shares_add_up_to_the_whole_and_only_once() {
    let share = |part, parts| {
        let mut file = file("a", &format!("tokens of {part}"), 1.0);
        file.shares = vec![Share {
            of_text: "text".to_owned(),
            part,
            parts,
        }];
        file
    };
    let mut merged = share(2, 3);
    merged.merge(share(3, 3)).unwrap();
    let missing: Vec<String> = merged
        .missing_shares()
        .iter()
        .map(Share::to_string)
        .collect();
    assert_eq!(missing, ["1/3"]);
    for (other, problem) in [
        (share(3, 3), "share 3/3 is in both"),
        (share(1, 2), "splits"),
    ] {
        let before = merged.clone();
        let error = merged.merge(other).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
        assert_eq!(merged, before);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("statistics");
    merged.write(&path).unwrap();
    assert_eq!(Statistics::read(&path).unwrap(), merged);
    // A share whose text is that of another one, by chance.
    let mut last = share(1, 3);
    last.tokens.clone_from(&share(2, 3).tokens);
    merged.merge(last).unwrap();
    assert!(merged.missing_shares().is_empty() && merged.shares.is_empty());
    // From here on the text of a share is known like any other.
    assert!(merged.merge(share(2, 3)).is_err());
}

/// What a file promises of others must not decide how much is listed.
#[test]
fn shares_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let share = |of_text: &str, part, parts| Share {
        of_text: of_text.to_owned(),
        part,
        parts,
    };
    for (shares, problem) in [
        (vec![share("t", 1, u32::MAX)], "more than the 65536"),
        (
            vec![share("t", 1, 40_000), share("u", 1, 40_000)],
            "80000 in all",
        ),
        (vec![share("t", 0, 3)], "no share 0/3"),
        (vec![share("t", 4, 3)], "no share 4/3"),
    ] {
        let mut statistics = file("d", "tokens", 1.0);
        statistics.shares = shares;
        let error = Statistics::read(&saved(dir.path(), &statistics)).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(problem), "{error}");
    }
    let mut statistics = file("d", "tokens", 1.0);
    statistics.shares = vec![share("t", 3, Share::MAX_PARTS)];
    let read = Statistics::read(&saved(dir.path(), &statistics)).unwrap();
    assert_eq!(read.missing_shares().len(), 65_535);
}

/// A sum that is no number could be written, but not read again.
#[test]
fn sums_that_are_too_large() {
    let mut merged = file("d", "t1", 1e308);
    let before = merged.clone();
    let error = merged.merge(file("d", "t2", 1e308)).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("domain d, layer 1") && error.contains("too large"),
        "{error}"
    );
    assert_eq!(merged, before);
}
