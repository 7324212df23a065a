//! A calibration that is stopped behind every layer and goes on, on any backend.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tenp_checkpoint::{CheckpointError, Inputs, Work};
use tenp_kernels::device::Backend;
use tenp_model::calibrate::{FoldOptions, Keep, calibrate_in_folds};
use tenp_model::device::DeviceModel;
use tenp_model::{Model, ModelError};

use super::tight::Tight;
use super::{Place, domains, open};

pub(crate) fn a_stopped_calibration_goes_on_with_the_same_bits<B: Backend + 'static>(
    place: Place<'_, B>,
) {
    let (mut checkpoint, ids, _) = open("deepseek_v3");
    let stop = Arc::new(AtomicBool::new(false));
    checkpoint.stop_when(Arc::clone(&stop));
    let (domains, num_layers) = (domains(&ids), checkpoint.config().num_layers);
    let options = FoldOptions {
        num_folds: Some(2),
        tables: vec!["contribution"],
        domain_tables: Some(vec!["contribution", "energy"]),
        held_bytes: None,
    };
    let calibrate = |keep: Option<&mut Keep>, last: usize| {
        let device = DeviceModel::new(&checkpoint, Tight(place(0))).expect("found");
        stop.store(false, Ordering::Relaxed);
        let progress = |layer, _| {
            if layer == last {
                stop.store(true, Ordering::Relaxed);
            }
        };
        calibrate_in_folds(&Model::on(&device), &domains, &options, keep, &progress)
    };
    let whole = calibrate(None, num_layers).expect("runs");
    let dir = tempfile::tempdir().expect("a folder");
    let output = dir.path().join("statistics");
    for last in 0..num_layers {
        let mut work = Work::hold(Work::place(&output, "work"), &output).expect("held");
        work.resume(Inputs::new(), false).expect("the same inputs");
        assert_eq!(work.is_begun(), last > 0);
        let mut keep = Keep::new(work, Duration::ZERO);
        let result = calibrate(Some(&mut keep), last);
        assert_eq!(keep.trouble(), None);
        if last + 1 < num_layers {
            assert!(
                matches!(
                    result,
                    Err(ModelError::Checkpoint(CheckpointError::Interrupted))
                ),
                "stopped behind layer {last}"
            );
            let hidden = keep.work().dir().join(format!("hidden-{}", last + 1));
            assert!(hidden.exists(), "kept behind layer {last}");
        } else {
            assert!(result.expect("runs to its end") == whole);
            keep.finish();
        }
    }
    assert_eq!(std::fs::read_dir(dir.path()).expect("lists").count(), 0);
}

/// Every layer's tables are let go of as soon as it is done, long before it is time to keep it; the file is the one of a run that
/// held everything, and of one that was stopped on the way.
pub(crate) fn statistics_that_are_let_go_of_are_written<B: Backend + 'static>(place: Place<'_, B>) {
    let (mut checkpoint, ids, _) = open("deepseek_v3");
    let stop = Arc::new(AtomicBool::new(false));
    checkpoint.stop_when(Arc::clone(&stop));
    let (domains, layers) = (domains(&ids), &checkpoint.config().moe_layers);
    let run = |keep: Option<&mut Keep>, last: usize| {
        let device = DeviceModel::new(&checkpoint, place(0)).expect("found");
        stop.store(false, Ordering::Relaxed);
        let progress = |layer, _| {
            if layer == last {
                stop.store(true, Ordering::Relaxed);
            }
        };
        let options = FoldOptions {
            held_bytes: keep.as_ref().map(|_| 0),
            ..FoldOptions::default()
        };
        let calibrated =
            calibrate_in_folds(&Model::on(&device), &domains, &options, keep, &progress);
        calibrated.map(|(statistics, _)| statistics)
    };
    let dir = tempfile::tempdir().expect("a folder");
    let [whole, output] = ["whole", "statistics"].map(|name| dir.path().join(name));
    let held = run(None, usize::MAX).expect("runs");
    held.write(&whole).expect("written");
    for last in [layers[0], usize::MAX] {
        let mut work = Work::hold(Work::place(&output, "work"), &output).expect("held");
        work.resume(Inputs::new(), false).expect("the same inputs");
        assert_eq!(work.is_begun(), last == usize::MAX);
        let mut keep = Keep::new(work, Duration::from_hours(1));
        // There are no hidden states to go on from.
        assert_eq!(keep.next_layer(checkpoint.config()), 0);
        let result = run(Some(&mut keep), last);
        assert_eq!(keep.trouble(), None);
        if last == usize::MAX {
            let gone = result.expect("runs to its end");
            let mut all = gone.domains.values().flat_map(|layers| layers.values());
            assert!(all.all(|layer| layer.table_bytes() == 0 && layer.tokens.len() > 1));
            keep.write(&gone, &output).expect("written");
            keep.finish();
        } else {
            assert!(result.is_err());
        }
    }
    let read = |path| std::fs::read(path).expect("there");
    assert!(read(&output) == read(&whole));
}
