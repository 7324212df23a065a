//! Weight matrices as they lie in a checkpoint.

use half::{bf16, f16};

use crate::KernelError;
use crate::fp8::{FP8_BLOCK, dequantise};

/// Element type of a stored matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// OCP FP8 E4M3, with a scale for each block of 128 × 128.
    F8E4m3,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4m3 => 1,
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
    /// `[⌈rows / 128⌉, ⌈cols / 128⌉]` little-endian f32; empty unless the elements are fp8.
    scales: &'a [[u8; 4]],
}

impl<'a> MatrixView<'a> {
    /// Views `bytes` as `[rows, cols]` of `dtype`, which needs no scales.
    ///
    /// # Errors
    /// [`KernelError::Length`] if the byte count is not `rows · cols · dtype.size()`, [`KernelError::Invalid`] for fp8.
    pub fn new(
        dtype: Dtype,
        rows: usize,
        cols: usize,
        bytes: &'a [u8],
    ) -> Result<Self, KernelError> {
        if dtype == Dtype::F8E4m3 {
            return Err(KernelError::Invalid {
                what: "matrix",
                why: "fp8 elements have no value without their blocks' scales".into(),
            });
        }
        Self::checked(dtype, rows, cols, bytes, &[])
    }

    /// Views codes of fp8 as `[rows, cols]`; `scales` is `[⌈rows / 128⌉, ⌈cols / 128⌉]` little-endian f32.
    ///
    /// # Errors
    /// [`KernelError::Length`] if there are not as many codes or scales.
    pub fn from_fp8(
        rows: usize,
        cols: usize,
        codes: &'a [u8],
        scales: &'a [u8],
    ) -> Result<Self, KernelError> {
        let blocks = rows.div_ceil(FP8_BLOCK) * cols.div_ceil(FP8_BLOCK);
        crate::error::check_len("fp8 scale bytes", 4 * blocks, scales.len())?;
        Self::checked(Dtype::F8E4m3, rows, cols, codes, scales.as_chunks::<4>().0)
    }

    fn checked(
        dtype: Dtype,
        rows: usize,
        cols: usize,
        bytes: &'a [u8],
        scales: &'a [[u8; 4]],
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
            scales,
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

    /// Codes and scales (little-endian f32) of an fp8 matrix, [`Self::from_fp8`].
    #[must_use]
    pub const fn fp8_parts(&self) -> Option<(&'a [u8], &'a [u8])> {
        match self.dtype {
            Dtype::F8E4m3 => Some((self.bytes, self.scales.as_flattened())),
            _ => None,
        }
    }

    /// Row `row`, which is there.
    pub(crate) fn row(&self, row: usize) -> Row<'a> {
        let pitch = self.cols * self.dtype.size();
        let across = self.cols.div_ceil(FP8_BLOCK);
        let scales = match self.dtype {
            Dtype::F8E4m3 => &self.scales[row / FP8_BLOCK * across..][..across],
            _ => &[],
        };
        Row {
            dtype: self.dtype,
            bytes: &self.bytes[row * pitch..(row + 1) * pitch],
            scales,
        }
    }

    /// Widens row `row` into `out`.
    ///
    /// # Errors
    /// [`KernelError::Index`] past the last row, [`KernelError::Length`] if `out` is not one row long.
    pub fn widen_row(&self, row: usize, out: &mut [f32]) -> Result<(), KernelError> {
        self.check_row(row, out.len())?;
        self.row(row).widen(0, out);
        Ok(())
    }

    /// Rounds row `row` to bf16 (nearest, ties to even) where it is not bf16 already.
    ///
    /// # Errors
    /// As [`Self::widen_row`].
    pub fn round_row(&self, row: usize, out: &mut [bf16]) -> Result<(), KernelError> {
        self.check_row(row, out.len())?;
        self.row(row).round(0, out);
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
        for (row, out) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.row(row).widen(0, out);
        }
        out
    }
}

/// A row of a matrix: the one place where stored elements become numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
    /// Of the row's blocks, for fp8.
    scales: &'a [[u8; 4]],
}

impl<'a> Row<'a> {
    /// No row.
    pub(crate) const EMPTY: Self = Self {
        dtype: Dtype::F32,
        bytes: &[],
        scales: &[],
    };

    /// A row of f32 values.
    pub(crate) fn of(values: &'a [f32]) -> Self {
        Self {
            bytes: bytemuck::cast_slice(values),
            ..Self::EMPTY
        }
    }

    /// The stored bytes.
    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Element type.
    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Widens the elements from `first` on, as many as `out` takes.
    pub(crate) fn widen(&self, first: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        let bytes = &self.bytes[first * size..(first + out.len()) * size];
        match self.dtype {
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
            Dtype::F8E4m3 => dequantise(bytes, self.scales, first, out),
        }
    }

    /// The same, rounded to bf16 (nearest, ties to even) where they are not bf16 already.
    pub(crate) fn round(&self, first: usize, out: &mut [bf16]) {
        if self.dtype == Dtype::Bf16 {
            let bytes = &self.bytes[2 * first..2 * (first + out.len())];
            for (to, from) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *to = bf16::from_le_bytes(*from);
            }
            return;
        }
        let mut wide = [0f32; 64];
        for (run, to) in out.chunks_mut(64).enumerate() {
            let wide = &mut wide[..to.len()];
            self.widen(first + 64 * run, wide);
            for (to, &value) in to.iter_mut().zip(wide.iter()) {
                *to = bf16::from_f32(value);
            }
        }
    }
}
