//! Shapes of dense products: row-major operands, sums in f32. Who runs them is the [`super::Backend`].

use bytemuck::Pod;
use half::bf16;

use crate::{Dtype, KernelError};

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for f32 {}
}

/// Element types of dense products.
pub trait DenseElement: Pod + sealed::Sealed {
    /// The type's name.
    const DTYPE: Dtype;
    /// The number, exactly.
    fn to_f32(self) -> f32;
    /// The nearest number, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl DenseElement for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl DenseElement for f32 {
    const DTYPE: Dtype = Dtype::F32;
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
}

/// How the weight of a dense product lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightLayout {
    /// `[outputs, inner]`: a row per output, as checkpoints have it.
    OutputRows,
    /// `[inner, outputs]`: transposed, as `DT` is for the down product.
    InnerRows,
}

/// How the input of a dense product lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputLayout {
    /// `[rows, inner]`.
    Rows,
    /// `[inner, rows]`: transposed, as for `xᵀ · x`.
    InnerRows,
}

/// Sizes of `out[rows, outputs] = x[rows, inner] · W`; pitches are elements from one row to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseShape {
    /// Rows of `x` and `out`.
    pub rows: usize,
    /// Inner dimension.
    pub inner: usize,
    /// Columns of `out`.
    pub outputs: usize,
    /// Of `x`, at least its row.
    pub x_pitch: usize,
    /// Of the weight, at least its row.
    pub weight_pitch: usize,
    /// Of `out`, at least `outputs`.
    pub out_pitch: usize,
    /// How `x` lies.
    pub x_layout: InputLayout,
    /// How the weight lies.
    pub layout: WeightLayout,
    /// Whether the product is added to what `out` holds.
    pub accumulate: bool,
}

impl DenseShape {
    /// Rows close together, the weight as in a checkpoint, nothing to add to.
    #[must_use]
    pub const fn new(rows: usize, inner: usize, outputs: usize) -> Self {
        Self {
            rows,
            inner,
            outputs,
            x_pitch: inner,
            weight_pitch: inner,
            out_pitch: outputs,
            x_layout: InputLayout::Rows,
            layout: WeightLayout::OutputRows,
            accumulate: false,
        }
    }

    /// `out[cols, cols] = xᵀ · x` of `x[rows, cols]`, which is both the input and the weight.
    #[must_use]
    pub const fn gram(rows: usize, cols: usize, pitch: usize) -> Self {
        Self {
            rows: cols,
            inner: rows,
            outputs: cols,
            x_pitch: pitch,
            weight_pitch: pitch,
            out_pitch: cols,
            x_layout: InputLayout::InnerRows,
            layout: WeightLayout::InnerRows,
            accumulate: false,
        }
    }

    /// Rows and columns of `x` as stored.
    #[must_use]
    pub const fn x(&self) -> (usize, usize) {
        match self.x_layout {
            InputLayout::Rows => (self.rows, self.inner),
            InputLayout::InnerRows => (self.inner, self.rows),
        }
    }

    /// Rows and columns of the weight as stored.
    #[must_use]
    pub const fn weight(&self) -> (usize, usize) {
        match self.layout {
            WeightLayout::OutputRows => (self.outputs, self.inner),
            WeightLayout::InnerRows => (self.inner, self.outputs),
        }
    }

    /// Elements of `x`, the weight and `out` from the first to the last that is touched.
    ///
    /// # Errors
    /// [`KernelError::Invalid`] for a pitch shorter than its row.
    pub fn extents(&self) -> Result<[usize; 3], KernelError> {
        let (x_rows, x_cols) = self.x();
        let (weight_rows, weight_cols) = self.weight();
        let extent = |what, rows: usize, cols: usize, pitch: usize| {
            if pitch < cols {
                return Err(KernelError::Invalid {
                    what,
                    why: format!("rows of {cols} elements lie {pitch} apart"),
                });
            }
            Ok(if rows == 0 {
                0
            } else {
                (rows - 1) * pitch + cols
            })
        };
        Ok([
            extent("dense input", x_rows, x_cols, self.x_pitch)?,
            extent("dense weight", weight_rows, weight_cols, self.weight_pitch)?,
            extent("dense output", self.rows, self.outputs, self.out_pitch)?,
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_reach_to_the_last_element() {
        let shape = DenseShape::new(3, 5, 7);
        assert_eq!(shape.extents().unwrap(), [15, 35, 21]);
        let pitched = DenseShape {
            x_pitch: 8,
            weight_pitch: 16,
            out_pitch: 10,
            layout: WeightLayout::InnerRows,
            ..shape
        };
        assert_eq!(
            pitched.extents().unwrap(),
            [2 * 8 + 5, 4 * 16 + 7, 2 * 10 + 7]
        );
        assert_eq!(
            DenseShape::gram(9, 5, 8).extents().unwrap(),
            [8 * 8 + 5, 8 * 8 + 5, 25]
        );
        assert_eq!(DenseShape::new(0, 5, 7).extents().unwrap(), [0, 35, 0]);
        assert!(
            DenseShape {
                x_pitch: 4,
                ..shape
            }
            .extents()
            .is_err()
        );
    }
}
