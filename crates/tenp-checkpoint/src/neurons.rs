//! Matrices in memory: the neurons of an expert that stay, or values encoded in a tensor's dtype.

use crate::fp8::{self, NonFinite, PADDING, Regroup};
use crate::{Checkpoint, CheckpointError, Dtype, ExpertPlan, Matrix, OutputDtype, Part};

/// A matrix in memory, as a checkpoint stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedMatrix {
    /// `F32`, `F16`, `BF16` or `F8E4M3`.
    pub dtype: Dtype,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// `rows * cols` little-endian elements.
    pub bytes: Vec<u8>,
    /// As in [`Matrix::scales`].
    pub scales: Vec<u8>,
}

impl OwnedMatrix {
    /// Values rounded to a weight dtype (nearest, ties to even), for fp8 in blocks scaled to their largest magnitude.
    ///
    /// # Errors
    /// A value for fp8 that is not finite.
    ///
    /// # Panics
    /// If the dtype is not one of weights or there are not `rows · cols` values.
    pub fn encode(
        dtype: Dtype,
        rows: usize,
        cols: usize,
        values: &[f32],
    ) -> Result<Self, NonFinite> {
        Self::encoded(dtype, (rows, cols), values, fp8::scale_of)
    }

    /// [`Self::encode`] with scales of fp8 that are rounded up to bf16 numbers, and so can be stored in f32 and in bf16.
    ///
    /// # Errors
    /// As [`Self::encode`].
    ///
    /// # Panics
    /// As [`Self::encode`].
    pub fn encode_storable(
        dtype: Dtype,
        rows: usize,
        cols: usize,
        values: &[f32],
    ) -> Result<Self, NonFinite> {
        Self::encoded(dtype, (rows, cols), values, fp8::storable_scale_of)
    }

    fn encoded(
        dtype: Dtype,
        (rows, cols): (usize, usize),
        values: &[f32],
        scale_of: fn(f32) -> f32,
    ) -> Result<Self, NonFinite> {
        assert_eq!(values.len(), rows * cols, "values of a matrix");
        let (bytes, scales) = if dtype == Dtype::F8E4M3 {
            fp8::quantise((rows, cols), values, scale_of)?
        } else {
            let bytes = dtype.narrow(values).expect("weights have a float dtype");
            (bytes, Vec::new())
        };
        Ok(Self {
            dtype,
            rows,
            cols,
            bytes,
            scales,
        })
    }

    /// The matrix as one of a checkpoint.
    pub fn view(&self) -> Matrix<'_> {
        Matrix {
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            bytes: &self.bytes,
            scales: &self.scales,
        }
    }
}

