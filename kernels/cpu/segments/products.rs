//! Products of all pairs of segments, a tile at a time: no table of them ever exists.

use std::ops::Range;

use super::Segments;
use crate::cpu::linear::{PackedRows, columns_per_task, with_blocks};
use crate::cpu::moe::ExpertWeights;
use crate::cpu::pack::{BlockRows, Packing, pack_columns};
use crate::cpu::panels::panels_of;
use crate::cpu::tile::{TILE_COLS, Tile, multiply};
use crate::{Compute, KernelError, MatrixView};

/// Gate, up, down.
pub(super) const PARTS: usize = 3;

/// Segments as the rows of products, packed part by part; parts that are not wanted are left out.
pub(super) struct Rows([Option<PackedRows>; PARTS]);

impl Rows {
    pub(super) fn new(
        compute: Compute,
        segments: &Segments,
        wanted: [bool; PARTS],
    ) -> Result<Self, KernelError> {
        let mut parts = [None, None, None];
        for ((part, table), wanted) in parts.iter_mut().zip(segments.tables()).zip(wanted) {
            if wanted {
                *part = Some(PackedRows::new(compute, table, segments.hidden())?);
            }
        }
        Ok(Self(parts))
    }
}

/// Where the columns' down parts lie.
enum Down<'a> {
    /// `[n, H]`.
    Rows(MatrixView<'a>),
    /// `[H, n]`.
    Columns(MatrixView<'a>),
}

/// Segments as the columns of products.
pub(super) struct Columns<'a> {
    gate: MatrixView<'a>,
    up: MatrixView<'a>,
    down: Down<'a>,
}

impl<'a> Columns<'a> {
    pub(super) fn of_expert(expert: &ExpertWeights<'a>) -> Self {
        Self {
            gate: expert.gate,
            up: expert.up,
            down: Down::Columns(expert.down),
        }
    }

    pub(super) fn of_segments(segments: &'a Segments) -> Result<Self, KernelError> {
        let (n, h) = (segments.len(), segments.hidden());
        let [gate, up, down] = segments.tables();
        Ok(Self {
            gate: MatrixView::from_f32(n, h, gate)?,
            up: MatrixView::from_f32(n, h, up)?,
            down: Down::Rows(MatrixView::from_f32(n, h, down)?),
        })
    }

    fn len(&self) -> usize {
        self.gate.rows()
    }

    fn pack(&self, part: usize, first: usize, packing: Packing, out: &mut [u32]) {
        match (part, &self.down) {
            (0, _) => BlockRows::plain(&self.gate, first).pack(packing, out),
            (1, _) => BlockRows::plain(&self.up, first).pack(packing, out),
            (_, Down::Rows(down)) => BlockRows::plain(down, first).pack(packing, out),
            (_, Down::Columns(down)) => pack_columns(packing, down, first, out),
        }
    }
}

/// One tile of each part's products: rows from `first_row`, columns from `first_column`.
pub(super) struct Products<'a> {
    pub(super) first_row: usize,
    pub(super) rows: usize,
    /// A multiple of [`TILE_COLS`]. Columns behind the last are products with zeros.
    pub(super) first_column: usize,
    /// Zeros for a part that was left out.
    pub(super) tiles: &'a [Tile; PARTS],
}

/// Gives `take` the products of rows `run` with all columns. For each row columns come in order.
pub(super) fn for_each_tile(
    rows: &Rows,
    run: &Range<usize>,
    columns: &Columns<'_>,
    mut take: impl FnMut(&Products<'_>),
) {
    let wanted: Vec<(usize, &PackedRows)> = rows
        .0
        .iter()
        .enumerate()
        .filter_map(|(part, rows)| Some((part, rows.as_ref()?)))
        .collect();
    let Some(&(_, some)) = wanted.first() else {
        return;
    };
    let (packing, steps) = (some.packing(), some.packing().steps(some.inner()));
    let block_len = steps * TILE_COLS;
    // All parts of a pass stay in the second cache level together.
    let pass = (columns_per_task(steps) / TILE_COLS / wanted.len()).max(1) * TILE_COLS;
    let mut tiles = [const { Tile::new() }; PARTS];
    for first in (0..columns.len()).step_by(pass) {
        let blocks = (columns.len() - first).min(pass).div_ceil(TILE_COLS);
        with_blocks(blocks * wanted.len() * block_len, |packed| {
            for b in 0..blocks {
                for (i, &(part, _)) in wanted.iter().enumerate() {
                    let at = (b * wanted.len() + i) * block_len;
                    let block = &mut packed[at..at + block_len];
                    columns.pack(part, first + b * TILE_COLS, packing, block);
                }
            }
            for panel in panels_of(run.clone()) {
                for b in 0..blocks {
                    for (i, &(part, rows)) in wanted.iter().enumerate() {
                        let at = (b * wanted.len() + i) * block_len;
                        let block = &packed[at..at + block_len];
                        let a = rows.panel(panel);
                        multiply(packing, a, panel.rows, block, &mut tiles[part]);
                    }
                    take(&Products {
                        first_row: panel.first_row,
                        rows: panel.rows,
                        first_column: first + b * TILE_COLS,
                        tiles: &tiles,
                    });
                }
            }
        });
    }
}

/// The largest of a tile's row, if it is larger than `best`; ties go to the lower column, NaN is never larger.
pub(super) fn larger_than(best: Option<f32>, values: &[f32; TILE_COLS]) -> Option<(usize, f32)> {
    let mut best = best.unwrap_or(f32::NEG_INFINITY);
    // Most rows have found their best long ago.
    if !values.iter().any(|&v| v > best) {
        return None;
    }
    let mut found = None;
    for (c, &value) in values.iter().enumerate() {
        if value > best {
            best = value;
            found = Some((c, value));
        }
    }
    found
}
