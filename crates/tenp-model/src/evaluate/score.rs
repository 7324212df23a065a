//! Likelihood of answers and texts.

use tenp_kernels::cpu::elementwise::log_sum_exp;

use crate::generate::arg_max;
use crate::text::Task;
use crate::{Model, ModelError, Observer, Sequences};

/// Hidden states of one pass may take this much memory; longer inputs take several passes.
pub(super) const PASS_BYTES: usize = 1 << 30;

/// Outcome of a task.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TaskScore {
    /// Questions.
    pub n: usize,
    /// Share of questions whose right choice is the likeliest (sum of log-probabilities of its tokens).
    pub accuracy: f64,
    /// Binomial standard error of the accuracy.
    pub stderr: f64,
    /// Share of questions where greedy generation gives exactly the right choice's tokens.
    pub exact_match: f64,
    /// Mean negative log-likelihood of the right choices' tokens, in nats per token.
    pub nll: f64,
    /// Tokens of the right choices, over which `nll` is the mean.
    pub answer_tokens: usize,
}

/// Outcome of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TextScore {
    /// Tokens predicted.
    pub tokens: usize,
    /// Mean negative log-likelihood, nats per token.
    pub nll: f64,
    /// e^nll.
    pub perplexity: f64,
}

/// A row whose next token is known.
struct Target {
    row: usize,
    id: u32,
    /// What the prediction belongs to.
    owner: usize,
}

/// Log-probability of each target's token and whether it is the likeliest, in target order.
fn score_targets(
    model: &Model<'_>,
    sequences: &Sequences,
    targets: &[Target],
    observer: &dyn Observer,
) -> Result<Vec<(f64, bool)>, ModelError> {
    let hidden = model.hidden_states(sequences, observer)?;
    let rows: Vec<usize> = targets.iter().map(|t| t.row).collect();
    let mut results = Vec::with_capacity(targets.len());
    model.head()?.for_each(&hidden, &rows, |_, logits| {
        let id = targets[results.len()].id;
        let log_probability = f64::from(logits[id as usize]) - log_sum_exp(logits);
        results.push((log_probability, arg_max(logits) == id));
    })?;
    Ok(results)
}

/// Questions that go through the model in one pass.
struct QuestionPass {
    sequences: Sequences,
    targets: Vec<Target>,
    /// (question, choice).
    owners: Vec<(usize, usize)>,
    /// The first question of the next pass.
    next: usize,
}

/// Tokens of a pass, up to a sample's more.
fn pass_tokens(model: &Model<'_>) -> usize {
    PASS_BYTES / model.hidden_bytes_per_token()
}

fn question_pass(task: &Task, first: usize, max_tokens: usize) -> QuestionPass {
    let mut sequences = Sequences::default();
    let mut targets = Vec::new();
    let mut owners: Vec<(usize, usize)> = Vec::new();
    let mut last = first;
    while last < task.items.len() && (last == first || sequences.num_tokens() < max_tokens) {
        let item = &task.items[last];
        let stem = sequences.push(&item.prompt, 0);
        let stem_end = sequences.num_tokens() - 1;
        for (c, choice) in item.choices.iter().enumerate() {
            let owner = owners.len();
            owners.push((last, c));
            targets.push(Target {
                row: stem_end,
                id: choice[0],
                owner,
            });
            if choice.len() > 1 {
                let branch = sequences.push_branch(&choice[..choice.len() - 1], stem);
                let rows = sequences.spans()[branch].rows.clone();
                targets.extend(
                    rows.zip(&choice[1..])
                        .map(|(row, &id)| Target { row, id, owner }),
                );
            }
        }
        last += 1;
    }
    QuestionPass {
        sequences,
        targets,
        owners,
        next: last,
    }
}

/// The sequences of every pass of [`score_tasks`] on a task.
pub fn task_passes(model: &Model<'_>, task: &Task) -> Vec<Sequences> {
    let (mut passes, mut first) = (Vec::new(), 0);
    while first < task.items.len() {
        let pass = question_pass(task, first, pass_tokens(model));
        first = pass.next;
        passes.push(pass.sequences);
    }
    passes
}

