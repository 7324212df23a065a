//! Blocks of 32 weight rows or columns, widened, dequantised or paired on the way from the file's bytes.

use half::bf16;

use super::rows::{round_in_place, to_pairs};
use super::transpose;
use super::{Packing, bf16_bits};
use crate::cpu::dispatch::multiversion;
use crate::cpu::tile::TILE_COLS;
use crate::matrix::{Dtype, MatrixView, Row};

/// Elements of a row that are converted at a time: 16 rows of them stay in the first cache level until they are moved.
const RUN: usize = 256;

/// Packs weight rows as the 32 columns of a block, `[steps, 32]`: column c is row `rows[c]` of `matrices[c]`, or zero.
pub(crate) struct BlockRows<'a> {
    /// The row of each column; an empty one for a column of zeros.
    pub(crate) columns: [Row<'a>; TILE_COLS],
    /// Element type of all of them.
    pub(crate) dtype: Dtype,
    /// Row length.
    pub(crate) inner: usize,
}

impl<'a> BlockRows<'a> {
    /// Columns `first..first + 32` are the matrix's rows; rows past the end are zero.
    pub(crate) fn plain(matrix: &MatrixView<'a>, first: usize) -> Self {
        let columns = std::array::from_fn(|c| row_or_zeros(matrix, first + c));
        Self {
            columns,
            dtype: matrix.dtype(),
            inner: matrix.cols(),
        }
    }

    /// 16 gate rows, then the 16 up rows of the same neurons; neurons past the end are zero.
    pub(crate) fn gate_up(gate: &MatrixView<'a>, up: &MatrixView<'a>, first: usize) -> Self {
        let columns = std::array::from_fn(|c| {
            if c < 16 {
                row_or_zeros(gate, first + c)
            } else {
                row_or_zeros(up, first + c - 16)
            }
        });
        Self {
            columns,
            dtype: gate.dtype(),
            inner: gate.cols(),
        }
    }

    /// Writes the block; `out` has `steps(inner) · 32` elements.
    pub(crate) fn pack(&self, packing: Packing, out: &mut [u32]) {
        let steps = packing.steps(self.inner);
        assert_eq!(out.len(), steps * TILE_COLS);
        // The down projection of an expert without neurons.
        if steps == 0 {
            return;
        }
        let mut done = 0;
        if transpose::is_available() {
            // Pairs: only whole pairs can be moved.
            let whole = if packing == Packing::Pairs {
                self.inner / 2
            } else {
                self.inner
            };
            done = whole / 16 * 16;
            for half in 0..2 {
                let columns = std::array::from_fn(|c| self.columns[16 * half + c]);
                self.move_half(packing, &columns, done, &mut out[16 * half..]);
            }
        }
        self.pack_from(packing, done, out);
    }

    /// The first `steps` steps, whole sixteens, of 16 columns, by 16×16 transposes; `out` begins at their first element.
    fn move_half(&self, packing: Packing, columns: &[Row<'a>; 16], steps: usize, out: &mut [u32]) {
        // bf16 pairs are moved as they lie in the file.
        let stored = match (packing, self.dtype) {
            (Packing::Pairs, Dtype::Bf16) => Some(transpose::Source::Pairs),
            (Packing::F32 | Packing::Rounded, Dtype::Bf16) => Some(transpose::Source::Bf16),
            (Packing::F32, Dtype::F32) => Some(transpose::Source::F32),
            _ => None,
        };
        assert!(steps == 0 || out.len() >= (steps - 1) * TILE_COLS + 16);
        if let Some(source) = stored {
            for column in columns {
                let bytes = self.inner * self.dtype.size();
                assert!(column.is_empty() || column.bytes().len() == bytes);
                assert!(column.is_empty() || column.dtype() == self.dtype);
            }
            let bytes = columns.map(|column| column.bytes());
            // SAFETY: available; non-empty columns hold `inner` elements, `out` 32 per step.
            unsafe { transpose::columns(source, &bytes, steps / 16, out.as_mut_ptr()) };
            return;
        }
        let (per_step, source) = if packing == Packing::Pairs {
            (2, transpose::Source::Pairs)
        } else {
            (1, transpose::Source::F32)
        };
        let mut staged = [[0u32; RUN]; 16];
        for first in (0..steps).step_by(RUN / per_step) {
            let count = (steps - first).min(RUN / per_step);
            for (column, staged) in columns.iter().zip(&mut staged) {
                if !column.is_empty() {
                    convert(packing, column, first * per_step, &mut staged[..count]);
                }
            }
            let bytes = std::array::from_fn(|c| {
                if columns[c].is_empty() {
                    &[][..]
                } else {
                    bytemuck::cast_slice(&staged[c])
                }
            });
            // SAFETY: available; a run holds `count` steps, a multiple of 16, and `out` 32 elements per step.
            unsafe {
                let to = out.as_mut_ptr().add(first * TILE_COLS);
                transpose::columns(source, &bytes, count / 16, to);
            }
        }
    }

    /// Steps `from..` one by one.
    fn pack_from(&self, packing: Packing, from: usize, out: &mut [u32]) {
        let steps = packing.steps(self.inner);
        let per_step = if packing == Packing::Pairs { 2 } else { 1 };
        let first = (from * per_step).min(self.inner);
        let mut values = vec![0f32; self.inner - first];
        for (c, column) in self.columns.iter().enumerate() {
            if column.is_empty() {
                for step in from..steps {
                    out[step * TILE_COLS + c] = 0;
                }
                continue;
            }
            column.widen(first, &mut values);
            for step in from..steps {
                let i = (step - from) * per_step;
                out[step * TILE_COLS + c] = match packing {
                    Packing::F32 => values[i].to_bits(),
                    Packing::Rounded => bf16_bits(values[i]) << 16,
                    Packing::Pairs => {
                        bf16_bits(values[i]) | values.get(i + 1).map_or(0, |&v| bf16_bits(v) << 16)
                    }
                };
            }
        }
    }
}

fn row_or_zeros<'a>(matrix: &MatrixView<'a>, row: usize) -> Row<'a> {
    if row < matrix.rows() {
        matrix.row(row)
    } else {
        Row::EMPTY
    }
}

