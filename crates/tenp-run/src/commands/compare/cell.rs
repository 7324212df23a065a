//! One cell: prune, measure, forget the checkpoint, keep the figures.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tenp_checkpoint::{Accounting, Checkpoint, Statistics, Work, replace_file};

use tenp_model::evaluate::{Comparison, TaskScore, TextScore, compare, score_tasks, score_text};
use tenp_model::text::Task;
use tenp_model::{Model, Spill};

use super::grid::Key;
use crate::cli::RecoverArg;
use crate::commands::apply::Rewriting;
use crate::commands::calibrate::{Keeping, run_kept};
use crate::commands::eval;
use crate::coverage::Coverage;
use crate::models::{self, Domains};
use crate::place::Place;
use crate::recovery::{self, Recovery};
use crate::requests;
use crate::search::Search;
use crate::unfinished::CALIBRATION;

/// What every cell is measured with.
pub(super) struct Bench<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    /// The full model: kept for all cells, so that a GPU keeps its weights.
    pub(super) model: Model<'a>,
    pub(super) place: &'a Place,
    pub(super) tasks: Vec<Task>,
    pub(super) texts: Domains,
    pub(super) folder: &'a Path,
    /// Of hidden states and of plans that are tried.
    pub(super) spill: &'a Spill,
    pub(super) min_tokens: u32,
    /// Time of a calibration that is worth keeping.
    pub(super) every: Duration,
}

/// Figures of one model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Figures {
    /// By name: n, accuracy, its standard error, NLL per answer token, answer tokens.
    pub(super) tasks: Vec<(String, TaskFigures)>,
    /// By name.
    pub(super) texts: Vec<(String, TextFigures)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct TaskFigures {
    pub(super) n: usize,
    pub(super) accuracy: f64,
    pub(super) stderr: f64,
    pub(super) exact_match: f64,
    pub(super) nll: f64,
    pub(super) answer_tokens: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct TextFigures {
    pub(super) tokens: usize,
    pub(super) nll: f64,
    pub(super) perplexity: f64,
}

impl From<TaskScore> for TaskFigures {
    fn from(t: TaskScore) -> Self {
        Self {
            n: t.n,
            accuracy: t.accuracy,
            stderr: t.stderr,
            exact_match: t.exact_match,
            nll: t.nll,
            answer_tokens: t.answer_tokens,
        }
    }
}

impl From<TextScore> for TextFigures {
    fn from(t: TextScore) -> Self {
        Self {
            tokens: t.tokens,
            nll: t.nll,
            perplexity: t.perplexity,
        }
    }
}

impl Figures {
    /// Over the tasks.
    pub(super) fn mean_accuracy(&self) -> Option<f64> {
        let sum: f64 = self.tasks.iter().map(|(_, t)| t.accuracy).sum();
        (!self.tasks.is_empty()).then(|| sum / self.tasks.len() as f64)
    }

    /// Per answer token, over all tasks together.
    pub(super) fn answer_nll(&self) -> Option<f64> {
        let tokens: usize = self.tasks.iter().map(|(_, t)| t.answer_tokens).sum();
        let sum = |(_, t): &(String, TaskFigures)| t.nll * t.answer_tokens as f64;
        (tokens > 0).then(|| self.tasks.iter().map(sum).sum::<f64>() / tokens as f64)
    }

    /// Of all texts together.
    pub(super) fn perplexity(&self) -> Option<f64> {
        let tokens: usize = self.texts.iter().map(|(_, t)| t.tokens).sum();
        let sum: f64 = self
            .texts
            .iter()
            .map(|(_, t)| t.nll * t.tokens as f64)
            .sum();
        (tokens > 0).then(|| (sum / tokens as f64).exp())
    }
}

/// One layer against the full model's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct LayerFigures {
    pub(super) layer: usize,
    pub(super) output_error: f64,
    pub(super) routing_shift: Option<f64>,
}

