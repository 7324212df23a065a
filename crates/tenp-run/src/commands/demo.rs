//! `demo`: the whole story on the bundled checkpoint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tenp_checkpoint::{Checkpoint, Plan};
use tenp_kernels::Compute;
use tenp_model::rewrite::RecoverOptions;
use tenp_model::text::{Data, Task};
use tenp_prune::{Allocation, Method, NeuronScore, PlanRequest};

use super::apply::Rewriting;
use super::eval::{Measures, run_tasks};
use crate::cli::{DataArgs, Demo, HiddenArgs, MIN_TOKENS};
use crate::failure::usage;
use crate::place::Place;
use crate::progress::Progress;
use crate::recovery::{self, Recovery};
use crate::{console, models, picture, requests};

/// What is compared, all at the same budget.
struct Entry {
    name: &'static str,
    request: PlanRequest,
    /// By least squares.
    recovers: bool,
}

fn entries(keep: f64) -> Vec<Entry> {
    let entry = |name, method| Entry {
        name,
        request: PlanRequest {
            method,
            keep,
            ..PlanRequest::default()
        },
        recovers: false,
    };
    let mut recommended = entry("recommended", Method::Tenp);
    recommended.request.allocation = Some(Allocation::Global);
    recommended.request.neuron_score = Some(NeuronScore::Wifv);
    recommended.request.width_multiple = Some(1);
    recommended.recovers = true;
    vec![
        entry("TENP", Method::Tenp),
        recommended,
        entry("uniform ENP", Method::Enp),
        entry("expert dropping (REAP)", Method::Reap),
        entry("random neurons", Method::RandomNeurons),
        entry("random experts", Method::RandomExperts),
    ]
}

/// The same figures on every machine.
const PLACE: Place = Place::Cpu(Compute::F32);

/// One line of the comparison.
struct Row {
    name: String,
    accounting: Option<tenp_checkpoint::Accounting>,
    bytes: u64,
    measures: Measures,
}

pub(super) fn run(args: &Demo) -> Result<()> {
    let started = Instant::now();
    let folder = args.folder.clone().map_or_else(bundled, Ok)?;
    let checkpoint = models::open(&folder)?;
    let entries = entries(args.keep);
    for entry in &entries {
        requests::rehearse(&checkpoint, ["default"], &entry.request)?;
    }
    let texts = models::Texts::new(&checkpoint);
    let tasks = texts.tasks(&[folder.join("tasks")])?;
    let data = DataArgs {
        data: calibration_files(&folder)?,
        samples: 128,
        seq_len: None,
        min_tokens: MIN_TOKENS,
    };
    let domains = texts.domains(&data)?;
    let size = checkpoint.size();
    console::note(&format!(
        "{}: {} parameters, {} in routed experts; keeping {} of those",
        folder.display(),
        console::count(size.parameters_total),
        console::count(size.parameters_routed),
        console::percent(args.keep)
    ));
    let statistics = super::calibrate::run_domains(&checkpoint, &domains, &PLACE)?;
    let mut rows = vec![Row {
        name: "full model".to_owned(),
        accounting: None,
        bytes: size.bytes_total,
        measures: measure(&checkpoint, &tasks, "full model")?,
    }];
    let scratch = tempfile::tempdir().context("cannot create a temporary folder")?;
    let mut tenp: Option<Plan> = None;
    let sequences = recovery::sequences(&domains, &BTreeMap::new());
    for (index, entry) in entries.iter().enumerate() {
        let plan = requests::plan(&checkpoint, &statistics, &entry.request)?;
        let out = scratch.path().join(index.to_string());
        let recovery = if entry.recovers {
            Recovery::LeastSquares {
                sequences: &sequences,
                options: RecoverOptions::default(),
            }
        } else {
            Recovery::None
        };
        let progress = OnceLock::new();
        let rewriting = Rewriting {
            checkpoint: &checkpoint,
            plan: &plan,
            recovery,
            place: &PLACE,
            spill: &HiddenArgs::default().spill(&out),
        };
        rewriting.write(&out, &progress)?;
        progress.get().into_iter().for_each(Progress::finish);
        let pruned = models::open(&out)?;
        rows.push(Row {
            name: entry.name.to_owned(),
            accounting: Some(plan.accounting.clone()),
            bytes: pruned.size().bytes_total,
            measures: measure(&pruned, &tasks, entry.name)?,
        });
        tenp.get_or_insert(plan);
    }
    let plan = tenp.expect("TENP is the first method");
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        console::json(&as_json(&rows, &plan, seconds));
    } else {
        console::data(&as_text(
            &rows,
            &plan,
            checkpoint.config().moe.expert_width,
            seconds,
        ));
    }
    Ok(())
}

