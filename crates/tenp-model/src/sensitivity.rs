//! What cutting experts costs (`docs/methods.md`, "Allocations"): the error of every routed expert's output at a few
//! widths, in one pass of the full model.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use tenp_checkpoint::Checkpoint;
use tenp_kernels::cpu::linear::linear;
use tenp_kernels::{Compute, KernelError, MatrixView};

use crate::cpu::{CpuModel, CpuPass};
use crate::engine::Pass;
use crate::error::AtLayer;
use crate::observer::RoutedActivations;
use crate::{ModelError, Observer, Sequences, Spill};

/// Errors of narrowed experts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CutErrors {
    /// `[moe layer][expert][width]`: Σ weight·g²‖y − y′‖², y′ the output with the best neurons of that width only.
    pub errors: Vec<Vec<Vec<f64>>>,
    /// By MoE layer: Σ weight·‖r‖² of the residual stream behind it.
    pub residuals: Vec<f64>,
}

/// Which neurons go first, and where errors are measured.
#[derive(Clone, Copy, Debug)]
pub struct Cuts<'a> {
    /// Ascending, from 0 to the whole width.
    pub widths: &'a [usize],
    /// `[moe layer][expert]`: neurons from the one to keep longest to the first to go.
    pub orders: &'a [Vec<Vec<u32>>],
    /// Weight of each label of the sequences.
    pub weights: &'a [f64],
}

/// Runs the full model over `sequences` on the CPU and measures what cutting its experts would cost.
///
/// `progress` is told the tokens that have passed a layer, from any thread. The sums are made in a fixed order: the same
/// bits whatever the threads. Hidden states that should not be in memory go to a file where `spill` says.
///
/// # Errors
/// Token ids or lengths that the model does not have, unreadable tensors, activations that are not finite, a full disk.
pub fn cut_errors(
    checkpoint: &Checkpoint,
    (compute, spill): (Compute, &Spill),
    sequences: &Sequences,
    cuts: Cuts<'_>,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<CutErrors, ModelError> {
    let config = checkpoint.config();
    sequences.check(config)?;
    let model = CpuModel {
        checkpoint,
        compute,
        spill: Some(spill),
    };
    let mut pass = CpuPass::new(model, sequences, None)?;
    let mut measured = CutErrors::default();
    loop {
        let layer = pass.layer();
        let position = config.moe_layers.binary_search(&layer).ok();
        let num_experts = if position.is_some() {
            config.moe.num_experts
        } else {
            0
        };
        let observer = LayerErrors {
            checkpoint,
            sequences,
            cuts,
            position: position.unwrap_or_default(),
            errors: Mutex::new(vec![vec![0.0; cuts.widths.len()]; num_experts]),
            progress,
        };
        if !pass.step(&observer)? {
            return Ok(measured);
        }
        if position.is_some() {
            let errors = observer.errors.into_inner();
            measured
                .errors
                .push(errors.unwrap_or_else(PoisonError::into_inner));
            let width = config.hidden_size;
            let residual = sequences.spans().iter().map(|span| {
                let rows = &pass.hidden()[span.rows.start * width..span.rows.end * width];
                cuts.weights[span.label] * squared_norm(rows)
            });
            measured.residuals.push(residual.sum());
        }
    }
}

fn squared_norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum()
}

/// Collects the errors of one layer. Blocks come in order.
struct LayerErrors<'a> {
    checkpoint: &'a Checkpoint,
    sequences: &'a Sequences,
    cuts: Cuts<'a>,
    /// Of the layer among the MoE layers.
    position: usize,
    errors: Mutex<Vec<Vec<f64>>>,
    progress: &'a (dyn Fn(usize) + Sync),
}

impl LayerErrors<'_> {
    /// Adds an expert's rows of a block. The neurons between two widths go together, from the first to go on, and what has
    /// gone so far adds up to y − y′.
    fn add(
        &self,
        (layer, expert): (usize, usize),
        weight: f64,
        routed: &RoutedActivations<'_>,
        errors: &mut [f64],
    ) -> Result<(), ModelError> {
        let rows = routed.groups.rows(expert);
        if rows.is_empty() {
            return Ok(());
        }
        let order = &self.cuts.orders[self.position][expert];
        let gates = &routed.groups.weights()[rows.clone()];
        let h = routed
            .activations
            .transposed_h(routed.groups, expert, order.len());
        let down = self.checkpoint.expert(layer, expert)?.down;
        let (hidden, width) = (down.rows, down.cols);
        let down = down.to_f32();
        let mut gone = vec![0f32; rows.len() * hidden];
        let mut more = vec![0f32; gone.len()];
        for (step, ends) in self.cuts.widths.windows(2).enumerate().rev() {
            let ids = &order[ends[0]..ends[1]];
            let x: Vec<f32> = (0..rows.len())
                .flat_map(|row| ids.iter().map(move |&id| (row, id as usize)))
                .map(|(row, id)| h[id * rows.len() + row])
                .collect();
            let columns: Vec<f32> = down
                .chunks_exact(width)
                .flat_map(|row| ids.iter().map(|&id| row[id as usize]))
                .collect();
            multiply(&x, &columns, (hidden, ids.len()), &mut more).at(layer)?;
            gone.iter_mut().zip(&more).for_each(|(g, m)| *g += m);
            let error = gone.chunks_exact(hidden).zip(gates);
            errors[step] += weight
                * error
                    .map(|(row, gate)| f64::from(*gate).powi(2) * squared_norm(row))
                    .sum::<f64>();
        }
        Ok(())
    }
}

fn multiply(
    x: &[f32],
    columns: &[f32],
    (rows, cols): (usize, usize),
    out: &mut [f32],
) -> Result<(), KernelError> {
    let weights = MatrixView::from_f32(rows, cols, columns)?;
    linear(Compute::F32, x, &weights, None, out)
}

impl Observer for LayerErrors<'_> {
    fn wants_activations(&self) -> bool {
        true
    }

    fn activations(
        &self,
        layer: usize,
        rows: Range<usize>,
        routed: &RoutedActivations<'_>,
    ) -> Result<(), ModelError> {
        let spans = self.sequences.spans();
        let span = spans.partition_point(|span| span.rows.end <= rows.start);
        let weight = self.cuts.weights[spans[span].label];
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        let results: Vec<_> = errors
            .par_iter_mut()
            .enumerate()
            .map(|(expert, errors)| self.add((layer, expert), weight, routed, errors))
            .collect();
        results.into_iter().collect()
    }

    fn progress(&self, _layer: usize, tokens: usize) {
        (self.progress)(tokens);
    }
}
