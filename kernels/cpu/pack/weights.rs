//! Blocks of 32 weight rows or columns, widened or paired on the way from the file's bytes.

use super::rows::round_in_place;
#[cfg(target_arch = "x86_64")]
use super::transpose;
use super::{Packing, bf16_bits};
use crate::cpu::dispatch::multiversion;
use crate::cpu::tile::TILE_COLS;
use crate::matrix::{Dtype, MatrixView, widen};

/// Packs weight rows as the 32 columns of a block, `[steps, 32]`: column c is row `rows[c]` of `matrices[c]`, or zero.
pub(crate) struct BlockRows<'a> {
    /// Row bytes of each column; empty for a column of zeros.
    pub(crate) columns: [&'a [u8]; TILE_COLS],
    /// Element type of all of them.
    pub(crate) dtype: Dtype,
    /// Row length.
    pub(crate) inner: usize,
}

impl<'a> BlockRows<'a> {
    /// Columns `first..first + 32` are the matrix's rows; rows past the end are zero.
    pub(crate) fn plain(matrix: &MatrixView<'a>, first: usize) -> Self {
        let columns = std::array::from_fn(|c| {
            if first + c < matrix.rows() {
                matrix.row_bytes(first + c)
            } else {
                &[][..]
            }
        });
        Self {
            columns,
            dtype: matrix.dtype(),
            inner: matrix.cols(),
        }
    }

    /// 16 gate rows, then the 16 up rows of the same neurons; neurons past the end are zero.
    pub(crate) fn gate_up(gate: &MatrixView<'a>, up: &MatrixView<'a>, first: usize) -> Self {
        let columns = std::array::from_fn(|c| {
            let (matrix, row) = if c < 16 {
                (gate, first + c)
            } else {
                (up, first + c - 16)
            };
            if row < matrix.rows() {
                matrix.row_bytes(row)
            } else {
                &[][..]
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
        let mut done = 0;
        #[cfg(target_arch = "x86_64")]
        if crate::cpu::isa() >= crate::cpu::Isa::Avx512 {
            // Steps per 16×16 transpose; bf16 pairs are moved as they lie in the file.
            let wide = match (packing, self.dtype) {
                (Packing::Pairs, Dtype::Bf16) => Some(transpose::Source::Pairs),
                (Packing::F32 | Packing::Rounded, Dtype::Bf16) => Some(transpose::Source::Bf16),
                (Packing::F32, Dtype::F32) => Some(transpose::Source::F32),
                _ => None,
            };
            if let Some(source) = wide {
                // Pairs: only whole pairs can be moved.
                let whole = if packing == Packing::Pairs {
                    self.inner / 2
                } else {
                    self.inner
                };
                done = whole / 16 * 16;
                for half in 0..2 {
                    let columns: &[&[u8]; 16] = self.columns[16 * half..16 * half + 16]
                        .try_into()
                        .expect("32 columns are two halves");
                    for column in columns {
                        assert!(
                            column.is_empty() || column.len() == self.inner * self.dtype.size()
                        );
                    }
                    // SAFETY: AVX-512 detected; non-empty columns hold `inner` elements, `out` 32 per step.
                    unsafe {
                        let to = out.as_mut_ptr().add(16 * half);
                        transpose::columns(source, columns, done / 16, to);
                    }
                }
            }
        }
        self.pack_from(packing, done, out);
    }

    /// Steps `from..` one by one.
    fn pack_from(&self, packing: Packing, from: usize, out: &mut [u32]) {
        let steps = packing.steps(self.inner);
        let per_step = if packing == Packing::Pairs { 2 } else { 1 };
        let size = self.dtype.size();
        let mut values = vec![0f32; self.inner - (from * per_step).min(self.inner)];
        for (c, column) in self.columns.iter().enumerate() {
            if column.is_empty() {
                for step in from..steps {
                    out[step * TILE_COLS + c] = 0;
                }
                continue;
            }
            widen(self.dtype, &column[from * per_step * size..], &mut values);
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

/// Packs columns `first..first + 32` of `matrix` (`[inner, n]`), zero past the end: the transposed product.
pub(crate) fn pack_columns(
    packing: Packing,
    matrix: &MatrixView<'_>,
    first: usize,
    out: &mut [u32],
) {
    let count = (matrix.cols() - first).min(TILE_COLS);
    let size = matrix.dtype().size();
    let slice = |row: usize| &matrix.row_bytes(row)[first * size..(first + count) * size];
    match packing {
        Packing::F32 | Packing::Rounded => {
            for (row, step) in out.as_chunks_mut::<TILE_COLS>().0.iter_mut().enumerate() {
                columns_f32(matrix.dtype(), slice(row), step);
            }
            if packing == Packing::Rounded && matrix.dtype() != Dtype::Bf16 {
                round_in_place(out);
            }
        }
        Packing::Pairs => {
            for (pair, step) in out.as_chunks_mut::<TILE_COLS>().0.iter_mut().enumerate() {
                let second = if 2 * pair + 1 < matrix.rows() {
                    slice(2 * pair + 1)
                } else {
                    &[][..]
                };
                columns_pairs(matrix.dtype(), slice(2 * pair), second, step);
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

multiversion! {
    fn columns_f32(dtype: Dtype, bytes: &[u8], out: &mut [u32; TILE_COLS]) {
        *out = [0; TILE_COLS];
        match dtype {
            Dtype::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *o = u32::from(u16::from_le_bytes(*b)) << 16;
                }
            }
            Dtype::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *o = u32::from_le_bytes(*b);
                }
            }
            Dtype::F16 => {
                let mut values = [0f32; TILE_COLS];
                let n = bytes.len() / 2;
                widen(dtype, bytes, &mut values[..n]);
                *out = values.map(f32::to_bits);
            }
        }
    }
}

multiversion! {
    fn columns_pairs(dtype: Dtype, first: &[u8], second: &[u8], out: &mut [u32; TILE_COLS]) {
        *out = [0; TILE_COLS];
        if dtype == Dtype::Bf16 {
            for (o, b) in out.iter_mut().zip(first.as_chunks::<2>().0) {
                *o = u32::from(u16::from_le_bytes(*b));
            }
            for (o, b) in out.iter_mut().zip(second.as_chunks::<2>().0) {
                *o |= u32::from(u16::from_le_bytes(*b)) << 16;
            }
        } else {
            let mut values = [0f32; TILE_COLS];
            for (bytes, shift) in [(first, 0), (second, 16)] {
                let n = bytes.len() / dtype.size();
                widen(dtype, bytes, &mut values[..n]);
                for (o, &v) in out.iter_mut().zip(&values[..n]) {
                    *o |= bf16_bits(v) << shift;
                }
            }
        }
    }
}
