//! Neuron-level sums: what each neuron contributes to its expert's output.
//!
//! The projected contribution `h_j⟨w_j, y⟩ / (‖y‖ + 1e-8)` is the neuron importance of TENP (arXiv 2606.09885). It comes
//! from one more product, `Q = Y · W_down`, whose tiles are consumed where they are made: nothing of size
//! [tokens, width] is written. Sums are f64 over an expert's rows in token order.

use rayon::prelude::*;

use super::disjoint::Disjoint;
use super::dispatch::multiversion;
use super::linear::{columns_per_task, with_blocks};
use super::moe::{ExpertActivations, ExpertWeights};
use super::pack::pack_columns;
use super::panels::panels_of;
use super::tile::{TILE_COLS, TILE_ROWS, Tile, multiply};
use crate::error::check_len;
use crate::{ExpertGroups, KernelError, MatrixView, RaggedLayout};

/// Added to ‖y‖ in the contribution's denominator.
pub const CONTRIBUTION_EPSILON: f64 = 1e-8;

/// Running sums of every neuron of a layer, `[Σ widths]` each, experts one after another.
#[derive(Clone, Debug, PartialEq)]
pub struct NeuronSums {
    layout: RaggedLayout,
    /// Σ h_j⟨w_j, y⟩ / (‖y‖ + 1e-8).
    pub contribution: Vec<f64>,
    /// Σ of the same term's absolute value.
    pub contribution_abs: Vec<f64>,
    /// Σ |h_j|.
    pub activation: Vec<f64>,
    /// Σ (g h_j)².
    pub gated_energy: Vec<f64>,
    /// max (g h_j)².
    pub gated_peak: Vec<f64>,
    /// Σ h_j.
    pub mean: Vec<f64>,
    /// Σ h_j².
    pub second_moment: Vec<f64>,
}

impl NeuronSums {
    /// Zeros for experts of these widths.
    #[must_use]
    pub fn new(layout: RaggedLayout) -> Self {
        let zeros = || vec![0f64; layout.total()];
        Self {
            contribution: zeros(),
            contribution_abs: zeros(),
            activation: zeros(),
            gated_energy: zeros(),
            gated_peak: zeros(),
            mean: zeros(),
            second_moment: zeros(),
            layout,
        }
    }

    /// Bytes of the sums of `neurons` neurons.
    #[must_use]
    pub fn bytes(neurons: usize) -> usize {
        7 * size_of::<f64>() * neurons
    }

    /// Widths and offsets of the experts.
    #[must_use]
    pub fn layout(&self) -> &RaggedLayout {
        &self.layout
    }

    /// Adds the sums over other rows; widths must be the same.
    ///
    /// # Panics
    /// If the widths differ.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.layout, other.layout, "sums of other experts");
        for (peak, &more) in self.gated_peak.iter_mut().zip(&other.gated_peak) {
            *peak = peak.max(more);
        }
        for (sums, more) in [
            (&mut self.contribution, &other.contribution),
            (&mut self.contribution_abs, &other.contribution_abs),
            (&mut self.activation, &other.activation),
            (&mut self.gated_energy, &other.gated_energy),
            (&mut self.mean, &other.mean),
            (&mut self.second_moment, &other.second_moment),
        ] {
            for (sum, &more) in sums.iter_mut().zip(more) {
                *sum += more;
            }
        }
    }

    fn tables(&mut self) -> [&mut Vec<f64>; 7] {
        [
            &mut self.contribution,
            &mut self.contribution_abs,
            &mut self.activation,
            &mut self.gated_energy,
            &mut self.gated_peak,
            &mut self.mean,
            &mut self.second_moment,
        ]
    }
}

/// The seven sums of a tile's 32 neurons, in the order of the fields of [`NeuronSums`].
type TileSums = [[f64; TILE_COLS]; 7];