/// Samples in passes of `max_tokens` tokens, up to a sample more.
pub(super) fn sample_passes(samples: &[Vec<u32>], max_tokens: usize) -> Vec<Sequences> {
    let mut passes: Vec<Sequences> = Vec::new();
    for sample in samples {
        if passes
            .last()
            .is_none_or(|pass| pass.num_tokens() >= max_tokens)
        {
            passes.push(Sequences::default());
        }
        if let Some(pass) = passes.last_mut() {
            pass.push(sample, 0);
        }
    }
    passes
}

/// The sequences of every pass of [`score_text`] on samples.
pub fn text_passes(model: &Model<'_>, samples: &[Vec<u32>]) -> Vec<Sequences> {
    sample_passes(samples, pass_tokens(model))
}

/// Scores every question of a task. `observer` sees the passes.
///
/// # Errors
/// As [`Model::hidden_states`].
pub fn score_tasks(
    model: &Model<'_>,
    task: &Task,
    observer: &dyn Observer,
) -> Result<TaskScore, ModelError> {
    let (mut right, mut exact, mut nll, mut nll_tokens) = (0usize, 0usize, 0f64, 0usize);
    let mut first = 0;
    while first < task.items.len() {
        let pass = question_pass(task, first, pass_tokens(model));
        let QuestionPass {
            sequences,
            targets,
            owners,
            next: last,
        } = pass;
        let scores = score_targets(model, &sequences, &targets, observer)?;
        let mut likelihoods = vec![(0f64, true); owners.len()];
        for (target, (log_probability, top)) in targets.iter().zip(scores) {
            likelihoods[target.owner].0 += log_probability;
            likelihoods[target.owner].1 &= top;
        }
        let mut by_item = likelihoods.iter().zip(&owners).peekable();
        for (index, item) in task.items[first..last]
            .iter()
            .enumerate()
            .map(|(i, item)| (first + i, item))
        {
            let mut best = (f64::NEG_INFINITY, 0);
            while let Some(&((likelihood, greedy), (_, choice))) =
                by_item.peek().filter(|(_, o)| o.0 == index)
            {
                if *likelihood > best.0 {
                    best = (*likelihood, *choice);
                }
                if *choice == item.answer {
                    exact += usize::from(*greedy);
                    nll -= likelihood;
                    nll_tokens += item.choices[*choice].len();
                }
                by_item.next();
            }
            right += usize::from(best.1 == item.answer);
        }
        first = last;
    }
    let n = task.items.len();
    let accuracy = right as f64 / n as f64;
    Ok(TaskScore {
        n,
        accuracy,
        stderr: (accuracy * (1.0 - accuracy) / n as f64).sqrt(),
        exact_match: exact as f64 / n as f64,
        nll: nll / nll_tokens as f64,
        answer_tokens: nll_tokens,
    })
}

/// Negative log-likelihood of samples, every token but each first one predicted.
///
/// # Errors
/// As [`Model::hidden_states`].
pub fn score_text(
    model: &Model<'_>,
    samples: &[Vec<u32>],
    observer: &dyn Observer,
) -> Result<TextScore, ModelError> {
    let (mut nll, mut tokens) = (0f64, 0usize);
    for sequences in text_passes(model, samples) {
        let spans = sequences.spans().iter();
        let rows = spans.flat_map(|span| span.rows.start..span.rows.end.saturating_sub(1));
        let targets = rows.map(|row| Target {
            row,
            id: sequences.ids()[row + 1],
            owner: 0,
        });
        let targets: Vec<Target> = targets.collect();
        for (log_probability, _) in score_targets(model, &sequences, &targets, observer)? {
            nll -= log_probability;
        }
        tokens += targets.len();
    }
    let nll = nll / tokens.max(1) as f64;
    Ok(TextScore {
        tokens,
        nll,
        perplexity: nll.exp(),
    })
}
