//! Second moments C = Σ g² h hᵀ of the activations of some experts of a layer, which least squares is fitted to: what is
//! asked of a pass, and how the CPU collects it. Sums of products in f32 over a few hundred rows at a time, those in f64.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use tenp_kernels::cpu::linear::linear;
use tenp_kernels::{Compute, KernelError, MatrixView};

use crate::error::AtLayer;
use crate::observer::RoutedActivations;
use crate::{ModelError, Observer};

/// Rows summed in f32.
const ROWS: usize = 512;

/// What is to be collected in a layer.
pub(crate) struct MomentsWanted<'a> {
    /// By expert: whether its moments are wanted; its outputs count in any case.
    pub(crate) experts: &'a [bool],
    /// K.
    pub(crate) width: usize,
    /// By token: whether it goes into the second part.
    pub(crate) held: &'a [bool],
    /// Whether a token counts by the square of its gate weight, or by 1.
    pub(crate) gated: bool,
    /// Told of tokens that have passed, from any thread.
    pub(crate) progress: &'a (dyn Fn(usize) + Sync),
}

/// Second moments of an expert's activations.
#[derive(Clone, Debug, Default)]
pub(crate) struct ExpertMoments {
    /// `[K, K]` over the tokens that are fitted, and over those held out; empty where not wanted.
    pub(crate) sums: [Vec<f64>; 2],
    /// Σ g²‖y‖² of the same tokens.
    pub(crate) outputs: [f64; 2],
}

/// Bytes of an expert's moments.
pub(crate) fn bytes(width: usize) -> usize {
    2 * size_of::<f64>() * width * width
}

/// Bytes that a thread holds while it adds to them: activations of some rows, scaled and packed, and their products.
pub(crate) fn adding_bytes(width: usize) -> usize {
    size_of::<f32>() * (3 * ROWS * width + width * width)
}

/// Collects the moments of a layer on the CPU. Blocks must come in order.
pub(crate) struct Moments<'a> {
    layer: usize,
    hidden: usize,
    wanted: &'a MomentsWanted<'a>,
    experts: Mutex<Vec<ExpertMoments>>,
}

impl<'a> Moments<'a> {
    pub(crate) fn new(layer: usize, hidden: usize, wanted: &'a MomentsWanted<'a>) -> Self {
        let square = wanted.width * wanted.width;
        let empty = |wanted: &bool| ExpertMoments {
            sums: [0; 2].map(|_| vec![0.0; if *wanted { square } else { 0 }]),
            outputs: [0.0; 2],
        };
        Self {
            layer,
            hidden,
            experts: Mutex::new(wanted.experts.iter().map(empty).collect()),
            wanted,
        }
    }

    /// By expert.
    pub(crate) fn finish(self) -> Vec<ExpertMoments> {
        let experts = self.experts.into_inner();
        experts.unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an expert's rows of a block whose first token is `first`.
    fn add(
        &self,
        (expert, first): (usize, usize),
        routed: &RoutedActivations<'_>,
        moments: &mut ExpertMoments,
    ) -> Result<(), KernelError> {
        let rows = routed.groups.rows(expert);
        if rows.is_empty() {
            return Ok(());
        }
        let tokens = &routed.groups.token_ids()[rows.clone()];
        let gate = |i: usize| {
            if self.wanted.gated {
                routed.groups.weights()[rows.start + i]
            } else {
                1.0
            }
        };
        let outputs =
            routed.activations.outputs()[rows.start * self.hidden..].chunks_exact(self.hidden);
        let mut parts = [Vec::new(), Vec::new()];
        for (i, (&token, y)) in tokens.iter().zip(outputs).enumerate() {
            let part = usize::from(self.wanted.held[first + token as usize]);
            let square: f64 = y.iter().map(|v| f64::from(*v).powi(2)).sum();
            moments.outputs[part] += f64::from(gate(i)).powi(2) * square;
            parts[part].push(i);
        }
        if !self.wanted.experts[expert] {
            return Ok(());
        }
        let h = routed
            .activations
            .transposed_h(routed.groups, expert, self.wanted.width);
        let mut product = vec![0f32; self.wanted.width * self.wanted.width];
        for (part, sums) in parts.iter().zip(&mut moments.sums) {
            for chunk in part.chunks(ROWS) {
                let scaled: Vec<f32> = h
                    .chunks_exact(rows.len())
                    .flat_map(|neuron| chunk.iter().map(|&i| gate(i) * neuron[i]))
                    .collect();
                let columns = MatrixView::from_f32(self.wanted.width, chunk.len(), &scaled)?;
                linear(Compute::F32, &scaled, &columns, None, &mut product)?;
                for (sum, more) in sums.iter_mut().zip(&product) {
                    *sum += f64::from(*more);
                }
            }
        }
        Ok(())
    }
}

impl Observer for Moments<'_> {
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
            .map(|(expert, moments)| self.add((expert, rows.start), routed, moments))
            .collect();
        results
            .into_iter()
            .collect::<Result<(), KernelError>>()
            .at(self.layer)
    }

    fn progress(&self, _layer: usize, tokens: usize) {
        (self.wanted.progress)(tokens);
    }
}