/// A finished run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Cell {
    pub(super) key: Key,
    pub(super) figures: Figures,
    /// KL(full ‖ pruned), nats a token, on texts and on prompts with their right answers.
    pub(super) kl: f64,
    /// Share of positions with the same likeliest token.
    pub(super) top1: f64,
    pub(super) layers: Vec<LayerFigures>,
    pub(super) accounting: Accounting,
    /// Kept widths, `[MoE layer][expert]`; 0 for an expert that is gone.
    pub(super) widths: Vec<Vec<usize>>,
    /// Planning and writing.
    pub(super) prune_seconds: f64,
    pub(super) measure_seconds: f64,
}

impl Cell {
    /// Mean over the layers.
    pub(super) fn layer_error(&self) -> f64 {
        mean(self.layers.iter().map(|l| l.output_error))
    }

    /// Mean over the layers whose experts can be matched.
    pub(super) fn routing_shift(&self) -> Option<f64> {
        let shifts: Vec<f64> = self.layers.iter().filter_map(|l| l.routing_shift).collect();
        (!shifts.is_empty()).then(|| mean(shifts.into_iter()))
    }

    /// A line for people.
    pub(super) fn summary(&self) -> String {
        let accuracy = self
            .figures
            .mean_accuracy()
            .map_or_else(String::new, |a| format!("accuracy {a:.3}, "));
        format!("{accuracy}KL {:.4}", self.kl)
    }
}

pub(super) fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0usize), |(sum, n), v| (sum + v, n + 1));
    sum / n.max(1) as f64
}

