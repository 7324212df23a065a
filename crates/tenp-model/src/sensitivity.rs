//! What cutting experts costs (`docs/methods.md`, "Allocations"): the error of every routed expert's output at a few
//! widths, in one pass of the full model.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use tenp_checkpoint::{Checkpoint, Matrix};
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
    let model = CpuModel {
        checkpoint,
        compute,
        spill: Some(spill),
    };
    measured(model, sequences, cuts, HELD_BYTES, progress)
}

fn measured(
    model: CpuModel<'_>,
    sequences: &Sequences,
    cuts: Cuts<'_>,
    most_held: usize,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<CutErrors, ModelError> {
    let config = model.checkpoint.config();
    sequences.check(config)?;
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
            model,
            sequences,
            cuts,
            most_held,
            layer,
            position: position.unwrap_or_default(),
            collected: Mutex::new(Collected::new(num_experts, cuts.widths.len())),
            progress,
        };
        if !pass.step(&observer)? {
            return Ok(measured);
        }
        if position.is_some() {
            let mut collected = observer.collected();
            observer.measure(&mut collected)?;
            measured.errors.push(std::mem::take(&mut collected.errors));
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
    model: CpuModel<'a>,
    sequences: &'a Sequences,
    cuts: Cuts<'a>,
    /// Bytes of activations.
    most_held: usize,
    layer: usize,
    /// Of the layer among the MoE layers.
    position: usize,
    collected: Mutex<Collected>,
    progress: &'a (dyn Fn(usize) + Sync),
}

/// What is known of a layer so far.
struct Collected {
    /// `[expert][width]`.
    errors: Vec<Vec<f64>>,
    /// By expert: rows of the blocks that are not in the errors yet.
    held: Vec<Vec<Rows>>,
    held_bytes: usize,
}

/// An expert's rows of a block.
struct Rows {
    /// `[K, rows]`.
    h: Vec<f32>,
    gates: Vec<f32>,
    /// Of the domain.
    weight: f64,
}

/// Activations that are held before a block's come to them: for many blocks together a down projection is widened once.
const HELD_BYTES: usize = 512 << 20;

/// Bytes of the activations held where the layer's are `all` and a block's are `block`.
pub(crate) fn held_bytes(all: usize, block: usize) -> usize {
    all.min(HELD_BYTES + block)
}

impl Collected {
    fn new(num_experts: usize, num_widths: usize) -> Self {
        Self {
            errors: vec![vec![0.0; num_widths]; num_experts],
            held: (0..num_experts).map(|_| Vec::new()).collect(),
            held_bytes: 0,
        }
    }

    /// Adds the rows of a block, by expert.
    fn hold(&mut self, block: Vec<Rows>) {
        for (held, rows) in self.held.iter_mut().zip(block) {
            self.held_bytes += size_of_val(&rows.h[..]);
            if !rows.gates.is_empty() {
                held.push(rows);
            }
        }
    }
}

impl LayerErrors<'_> {
    fn collected(&self) -> MutexGuard<'_, Collected> {
        self.collected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what is held to the errors.
    fn measure(&self, collected: &mut Collected) -> Result<(), ModelError> {
        let held: Vec<_> = collected.held.iter_mut().map(std::mem::take).collect();
        collected.held_bytes = 0;
        let experts = collected.errors.par_iter_mut().zip(held).enumerate();
        let results: Vec<_> = experts
            .map(|(expert, (errors, rows))| self.add(expert, &rows, errors))
            .collect();
        results.into_iter().collect()
    }

    /// Adds an expert's rows. The neurons between two widths go together, from the first to go on, and what has gone so far
    /// adds up to y − y′.
    fn add(&self, expert: usize, rows: &[Rows], errors: &mut [f64]) -> Result<(), ModelError> {
        if rows.is_empty() {
            return Ok(());
        }
        let order = &self.cuts.orders[self.position][expert];
        let parts: Vec<&[u32]> = self
            .cuts
            .widths
            .windows(2)
            .map(|ends| &order[ends[0]..ends[1]])
            .collect();
        let down = self.model.checkpoint.expert(self.layer, expert)?.down;
        let columns = columns(&down, &parts);
        for Rows { h, gates, weight } in rows {
            let mut gone = vec![0f32; gates.len() * down.rows];
            let mut more = vec![0f32; gone.len()];
            for (step, (ids, columns)) in parts.iter().zip(&columns).enumerate().rev() {
                let x: Vec<f32> = (0..gates.len())
                    .flat_map(|row| ids.iter().map(move |&id| (row, id as usize)))
                    .map(|(row, id)| h[id * gates.len() + row])
                    .collect();
                let shape = (down.rows, ids.len());
                multiply(self.model.compute, &x, (columns, shape), &mut more).at(self.layer)?;
                gone.iter_mut().zip(&more).for_each(|(g, m)| *g += m);
                let error = gone.chunks_exact(down.rows).zip(gates);
                errors[step] += weight
                    * error
                        .map(|(row, gate)| f64::from(*gate).powi(2) * squared_norm(row))
                        .sum::<f64>();
            }
        }
        Ok(())
    }
}

/// `[H, ids]` of a down projection for each part of its neurons.
fn columns(down: &Matrix<'_>, parts: &[&[u32]]) -> Vec<Vec<f32>> {
    let room = |ids: &&[u32]| Vec::with_capacity(down.rows * ids.len());
    let mut columns: Vec<Vec<f32>> = parts.iter().map(room).collect();
    let mut values = vec![0.0; down.cols];
    for row in 0..down.rows {
        down.widen_row(row, &mut values);
        for (columns, ids) in columns.iter_mut().zip(parts) {
            columns.extend(ids.iter().map(|&id| values[id as usize]));
        }
    }
    columns
}

