//! C = Σ g² h hᵀ of the narrowed experts of a layer: sums of products in f32 over a few hundred rows at a time, those in f64.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use tenp_checkpoint::{LayerPlan, ModelConfig};
use tenp_kernels::cpu::linear::linear;
use tenp_kernels::{Compute, KernelError, MatrixView};

use crate::error::AtLayer;
use crate::observer::RoutedActivations;
use crate::{ModelError, Observer, Sequences};

/// One sample in this many is held out, or this share of each where there are fewer samples.
const HELD_OUT: usize = 5;

/// Rows summed in f32.
const ROWS: usize = 512;

/// By token: whether it is held out to choose the ridge by. Every fifth sample of a domain is, or the last fifth of each
/// sample where the domain has fewer than five.
pub(super) fn held_out(sequences: &Sequences) -> Vec<bool> {
    let spans = sequences.spans();
    let mut held = vec![false; sequences.num_tokens()];
    let domains = spans
        .iter()
        .map(|span| span.label)
        .max()
        .map_or(0, |l| l + 1);
    for domain in 0..domains {
        let own: Vec<_> = spans.iter().filter(|span| span.label == domain).collect();
        for (index, span) in own.iter().enumerate() {
            let rows = span.rows.clone();
            let from = if own.len() < HELD_OUT {
                rows.end - rows.len() / HELD_OUT
            } else if index % HELD_OUT == HELD_OUT - 1 {
                rows.start
            } else {
                rows.end
            };
            held[from..rows.end].fill(true);
        }
    }
    held
}

/// Second moments of an expert's activations.
#[derive(Clone, Debug, Default)]
pub(super) struct ExpertGram {
    /// `[K, K]` over the tokens that are fitted, and over those held out.
    pub(super) sums: [Vec<f64>; 2],
    /// Σ g²‖y‖² of the same tokens.
    pub(super) outputs: [f64; 2],
}

/// Collects the moments of a layer. Blocks must come in order.
pub(super) struct Grams<'a> {
    layer: usize,
    width: usize,
    hidden: usize,
    narrow: Vec<bool>,
    held: &'a [bool],
    gated: bool,
    experts: Mutex<Vec<ExpertGram>>,
    progress: &'a (dyn Fn(usize) + Sync),
}

impl<'a> Grams<'a> {
    pub(super) fn new(
        plan: &LayerPlan,
        config: &ModelConfig,
        held: &'a [bool],
        gated: bool,
        progress: &'a (dyn Fn(usize) + Sync),
    ) -> Self {
        let width = config.moe.expert_width;
        let narrow: Vec<bool> = plan
            .experts
            .iter()
            .map(|e| e.width > 0 && e.width < width)
            .collect();
        let empty = |narrow: &bool| ExpertGram {
            sums: [0; 2].map(|_| vec![0.0; if *narrow { width * width } else { 0 }]),
            outputs: [0.0; 2],
        };
        Self {
            layer: plan.layer,
            width,
            hidden: config.hidden_size,
            experts: Mutex::new(narrow.iter().map(empty).collect()),
            narrow,
            held,
            gated,
            progress,
        }
    }

    /// The narrowed experts' moments, and Σ g²‖y‖² of all experts: over all tokens, and over those held out.
    pub(super) fn finish(self) -> (Vec<(usize, ExpertGram)>, [f64; 2]) {
        let experts = self
            .experts
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let mut outputs = [0.0; 2];
        for expert in &experts {
            outputs[0] += expert.outputs[0] + expert.outputs[1];
            outputs[1] += expert.outputs[1];
        }
        let narrow = self.narrow;
        let grams = experts.into_iter().enumerate().filter(|(e, _)| narrow[*e]);
        (grams.collect(), outputs)
    }

    /// Adds an expert's rows of a block whose first token is `first`.
    fn add(
        &self,
        (expert, first): (usize, usize),
        routed: &RoutedActivations<'_>,
        gram: &mut ExpertGram,
    ) -> Result<(), KernelError> {
        let rows = routed.groups.rows(expert);
        if rows.is_empty() {
            return Ok(());
        }
        let tokens = &routed.groups.token_ids()[rows.clone()];
        let gate = |i: usize| {
            if self.gated {
                routed.groups.weights()[rows.start + i]
            } else {
                1.0
            }
        };
        let outputs =
            routed.activations.outputs()[rows.start * self.hidden..].chunks_exact(self.hidden);
        let mut parts = [Vec::new(), Vec::new()];
        for (i, (&token, y)) in tokens.iter().zip(outputs).enumerate() {
            let part = usize::from(self.held[first + token as usize]);
            let square: f64 = y.iter().map(|v| f64::from(*v).powi(2)).sum();
            gram.outputs[part] += f64::from(gate(i)).powi(2) * square;
            parts[part].push(i);
        }
        if !self.narrow[expert] {
            return Ok(());
        }
        let h = routed
            .activations
            .transposed_h(routed.groups, expert, self.width);
        let mut product = vec![0f32; self.width * self.width];
        for (part, sums) in parts.iter().zip(&mut gram.sums) {
            for chunk in part.chunks(ROWS) {
                let scaled: Vec<f32> = h
                    .chunks_exact(rows.len())
                    .flat_map(|neuron| chunk.iter().map(|&i| gate(i) * neuron[i]))
                    .collect();
                let columns = MatrixView::from_f32(self.width, chunk.len(), &scaled)?;
                linear(Compute::F32, &scaled, &columns, None, &mut product)?;
                for (sum, more) in sums.iter_mut().zip(&product) {
                    *sum += f64::from(*more);
                }
            }
        }
        Ok(())
    }
}

impl Observer for Grams<'_> {
    fn wants_activations(&self) -> bool {
        true
    }

    fn activations(
        &self,
        _layer: usize,
        rows: Range<usize>,
        routed: &RoutedActivations<'_>,
    ) -> Result<(), ModelError> {
        let mut experts = self.experts.lock().unwrap_or_else(PoisonError::into_inner);
        let results: Vec<_> = experts
            .par_iter_mut()
            .enumerate()
            .map(|(expert, gram)| self.add((expert, rows.start), routed, gram))
            .collect();
        results
            .into_iter()
            .collect::<Result<(), KernelError>>()
            .at(self.layer)
    }

    fn progress(&self, _layer: usize, tokens: usize) {
        (self.progress)(tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifth_is_held_out() {
        let mut few = Sequences::default();
        few.push(&[1; 10], 0);
        few.push(&[1; 4], 0);
        let held = held_out(&few);
        assert_eq!(held.iter().filter(|h| **h).count(), 2);
        assert!(held[8] && held[9]);
        let mut many = Sequences::default();
        for label in [0, 0, 0, 0, 0, 0, 1] {
            many.push(&[1; 5], label);
        }
        let held = held_out(&many);
        assert!(
            held[20..25].iter().all(|h| *h),
            "the fifth sample of the first domain"
        );
        assert!(held[34], "the last token of the only sample of the second");
        assert_eq!(held.iter().filter(|h| **h).count(), 6);
    }
}
