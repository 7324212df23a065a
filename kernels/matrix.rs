//! Weight matrices as they lie in a checkpoint.

use half::{bf16, f16};

use crate::KernelError;

/// Element type of a stored matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// A row-major matrix over little-endian bytes that may be unaligned (a memory-mapped tensor).
#[derive(Clone, Copy, Debug)]
pub struct MatrixView<'a> {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
}

impl<'a> MatrixView<'a> {
    /// Views `bytes` as `[rows, cols]` of `dtype`.
    ///
    /// # Errors
    /// [`KernelError::Length`] if the byte count is not `rows · cols · dtype.size()`.
    pub fn new(
        dtype: Dtype,
        rows: usize,
        cols: usize,
        bytes: &'a [u8],
    ) -> Result<Self, KernelError> {
        let expected = rows
            .checked_mul(cols)
            .and_then(|n| n.checked_mul(dtype.size()))
            .ok_or_else(|| KernelError::Invalid {
                what: "matrix",
                why: format!("{rows} × {cols} elements do not fit in memory"),
            })?;
        crate::error::check_len("matrix bytes", expected, bytes.len())?;
        Ok(Self {
            dtype,
            rows,
            cols,
            bytes,
        })
    }

    /// Views f32 values as `[rows, cols]`.
    ///
    /// # Errors
    /// [`KernelError::Length`] if there are not `rows · cols` values.
    pub fn from_f32(rows: usize, cols: usize, values: &'a [f32]) -> Result<Self, KernelError> {
        Self::new(Dtype::F32, rows, cols, bytemuck::cast_slice(values))
    }

    /// Views bf16 values as `[rows, cols]`.
    ///
    /// # Errors
    /// [`KernelError::Length`] if there are not `rows · cols` values.
    pub fn from_bf16(rows: usize, cols: usize, values: &'a [bf16]) -> Result<Self, KernelError> {
        Self::new(Dtype::Bf16, rows, cols, bytemuck::cast_slice(values))
    }

    /// Element type.
    #[must_use]
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of rows.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of row `row`.
    pub(crate) fn row_bytes(&self, row: usize) -> &'a [u8] {
        let pitch = self.cols * self.dtype.size();
        &self.bytes[row * pitch..(row + 1) * pitch]
    }

    /// Widens row `row` into `out`.
    ///
    /// # Errors
    /// [`KernelError::Index`] past the last row, [`KernelError::Length`] if `out` is not one row long.
    pub fn widen_row(&self, row: usize, out: &mut [f32]) -> Result<(), KernelError> {
        self.check_row(row, out.len())?;
        widen(self.dtype, self.row_bytes(row), out);
        Ok(())
    }

    /// Rounds row `row` to bf16 (nearest, ties to even) where it is not bf16 already.
    ///
    /// # Errors
    /// As [`Self::widen_row`].
    pub fn round_row(&self, row: usize, out: &mut [bf16]) -> Result<(), KernelError> {
        if self.dtype != Dtype::Bf16 {
            let mut wide = vec![0.0; out.len()];
            self.widen_row(row, &mut wide)?;
            for (to, &value) in out.iter_mut().zip(&wide) {
                *to = bf16::from_f32(value);
            }
            return Ok(());
        }
        self.check_row(row, out.len())?;
        for (to, from) in out.iter_mut().zip(self.row_bytes(row).as_chunks::<2>().0) {
            *to = bf16::from_le_bytes(*from);
        }
        Ok(())
    }

    fn check_row(&self, row: usize, len: usize) -> Result<(), KernelError> {
        if row >= self.rows {
            return Err(KernelError::Index {
                what: "matrix row",
                index: row,
                len: self.rows,
            });
        }
        crate::error::check_len("converted row", self.cols, len)
    }

    /// The whole matrix in f32.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        widen(self.dtype, self.bytes, &mut out);
        out
    }
}

/// Widens stored elements to f32; `bytes` holds exactly `out.len()` of them.
pub fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = f32::from_le_bytes(*b);
            }
        }
        Dtype::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f16::from_le_bytes(*b).to_f32();
            }
        }
        Dtype::Bf16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = bf16::from_le_bytes(*b).to_f32();
            }
        }
    }
}
