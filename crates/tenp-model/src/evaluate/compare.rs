//! A model against a reference, layer by layer in lock-step on the same tokens.

use std::ops::Range;

use rayon::prelude::*;
use tenp_kernels::cpu::elementwise::log_sum_exp;

use crate::forward::MoeBlock;
use crate::generate::arg_max;
use crate::{Head, Model, ModelError, Observer, Sequences};

/// How far a model is from its reference.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Token positions compared.
    pub tokens: usize,
    /// Mean KL(reference ‖ model) of the next-token distributions, nats.
    pub kl: f64,
    /// Share of positions with the same likeliest token.
    pub top1: f64,
    /// MoE layers in depth order.
    pub layers: Vec<LayerComparison>,
}

/// One MoE layer of a [`Comparison`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerComparison {
    /// The model's own layer index.
    pub layer: usize,
    /// ‖o − o_ref‖_F / ‖o_ref‖_F over the MoE block's outputs.
    pub output_error: f64,
    /// 1 − mean(|top-k ∩ top-k of the reference|) / k; absent where the experts cannot be matched.
    pub routing_shift: Option<f64>,
}

/// What one side of the comparison computed at the current layer.
#[derive(Default)]
struct Capture {
    outputs: Vec<f32>,
    expert_ids: Vec<u32>,
    top_k: usize,
}

impl Observer for Capture {
    fn moe(&mut self, block: &MoeBlock<'_>) -> Result<(), ModelError> {
        self.top_k = block.routing.expert_ids.len() / block.rows.len().max(1);
        self.expert_ids.extend_from_slice(&block.routing.expert_ids);
        Ok(())
    }

    fn moe_output(
        &mut self,
        _layer: usize,
        _rows: Range<usize>,
        output: &[f32],
    ) -> Result<(), ModelError> {
        self.outputs.extend_from_slice(output);
        Ok(())
    }
}

/// Runs `model` and `reference` on the same samples.
///
/// `kept_experts[m][e]` is the reference's id of expert e of the model's m-th MoE layer; without it the ids are taken
/// to agree where the counts do.
///
/// # Errors
/// Models that differ in layers, hidden size or vocabulary; as [`Model::hidden_states`].
pub fn compare(
    model: &Model<'_>,
    reference: &Model<'_>,
    samples: &[Vec<u32>],
    kept_experts: Option<&[Vec<usize>]>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Comparison, ModelError> {
    let (a, b) = (model.config(), reference.config());
    for (what, ours, theirs) in [
        ("layers", a.num_layers, b.num_layers),
        ("hidden size", a.hidden_size, b.hidden_size),
        ("vocabulary", a.vocab_size, b.vocab_size),
    ] {
        if ours != theirs {
            return Err(ModelError::Reference {
                why: format!("{what} {theirs}, the model's is {ours}"),
            });
        }
    }
    let mut sequences = Sequences::default();
    for sample in samples {
        sequences.push(sample, 0);
    }
    let (mut run, mut reference_run) = (model.begin(&sequences)?, reference.begin(&sequences)?);
    let mut layers = Vec::new();
    loop {
        let layer = run.layer();
        let (mut ours, mut theirs) = (Capture::default(), Capture::default());
        if !run.step(&mut ours, None)? {
            break;
        }
        reference_run.step(&mut theirs, None)?;
        progress(layer, sequences.num_tokens());
        if !ours.outputs.is_empty() && ours.outputs.len() == theirs.outputs.len() {
            let kept = kept_experts
                .and_then(|k| k.get(layers.len()))
                .map(Vec::as_slice);
            let comparable = kept.is_some() || a.moe.num_experts == b.moe.num_experts;
            layers.push(LayerComparison {
                layer,
                output_error: relative_error(&ours.outputs, &theirs.outputs),
                routing_shift: comparable.then(|| routing_shift(&ours, &theirs, kept)),
            });
        }
    }
    let (hidden, reference_hidden) = (run.finish()?, reference_run.finish()?);
    let (kl, top1) = divergence(
        (&model.head()?, &hidden),
        (&reference.head()?, &reference_hidden),
        a.hidden_size,
    )?;
    Ok(Comparison {
        tokens: sequences.num_tokens(),
        kl,
        top1,
        layers,
    })
}

fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    let (mut error, mut norm) = (0f64, 0f64);
    for (a, b) in ours.iter().zip(theirs) {
        let (a, b) = (f64::from(*a), f64::from(*b));
        error += (a - b) * (a - b);
        norm += b * b;
    }
    if norm == 0.0 {
        if error == 0.0 { 0.0 } else { f64::INFINITY }
    } else {
        (error / norm).sqrt()
    }
}

fn routing_shift(ours: &Capture, theirs: &Capture, kept: Option<&[usize]>) -> f64 {
    let tokens = ours.expert_ids.chunks_exact(ours.top_k.max(1));
    let count = tokens.len();
    let shared: usize = tokens
        .zip(theirs.expert_ids.chunks_exact(theirs.top_k.max(1)))
        .map(|(a, b)| {
            a.iter()
                .filter(|&&e| {
                    let original =
                        kept.map_or(e, |k| k.get(e as usize).map_or(u32::MAX, |&o| o as u32));
                    b.contains(&original)
                })
                .count()
        })
        .sum();
    1.0 - shared as f64 / (count * theirs.top_k).max(1) as f64
}

/// (mean KL(reference ‖ model), top-1 agreement) over all rows.
fn divergence(
    (head, hidden): (&Head<'_>, &[f32]),
    (reference_head, reference_hidden): (&Head<'_>, &[f32]),
    width: usize,
) -> Result<(f64, f64), ModelError> {
    let vocab = head.vocab_size();
    // Two sets of logits, 64 MiB each.
    let batch = ((64 << 20) / 4 / vocab.max(1)).clamp(14, 4096) * width;
    let (mut kl, mut same, mut rows) = (0f64, 0usize, 0usize);
    for (ours, theirs) in hidden.chunks(batch).zip(reference_hidden.chunks(batch)) {
        let (ours, theirs) = (head.logits(ours)?, reference_head.logits(theirs)?);
        // Collected in row order, so that the sum does not depend on the threads.
        let per_row: Vec<(f64, bool)> = ours
            .par_chunks(vocab)
            .zip(theirs.par_chunks(vocab))
            .map(|(q, p)| {
                let (log_q, log_p) = (log_sum_exp(q), log_sum_exp(p));
                let kl = p.iter().zip(q).map(|(&p, &q)| {
                    let log_probability = f64::from(p) - log_p;
                    log_probability.exp() * (log_probability - (f64::from(q) - log_q))
                });
                (kl.sum::<f64>(), arg_max(p) == arg_max(q))
            })
            .collect();
        for (row_kl, agree) in per_row {
            kl += row_kl;
            same += usize::from(agree);
            rows += 1;
        }
    }
    Ok((kl / rows.max(1) as f64, same as f64 / rows.max(1) as f64))
}
