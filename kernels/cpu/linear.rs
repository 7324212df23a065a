//! Dense products `out = x · Wᵀ (+ bias)`.

use std::cell::RefCell;

use rayon::prelude::*;

use super::disjoint::Disjoint;
use super::pack::{BlockRows, Packing, check_shape};
pub use super::panels::PackedRows;
use super::panels::{panels_of, row_runs};
use super::tile::{TILE_COLS, Tile, copy_row, multiply};
use crate::error::check_len;
use crate::{Compute, KernelError, MatrixView};

thread_local! {
    static BLOCKS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// Lends the calling thread's weight-block buffer, at least `len` elements long.
pub(crate) fn with_blocks<R>(len: usize, f: impl FnOnce(&mut [u32]) -> R) -> R {
    BLOCKS.with(|cell| {
        let mut buffer = cell.take();
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        let result = f(&mut buffer[..len]);
        cell.replace(buffer);
        result
    })
}

/// Outputs that one task takes: enough weight blocks to reuse each packed row from cache, few enough that the blocks
/// (up to 1 MiB) stay in L2 themselves.
pub(crate) fn columns_per_task(steps: usize) -> usize {
    ((1 << 18) / steps.max(1) / TILE_COLS).clamp(1, 8) * TILE_COLS
}

/// Bytes of a thread's weight blocks for products over an inner dimension of `inner`; they stay with the thread.
#[must_use]
pub fn thread_bytes(compute: Compute, inner: usize) -> usize {
    let steps = Packing::of(compute).steps(inner);
    size_of::<u32>() * columns_per_task(steps) * steps
}

/// `x · Wᵀ + bias` for `x` `[rows, inner]` and `weight` `[outputs, inner]`; `out` is `[rows, outputs]`.
///
/// # Errors
/// Lengths and shapes that do not fit together.
pub fn linear(
    compute: Compute,
    x: &[f32],
    weight: &MatrixView<'_>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    linear_packed(
        &PackedRows::new(compute, x, weight.cols())?,
        weight,
        bias,
        out,
    )
}

/// [`linear`] on rows packed once for several products.
///
/// # Errors
/// Lengths and shapes that do not fit together.
pub fn linear_packed(
    x: &PackedRows,
    weight: &MatrixView<'_>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let outputs = weight.rows();
    check_shape("linear weight", weight, outputs, x.inner())?;
    check_len("linear output", x.num_rows() * outputs, out.len())?;
    if let Some(bias) = bias {
        check_len("linear bias", outputs, bias.len())?;
    }
    let steps = x.packing().steps(x.inner());
    let per_task = columns_per_task(steps);
    let column_tasks = outputs.div_ceil(per_task);
    let tasks: Vec<_> = row_runs(0..x.num_rows(), column_tasks)
        .flat_map(|rows| (0..column_tasks).map(move |task| (rows.clone(), task * per_task)))
        .collect();
    let out = Disjoint::new(out);
    tasks.into_par_iter().for_each(|(rows, first)| {
        let blocks = (outputs - first).min(per_task).div_ceil(TILE_COLS);
        with_blocks(blocks * steps * TILE_COLS, |packed| {
            for (b, block) in packed
                .chunks_exact_mut((steps * TILE_COLS).max(1))
                .enumerate()
            {
                BlockRows::plain(weight, first + b * TILE_COLS).pack(x.packing(), block);
            }
            let mut tile = Tile::new();
            for panel in panels_of(rows) {
                for b in 0..blocks {
                    let block = &packed[b * steps * TILE_COLS..(b + 1) * steps * TILE_COLS];
                    multiply(x.packing(), x.panel(panel), panel.rows, block, &mut tile);
                    let column = first + b * TILE_COLS;
                    let count = (outputs - column).min(TILE_COLS);
                    for (r, row) in tile.0[..panel.rows].iter().enumerate() {
                        let start = (panel.first_row + r) * outputs + column;
                        // SAFETY: this pair of rows and columns is this task's alone.
                        let to = unsafe { out.range(start..start + count) };
                        copy_row(row, to);
                        if let Some(bias) = bias {
                            super::elementwise::add(to, &bias[column..column + count]);
                        }
                    }
                }
            }
        });
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    #[test]
    fn matches_f64_at_awkward_sizes() {
        for (rows, inner, outputs) in [
            (1, 1, 1),
            (1, 64, 33),
            (14, 31, 32),
            (15, 100, 65),
            (43, 257, 130),
        ] {
            let value = |i: usize| ((i * 2_654_435_761) % 2003) as f32 / 1000.0 - 1.0;
            let x: Vec<f32> = (0..rows * inner).map(value).collect();
            let w: Vec<half::bf16> = (0..outputs * inner)
                .map(|i| half::bf16::from_f32(value(i + 99)))
                .collect();
            let weight = MatrixView::from_bf16(outputs, inner, &w).unwrap();
            let bias: Vec<f32> = (0..outputs).map(value).collect();
            for (compute, tolerance) in [(Compute::F32, 1e-6), (Compute::Bf16, 8e-3)] {
                let mut out = vec![f32::NAN; rows * outputs];
                linear(compute, &x, &weight, Some(&bias), &mut out).unwrap();
                let (mut error, mut norm) = (0f64, 0f64);
                for r in 0..rows {
                    for o in 0..outputs {
                        let want = f64::from(bias[o])
                            + (0..inner)
                                .map(|i| {
                                    f64::from(x[r * inner + i])
                                        * f64::from(w[o * inner + i].to_f32())
                                })
                                .sum::<f64>();
                        error += (f64::from(out[r * outputs + o]) - want).powi(2);
                        norm += want * want;
                    }
                }
                assert!(
                    (error / norm).sqrt() < tolerance,
                    "{rows} {inner} {outputs} {compute:?}"
                );
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_batch() {
        let (inner, outputs) = (77, 50);
        let value = |i: usize| ((i * 48_271) % 2003) as f32 / 1000.0 - 1.0;
        let x: Vec<f32> = (0..40 * inner).map(value).collect();
        let w: Vec<f32> = (0..outputs * inner).map(value).collect();
        let weight = MatrixView::from_f32(outputs, inner, &w).unwrap();
        for compute in [Compute::F32, Compute::Bf16] {
            let mut all = vec![0.0; 40 * outputs];
            linear(compute, &x, &weight, None, &mut all).unwrap();
            for row in [0usize, 13, 14, 39] {
                let mut one = vec![0.0; outputs];
                linear(
                    compute,
                    &x[row * inner..(row + 1) * inner],
                    &weight,
                    None,
                    &mut one,
                )
                .unwrap();
                assert_eq!(one, all[row * outputs..(row + 1) * outputs]);
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let w = [0u8; 24];
        let weight = MatrixView::new(Dtype::F32, 2, 3, &w).unwrap();
        assert!(matches!(
            linear(Compute::F32, &[0.0; 4], &weight, None, &mut [0.0; 2]),
            Err(KernelError::Length { .. })
        ));
        assert!(linear(Compute::F32, &[0.0; 3], &weight, None, &mut [0.0; 3]).is_err());
        assert!(
            linear(
                Compute::F32,
                &[0.0; 3],
                &weight,
                Some(&[0.0]),
                &mut [0.0; 2]
            )
            .is_err()
        );
        assert!(MatrixView::new(Dtype::F32, 2, 4, &w).is_err());
    }
}
