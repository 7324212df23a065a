//! Neurons of an fp8 matrix in new places: codes are copied where their scale can stay, and else scaled anew.

use std::ops::Range;

use rayon::prelude::*;

use super::{FP8_BLOCK, NonFinite, decode, encode, scale_shape, storable_scale_of};
use crate::Matrix;

/// In place of a source row or column: zeros.
pub(crate) const PADDING: u32 = u32::MAX;

/// An fp8 matrix made of rows and columns of another, which are in ascending order.
pub(crate) struct Regroup<'a> {
    /// What it is made of.
    pub(crate) source: Matrix<'a>,
    /// Source of every row.
    pub(crate) rows: Vec<u32>,
    /// Source of every column.
    pub(crate) cols: Vec<u32>,
}

/// Rows or columns next to each other that come from one block of the source, or are padding.
struct Run {
    range: Range<usize>,
    /// Block of the source; `None` for padding.
    block: Option<usize>,
}

/// The runs of a block of the new matrix.
fn runs(ids: &[u32]) -> Vec<Run> {
    let block = |id: u32| (id != PADDING).then_some(id as usize / FP8_BLOCK);
    let mut start = 0;
    ids.chunk_by(|a, b| block(*a) == block(*b))
        .map(|ids| {
            let range = start..start + ids.len();
            start = range.end;
            let block = block(ids[0]);
            Run { range, block }
        })
        .collect()
}

impl Regroup<'_> {
    /// Codes of the new matrix and its scales, little-endian: a block whose elements all had one scale keeps it and its
    /// codes, padding has 1, and any other block has its largest magnitude / 448.
    pub(crate) fn make(&self) -> Result<(Vec<u8>, Vec<u8>), NonFinite> {
        let width = self.cols.len();
        let [down, across] = scale_shape(self.rows.len(), width);
        let mut codes = vec![0; self.rows.len() * width];
        let mut scales = vec![0; 4 * down * across];
        let columns: Vec<Vec<Run>> = self.cols.chunks(FP8_BLOCK).map(runs).collect();
        codes
            .par_chunks_mut((FP8_BLOCK * width).max(1))
            .zip(scales.par_chunks_exact_mut(4 * across.max(1)))
            .zip(self.rows.par_chunks(FP8_BLOCK))
            .enumerate()
            .try_for_each(|(down, ((codes, scales), rows))| {
                self.gather(rows, codes);
                let rows = runs(rows);
                let scales = scales.as_chunks_mut().0.iter_mut();
                for (number, (scale, cols)) in scales.zip(&columns).enumerate() {
                    let block = Block {
                        source: &self.source,
                        rows: &rows,
                        cols,
                    };
                    let first = number * FP8_BLOCK;
                    let new = block.rescale(&mut Codes {
                        rows: &mut *codes,
                        width,
                        first,
                    });
                    let new = new.ok_or(NonFinite {
                        row: down * FP8_BLOCK,
                        col: first,
                    })?;
                    *scale = new.to_le_bytes();
                }
                Ok(())
            })?;
        Ok((codes, scales))
    }

    /// The source's codes at their new places in rows of zeros.
    fn gather(&self, rows: &[u32], codes: &mut [u8]) {
        let all = self.cols.len() == self.source.cols && self.cols.last() != Some(&PADDING);
        for (codes, &row) in codes.chunks_exact_mut(self.cols.len()).zip(rows) {
            if row == PADDING {
                continue;
            }
            let source = self.source.row(row as usize);
            if all {
                codes.copy_from_slice(source);
                continue;
            }
            for (code, &col) in codes.iter_mut().zip(&self.cols) {
                *code = source.get(col as usize).copied().unwrap_or(0);
            }
        }
    }
}

/// Where the elements of a block of the new matrix come from.
struct Block<'a> {
    source: &'a Matrix<'a>,
    rows: &'a [Run],
    cols: &'a [Run],
}

/// Rows of `width` codes, of which the block's are those from `first` on.
struct Codes<'a> {
    rows: &'a mut [u8],
    width: usize,
    first: usize,
}

/// Rows and columns of a block that had one scale.
struct Piece<'a> {
    rows: &'a Range<usize>,
    cols: &'a Range<usize>,
    scale: f32,
}

impl Codes<'_> {
    /// The parts of rows that are a piece's.
    fn of(&mut self, piece: &Piece<'_>) -> impl Iterator<Item = &mut [u8]> {
        let start = self.first + piece.cols.start;
        let rows = self.rows.chunks_exact_mut(self.width);
        rows.skip(piece.rows.start)
            .take(piece.rows.len())
            .map(move |row| &mut row[start..][..piece.cols.len()])
    }
}

impl Block<'_> {
    fn pieces(&self) -> Vec<Piece<'_>> {
        let across = self.source.cols.div_ceil(FP8_BLOCK);
        let scales = self.source.scales.as_chunks().0;
        let rows = self.rows.iter();
        rows.flat_map(|row| self.cols.iter().map(move |col| (row, col)))
            .filter_map(|(row, col)| {
                let scale = scales[row.block? * across + col.block?];
                Some(Piece {
                    rows: &row.range,
                    cols: &col.range,
                    scale: f32::from_le_bytes(scale),
                })
            })
            .collect()
    }

    /// Gives codes under the source's scales one scale, which it returns; `None` where a value is not finite.
    fn rescale(&self, codes: &mut Codes<'_>) -> Option<f32> {
        let pieces = self.pieces();
        let Some(first) = pieces.first().map(|piece| piece.scale) else {
            return Some(1.0);
        };
        let mut scales = pieces.iter().map(|piece| piece.scale.to_bits());
        if scales.all(|scale| scale == first.to_bits()) {
            return first.is_finite().then_some(first);
        }
        let mut peak = 0_f32;
        for piece in &pieces {
            // Magnitudes order as their codes do.
            let largest = codes.of(piece).map(|line| largest_magnitude(line)).max();
            let value = decode(largest.unwrap_or(0)) * piece.scale.abs();
            if !value.is_finite() {
                return None;
            }
            peak = peak.max(value);
        }
        let new = storable_scale_of(peak);
        for piece in &pieces {
            let table: [u8; 256] =
                std::array::from_fn(|code| encode(decode(code as u8) * piece.scale / new));
            for code in codes.of(piece).flatten() {
                *code = table[usize::from(*code)];
            }
        }
        Some(new)
    }
}

