//! `eval`: accuracy, perplexity, distance from a reference.

use anyhow::Result;
use serde_json::{Map, Value, json};
use tenp_model::evaluate::{
    Comparison, TaskScore, TextScore, check_comparable, compare, score_tasks, score_text,
};
use tenp_model::text::Task;
use tenp_model::{Model, Observer};

use crate::cli::Eval;
use crate::failure::usage;
use crate::place::Place;
use crate::progress::{Progress, Unit};
use crate::{console, models};

/// Passes a run's progress on.
pub(super) struct Watch<'p>(pub(super) &'p Progress);

impl Observer for Watch<'_> {
    fn progress(&self, _layer: usize, tokens: usize) {
        self.0.advance(tokens as u64);
    }
}

/// Everything measured of one model.
#[derive(Default)]
pub(super) struct Measures {
    pub(super) tasks: Vec<(String, TaskScore)>,
    pub(super) text: Vec<(String, TextScore)>,
    pub(super) reference: Option<Comparison>,
}

impl Measures {
    pub(super) fn mean_accuracy(&self) -> f64 {
        self.tasks.iter().map(|(_, t)| t.accuracy).sum::<f64>() / self.tasks.len().max(1) as f64
    }

    /// Negative log-likelihood per answer token, over the answers of all tasks.
    pub(super) fn answer_nll(&self) -> f64 {
        let tokens: usize = self.tasks.iter().map(|(_, t)| t.answer_tokens).sum();
        let total: f64 = self
            .tasks
            .iter()
            .map(|(_, t)| t.nll * t.answer_tokens as f64)
            .sum();
        total / tokens.max(1) as f64
    }
}

pub(super) fn run(args: &Eval) -> Result<()> {
    if args.tasks.is_empty() && args.text.is_empty() {
        return Err(usage("nothing to measure: give --tasks, --text or both"));
    }
    let checkpoint = models::open(&args.model)?;
    let texts = models::Texts::new(&checkpoint);
    let tasks = texts.tasks(&args.tasks)?;
    let samples = texts.texts("--text", &args.text, args.seq_len)?;
    let reference = args.reference.as_deref().map(models::open).transpose()?;
    if let Some(reference) = &reference {
        check_comparable(checkpoint.config(), reference.config())?;
    }
    let place = Place::new(args.run)?;
    // One model for everything, so that a GPU keeps its weights from one part to the next.
    let measured = place.with_model(&checkpoint, |model| {
        let mut measures = Measures {
            tasks: run_tasks(&model, &tasks, "tasks")?,
            ..Measures::default()
        };
        for (name, samples) in &samples {
            let score = run_text(&model, name, samples)?;
            measures.text.push((name.clone(), score));
        }
        if let Some(reference) = &reference {
            let kept = models::kept_experts(&checkpoint, reference)?;
            let samples = reference_samples(&tasks, &samples);
            measures.reference = Some(place.with_model(reference, |reference| {
                run_reference(&model, &reference, &samples, kept.as_deref())
            })?);
        }
        Ok(measures)
    });
    for read in [Some(&checkpoint), reference.as_ref()]
        .into_iter()
        .flatten()
    {
        read.check_unchanged()?;
    }
    let measures = measured?;
    if args.json {
        console::json(&as_json(&measures));
    } else {
        console::data(&as_text(&measures));
    }
    Ok(())
}

/// Scores every task.
pub(super) fn run_tasks(
    model: &Model<'_>,
    tasks: &[Task],
    label: &str,
) -> Result<Vec<(String, TaskScore)>> {
    if tasks.is_empty() {
        return Ok(Vec::new());
    }
    let layers = model.config().num_layers;
    let tokens: usize = tasks
        .iter()
        .flat_map(|t| &t.items)
        .map(|i| i.prompt.len() + i.choices.iter().map(|c| c.len() - 1).sum::<usize>())
        .sum();
    let progress = Progress::new(label, Unit::Tokens, (tokens * layers) as u64, layers);
    let watch = Watch(&progress);
    let mut scores = Vec::new();
    for task in tasks {
        scores.push((task.name.clone(), score_tasks(model, task, &watch)?));
    }
    progress.finish();
    Ok(scores)
}

fn run_text(model: &Model<'_>, name: &str, samples: &[Vec<u32>]) -> Result<TextScore> {
    let layers = model.config().num_layers;
    let tokens: usize = samples.iter().map(Vec::len).sum();
    let progress = Progress::new(name, Unit::Tokens, (tokens * layers) as u64, layers);
    let score = score_text(model, samples, &Watch(&progress))?;
    progress.finish();
    Ok(score)
}

