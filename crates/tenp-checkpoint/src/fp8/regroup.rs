//! Neurons of an fp8 matrix in new places: codes are copied where their scale can stay, and else scaled anew.

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

/// A block of the new matrix.
struct Block<'a> {
    source: &'a Matrix<'a>,
    rows: &'a [u32],
    cols: &'a [u32],
}

impl Regroup<'_> {
    /// Scales of the new matrix, little-endian: a block whose elements all had one scale keeps it, padding has 1, and any
    /// other block has its largest magnitude / 448.
    pub(crate) fn scales(&self) -> Result<Vec<u8>, NonFinite> {
        let [_, across] = scale_shape(self.rows.len(), self.cols.len());
        let mut scales = vec![0; 4 * across * self.rows.len().div_ceil(FP8_BLOCK)];
        scales
            .par_chunks_exact_mut(4 * across.max(1))
            .zip(self.rows.par_chunks(FP8_BLOCK))
            .enumerate()
            .try_for_each(|(down, (scales, rows))| {
                for (number, (scale, cols)) in self.across(scales.as_chunks_mut().0).enumerate() {
                    let block = Block {
                        source: &self.source,
                        rows,
                        cols,
                    };
                    let new = block.scale().ok_or(NonFinite {
                        row: down * FP8_BLOCK,
                        col: number * FP8_BLOCK,
                    })?;
                    *scale = new.to_le_bytes();
                }
                Ok(())
            })?;
        Ok(scales)
    }

    /// Codes of the new matrix under those scales.
    pub(crate) fn codes(&self, scales: &[u8]) -> Vec<u8> {
        let width = self.cols.len();
        let [_, across] = scale_shape(self.rows.len(), width);
        let mut codes = vec![0; self.rows.len() * width];
        codes
            .par_chunks_mut((FP8_BLOCK * width).max(1))
            .zip(self.rows.par_chunks(FP8_BLOCK))
            .zip(scales.par_chunks_exact(4 * across.max(1)))
            .for_each(|((codes, rows), scales)| {
                let mut first = 0;
                for (scale, cols) in self.across(scales.as_chunks().0) {
                    let block = Block {
                        source: &self.source,
                        rows,
                        cols,
                    };
                    let range = first..first + cols.len();
                    block.write(f32::from_le_bytes(*scale), range, width, codes);
                    first += cols.len();
                }
            });
        codes
    }

    fn across<T>(&self, scales: impl IntoIterator<Item = T>) -> impl Iterator<Item = (T, &[u32])> {
        scales.into_iter().zip(self.cols.chunks(FP8_BLOCK))
    }
}

impl Block<'_> {
    /// Scales of all source blocks that elements come from.
    fn source_scales(&self) -> impl Iterator<Item = f32> {
        let rows = blocks_of(self.rows);
        rows.flat_map(move |row| blocks_of(self.cols).map(move |col| self.source_scale(row, col)))
    }

    fn source_scale(&self, row_block: usize, col_block: usize) -> f32 {
        let across = self.source.cols.div_ceil(FP8_BLOCK);
        f32::from_le_bytes(self.source.scales.as_chunks().0[row_block * across + col_block])
    }

    /// The new scale; `None` where a value is not finite.
    fn scale(&self) -> Option<f32> {
        let mut scales = self.source_scales();
        let Some(first) = scales.next() else {
            return Some(1.0);
        };
        if scales.all(|scale| scale.to_bits() == first.to_bits()) {
            return first.is_finite().then_some(first);
        }
        let mut peak = 0_f32;
        let mut finite = true;
        self.for_each_line(|_, codes, scales| {
            let mut largest = 0;
            for (code, scale) in codes.iter().zip(scales) {
                largest = largest.max(code & 0x7f);
                let value = decode(code & 0x7f) * scale.abs();
                peak = if value > peak { value } else { peak };
            }
            finite &= largest < 0x7f;
        });
        finite &= self.source_scales().all(f32::is_finite);
        (finite && peak.is_finite()).then(|| storable_scale_of(peak))
    }

    /// Writes the block's columns `range` of rows of `width` codes.
    fn write(&self, scale: f32, range: std::ops::Range<usize>, width: usize, codes: &mut [u8]) {
        let same = |source: f32| source.to_bits() == scale.to_bits();
        let copied = self.source_scales().all(same);
        self.for_each_line(|row, source, scales| {
            let to = &mut codes[row * width..][range.clone()];
            if copied {
                to.copy_from_slice(source);
                return;
            }
            for ((to, code), own) in to.iter_mut().zip(source).zip(scales) {
                *to = encode(decode(*code) * own / scale);
            }
        });
    }

    /// Codes and their source scales, row by row. Padding is the code 0.
    fn for_each_line(&self, mut work: impl FnMut(usize, &[u8], &[f32])) {
        let (mut codes, mut scales) = ([0; FP8_BLOCK], [0.0; FP8_BLOCK]);
        let count = self.cols.len();
        let mut scales_of = None;
        for (row, &id) in self.rows.iter().enumerate() {
            if id == PADDING {
                work(row, &[0; FP8_BLOCK][..count], &[0.0; FP8_BLOCK][..count]);
                continue;
            }
            let row_block = id as usize / FP8_BLOCK;
            if scales_of != Some(row_block) {
                scales_of = Some(row_block);
                for (scale, &col) in scales.iter_mut().zip(self.cols) {
                    *scale = match col {
                        PADDING => 0.0,
                        col => self.source_scale(row_block, col as usize / FP8_BLOCK),
                    };
                }
            }
            let source = self.source.row(id as usize);
            match run(self.cols) {
                Some(first) => codes[..count].copy_from_slice(&source[first..first + count]),
                None => {
                    for (code, &col) in codes.iter_mut().zip(self.cols) {
                        *code = source.get(col as usize).copied().unwrap_or(0);
                    }
                }
            }
            work(row, &codes[..count], &scales[..count]);
        }
    }
}

/// Source blocks of ascending ids, each once.
fn blocks_of(ids: &[u32]) -> impl Iterator<Item = usize> {
    let mut last = None;
    ids.iter().filter_map(move |&id| {
        let block = (id != PADDING).then_some(id as usize / FP8_BLOCK)?;
        (last.replace(block) != Some(block)).then_some(block)
    })
}

/// The first of ids without a gap.
fn run(ids: &[u32]) -> Option<usize> {
    let (first, last) = (*ids.first()?, *ids.last()?);
    (last != PADDING && (last - first) as usize + 1 == ids.len()).then_some(first as usize)
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
        let scales = regroup.scales().unwrap();
        OwnedMatrix {
            dtype: Dtype::F8E4M3,
            rows: regroup.rows.len(),
            cols: regroup.cols.len(),
            bytes: regroup.codes(&scales),
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
                .scales()
                .err()
        };
        assert_eq!(mixed(&source), None);
        source.bytes[2003] = 0xff;
        assert_eq!(mixed(&source), Some(NonFinite { row: 0, col: 0 }));
        source.bytes[2003] = 0;
        source.scales[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
        assert_eq!(mixed(&source), Some(NonFinite { row: 0, col: 0 }));
        let one = regroup(&source, vec![1, 2], (0..10).collect());
        assert!(one.scales().is_err());
    }
}
