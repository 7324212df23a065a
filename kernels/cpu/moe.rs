//! The grouped expert forward pass over experts of different width, and the weighted combine.
//!
//! For expert e with width I_e and rows T_e (arXiv 2606.09885 notation, `docs/methods.md` section 1):
//! `h = silu(W_gate x) · (W_up x)` `[T_e, I_e]`, `y = W_down h` `[T_e, H]`, `out_t = Σ g y`.

use std::ops::Range;

use rayon::prelude::*;

use super::disjoint::Disjoint;
use super::dispatch::multiversion;
use super::elementwise::{add_scaled, silu};
use super::linear::{columns_per_task, with_blocks};
use super::pack::{BlockRows, Packing, check_shape, pack_rows, unpack_steps};
use super::panels::{PackedRows, Panel, grow, packed_range, panels_of, row_runs};
use super::tile::{TILE_COLS, TILE_ROWS, Tile, copy_row, multiply};
use crate::error::check_len;
use crate::{Compute, ExpertGroups, KernelError, MatrixView};

/// Neurons of a tile of the gate/up product: half its columns are gate rows, half the up rows of the same neurons.
const TILE_NEURONS: usize = TILE_COLS / 2;

/// Weights of one expert; the width may differ from expert to expert and may be 0.
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<'a> {
    /// `[width, H]`.
    pub gate: MatrixView<'a>,
    /// `[width, H]`.
    pub up: MatrixView<'a>,
    /// `[H, width]`.
    pub down: MatrixView<'a>,
}

impl ExpertWeights<'_> {
    /// Number of neurons.
    #[must_use]
    pub fn width(&self) -> usize {
        self.gate.rows()
    }

    pub(crate) fn check(&self, hidden: usize) -> Result<(), KernelError> {
        let width = self.width();
        check_shape("expert gate weight", &self.gate, width, hidden)?;
        check_shape("expert up weight", &self.up, width, hidden)?;
        check_shape("expert down weight", &self.down, hidden, width)?;
        let dtypes = [self.gate.dtype(), self.up.dtype()];
        if dtypes[0] == dtypes[1] {
            return Ok(());
        }
        Err(KernelError::Invalid {
            what: "expert weights",
            why: format!("gate is {:?}, up {:?}", dtypes[0], dtypes[1]),
        })
    }
}

/// Intermediate results of the expert forward pass, kept packed; buffers are reused from call to call.
#[derive(Debug, Default)]
pub struct ExpertActivations {
    x: PackedRows,
    /// Per expert, per panel: `[steps(width), rows]`.
    h: Vec<u32>,
    h_offsets: Vec<usize>,
    y: Vec<f32>,
    /// y once more as an operand, where the scoring asked for it.
    packed_y: PackedRows,
    keeps_packed_y: bool,
    num_rows: usize,
    hidden: usize,
    packing: Option<Packing>,
}

impl ExpertActivations {
    /// `[rows, H]` ungated expert outputs y of the last forward pass.
    #[must_use]
    pub fn outputs(&self) -> &[f32] {
        &self.y[..self.num_rows * self.hidden]
    }

    /// Hidden size H of the last forward pass.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Bytes of the buffers, as [`activation_bytes`] counts them.
    #[must_use]
    pub fn held_bytes(&self) -> [usize; 4] {
        [
            self.x.held_bytes(),
            size_of_val(&self.h[..]),
            size_of_val(&self.y[..]),
            self.packed_y.held_bytes(),
        ]
    }

    /// Whether the next forward passes also keep y packed, as [`super::neuron::accumulate_neuron_sums`] needs it.
    pub fn keep_packed_outputs(&mut self, keep: bool) {
        self.keeps_packed_y = keep;
    }

    pub(crate) fn packed_outputs(&self) -> Option<&PackedRows> {
        self.keeps_packed_y.then_some(&self.packed_y)
    }

    pub(crate) fn packing(&self) -> Packing {
        self.packing.unwrap_or(Packing::F32)
    }

    fn h_panel(&self, groups: &ExpertGroups, expert: usize, steps: usize, panel: Panel) -> &[u32] {
        let start = self.h_offsets[expert] + (panel.first_row - groups.rows(expert).start) * steps;
        &self.h[start..start + panel.rows * steps]
    }