/// The folder in the source tree, or `demo/` here.
fn bundled() -> Result<PathBuf> {
    let places = [
        PathBuf::from("demo"),
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo"),
    ];
    let found = places.iter().find(|p| p.join("config.json").exists());
    let found = found.and_then(|p| p.canonicalize().ok());
    let here = std::env::current_dir().unwrap_or_default();
    found
        .map(|p| p.strip_prefix(&here).map(Path::to_path_buf).unwrap_or(p))
        .ok_or_else(|| {
            usage("the bundled checkpoint is not here; run from the source tree or give --folder")
        })
}

fn calibration_files(folder: &Path) -> Result<Vec<Data>> {
    let dir = folder.join("calibration");
    let entries =
        std::fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    paths.sort();
    let domain = |path: &Path| {
        path.file_stem()
            .map_or_else(String::new, |s| s.to_string_lossy().into_owned())
    };
    Ok(paths
        .into_iter()
        .map(|path| Data {
            domain: domain(&path),
            path,
        })
        .collect())
}

fn measure(checkpoint: &Checkpoint, tasks: &[Task], label: &str) -> Result<Measures> {
    PLACE.with_model(checkpoint, |model| {
        Ok(Measures {
            tasks: run_tasks(&model, tasks, label)?,
            ..Measures::default()
        })
    })
}

fn as_json(rows: &[Row], plan: &Plan, seconds: f64) -> Value {
    let models: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({
                "name": row.name,
                "bytes": row.bytes,
                "accounting": row.accounting,
                "mean_accuracy": row.measures.mean_accuracy(),
                "answer_nll": row.measures.answer_nll(),
                "tasks": row.measures.tasks.iter().map(|(n, t)| json!({"task": n, "accuracy": t.accuracy})).collect::<Vec<_>>(),
            })
        })
        .collect();
    let widths: Vec<Vec<usize>> = plan
        .layers
        .iter()
        .map(|l| l.experts.iter().map(|e| e.width).collect())
        .collect();
    json!({"models": models, "tenp_widths": widths, "seconds": seconds})
}

fn as_text(rows: &[Row], plan: &Plan, expert_width: usize, seconds: f64) -> String {
    let names: Vec<String> = rows[0]
        .measures
        .tasks
        .iter()
        .map(|(n, _)| n.clone())
        .collect();
    let mut header = vec!["", "size", "E", "A"];
    header.extend(names.iter().map(String::as_str));
    header.extend(["mean accuracy", "answer NLL"]);
    let table: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let share = |f: &dyn Fn(&tenp_checkpoint::Accounting) -> f64| {
                row.accounting
                    .as_ref()
                    .map_or_else(|| "100 %".to_owned(), |a| console::percent(f(a)))
            };
            let mut cells = vec![
                row.name.clone(),
                console::bytes(row.bytes),
                share(&|a| a.E),
                share(&|a| a.A),
            ];
            cells.extend(
                row.measures
                    .tasks
                    .iter()
                    .map(|(_, t)| format!("{:.3}", t.accuracy)),
            );
            cells.push(format!("{:.3}", row.measures.mean_accuracy()));
            cells.push(format!("{:.3}", row.measures.answer_nll()));
            cells
        })
        .collect();
    let n: usize = rows[0].measures.tasks.iter().map(|(_, t)| t.n).sum();
    format!(
        "\n{}\nE: routed-expert parameters kept; A: run per token. Accuracy on {n} multiple-choice questions, NLL in\nnats per answer token. \
         Recommended: --allocation global --neuron-score wifv --width-multiple 1 --recover least-squares.\n\n\
         TENP keeps these experts and neurons:\n{}\n{seconds:.0} s in all\n",
        console::table(&header, &table),
        picture::widths(plan, expert_width, console::columns())
    )
}