/// What models are compared on: the texts, and the prompts with their right answers.
pub(super) fn reference_samples(
    tasks: &[Task],
    texts: &[(String, Vec<Vec<u32>>)],
) -> Vec<Vec<u32>> {
    let answered = tasks
        .iter()
        .flat_map(|t| &t.items)
        .map(|i| [&i.prompt[..], &i.choices[i.answer]].concat());
    texts
        .iter()
        .flat_map(|(_, s)| s.iter().cloned())
        .chain(answered)
        .collect()
}

/// Compares a model with its reference.
fn run_reference(
    model: &Model<'_>,
    reference: &Model<'_>,
    samples: &[Vec<u32>],
    kept: Option<&[Vec<usize>]>,
) -> Result<Comparison> {
    let layers = model.config().num_layers;
    let tokens: usize = samples.iter().map(Vec::len).sum();
    let progress = Progress::new("reference", Unit::Tokens, (tokens * layers) as u64, layers);
    let mut advance = |_, tokens| progress.advance(tokens as u64);
    let comparison = compare(model, reference, samples, kept, &mut advance)?;
    progress.finish();
    Ok(comparison)
}

fn as_json(m: &Measures) -> Value {
    let mut out = Map::new();
    let tasks: Map<String, Value> = m
        .tasks
        .iter()
        .map(|(name, t)| {
            let value = json!({
                "n": t.n, "accuracy": t.accuracy, "stderr": t.stderr, "exact_match": t.exact_match, "nll": t.nll,
            });
            (name.clone(), value)
        })
        .collect();
    if !tasks.is_empty() {
        out.insert("tasks".into(), Value::Object(tasks));
        out.insert("mean_accuracy".into(), json!(m.mean_accuracy()));
    }
    if !m.text.is_empty() {
        let text: Map<String, Value> = m
            .text
            .iter()
            .map(|(name, t)| {
                (
                    name.clone(),
                    json!({"tokens": t.tokens, "nll": t.nll, "perplexity": t.perplexity}),
                )
            })
            .collect();
        out.insert("text".into(), Value::Object(text));
    }
    if let Some(r) = &m.reference {
        let layers: Vec<Value> = r
            .layers
            .iter()
            .map(|l| json!({"layer": l.layer, "output_error": l.output_error, "routing_shift": l.routing_shift}))
            .collect();
        out.insert(
            "reference".into(),
            json!({"kl": r.kl, "top1": r.top1, "layers": layers}),
        );
    }
    Value::Object(out)
}

fn as_text(m: &Measures) -> String {
    let mut parts = Vec::new();
    if !m.tasks.is_empty() {
        let mut rows: Vec<Vec<String>> = m
            .tasks
            .iter()
            .map(|(name, t)| {
                vec![
                    name.clone(),
                    t.n.to_string(),
                    format!("{:.3} ± {:.3}", t.accuracy, t.stderr),
                    format!("{:.3}", t.exact_match),
                    format!("{:.4}", t.nll),
                ]
            })
            .collect();
        let mean = |f: &dyn Fn(&TaskScore) -> f64| {
            m.tasks.iter().map(|(_, t)| f(t)).sum::<f64>() / m.tasks.len() as f64
        };
        rows.push(vec![
            "all".into(),
            String::new(),
            format!("{:.3}        ", m.mean_accuracy()),
            format!("{:.3}", mean(&|t| t.exact_match)),
            format!("{:.4}", m.answer_nll()),
        ]);
        parts.push(console::table(
            &["task", "n", "accuracy", "exact match", "answer NLL"],
            &rows,
        ));
    }
    if !m.text.is_empty() {
        let rows: Vec<Vec<String>> = m
            .text
            .iter()
            .map(|(name, t)| {
                vec![
                    name.clone(),
                    t.tokens.to_string(),
                    format!("{:.4}", t.nll),
                    format!("{:.3}", t.perplexity),
                ]
            })
            .collect();
        parts.push(console::table(
            &["text", "tokens", "NLL", "perplexity"],
            &rows,
        ));
    }
    if let Some(r) = &m.reference {
        parts.push(format!(
            "against the reference, {} tokens: KL {:.5} nats, top-1 agreement {}\n",
            r.tokens,
            r.kl,
            console::percent(r.top1)
        ));
        let rows: Vec<Vec<String>> = r
            .layers
            .iter()
            .map(|l| {
                let shift = l
                    .routing_shift
                    .map_or_else(|| "–".to_owned(), console::percent);
                vec![l.layer.to_string(), format!("{:.4}", l.output_error), shift]
            })
            .collect();
        parts.push(console::table(
            &["layer", "output error", "routing shift"],
            &rows,
        ));
    }
    parts.join("\n")
}