fn multiply(
    compute: Compute,
    x: &[f32],
    (columns, (rows, cols)): (&[f32], (usize, usize)),
    out: &mut [f32],
) -> Result<(), KernelError> {
    let weights = MatrixView::from_f32(rows, cols, columns)?;
    linear(compute, x, &weights, None, out)
}

impl Observer for LayerErrors<'_> {
    fn wants_activations(&self) -> bool {
        true
    }

    fn activations(
        &self,
        _layer: usize,
        rows: Range<usize>,
        routed: &RoutedActivations<'_>,
    ) -> Result<(), ModelError> {
        let spans = self.sequences.spans();
        let span = spans.partition_point(|span| span.rows.end <= rows.start);
        let weight = self.cuts.weights[spans[span].label];
        let orders = self.cuts.orders[self.position].par_iter().enumerate();
        let block = orders.map(|(expert, order)| Rows {
            h: routed
                .activations
                .transposed_h(routed.groups, expert, order.len()),
            gates: routed.groups.weights()[routed.groups.rows(expert)].to_vec(),
            weight,
        });
        let block: Vec<Rows> = block.collect();
        let bytes: usize = block.iter().map(|rows| size_of_val(&rows.h[..])).sum();
        let mut collected = self.collected();
        if collected.held_bytes + bytes > self.most_held {
            self.measure(&mut collected)?;
        }
        collected.hold(block);
        Ok(())
    }

    fn progress(&self, _layer: usize, tokens: usize) {
        (self.progress)(tokens);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// The same errors in f64, from the activations of the pass.
    struct InF64<'a> {
        checkpoint: &'a Checkpoint,
        cuts: Cuts<'a>,
        /// By layer and expert.
        errors: Mutex<Vec<Vec<Vec<f64>>>>,
    }

    impl Observer for InF64<'_> {
        fn wants_activations(&self) -> bool {
            true
        }

        fn activations(
            &self,
            layer: usize,
            rows: Range<usize>,
            routed: &RoutedActivations<'_>,
        ) -> Result<(), ModelError> {
            // Two sequences of one block each, a label each.
            let weight = self.cuts.weights[usize::from(rows.start > 0)];
            let mut errors = self.errors.lock().expect("no test panicked");
            for (expert, order) in self.cuts.orders[layer].iter().enumerate() {
                let place = routed.groups.rows(expert);
                let (activations, gates) = (routed.activations, routed.groups.weights());
                let h = activations.transposed_h(routed.groups, expert, order.len());
                let down = self.checkpoint.expert(layer, expert)?.down;
                let values = down.to_f32();
                for (step, &width) in self.cuts.widths.iter().enumerate() {
                    for (row, at) in place.clone().enumerate() {
                        let squares = (0..down.rows).map(|r| {
                            let gone = order[width..].iter().map(|&j| {
                                let weight = values[r * down.cols + j as usize];
                                let h = h[j as usize * place.len() + row];
                                f64::from(weight) * f64::from(h)
                            });
                            gone.sum::<f64>().powi(2)
                        });
                        let gate = f64::from(gates[at]).powi(2);
                        errors[layer][expert][step] += weight * gate * squares.sum::<f64>();
                    }
                }
            }
            Ok(())
        }
    }

    #[test]
    fn errors_are_those_of_the_outputs_whatever_is_held() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        let checkpoint = Checkpoint::open(&golden.join("olmoe")).expect("a checkpoint");
        let config = checkpoint.config();
        let (layers, moe) = (config.num_layers, &config.moe);
        let (experts, full) = (moe.num_experts, moe.expert_width);
        let widths = [0, full / 4, full - 1, full];
        let order = |expert: usize| {
            let id = move |n: usize| ((n * 5 + expert) % full) as u32;
            (0..full).map(id).collect::<Vec<_>>()
        };
        assert!(full % 5 != 0, "every neuron is in the order once");
        let orders = vec![(0..experts).map(order).collect::<Vec<_>>(); layers];
        let cuts = Cuts {
            widths: &widths,
            orders: &orders,
            weights: &[1.0, 0.5],
        };
        let mut text = Sequences::default();
        let ids = |n: usize| (0..n as u32).map(|i| i * 7 % 50).collect::<Vec<_>>();
        text.push(&ids(40), 0);
        text.push(&ids(23), 1);
        for (compute, near) in [(Compute::F32, 1e-4), (Compute::Bf16, 2e-2)] {
            let model = CpuModel {
                checkpoint: &checkpoint,
                compute,
                spill: None,
            };
            let of = |most_held| measured(model, &text, cuts, most_held, &|_| ());
            let got = of(usize::MAX).expect("errors");
            assert_eq!(of(0).expect("errors"), got, "a block at a time");
            let want = InF64 {
                checkpoint: &checkpoint,
                cuts,
                errors: Mutex::new(vec![vec![vec![0.0; widths.len()]; experts]; layers]),
            };
            let mut pass = CpuPass::new(model, &text, None).expect("a pass");
            while pass.step(&want).expect("a layer") {}
            let want = want.errors.into_inner().expect("no test panicked");
            let (got, want) = (got.errors.concat().concat(), want.concat().concat());
            assert!(want.iter().filter(|e| **e > 0.0).count() > layers * experts);
            for (got, want) in got.iter().zip(&want) {
                assert!((got - want).abs() <= near * want, "{got} {want}");
            }
        }
    }
}
