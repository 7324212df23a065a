//! Runs that end before their time: what they leave, and how the same run goes on.

use std::cell::Cell;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tenp_checkpoint::{
    ApplyOptions, ApplyOutcome, Checkpoint, CheckpointError, ExpertPlan, LayerPlan, LayerRewriter,
    Notes, OutputDtype, OutputForm, OwnedMatrix, Plan, RewrittenExpert, RewrittenLayer, Room, Work,
    apply, apply_rewritten,
};

use crate::fixture::{Fixture, Keep, plan, ragged, snapshot};

const WORK: &str = ".out.tenp-work";

fn options() -> ApplyOptions {
    ApplyOptions {
        shard_bytes: 60_000,
        ..ApplyOptions::default()
    }
}

/// Applies until `share` of the bytes are written.
fn interrupted(fixture: &Fixture, plan: &Plan, options: &ApplyOptions, share: f64) {
    let mut source = fixture.open();
    let stop = Arc::new(AtomicBool::new(false));
    source.stop_when(Arc::clone(&stop));
    let result = apply(
        &source,
        plan,
        &fixture.out(),
        options,
        &mut |done, total| {
            if done as f64 >= share * total as f64 {
                stop.store(true, Ordering::Relaxed);
            }
        },
    );
    assert!(
        matches!(result, Err(CheckpointError::Interrupted)),
        "{result:?}"
    );
}

fn shards(dir: &Path) -> Vec<(String, u64)> {
    let entries = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    let mut shards: Vec<(String, u64)> = entries
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, entry.metadata().unwrap().ino())
        })
        .filter(|(name, _)| name.ends_with(".safetensors"))
        .collect();
    shards.sort();
    shards
}

/// What a run without interruption writes.
fn whole(fixture: &Fixture, plan: &Plan) -> std::collections::BTreeMap<String, Vec<u8>> {
    let other = fixture.root().join("whole");
    apply(&fixture.open(), plan, &other, &options(), &mut |_, _| ()).unwrap();
    let files = snapshot(&other);
    std::fs::remove_dir_all(&other).unwrap();
    files
}

#[test]
fn the_same_run_goes_on_behind_the_shards_that_are_whole() {
    let fixture = Fixture::sharded("deepseek_v3");
    let source = fixture.open();
    for plan in [ragged(&source), plan(&source, |_, _| Keep::All)] {
        let expected = whole(&fixture, &plan);
        interrupted(&fixture, &plan, &options(), 0.6);
        assert_eq!(fixture.names(), [WORK, "input"]);
        let output = fixture.root().join(WORK).join("output");
        let mut kept = shards(&output);
        assert!(kept.len() > 1, "{kept:?}");
        // A shard that is not as long as it should be does not count.
        let (torn, _) = kept.remove(1);
        let torn = std::fs::File::options().write(true).open(output.join(torn));
        torn.unwrap().set_len(1000).unwrap();
        let outcome = apply(
            &source,
            &plan,
            &fixture.out(),
            &options(),
            &mut |done, total| assert!(done <= total),
        );
        let Ok(ApplyOutcome::Written { resumed_shards, .. }) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(resumed_shards, kept.len());
        let written = shards(&fixture.out());
        assert!(kept.iter().all(|shard| written.contains(shard)));
        assert_eq!(snapshot(&fixture.out()), expected);
        assert_eq!(fixture.names(), ["input", "out"]);
        std::fs::remove_dir_all(fixture.out()).unwrap();
    }
}

#[test]
fn a_run_that_has_no_whole_shard_leaves_nothing() {
    let fixture = Fixture::new("mixtral");
    let plan = ragged(&fixture.open());
    interrupted(&fixture, &plan, &ApplyOptions::default(), 0.5);
    assert_eq!(fixture.names(), ["input"]);
}

#[test]
fn a_run_of_other_inputs_is_refused_until_a_restart() {
    let fixture = Fixture::sharded("olmoe");
    let source = fixture.open();
    let plan = ragged(&source);
    let other = self::plan(&source, |_, _| Keep::Neurons(vec![0, 2]));
    interrupted(&fixture, &plan, &options(), 0.6);
    let before = snapshot(&fixture.root().join(WORK).join("output"));
    let padded = ApplyOptions {
        form: OutputForm::Padded,
        shard_bytes: 70_000,
        ..options()
    };
    for (plan, options, differ) in [
        (&other, &options(), "differ: plan;"),
        (&plan, &padded, "differ: form, shard size;"),
    ] {
        let error = apply(&source, plan, &fixture.out(), options, &mut |_, _| ());
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains(differ) && error.contains("--restart"),
            "{error}"
        );
    }
    assert_eq!(snapshot(&fixture.root().join(WORK).join("output")), before);
    let expected = whole(&fixture, &other);
    let restart = ApplyOptions {
        restart: true,
        ..options()
    };
    let outcome = apply(&source, &other, &fixture.out(), &restart, &mut |_, _| ()).unwrap();
    assert!(matches!(
        outcome,
        ApplyOutcome::Written {
            resumed_shards: 0,
            ..
        }
    ));
    assert_eq!(snapshot(&fixture.out()), expected);
    assert_eq!(fixture.names(), ["input", "out"]);
}

#[test]
fn two_runs_into_the_same_output() {
    let fixture = Fixture::sharded("mixtral");
    let source = fixture.open();
    let plan = ragged(&source);
    let second = Cell::new(None);
    apply(
        &source,
        &plan,
        &fixture.out(),
        &options(),
        &mut |done, total| {
            if done == total {
                let again = apply(&source, &plan, &fixture.out(), &options(), &mut |_, _| ());
                second.set(Some(again.unwrap_err().to_string()));
            }
        },
    )
    .unwrap();
    let error = second.take().unwrap();
    assert!(error.contains("another run is writing it"), "{error}");
    assert_eq!(fixture.names(), ["input", "out"]);
}

