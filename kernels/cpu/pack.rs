//! Operands of the tile kernel: rows of activations, and blocks of 32 weight rows or columns.

mod rows;
mod transpose;
mod weights;

#[cfg(test)]
mod tests;

use crate::matrix::MatrixView;
use crate::{Compute, KernelError};

pub(crate) use rows::{pack_rows, unpack_steps};
pub(crate) use weights::{BlockRows, pack_columns, pack_step};

/// How operands are held for the tile kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// f32 bits, one inner index per step.
    F32,
    /// f32 bits of values rounded to bf16: bf16 compute where there are no bf16 dot products.
    Rounded,
    /// Two bf16 values of neighbouring inner indices per step, the first in the low half.
    Pairs,
}

impl Packing {
    pub(crate) fn of(compute: Compute) -> Self {
        match compute {
            Compute::F32 => Self::F32,
            Compute::Bf16 if super::isa().has_pairs() => Self::Pairs,
            Compute::Bf16 => Self::Rounded,
        }
    }

    /// Steps that an inner dimension of `inner` takes.
    pub(crate) const fn steps(self, inner: usize) -> usize {
        match self {
            Self::F32 | Self::Rounded => inner,
            Self::Pairs => inner.div_ceil(2),
        }
    }
}

/// Bits of `x` rounded to bf16, nearest even; NaN stays NaN.
#[allow(clippy::inline_always)]
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        (bits >> 16) | 0x40
    } else {
        rounded
    }
}

/// Checks that `matrix` is `[rows, cols]`.
pub(crate) fn check_shape(
    what: &'static str,
    matrix: &MatrixView<'_>,
    rows: usize,
    cols: usize,
) -> Result<(), KernelError> {
    if (matrix.rows(), matrix.cols()) == (rows, cols) {
        return Ok(());
    }
    Err(KernelError::Shape {
        what,
        expected: (rows, cols),
        got: (matrix.rows(), matrix.cols()),
    })
}