    /// Copies neurons `first..first + 32` of a panel's h, row by row; neurons past `width` are left alone.
    pub(crate) fn h_tile(
        &self,
        groups: &ExpertGroups,
        expert: usize,
        width: usize,
        panel: Panel,
        first: usize,
        tile: &mut [[f32; TILE_COLS]; TILE_ROWS],
    ) {
        let packing = self.packing();
        let packed = self.h_panel(groups, expert, packing.steps(width), panel);
        let count = (width - first).min(TILE_COLS);
        match packing {
            Packing::F32 | Packing::Rounded => {
                let steps = &packed[first * panel.rows..(first + count) * panel.rows];
                unpack_steps(steps, panel.rows, 0, tile);
            }
            Packing::Pairs => {
                let pairs = packed[first / 2 * panel.rows..]
                    .chunks_exact(panel.rows)
                    .take(count.div_ceil(2));
                for (j, values) in pairs.enumerate() {
                    for (row, &v) in tile.iter_mut().zip(values) {
                        row[2 * j] = f32::from_bits(v << 16);
                        row[2 * j + 1] = f32::from_bits(v & 0xffff_0000);
                    }
                }
            }
        }
    }
}

/// Bytes of the buffers that [`ExpertActivations`] keeps for `rows` rows of experts of one width: x, h, y, and y packed
/// where that is kept. Each grows to what its largest pass needs.
#[must_use]
pub fn activation_bytes(
    compute: Compute,
    rows: usize,
    (hidden, width): (usize, usize),
    keeps_packed: bool,
) -> [usize; 4] {
    let packed = |inner| PackedRows::bytes(compute, rows, inner);
    let packed_y = if keeps_packed { packed(hidden) } else { 0 };
    [
        packed(hidden),
        packed(width),
        size_of::<f32>() * rows * hidden,
        packed_y,
    ]
}

impl ExpertActivations {
    /// h of an expert of the last forward pass, which was over `groups`, transposed: `[width, rows]`.
    #[must_use]
    pub fn transposed_h(&self, groups: &ExpertGroups, expert: usize, width: usize) -> Vec<f32> {
        let rows = groups.rows(expert);
        let mut out = vec![0f32; width * rows.len()];
        let mut tile = [[0f32; TILE_COLS]; TILE_ROWS];
        for panel in panels_of(rows.clone()) {
            for first in (0..width).step_by(TILE_COLS) {
                self.h_tile(groups, expert, width, panel, first, &mut tile);
                for c in 0..(width - first).min(TILE_COLS) {
                    let at = (first + c) * rows.len() + panel.first_row - rows.start;
                    for (out, row) in out[at..at + panel.rows].iter_mut().zip(&tile) {
                        *out = row[c];
                    }
                }
            }
        }
        out
    }
}

