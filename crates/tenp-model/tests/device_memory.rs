//! What is foreseen of a GPU's memory, against the buffers that the executor of the `simt` crate was asked for.

// `cargo test -- --nocapture` lists the bytes.
#![allow(clippy::print_stdout)]

mod support;

use std::time::{Duration, Instant};

use simt::{Held, Schedule, Simulated, most_held};
use support::{golden, golden_dir};
use tenp_checkpoint::Checkpoint;
use tenp_model::calibrate::{FoldOptions, calibrate_in_folds};
use tenp_model::device::DeviceModel;
use tenp_model::generate::{Limits, complete};
use tenp_model::memory::{self, Step};
use tenp_model::{Model, Sequences};

/// Both ways to hold layers: all of them, and two in turn.
fn places() -> [Simulated; 2] {
    let place = Simulated::new(Schedule::UNLIKE[0]).with_wgmma();
    [place, place.with_free_bytes(0)]
}

#[track_caller]
fn check(what: &str, step: &Step, held: &Held) {
    let said = step.device.expect("a GPU runs it");
    let taken: usize = held.values().sum();
    let share = taken as f64 / said as f64;
    println!("{what}: {said} said, {taken} taken, {share:.2}");
    assert!((0.8..1.05).contains(&share), "{what}: {share} of {held:?}");
}

#[test]
fn a_calibration_takes_what_was_foreseen() {
    for (family, copies) in [("deepseek_v3", 3), ("mixtral", 1)] {
        let checkpoint = Checkpoint::open(&golden_dir().join(family)).expect("opens");
        let (ids, _) = golden(checkpoint.dir());
        let samples = vec![ids; copies].concat();
        // The sums of every group of a domain's samples are there at once.
        let domains = ["a", "b"].map(|name| (name.to_owned(), samples.clone()));
        let options = FoldOptions {
            num_folds: Some(2),
            ..FoldOptions::default()
        };
        for place in places() {
            let mut step = Step::default();
            let held = most_held(|| {
                let device = DeviceModel::new(&checkpoint, place).expect("found");
                let model = Model::on(&device);
                step = memory::calibration(&model, &domains, &options);
                calibrate_in_folds(&model, &domains, &options, None, &|_, _| ()).expect("runs");
            });
            check(family, &step, &held);
        }
    }
}

#[test]
fn figures_take_what_was_foreseen() {
    for family in ["deepseek_v3", "qwen2_moe"] {
        let checkpoint = Checkpoint::open(&golden_dir().join(family)).expect("opens");
        let mut sequences = Sequences::default();
        for ids in golden(checkpoint.dir()).0 {
            sequences.push(&ids, 0);
        }
        for place in places() {
            let mut step = Step::default();
            let held = most_held(|| {
                let device = DeviceModel::new(&checkpoint, place).expect("found");
                let model = Model::on(&device);
                step = memory::evaluation(&model, std::slice::from_ref(&sequences));
                let started = Instant::now();
                for _ in 0..2 {
                    let hidden = model.hidden_states(&sequences, &()).expect("runs");
                    model.head().expect("there").logits(&hidden).expect("made");
                }
                let waited = model.waited().expect("a GPU runs it");
                assert!(waited.weights > Duration::ZERO && waited.kernels > Duration::ZERO);
                assert!(waited.weights + waited.kernels < started.elapsed());
            });
            check(family, &step, &held);
        }
    }
}

/// A long prompt among short ones: each sequence gets the room of the longest.
#[test]
fn completions_take_what_was_foreseen() {
    let checkpoint = Checkpoint::open(&golden_dir().join("olmoe")).expect("opens");
    let text = golden(checkpoint.dir()).0.concat();
    let prompts = [&text[..70], &text[..5], &text[..9]];
    let mut sequences = Sequences::default();
    for prompt in prompts {
        sequences.push(prompt, 0);
    }
    let limits = Limits {
        new_tokens: 8,
        len: 200,
    };
    for place in places() {
        let mut step = Step::default();
        let held = most_held(|| {
            let device = DeviceModel::new(&checkpoint, place).expect("found");
            let model = Model::on(&device);
            step = memory::generation(&model, &sequences, limits.new_tokens);
            complete(&model, &prompts, limits, &|_| ()).expect("completed");
        });
        check("completions", &step, &held);
    }
}