/// Adds the batch of the last [`super::moe::expert_forward`] to the neurons' sums.
///
/// `norms` is `[rows]` ‖y‖, as [`super::direction::accumulate_expert_sums`] returns it; rows with norm 0 contribute 0.
/// That pass must have been asked to keep its outputs packed ([`ExpertActivations::keep_packed_outputs`]).
///
/// # Errors
/// Lengths and widths that do not fit together.
pub fn accumulate_neuron_sums(
    experts: &[ExpertWeights<'_>],
    groups: &ExpertGroups,
    activations: &ExpertActivations,
    norms: &[f64],
    sums: &mut NeuronSums,
) -> Result<(), KernelError> {
    check_len("experts", groups.num_experts(), experts.len())?;
    check_len(
        "neuron sums",
        groups.num_experts(),
        sums.layout.num_experts(),
    )?;
    check_len("output norms", groups.num_rows(), norms.len())?;
    for (expert, &width) in experts.iter().zip(sums.layout.widths()) {
        check_len("neuron sums of an expert", expert.width(), width)?;
    }
    let outputs = activations.packed_outputs().ok_or_else(|| KernelError::Invalid {
        what: "expert activations",
        why: "their outputs were not kept packed; call keep_packed_outputs(true) before the forward pass".into(),
    })?;
    check_len("expert outputs", groups.num_rows(), outputs.num_rows())?;
    let packing = outputs.packing();
    let steps = packing.steps(activations.hidden());
    let per_task = columns_per_task(steps);
    let layout = sums.layout.clone();
    let tasks: Vec<(usize, usize)> = (0..groups.num_experts())
        .filter(|&e| !groups.rows(e).is_empty())
        .flat_map(|e| {
            (0..experts[e].width())
                .step_by(per_task)
                .map(move |first| (e, first))
        })
        .collect();
    let tables = sums.tables().map(|t| Disjoint::new(t.as_mut_slice()));
    tasks.par_iter().for_each(|&(e, first)| {
        let width = experts[e].width();
        let count = (width - first).min(per_task);
        let blocks = count.div_ceil(TILE_COLS);
        with_blocks(blocks * steps * TILE_COLS, |packed| {
            let mut block_sums: Vec<TileSums> = Vec::with_capacity(blocks);
            for b in 0..blocks {
                let block = &mut packed[b * steps * TILE_COLS..(b + 1) * steps * TILE_COLS];
                pack_columns(packing, &experts[e].down, first + b * TILE_COLS, block);
                let start = layout.range(e).start + first + b * TILE_COLS;
                let columns = (width - first - b * TILE_COLS).min(TILE_COLS);
                let mut tile_sums = [[0.0; TILE_COLS]; 7];
                for (to, table) in tile_sums.iter_mut().zip(&tables) {
                    // SAFETY: these neurons are this task's alone.
                    to[..columns].copy_from_slice(unsafe { table.range(start..start + columns) });
                }
                block_sums.push(tile_sums);
            }
            let mut q = Tile::new();
            let mut h = [[0.0; TILE_COLS]; TILE_ROWS];
            for panel in panels_of(groups.rows(e)) {
                let rows = panel.first_row..panel.first_row + panel.rows;
                for (b, tile_sums) in block_sums.iter_mut().enumerate() {
                    let block = &packed[b * steps * TILE_COLS..(b + 1) * steps * TILE_COLS];
                    multiply(packing, outputs.panel(panel), panel.rows, block, &mut q);
                    activations.h_tile(groups, e, width, panel, first + b * TILE_COLS, &mut h);
                    add_tile(
                        &q,
                        &h,
                        &norms[rows.clone()],
                        &groups.weights()[rows.clone()],
                        tile_sums,
                    );
                }
            }
            for (b, tile_sums) in block_sums.iter().enumerate() {
                let start = layout.range(e).start + first + b * TILE_COLS;
                let columns = (width - first - b * TILE_COLS).min(TILE_COLS);
                for (from, table) in tile_sums.iter().zip(&tables) {
                    // SAFETY: these neurons are this task's alone.
                    unsafe { table.range(start..start + columns) }
                        .copy_from_slice(&from[..columns]);
                }
            }
        });
    });
    Ok(())
}

multiversion! {
    fn add_tile(
        q: &Tile,
        h: &[[f32; TILE_COLS]; TILE_ROWS],
        norms: &[f64],
        gates: &[f32],
        sums: &mut TileSums,
    ) {
        let [contribution, contribution_abs, activation, energy, peak, mean, second] = sums;
        for (((q, h), &norm), &gate) in q.0.iter().zip(h).zip(norms).zip(gates) {
            // A zero norm marks a zero or non-finite output: its contributions are 0, whatever h and q are.
            let live = norm > 0.0;
            let inverse = if live { (1.0 / (norm + CONTRIBUTION_EPSILON)) as f32 } else { 0.0 };
            let gate_sq = f64::from(gate) * f64::from(gate);
            for j in 0..TILE_COLS {
                let term = if live { h[j] * q[j] * inverse } else { 0.0 };
                let (term, value) = (f64::from(term), f64::from(h[j]));
                contribution[j] += term;
                contribution_abs[j] += term.abs();
                activation[j] += value.abs();
                mean[j] += value;
                let square = value * value;
                second[j] += square;
                energy[j] = square.mul_add(gate_sq, energy[j]);
                let gated = square * gate_sq;
                peak[j] = if gated > peak[j] { gated } else { peak[j] };
            }
        }
    }
}

/// Squared weight norms of one expert's neurons: `(‖gate row‖² + ‖up row‖² + ‖w_j‖², ‖w_j‖²)`, `[width]` each.
///
/// # Errors
/// Shapes that do not fit together.
pub fn neuron_weight_norms(
    expert: &ExpertWeights<'_>,
) -> Result<(Vec<f64>, Vec<f64>), KernelError> {
    let hidden = expert.gate.cols();
    let down = column_squares(&expert.down)?;
    let mut all = down.clone();
    let mut row = vec![0f32; hidden];
    for matrix in [&expert.gate, &expert.up] {
        for (neuron, sum) in all.iter_mut().enumerate() {
            matrix.widen_row(neuron, &mut row)?;
            *sum += super::reduce::sum_squares(&row);
        }
    }
    Ok((all, down))
}

/// Squared norms of a matrix's columns.
pub(crate) fn column_squares(matrix: &MatrixView<'_>) -> Result<Vec<f64>, KernelError> {
    let mut squares = vec![0f64; matrix.cols()];
    let mut row = vec![0f32; matrix.cols()];
    for r in 0..matrix.rows() {
        matrix.widen_row(r, &mut row)?;
        add_squares(&row, &mut squares);
    }
    Ok(squares)
}

multiversion! {
    fn add_squares(row: &[f32], sums: &mut [f64]) {
        for (sum, &v) in sums.iter_mut().zip(row) {
            *sum += f64::from(v) * f64::from(v);
        }
    }
}