/// Whole steps of a row from element `first` on, as the packing holds them.
fn convert(packing: Packing, row: &Row<'_>, first: usize, steps: &mut [u32]) {
    match packing {
        Packing::F32 => row.widen(first, bytemuck::cast_slice_mut(steps)),
        Packing::Rounded => {
            row.widen(first, bytemuck::cast_slice_mut(steps));
            round_in_place(steps);
        }
        Packing::Pairs => {
            let mut values = [0f32; RUN];
            let values = &mut values[..2 * steps.len()];
            row.widen(first, values);
            to_pairs(values, steps);
        }
    }
}

/// Packs columns `first..first + 32` of `matrix` (`[inner, n]`), zero past the end: the transposed product.
pub(crate) fn pack_columns(
    packing: Packing,
    matrix: &MatrixView<'_>,
    first: usize,
    out: &mut [u32],
) {
    let count = (matrix.cols() - first).min(TILE_COLS);
    let (rows, steps) = (matrix.rows(), out.as_chunks_mut::<TILE_COLS>().0);
    match packing {
        Packing::F32 | Packing::Rounded => {
            for (row, step) in steps.iter_mut().enumerate() {
                columns_f32(&matrix.row(row), first, count, step);
            }
            if packing == Packing::Rounded && matrix.dtype() != Dtype::Bf16 {
                round_in_place(out);
            }
        }
        Packing::Pairs => {
            for (pair, step) in steps.iter_mut().enumerate() {
                let pair = [2 * pair, 2 * pair + 1];
                let pair = pair.map(|row| (row < rows).then(|| matrix.row(row)));
                columns_pairs(pair, first, count, step);
            }
        }
    }
}

/// One step of a block from up to 32 values, zero past their end.
#[inline]
pub(crate) fn pack_step(values: &[f32], step: &mut [u32; TILE_COLS]) {
    if let Some(whole) = values.first_chunk::<TILE_COLS>() {
        *step = whole.map(f32::to_bits);
    } else {
        *step = [0; TILE_COLS];
        for (to, v) in step.iter_mut().zip(values) {
            *to = v.to_bits();
        }
    }
}

/// Elements `first..first + count` of a row, widened; zeros after them.
fn columns_f32(row: &Row<'_>, first: usize, count: usize, out: &mut [u32; TILE_COLS]) {
    if row.dtype() == Dtype::Bf16 {
        widen_bf16(&row.bytes()[2 * first..2 * (first + count)], out);
        return;
    }
    *out = [0; TILE_COLS];
    row.widen(first, bytemuck::cast_slice_mut(&mut out[..count]));
}

multiversion! {
    fn widen_bf16(bytes: &[u8], out: &mut [u32; TILE_COLS]) {
        *out = [0; TILE_COLS];
        for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *o = u32::from(u16::from_le_bytes(*b)) << 16;
        }
    }
}

/// The same of two neighbouring rows, rounded to bf16 and paired; the second may be missing.
fn columns_pairs(
    rows: [Option<Row<'_>>; 2],
    first: usize,
    count: usize,
    out: &mut [u32; TILE_COLS],
) {
    let mut rounded = [[bf16::ZERO; TILE_COLS]; 2];
    let [low, high]: [&[u8]; 2] = {
        let mut rounded = rounded.iter_mut();
        rows.map(|row| match (row, rounded.next()) {
            (Some(row), _) if row.dtype() == Dtype::Bf16 => {
                &row.bytes()[2 * first..2 * (first + count)]
            }
            (Some(row), Some(rounded)) => {
                row.round(first, &mut rounded[..count]);
                bytemuck::cast_slice(&*rounded)
            }
            _ => &[],
        })
    };
    pair_bf16(low, high, out);
}

multiversion! {
    fn pair_bf16(first: &[u8], second: &[u8], out: &mut [u32; TILE_COLS]) {
        *out = [0; TILE_COLS];
        for (o, b) in out.iter_mut().zip(first.as_chunks::<2>().0) {
            *o = u32::from(u16::from_le_bytes(*b));
        }
        for (o, b) in out.iter_mut().zip(second.as_chunks::<2>().0) {
            *o |= u32::from(u16::from_le_bytes(*b)) << 16;
        }
    }
}