/// The largest code but for signs.
fn largest_magnitude(codes: &[u8]) -> u8 {
    codes
        .iter()
        .fold(0, |largest, code| largest.max(code & 0x7f))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, OwnedMatrix};

    fn source(rows: usize, cols: usize) -> OwnedMatrix {
        let mut state = 7_u32;
        let values: Vec<f32> = (0..rows * cols)
            .map(|i| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let size = 1.0 + (i / cols / 128 * 3 + i % cols / 128) as f32;
                ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * size
            })
            .collect();
        OwnedMatrix::encode(Dtype::F8E4M3, rows, cols, &values).unwrap()
    }

    fn regroup(source: &OwnedMatrix, rows: Vec<u32>, cols: Vec<u32>) -> Regroup<'_> {
        Regroup {
            source: source.view(),
            rows,
            cols,
        }
    }

    fn made(regroup: &Regroup<'_>) -> OwnedMatrix {
        let (bytes, scales) = regroup.make().unwrap();
        OwnedMatrix {
            dtype: Dtype::F8E4M3,
            rows: regroup.rows.len(),
            cols: regroup.cols.len(),
            bytes,
            scales,
        }
    }

    #[test]
    fn values_are_those_of_the_source_to_half_a_step() {
        let source = source(300, 200);
        let every_other: Vec<u32> = (0..300).step_by(2).collect();
        let cols: Vec<u32> = (0..200).filter(|c| c % 3 > 0).collect();
        let new = made(&regroup(&source, every_other.clone(), cols.clone()));
        let (old, wide) = (source.view().to_f32(), new.view().to_f32());
        let mut copied = 0;
        for (i, row) in every_other.iter().enumerate() {
            for (j, col) in cols.iter().enumerate() {
                let (got, want) = (
                    wide[i * cols.len() + j],
                    old[*row as usize * 200 + *col as usize],
                );
                let scale = new.scales.as_chunks().0[i / 128 * 2 + j / 128];
                let bound = want.abs().max(f32::from_le_bytes(scale) / 64.0) / 16.0;
                assert!((got - want).abs() <= bound * 1.000_01, "{i} {j}");
                copied += u32::from(got.to_bits() == want.to_bits());
            }
        }
        // Blocks that mix scales are rounded again.
        assert!(copied < 90 * 133, "{copied}");
    }

    #[test]
    fn blocks_of_one_scale_keep_their_bytes() {
        let source = source(300, 200);
        let all: Vec<u32> = (0..200).collect();
        // An aligned run, the short last block, and some of one block.
        for rows in [(128..256).collect(), (256..300).collect(), vec![3, 9, 100]] {
            let rows: Vec<u32> = rows;
            let new = made(&regroup(&source, rows.clone(), all.clone()));
            let block = rows[0] as usize / 128;
            assert_eq!(new.scales, source.scales[8 * block..8 * block + 8]);
            for (i, row) in rows.iter().enumerate() {
                let old = source.view().row(*row as usize).to_vec();
                assert_eq!(new.view().row(i), old);
            }
        }
        let whole = regroup(&source, (0..300).collect(), all);
        assert_eq!(made(&whole), source);
    }

    #[test]
    fn padding_is_zero_and_has_the_scale_1_where_there_is_nothing_else() {
        let source = source(10, 20);
        let mut rows: Vec<u32> = (2..10).collect();
        rows.resize(140, PADDING);
        let mut cols: Vec<u32> = (0..20).collect();
        cols.resize(300, PADDING);
        let new = made(&regroup(&source, rows, cols));
        let scales: Vec<f32> = new
            .scales
            .as_chunks()
            .0
            .iter()
            .map(|s| f32::from_le_bytes(*s))
            .collect();
        assert_eq!(scales[0].to_le_bytes(), source.scales[..4]);
        assert_eq!(scales[1..], [1.0; 5]);
        assert_eq!(new.bytes[..20], source.bytes[40..60]);
        assert!(
            new.bytes[20..300]
                .iter()
                .chain(&new.bytes[8 * 300..])
                .all(|code| *code == 0)
        );
    }

    #[test]
    fn damaged_blocks_are_found() {
        let mut source = source(260, 10);
        let mixed = |source: &OwnedMatrix| {
            regroup(source, vec![1, 200], (0..10).collect())
                .make()
                .err()
        };
        assert_eq!(mixed(&source), None);
        source.bytes[2003] = 0xff;
        assert_eq!(mixed(&source), Some(NonFinite { row: 0, col: 0 }));
        source.bytes[2003] = 0;
        source.scales[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
        assert_eq!(mixed(&source), Some(NonFinite { row: 0, col: 0 }));
        let one = regroup(&source, vec![1, 2], (0..10).collect());
        assert!(one.make().is_err());
    }
}
