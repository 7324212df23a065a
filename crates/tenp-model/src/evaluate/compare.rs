//! A model against a reference, layer by layer in lock-step on the same tokens.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;
use tenp_checkpoint::ModelConfig;
use tenp_kernels::cpu::elementwise::log_sum_exp;

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

/// What one side of the comparison computes at the current layer: by first row, as blocks come in any order.
#[derive(Default)]
struct Capture {
    outputs: Mutex<BTreeMap<usize, Vec<f32>>>,
    expert_ids: Mutex<BTreeMap<usize, Vec<u32>>>,
}

impl Observer for Capture {
    fn wants_outputs(&self) -> bool {
        true
    }

    fn routed(
        &self,
        _layer: usize,
        rows: Range<usize>,
        expert_ids: &[u32],
    ) -> Result<(), ModelError> {
        let ids = expert_ids.to_vec();
        let mut all = self.expert_ids.lock().expect(UNPOISONED);
        all.insert(rows.start, ids);
        Ok(())
    }

    fn moe_output(
        &self,
        _layer: usize,
        rows: Range<usize>,
        output: &[f32],
    ) -> Result<(), ModelError> {
        let output = output.to_vec();
        let mut all = self.outputs.lock().expect(UNPOISONED);
        all.insert(rows.start, output);
        Ok(())
    }
}

const UNPOISONED: &str = "nothing panics while blocks are collected";

