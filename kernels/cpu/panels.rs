//! Packed rows of activations, group by group, in panels of up to 14 rows.

use std::ops::Range;

use rayon::prelude::*;

use super::pack::{Packing, pack_rows};
use super::tile::TILE_ROWS;
use crate::error::check_len;
use crate::{Compute, ExpertGroups, KernelError};

/// One panel: rows `first_row..first_row + rows`, all of one group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Panel {
    pub(crate) first_row: usize,
    pub(crate) rows: usize,
}

/// The panels of a group of consecutive rows.
pub(crate) fn panels_of(rows: Range<usize>) -> impl Iterator<Item = Panel> {
    let end = rows.end;
    rows.step_by(TILE_ROWS).map(move |first_row| Panel {
        first_row,
        rows: (end - first_row).min(TILE_ROWS),
    })
}

/// Splits a group's rows into runs that are worth a task of their own, where `column_tasks` alone would leave threads idle.
/// Every run but the last is whole panels, so the panels are those of the undivided group.
pub(crate) fn row_runs(
    rows: Range<usize>,
    column_tasks: usize,
) -> impl Iterator<Item = Range<usize>> {
    // Fewer rows than this would repeat the packing of the weights too often.
    const MIN_PANELS: usize = 10;
    let wanted = (4 * rayon::current_num_threads()).div_ceil(column_tasks.max(1));
    let panels = rows.len().div_ceil(TILE_ROWS);
    let per_run = panels.div_ceil(wanted).max(MIN_PANELS.min(panels)).max(1) * TILE_ROWS;
    let end = rows.end;
    rows.step_by(per_run)
        .map(move |first| first..(first + per_run).min(end))
}

/// Where elements `columns` of a panel's rows lie in packed rows of length `inner`. A pair may not straddle the start.
pub(crate) fn packed_range(
    packing: Packing,
    inner: usize,
    panel: Panel,
    columns: Range<usize>,
) -> Range<usize> {
    let base = panel.first_row * packing.steps(inner);
    let (from, to) = match packing {
        Packing::Pairs => (columns.start / 2, columns.end.div_ceil(2)),
        Packing::F32 | Packing::Rounded => (columns.start, columns.end),
    };
    base + from * panel.rows..base + to * panel.rows
}

/// Makes room for `len` elements without touching those that are there: results overwrite them anyway.
pub(crate) fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}

/// Rows of length `inner`, packed for the tile kernel. The buffer is kept from call to call.
#[derive(Debug)]
pub struct PackedRows {
    packing: Packing,
    inner: usize,
    num_rows: usize,
    data: Vec<u32>,
}

impl Default for PackedRows {
    fn default() -> Self {
        Self {
            packing: Packing::F32,
            inner: 0,
            num_rows: 0,
            data: Vec::new(),
        }
    }
}

impl PackedRows {
    /// Bytes that `rows` rows of length `inner` take.
    #[must_use]
    pub fn bytes(compute: Compute, rows: usize, inner: usize) -> usize {
        size_of::<u32>() * rows * Packing::of(compute).steps(inner)
    }

    /// Packs `x`, `[rows, inner]`, as one group.
    ///
    /// # Errors
    /// [`KernelError::Length`] if `x` is no multiple of `inner`.
    pub fn new(compute: Compute, x: &[f32], inner: usize) -> Result<Self, KernelError> {
        let mut packed = Self::default();
        packed.pack(compute, x, inner, inner)?;
        Ok(packed)
    }

    /// Packs the first `inner` elements of every `pitch` of `x` as one group, in the buffer that is there.
    ///
    /// # Errors
    /// [`KernelError::Length`] if `x` is no multiple of `pitch`, [`KernelError::Invalid`] if rows are longer than it.
    pub fn pack(
        &mut self,
        compute: Compute,
        x: &[f32],
        inner: usize,
        pitch: usize,
    ) -> Result<(), KernelError> {
        if inner > pitch {
            return Err(KernelError::Invalid {
                what: "packed rows",
                why: format!("{inner} elements do not fit in rows of {pitch}"),
            });
        }
        let num_rows = x.len().checked_div(pitch).unwrap_or(0);
        check_len("packed rows", num_rows * pitch, x.len())?;
        let rows = std::iter::once(0..num_rows);
        self.fill(compute, inner, rows, num_rows, |row| {
            &x[row * pitch..row * pitch + inner]
        });
        Ok(())
    }

    /// Packs the rows of `x` (`[tokens, inner]`) that each expert's tokens select.
    pub(crate) fn gather(
        &mut self,
        compute: Compute,
        x: &[f32],
        inner: usize,
        groups: &ExpertGroups,
    ) {
        let ids = groups.token_ids();
        self.fill(
            compute,
            inner,
            (0..groups.num_experts()).map(|e| groups.rows(e)),
            groups.num_rows(),
            |row| {
                let token = ids[row] as usize;
                &x[token * inner..(token + 1) * inner]
            },
        );
    }

    /// Makes room for rows of length `inner` that are written panel by panel, each at [`packed_range`].
    pub(crate) fn prepare(
        &mut self,
        packing: Packing,
        inner: usize,
        num_rows: usize,
    ) -> &mut [u32] {
        (self.packing, self.inner, self.num_rows) = (packing, inner, num_rows);
        let len = num_rows * packing.steps(inner);
        grow(&mut self.data, len);
        &mut self.data[..len]
    }

    fn fill<'x>(
        &mut self,
        compute: Compute,
        inner: usize,
        groups: impl Iterator<Item = Range<usize>>,
        num_rows: usize,
        row: impl Fn(usize) -> &'x [f32] + Sync,
    ) {
        self.packing = Packing::of(compute);
        self.inner = inner;
        self.num_rows = num_rows;
        let steps = self.packing.steps(inner);
        grow(&mut self.data, num_rows * steps);
        let mut rest = &mut self.data[..num_rows * steps];
        let mut work = Vec::with_capacity(num_rows.div_ceil(TILE_ROWS) + 8);
        for panel in groups.flat_map(panels_of) {
            let (mine, tail) = rest.split_at_mut(panel.rows * steps);
            rest = tail;
            work.push((panel, mine));
        }
        let packing = self.packing;
        work.into_par_iter()
            .with_min_len(8)
            .for_each(|(panel, out)| {
                let mut rows: [&[f32]; TILE_ROWS] = [&[]; TILE_ROWS];
                for (i, slot) in rows[..panel.rows].iter_mut().enumerate() {
                    *slot = row(panel.first_row + i);
                }
                if steps > 0 {
                    pack_rows(packing, &rows[..panel.rows], out);
                }
            });
    }

    pub(crate) fn packing(&self) -> Packing {
        self.packing
    }

    /// Bytes of the buffer.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        size_of_val(&self.data[..])
    }

    /// Row length.
    #[must_use]
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// Rows held.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    pub(crate) fn panel(&self, panel: Panel) -> &[u32] {
        let steps = self.packing.steps(self.inner);
        &self.data[panel.first_row * steps..(panel.first_row + panel.rows) * steps]
    }
}