/// Runs every expert on its rows: fills `activations` with h and y.
///
/// `x` is `[tokens, H]`. Experts without rows cost nothing; an expert of width 0 gives zero rows.
///
/// # Errors
/// Lengths and shapes that do not fit together; nothing is computed then.
pub fn expert_forward(
    compute: Compute,
    experts: &[ExpertWeights<'_>],
    groups: &ExpertGroups,
    x: &[f32],
    activations: &mut ExpertActivations,
) -> Result<(), KernelError> {
    check_len("experts", groups.num_experts(), experts.len())?;
    let hidden = experts.first().map_or(0, |e| e.down.rows());
    for expert in experts {
        expert.check(hidden)?;
    }
    check_len("expert input", groups.num_tokens() * hidden, x.len())?;
    activations.hidden = hidden;
    activations.x.gather(compute, x, hidden, groups);
    gate_up(experts, groups, activations);
    down(experts, groups, activations);
    Ok(())
}

/// A run of neurons (or outputs) of one expert: the unit of parallel work.
struct Task {
    expert: usize,
    rows: Range<usize>,
    first: usize,
    count: usize,
}

/// Splits every expert that has rows into runs of at most `per_task(expert)` of its `size(expert)` items, and its rows
/// too where that alone makes too few tasks.
fn tasks(
    groups: &ExpertGroups,
    size: impl Fn(usize) -> usize,
    per_task: impl Fn(usize) -> usize,
) -> Vec<Task> {
    let busy: Vec<usize> = (0..groups.num_experts())
        .filter(|&e| !groups.rows(e).is_empty())
        .collect();
    let column_tasks: usize = busy.iter().map(|&e| size(e).div_ceil(per_task(e))).sum();
    let mut tasks = Vec::new();
    for expert in busy {
        let (size, step) = (size(expert), per_task(expert));
        for rows in row_runs(groups.rows(expert), column_tasks) {
            tasks.extend((0..size).step_by(step).map(|first| Task {
                expert,
                rows: rows.clone(),
                first,
                count: (size - first).min(step),
            }));
        }
    }
    tasks
}

fn gate_up(experts: &[ExpertWeights<'_>], groups: &ExpertGroups, a: &mut ExpertActivations) {
    let packing = a.x.packing();
    a.packing = Some(packing);
    a.h_offsets.clear();
    let mut total = 0;
    for (e, expert) in experts.iter().enumerate() {
        a.h_offsets.push(total);
        total += groups.rows(e).len() * packing.steps(expert.width());
    }
    grow(&mut a.h, total);
    let steps = packing.steps(a.hidden);
    let per_task = columns_per_task(steps) / 2;
    let tasks = tasks(groups, |e| experts[e].width(), |_| per_task);
    let h = Disjoint::new(&mut a.h);
    let (x, h_offsets) = (&a.x, &a.h_offsets);
    tasks.par_iter().for_each(|task| {
        let expert = &experts[task.expert];
        let h_steps = packing.steps(expert.width());
        let blocks = task.count.div_ceil(TILE_NEURONS);
        with_blocks(blocks * steps * TILE_COLS, |packed| {
            for b in 0..blocks {
                let block = &mut packed[b * steps * TILE_COLS..(b + 1) * steps * TILE_COLS];
                BlockRows::gate_up(&expert.gate, &expert.up, task.first + b * TILE_NEURONS)
                    .pack(packing, block);
            }
            let mut tile = Tile::new();
            let rows = groups.rows(task.expert);
            for panel in panels_of(task.rows.clone()) {
                let base = h_offsets[task.expert] + (panel.first_row - rows.start) * h_steps;
                for b in 0..blocks {
                    let block = &packed[b * steps * TILE_COLS..(b + 1) * steps * TILE_COLS];
                    multiply(packing, x.panel(panel), panel.rows, block, &mut tile);
                    swiglu(&mut tile, panel.rows);
                    let first = task.first + b * TILE_NEURONS;
                    let count = (expert.width() - first).min(TILE_NEURONS);
                    // First neurons are multiples of 16, so a pair never straddles two tiles.
                    let (from, to) = match packing {
                        Packing::Pairs => (first / 2, (first + count).div_ceil(2)),
                        Packing::F32 | Packing::Rounded => (first, first + count),
                    };
                    // SAFETY: the panel is this expert's, the neurons are this task's alone.
                    let out = unsafe { h.range(base + from * panel.rows..base + to * panel.rows) };
                    pack_tile(packing, &tile, panel.rows, count, out);
                }
            }
        });
    });
}

/// Writes the first `columns` columns of a tile as steps of packed rows.
fn pack_tile(packing: Packing, tile: &Tile, rows: usize, columns: usize, out: &mut [u32]) {
    let slices: [&[f32]; TILE_ROWS] = std::array::from_fn(|r| &tile.0[r][..columns]);
    pack_rows(packing, &slices[..rows], out);
}

multiversion! {
    /// Columns 0..16 become silu(gate) · up.
    fn swiglu(tile: &mut Tile, rows: usize) {
        for row in &mut tile.0[..rows] {
            let (gate, up) = row.split_at_mut(TILE_NEURONS);
            for (g, &u) in gate.iter_mut().zip(up.iter()) {
                *g = silu(*g) * u;
            }
        }
    }
}

fn down(experts: &[ExpertWeights<'_>], groups: &ExpertGroups, a: &mut ExpertActivations) {
    let hidden = a.hidden;
    let mut y = std::mem::take(&mut a.y);
    a.num_rows = groups.num_rows();
    grow(&mut y, a.num_rows * hidden);
    let packing = a.packing();
    let steps_of = |e: usize| packing.steps(experts[e].width());
    let tasks = tasks(groups, |_| hidden, |e| columns_per_task(steps_of(e)));
    let mut packed_y = std::mem::take(&mut a.packed_y);
    let packed_out = a
        .keeps_packed_y
        .then(|| Disjoint::new(packed_y.prepare(packing, hidden, groups.num_rows())));
    let out = Disjoint::new(&mut y);
    let activations = &*a;
    tasks.par_iter().for_each(|task| {
        let expert = &experts[task.expert];
        let steps = steps_of(task.expert);
        let blocks = task.count.div_ceil(TILE_COLS);
        with_blocks(blocks * steps * TILE_COLS, |packed| {
            for b in 0..blocks {
                let block = &mut packed[b * steps * TILE_COLS..(b + 1) * steps * TILE_COLS];
                BlockRows::plain(&expert.down, task.first + b * TILE_COLS).pack(packing, block);
            }
            let mut tile = Tile::new();
            for panel in panels_of(task.rows.clone()) {
                let h = activations.h_panel(groups, task.expert, steps, panel);
                for b in 0..blocks {
                    let block = &packed[b * steps * TILE_COLS..(b + 1) * steps * TILE_COLS];
                    multiply(packing, h, panel.rows, block, &mut tile);
                    let column = task.first + b * TILE_COLS;
                    let count = (hidden - column).min(TILE_COLS);
                    for (r, row) in tile.0[..panel.rows].iter().enumerate() {
                        let start = (panel.first_row + r) * hidden + column;
                        // SAFETY: the row is this expert's, the columns are this task's alone.
                        copy_row(row, unsafe { out.range(start..start + count) });
                    }
                    if let Some(packed_out) = &packed_out {
                        let range = packed_range(packing, hidden, panel, column..column + count);
                        // SAFETY: the panel is this expert's, the columns are this task's alone.
                        pack_tile(packing, &tile, panel.rows, count, unsafe {
                            packed_out.range(range)
                        });
                    }
                }
            }
        });
    });
    a.y = y;
    a.packed_y = packed_y;
}

/// `out_t = Σ g y` over each token's rows, in the order the experts were chosen; `out` is `[tokens, H]`.
///
/// # Errors
/// [`KernelError::Length`] if `outputs` is not `[rows, H]` or `out` not `[tokens, H]`.
pub fn combine(
    groups: &ExpertGroups,
    outputs: &[f32],
    hidden: usize,
    out: &mut [f32],
) -> Result<(), KernelError> {
    check_len("expert outputs", groups.num_rows() * hidden, outputs.len())?;
    check_len("combined output", groups.num_tokens() * hidden, out.len())?;
    out.par_chunks_mut(hidden.max(1))
        .enumerate()
        .with_min_len(16)
        .for_each(|(token, out)| {
            out.fill(0.0);
            for &row in groups.rows_of_token(token) {
                let row = row as usize;
                add_scaled(
                    out,
                    &outputs[row * hidden..(row + 1) * hidden],
                    groups.weights()[row],
                );
            }
        });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_as_large_as_is_said() {
        let (hidden, width, tokens) = (24, 7, 37);
        let values = vec![0.5; hidden * width];
        let rows = |rows, cols| MatrixView::from_f32(rows, cols, &values).unwrap();
        let expert = ExpertWeights {
            gate: rows(width, hidden),
            up: rows(width, hidden),
            down: rows(hidden, width),
        };
        for (compute, keeps) in [(Compute::F32, false), (Compute::Bf16, true)] {
            let mut activations = ExpertActivations::default();
            activations.keep_packed_outputs(keeps);
            let x = vec![0.25; tokens * hidden];
            let groups = ExpertGroups::dense(tokens);
            expert_forward(compute, &[expert], &groups, &x, &mut activations).unwrap();
            let said = activation_bytes(compute, tokens, (hidden, width), keeps);
            assert_eq!(activations.held_bytes(), said, "{compute:?}");
        }
    }
}