impl Capture {
    /// (`[tokens, H]` outputs, `[tokens, top_k]` expert ids).
    fn into_layer(self) -> (Vec<f32>, Vec<u32>) {
        let outputs = self.outputs.into_inner().expect(UNPOISONED);
        let ids = self.expert_ids.into_inner().expect(UNPOISONED);
        (
            outputs.into_values().flatten().collect(),
            ids.into_values().flatten().collect(),
        )
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
    check_comparable(model.config(), reference.config())?;
    let mut total = Sums::default();
    for sequences in comparison_passes(model, samples) {
        one_pass(
            model,
            reference,
            &sequences,
            kept_experts,
            &mut total,
            progress,
        )?;
    }
    Ok(total.into_comparison())
}

/// The sequences of every pass of [`compare`] on samples.
pub fn comparison_passes(model: &Model<'_>, samples: &[Vec<u32>]) -> Vec<Sequences> {
    let max_tokens = super::score::PASS_BYTES / 4 / model.hidden_bytes_per_token();
    super::score::sample_passes(samples, max_tokens)
}

/// Rows whose logits are made at once on both sides: 64 MiB of each.
fn logit_rows(vocab_size: usize) -> usize {
    ((64 << 20) / 4 / vocab_size.max(1)).clamp(14, 4096)
}

/// Bytes of the MoE outputs of a layer over `tokens` tokens: both sides', and one once more while its blocks are put together.
pub(crate) fn output_bytes(config: &ModelConfig, tokens: usize) -> usize {
    size_of::<f32>() * 3 * config.hidden_size * tokens
}

/// Bytes of the logits of both sides that are there at once, of `tokens` tokens.
pub(crate) fn logit_bytes(config: &ModelConfig, tokens: usize) -> usize {
    let rows = logit_rows(config.vocab_size).min(tokens);
    size_of::<f32>() * 2 * config.vocab_size * rows
}

/// Whether two models can be compared.
///
/// # Errors
/// Another number of layers, hidden size or vocabulary.
pub fn check_comparable(model: &ModelConfig, reference: &ModelConfig) -> Result<(), ModelError> {
    let (a, b) = (model, reference);
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
    Ok(())
}

/// Sums over the passes.
#[derive(Default)]
struct Sums {
    tokens: usize,
    kl: f64,
    same: usize,
    layers: Vec<LayerSums>,
}

#[derive(Clone, Copy, Default)]
struct LayerSums {
    layer: usize,
    error_sq: f64,
    norm_sq: f64,
    /// Chosen experts in common, and chosen experts of the reference.
    routing: Option<(usize, usize)>,
}

impl Sums {
    fn into_comparison(self) -> Comparison {
        let tokens = self.tokens.max(1) as f64;
        let layers = self.layers.iter().map(|l| LayerComparison {
            layer: l.layer,
            output_error: if l.error_sq == 0.0 {
                0.0
            } else {
                (l.error_sq / l.norm_sq).sqrt()
            },
            routing_shift: l
                .routing
                .map(|(shared, all)| 1.0 - shared as f64 / all.max(1) as f64),
        });
        Comparison {
            tokens: self.tokens,
            kl: self.kl / tokens,
            top1: self.same as f64 / tokens,
            layers: layers.collect(),
        }
    }
}

fn one_pass(
    model: &Model<'_>,
    reference: &Model<'_>,
    sequences: &Sequences,
    kept_experts: Option<&[Vec<usize>]>,
    total: &mut Sums,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(), ModelError> {
    let (mut run, mut reference_run) = (model.begin(sequences)?, reference.begin(sequences)?);
    let mut index = 0;
    loop {
        let layer = run.layer();
        let (ours, theirs) = (Capture::default(), Capture::default());
        if !run.step(&ours)? {
            break;
        }
        reference_run.step(&theirs)?;
        progress(layer, sequences.num_tokens());
        let (ours, our_ids) = ours.into_layer();
        let (theirs, their_ids) = theirs.into_layer();
        if ours.is_empty() || ours.len() != theirs.len() {
            continue;
        }
        if total.layers.len() == index {
            total.layers.push(LayerSums {
                layer,
                ..LayerSums::default()
            });
        }
        let sums = &mut total.layers[index];
        for (a, b) in ours.iter().zip(&theirs) {
            let (a, b) = (f64::from(*a), f64::from(*b));
            sums.error_sq += (a - b) * (a - b);
            sums.norm_sq += b * b;
        }
        let kept = kept_experts.and_then(|k| k.get(index)).map(Vec::as_slice);
        let [own, other] = [model, reference].map(|m| m.config().num_experts(index));
        if kept.is_some() || own == other {
            let (shared, all) = sums.routing.unwrap_or_default();
            let top_k = [model, reference].map(|m| m.config().moe.top_k);
            let (more, of) = experts_in_common((&our_ids, &their_ids), top_k, kept);
            sums.routing = Some((shared + more, all + of));
        }
        index += 1;
    }
    let (hidden, reference_hidden) = (run.finish()?, reference_run.finish()?);
    let width = model.config().hidden_size;
    let (kl, same) = divergence(
        (&model.head()?, &hidden),
        (&reference.head()?, &reference_hidden),
        width,
    )?;
    total.tokens += sequences.num_tokens();
    total.kl += kl;
    total.same += same;
    Ok(())
}

/// (chosen experts in common, chosen experts of the reference).
fn experts_in_common(
    (ours, theirs): (&[u32], &[u32]),
    [our_k, their_k]: [usize; 2],
    kept: Option<&[usize]>,
) -> (usize, usize) {
    let original = |e: u32| kept.map_or(e, |k| k.get(e as usize).map_or(u32::MAX, |&o| o as u32));
    let shared = ours
        .chunks_exact(our_k.max(1))
        .zip(theirs.chunks_exact(their_k.max(1)))
        .map(|(a, b)| a.iter().filter(|&&e| b.contains(&original(e))).count());
    (shared.sum(), theirs.len())
}

/// (sum of KL(reference ‖ model), rows whose likeliest tokens agree).
fn divergence(
    (head, hidden): (&Head<'_>, &[f32]),
    (reference_head, reference_hidden): (&Head<'_>, &[f32]),
    width: usize,
) -> Result<(f64, usize), ModelError> {
    let vocab = head.vocab_size();
    let batch = logit_rows(vocab) * width;
    let (mut kl, mut same) = (0f64, 0usize);
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
        }
    }
    Ok((kl, same))
}