/// What is left where the process dies in the middle of replacing an output, and just behind it.
#[test]
fn an_output_that_is_being_replaced_is_never_lost() {
    let fixture = Fixture::sharded("mixtral");
    let source = fixture.open();
    let (old, new) = (
        ragged(&source),
        plan(&source, |_, _| Keep::Neurons(vec![1])),
    );
    let expected = whole(&fixture, &new);
    let forced = ApplyOptions {
        force: true,
        ..options()
    };
    let work = fixture.root().join(WORK);
    fixture.apply(&old, OutputForm::Ragged).unwrap();
    let earlier = snapshot(&fixture.out());
    interrupted(&fixture, &new, &forced, 0.6);
    assert_eq!(snapshot(&fixture.out()), earlier);
    // The old output is set aside, and the new one not yet there: whoever comes next puts it back.
    std::fs::rename(fixture.out(), work.join("replaced")).unwrap();
    let error = apply(&source, &new, &fixture.out(), &options(), &mut |_, _| ());
    assert!(error.unwrap_err().to_string().contains("--force"));
    assert_eq!(snapshot(&fixture.out()), earlier);
    std::fs::rename(fixture.out(), work.join("replaced")).unwrap();
    apply(&source, &new, &fixture.out(), &forced, &mut |_, _| ()).unwrap();
    assert_eq!(snapshot(&fixture.out()), expected);
    // A finished run finds the folder that it could not remove.
    std::fs::create_dir_all(work.join("replaced")).unwrap();
    std::fs::write(work.join("journal.json"), "{}").unwrap();
    std::fs::write(work.join("lock"), "").unwrap();
    let outcome = apply(&source, &new, &fixture.out(), &options(), &mut |_, _| ());
    assert_eq!(outcome.unwrap(), ApplyOutcome::AlreadyFinished);
    assert_eq!(fixture.names(), ["input", "out"]);
}

/// Counts what it is asked for, and fails at a layer.
struct Doubling<'a> {
    source: &'a Checkpoint,
    fails_at: Option<usize>,
    asked: Vec<usize>,
    told: Vec<usize>,
}

impl LayerRewriter for Doubling<'_> {
    fn settings(&self) -> String {
        "doubling".to_owned()
    }

    fn layer(
        &mut self,
        layer: &LayerPlan,
        dtype: OutputDtype,
        room: &Room,
    ) -> Result<RewrittenLayer, Box<dyn std::error::Error + Send + Sync>> {
        if self.fails_at == Some(layer.layer) {
            return Err("no more".into());
        }
        self.asked.push(layer.layer);
        let experts = layer.kept().filter(|expert| expert.width > 0);
        let rows = self.source.config().hidden_size;
        let made = |expert: &ExpertPlan| {
            let old = self.source.expert(layer.layer, expert.id)?.down.dtype;
            let dtype = dtype.of(old);
            let down = OwnedMatrix {
                dtype,
                rows,
                cols: expert.width,
                bytes: vec![layer.layer as u8; dtype.size() * rows * expert.width],
                scales: Vec::new(),
            };
            Ok::<_, CheckpointError>(RewrittenExpert {
                id: expert.id,
                down: Some(room.keep(down)?),
                ..RewrittenExpert::default()
            })
        };
        Ok(RewrittenLayer {
            experts: experts.map(made).collect::<Result<_, _>>()?,
            router: None,
            outcome: json!({"layer": layer.layer, "share": 1.0 / 3.0}),
        })
    }

    fn made_before(
        &mut self,
        layer: &LayerPlan,
        made: &RewrittenLayer,
        dtype: OutputDtype,
        room: &Room,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.told.push(layer.layer);
        let again = Self {
            fails_at: None,
            asked: Vec::new(),
            told: Vec::new(),
            ..*self
        }
        .layer(layer, dtype, room)?;
        assert_eq!(&again, made);
        Ok(())
    }

    fn notes(&self, outcomes: &[Value]) -> Notes {
        let mut notes = Notes::default();
        notes.report.insert("doubled".to_owned(), json!(outcomes));
        notes
    }
}

#[test]
fn layers_that_are_made_are_not_made_again() {
    let fixture = Fixture::sharded("olmoe");
    let source = fixture.open();
    let plan = ragged(&source);
    let layers = &source.config().moe_layers;
    assert!(layers.len() > 1);
    let run = |out: &Path, fails_at| {
        let mut doubling = Doubling {
            source: &source,
            fails_at,
            asked: Vec::new(),
            told: Vec::new(),
        };
        let result = apply_rewritten(
            &source,
            &plan,
            out,
            &options(),
            Some(&mut doubling),
            &mut |_, _| (),
        );
        (result, doubling.asked, doubling.told)
    };
    let other = fixture.root().join("whole");
    run(&other, None).0.unwrap();
    let (failed, asked, _) = run(&fixture.out(), Some(layers[1]));
    assert!(failed.unwrap_err().to_string().contains("no more"));
    assert_eq!(asked, layers[..1]);
    let (done, asked, told) = run(&fixture.out(), None);
    done.unwrap();
    assert_eq!((&asked[..], &told[..]), (&layers[1..], &layers[..1]));
    assert_eq!(snapshot(&fixture.out()), snapshot(&other));
    assert_eq!(fixture.names(), ["input", "out", "whole"]);
}

#[test]
fn a_work_folder_is_beside_its_output() {
    assert_eq!(
        Work::place(Path::new("a/out"), "work"),
        Path::new("a/.out.tenp-work")
    );
}