impl Bench<'_> {
    /// What a folder's results depend on, besides the cells' own keys.
    pub(super) fn inputs(&self, checkpoint: &Checkpoint, draws: &[Domains]) -> Value {
        let tasks: Vec<Value> = self
            .tasks
            .iter()
            .map(|task| {
                let items = task.items.iter().map(|i| (&i.prompt, &i.choices, i.answer));
                json!([task.name, models::fingerprint(&items.collect::<Vec<_>>())])
            })
            .collect();
        json!({
            "checkpoint": checkpoint.fingerprint(),
            "calibration": draws.iter().map(models::fingerprint).collect::<Vec<_>>(),
            "tasks": tasks,
            "texts": models::fingerprint(&self.texts),
            "compute": self.place.name(),
            "program": env!("CARGO_PKG_VERSION"),
        })
    }

    pub(super) fn cell_path(&self, key: &Key) -> PathBuf {
        self.folder
            .join("cells")
            .join(format!("{}.json", key.stem()))
    }

    /// A cell that an earlier run has finished.
    pub(super) fn read_cell(&self, key: &Key) -> Result<Option<Cell>> {
        let path = self.cell_path(key);
        let Ok(bytes) = std::fs::read(&path) else {
            return Ok(None);
        };
        let cell: Cell = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is damaged; delete it", path.display()))?;
        anyhow::ensure!(
            cell.key == *key,
            "{} is of {}; delete it",
            path.display(),
            cell.key.label()
        );
        Ok(Some(cell))
    }

    /// Statistics of a draw, calibrated once, with the `[N,K]` tables of these names.
    pub(super) fn statistics(
        &self,
        seed: usize,
        domains: &Domains,
        tables: &[&str],
    ) -> Result<Statistics> {
        let path = self.folder.join(format!("statistics-{seed}.safetensors"));
        if path.exists() {
            Work::remove_leftover(Work::place(&path, CALIBRATION), &path);
            return Ok(Statistics::read_tables(&path, &|name| {
                tables.contains(&name)
            })?);
        }
        let keeping = Keeping {
            output: &path,
            restart: false,
            every: self.every,
        };
        let (mut statistics, kept) = run_kept(&self.model, domains, self.place, &keeping)?;
        Coverage::of(&statistics).warn(self.min_tokens);
        statistics.write(&path)?;
        kept.finish();
        statistics.keep_tables(tables);
        Ok(statistics)
    }

    /// The full model's figures.
    pub(super) fn full(&self) -> Result<Figures> {
        let path = self.folder.join("full.json");
        if let Ok(bytes) = std::fs::read(&path) {
            return serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is damaged; delete it", path.display()));
        }
        let figures = self.measure(&self.model)?;
        self.write(&path, &figures)?;
        Ok(figures)
    }

    /// Writes figures, if what they were measured on is still the same.
    fn write(&self, path: &Path, figures: &impl Serialize) -> Result<()> {
        self.checkpoint.check_unchanged()?;
        write_json(path, figures)
    }

    fn measure(&self, model: &Model<'_>) -> Result<Figures> {
        let mut figures = Figures::default();
        for task in &self.tasks {
            let score = score_tasks(model, task, &())?;
            figures.tasks.push((task.name.clone(), score.into()));
        }
        for (name, samples) in &self.texts {
            let score = score_text(model, samples, &())?;
            figures.texts.push((name.clone(), score.into()));
        }
        Ok(figures)
    }

    fn distance(&self, pruned: &Model<'_>) -> Result<Comparison> {
        let samples = eval::reference_samples(&self.tasks, &self.texts);
        let kept = models::kept_experts(pruned.checkpoint(), self.checkpoint)?;
        let kept = kept.as_deref();
        Ok(compare(
            pruned,
            &self.model,
            &samples,
            kept,
            &mut |_, _| (),
        )?)
    }

    /// Prunes, measures and writes the figures; the pruned checkpoint is gone afterwards.
    pub(super) fn run_cell(
        &self,
        key: &Key,
        statistics: &Statistics,
        domains: &Domains,
        search: &Search<'_>,
    ) -> Result<Cell> {
        let started = Instant::now();
        let (request, recover) = key.request()?;
        let searched = search.settle(statistics, &request)?;
        let plan = requests::plan(self.checkpoint, statistics, &searched)?;
        let weights = &request.domain_weights;
        let sequences = recovery::sequences(domains, weights);
        let recovery = match recover.recover {
            RecoverArg::None => Recovery::None,
            RecoverArg::Rescale => recovery::rescale(self.checkpoint, &plan, statistics, weights)?,
            RecoverArg::LeastSquares => recovery::least_squares(recover, &sequences),
        };
        let scratch = tempfile::Builder::new()
            .prefix(".pruned-")
            .tempdir_in(self.folder)
            .with_context(|| format!("cannot write into {}", self.folder.display()))?;
        let out = scratch.path().join("model");
        let rewriting = Rewriting {
            checkpoint: self.checkpoint,
            plan: &plan,
            recovery,
            place: self.place,
            spill: self.spill,
        };
        rewriting.write(&out, &OnceLock::new())?;
        let prune_seconds = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let pruned = models::open(&out)?;
        let (figures, distance) = self.place.with_model(&pruned, |pruned| {
            Ok((self.measure(&pruned)?, self.distance(&pruned)?))
        })?;
        let layers = distance.layers.iter().map(|l| LayerFigures {
            layer: l.layer,
            output_error: l.output_error,
            routing_shift: l.routing_shift,
        });
        let cell = Cell {
            key: key.clone(),
            figures,
            kl: distance.kl,
            top1: distance.top1,
            layers: layers.collect(),
            widths: plan
                .layers
                .iter()
                .map(|layer| layer.experts.iter().map(|e| e.width).collect())
                .collect(),
            accounting: plan.accounting,
            prune_seconds,
            measure_seconds: started.elapsed().as_secs_f64(),
        };
        self.write(&self.cell_path(key), &cell)?;
        Ok(cell)
    }
}

/// Replaces a JSON file as a whole.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    Ok(replace_file(path, text.len() as u64, |sink| {
        sink.write(&text)
    })?)
}