impl Matrix<'_> {
    /// The kept neurons of an expert's matrix (rows of gate and up, columns of down; all where `kept` is absent), zeros
    /// after them up to `width`. `kept` is ascending and in range.
    ///
    /// # Errors
    /// An fp8 block that has to be scaled anew and holds a value that is not finite.
    pub fn neurons(
        &self,
        part: Part,
        kept: Option<&[u32]>,
        width: usize,
    ) -> Result<OwnedMatrix, NonFinite> {
        let (rows, cols) = match part {
            Part::Gate | Part::Up => (width, self.cols),
            Part::Down => (self.rows, width),
        };
        let (bytes, scales) = if kept.is_none() && (rows, cols) == (self.rows, self.cols) {
            (self.bytes.to_vec(), self.scales.to_vec())
        } else if self.dtype == Dtype::F8E4M3 {
            self.regroup(part, kept, width).make()?
        } else {
            let bytes = match part {
                Part::Gate | Part::Up => self.kept_rows(kept, width),
                Part::Down => self.kept_cols(kept, width),
            };
            (bytes, Vec::new())
        };
        Ok(OwnedMatrix {
            dtype: self.dtype,
            rows,
            cols,
            bytes,
            scales,
        })
    }

    /// The same in the output's dtype: fp8 that is left is gathered after rounding to bf16.
    pub(crate) fn neurons_in(
        &self,
        dtype: OutputDtype,
        part: Part,
        kept: Option<&[u32]>,
        width: usize,
    ) -> Result<OwnedMatrix, NonFinite> {
        let dtype = dtype.of(self.dtype);
        if dtype == self.dtype {
            self.neurons(part, kept, width)
        } else {
            self.in_dtype(dtype)?.view().neurons(part, kept, width)
        }
    }

    fn regroup(&self, part: Part, kept: Option<&[u32]>, width: usize) -> Regroup<'_> {
        let all = |count: usize| (0..count as u32).collect::<Vec<_>>();
        let chosen = |count: usize| {
            let mut ids = kept.map_or_else(|| all(count), <[u32]>::to_vec);
            ids.resize(width, PADDING);
            ids
        };
        let (rows, cols) = match part {
            Part::Gate | Part::Up => (chosen(self.rows), all(self.cols)),
            Part::Down => (all(self.rows), chosen(self.cols)),
        };
        Regroup {
            source: *self,
            rows,
            cols,
        }
    }

    /// Rounded to another weight dtype.
    ///
    /// # Errors
    /// A value of an fp8 matrix that is not finite.
    pub fn in_dtype(&self, dtype: Dtype) -> Result<OwnedMatrix, NonFinite> {
        let values = self.to_f32();
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let start = |index: usize| index / fp8::FP8_BLOCK * fp8::FP8_BLOCK;
            return Err(NonFinite {
                row: start(index / self.cols),
                col: start(index % self.cols),
            });
        }
        OwnedMatrix::encode(dtype, self.rows, self.cols, &values)
    }

    fn kept_rows(&self, kept: Option<&[u32]>, width: usize) -> Vec<u8> {
        let length = width * self.cols * self.dtype.size();
        let mut bytes = Vec::with_capacity(length);
        match kept {
            None => bytes.extend_from_slice(self.bytes),
            Some(ids) => {
                for id in ids {
                    bytes.extend_from_slice(self.row(*id as usize));
                }
            }
        }
        bytes.resize(length, 0);
        bytes
    }

    fn kept_cols(&self, kept: Option<&[u32]>, width: usize) -> Vec<u8> {
        let size = self.dtype.size();
        let stride = width * size;
        let mut bytes = vec![0; self.rows * stride];
        if stride == 0 {
            return bytes;
        }
        for (row, target) in bytes.chunks_exact_mut(stride).enumerate() {
            let source = self.row(row);
            match (kept, size) {
                (None, _) => target[..source.len()].copy_from_slice(source),
                (Some(ids), 2) => select::<2>(source, ids, target),
                (Some(ids), 4) => select::<4>(source, ids, target),
                (Some(ids), 8) => select::<8>(source, ids, target),
                (Some(ids), _) => select::<1>(source, ids, target),
            }
        }
        bytes
    }
}

impl Checkpoint {
    /// One matrix of an expert with the neurons that a plan keeps, zeros after them up to `width`.
    ///
    /// # Errors
    /// As [`Checkpoint::expert`]; an fp8 block that has to be computed with and is not finite.
    pub fn narrowed(
        &self,
        layer: usize,
        plan: &ExpertPlan,
        part: Part,
        width: usize,
        dtype: OutputDtype,
    ) -> Result<OwnedMatrix, CheckpointError> {
        let matrix = self.expert(layer, plan.id)?.part(part);
        matrix
            .neurons_in(dtype, part, plan.kept(), width)
            .map_err(|error| self.damaged(&self.spelling().expert(layer, plan.id, part), error))
    }

    pub(crate) fn damaged(&self, tensor: &str, problem: NonFinite) -> CheckpointError {
        CheckpointError::NonFinite {
            tensor: tensor.to_owned(),
            shard: self.shard_of(tensor).unwrap_or_default().to_owned(),
            problem,
        }
    }
}

/// Elements of `SIZE` bytes, by index.
fn select<const SIZE: usize>(source: &[u8], ids: &[u32], target: &mut [u8]) {
    let source = source.as_chunks::<SIZE>().0;
    let target = target.as_chunks_mut::<SIZE>().0;
    for (target, id) in target.iter_mut().zip(ids) {
        *target = source[*id as usize];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    fn matrix(bytes: &[u8], rows: usize, cols: usize) -> Matrix<'_> {
        Matrix {
            dtype: Dtype::F16,
            rows,
            cols,
            bytes,
            scales: &[],
        }
    }

    #[test]
    fn rows_and_columns_of_two_byte_elements() {
        let bytes: Vec<u8> = (0..12).collect();
        let matrix = matrix(&bytes, 2, 3);
        assert_eq!(
            matrix.kept_cols(Some(&[0, 2]), 2),
            [0, 1, 4, 5, 6, 7, 10, 11]
        );
        assert_eq!(matrix.kept_cols(Some(&[1]), 2), [2, 3, 0, 0, 8, 9, 0, 0]);
        assert_eq!(matrix.kept_cols(None, 4)[6..10], [0, 0, 6, 7]);
        assert_eq!(
            matrix.kept_rows(Some(&[1]), 2),
            [6, 7, 8, 9, 10, 11, 0, 0, 0, 0, 0, 0]
        );
        assert!(matrix.kept_cols(Some(&[]), 0).is_empty());
        assert!(matrix.kept_rows(Some(&[]), 0).is_empty());
    }
}
