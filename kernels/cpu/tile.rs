//! The inner product of everything: a tile of up to 14 rows by 32 outputs over the whole inner dimension.
//!
//! Operands are packed (see `pack.rs`): `a` holds, for each step of the inner dimension, one element of each row; `b`
//! holds one element of each of the 32 outputs. A step is one f32 product, or a pair of bf16 products. 14 × 2 vectors of
//! accumulators fill the AVX-512 register file, narrower units take a tile in blocks; nothing is reloaded before the end,
//! so outputs in f32 are single FMA chains.

/// Calls a kernel for blocks of up to six rows by 16 columns over a tile's rows and both halves of its columns.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! by_blocks {
    ($block:ident, $steps:expr, $a:expr, $rows:expr, $b:expr, $tile:expr) => {{
        let (a, b): (*const f32, *const f32) = ($a.cast(), $b.cast());
        let mut first = 0;
        while first < $rows {
            let count = ($rows - first).min(6);
            for half in 0..2 {
                // SAFETY: rows first..first+count are among the rows; the half starts at column 0 or 16.
                unsafe {
                    let (a, b) = (a.add(first), b.add(16 * half));
                    match count {
                        1 => $block::<1>($steps, a, $rows, b, $tile, first, half),
                        2 => $block::<2>($steps, a, $rows, b, $tile, first, half),
                        3 => $block::<3>($steps, a, $rows, b, $tile, first, half),
                        4 => $block::<4>($steps, a, $rows, b, $tile, first, half),
                        5 => $block::<5>($steps, a, $rows, b, $tile, first, half),
                        _ => $block::<6>($steps, a, $rows, b, $tile, first, half),
                    }
                }
            }
            first += count;
        }
    }};
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use super::pack::Packing;
use super::{Isa, isa};

/// Rows (tokens) of a tile.
pub const TILE_ROWS: usize = 14;
/// Outputs (weight rows) of a tile.
pub const TILE_COLS: usize = 32;

/// Result of one tile; only the first `rows` rows are meaningful.
#[repr(align(64))]
pub(crate) struct Tile(pub(crate) [[f32; TILE_COLS]; TILE_ROWS]);

impl Tile {
    pub(crate) const fn new() -> Self {
        Self([[0.0; TILE_COLS]; TILE_ROWS])
    }
}

/// Copies the first columns of a tile's row; whole rows, by far the most, without a call.
#[inline]
pub(crate) fn copy_row(row: &[f32; TILE_COLS], to: &mut [f32]) {
    match <&mut [f32; TILE_COLS]>::try_from(&mut *to) {
        Ok(whole) => *whole = *row,
        Err(_) => to.copy_from_slice(&row[..to.len()]),
    }
}

/// `tile[r][c] = Σ_step a[step][r] · b[step][c]` for `rows` rows and all 32 columns.
///
/// `a` is `[steps, rows]`, `b` is `[steps, 32]`.
pub(crate) fn multiply(packing: Packing, a: &[u32], rows: usize, b: &[u32], tile: &mut Tile) {
    let steps = b.len() / TILE_COLS;
    assert!(
        (1..=TILE_ROWS).contains(&rows) && b.len() == steps * TILE_COLS && a.len() == steps * rows
    );
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    let (a_start, b_start) = (a.as_ptr(), b.as_ptr());
    // SAFETY: `isa()` reports what was detected, `Packing::Pairs` is only chosen where it has bf16 dot products, and lengths
    // are asserted above. Other processors have the safe path alone.
    #[allow(unused_unsafe)]
    unsafe {
        match (packing, isa()) {
            #[cfg(target_arch = "x86_64")]
            (Packing::Pairs, _) => avx512::multiply_pairs(steps, a_start, rows, b_start, tile),
            #[cfg(target_arch = "x86_64")]
            (_, Isa::Avx512 | Isa::Avx512Bf16) => {
                avx512::multiply_f32(steps, a_start, rows, b_start, tile);
            }
            #[cfg(target_arch = "x86_64")]
            (_, Isa::Avx2) => avx2::multiply_f32(steps, a_start, rows, b_start, tile),
            #[cfg(target_arch = "aarch64")]
            (Packing::Pairs, _) => neon::multiply_pairs(steps, a_start, rows, b_start, tile),
            #[cfg(target_arch = "aarch64")]
            (_, Isa::Neon | Isa::NeonBf16) => {
                neon::multiply_f32(steps, a_start, rows, b_start, tile);
            }
            _ => portable(a, rows, b, tile),
        }
    }
}

/// The plain definition; also the path of machines without a path of their own.
fn portable(a: &[u32], rows: usize, b: &[u32], tile: &mut Tile) {
    for row in tile.0.iter_mut().take(rows) {
        *row = [0.0; TILE_COLS];
    }
    for (a, b) in a.chunks_exact(rows).zip(b.as_chunks::<TILE_COLS>().0) {
        for (row, &a) in tile.0.iter_mut().zip(a) {
            let a = f32::from_bits(a);
            for (out, &b) in row.iter_mut().zip(b) {
                *out = a.mul_add(f32::from_bits(b), *out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Path = fn(&[u32], usize, &[u32], &mut Tile);

    /// Every path this machine can run, by name.
    fn paths() -> Vec<(&'static str, Path)> {
        let mut paths: Vec<(&'static str, Path)> = vec![("chosen", |a, rows, b, tile| {
            multiply(Packing::F32, a, rows, b, tile);
        })];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                paths.push(("avx2", |a, rows, b, tile| {
                    let steps = b.len() / TILE_COLS;
                    // SAFETY: detected just above; the test's slices have these lengths.
                    unsafe { avx2::multiply_f32(steps, a.as_ptr(), rows, b.as_ptr(), tile) };
                }));
            }
            if is_x86_feature_detected!("avx512f") {
                paths.push(("avx512", |a, rows, b, tile| {
                    let steps = b.len() / TILE_COLS;
                    // SAFETY: detected just above; the test's slices have these lengths.
                    unsafe { avx512::multiply_f32(steps, a.as_ptr(), rows, b.as_ptr(), tile) };
                }));
            }
        }
        #[cfg(target_arch = "aarch64")]
        paths.push(("neon", |a, rows, b, tile| {
            let steps = b.len() / TILE_COLS;
            // SAFETY: NEON is part of the architecture; the test's slices have these lengths.
            unsafe { neon::multiply_f32(steps, a.as_ptr(), rows, b.as_ptr(), tile) };
        }));
        paths
    }

    /// Against f64 sums of the exact products: units differ in how they round the sum of a pair.
    #[test]
    fn pairs_are_dot_products_of_bf16() {
        if !isa().has_pairs() {
            return;
        }
        let pair = |i: usize| {
            let value = |i: usize| ((i * 2_654_435_761) % 251) as f32 / 128.0 - 1.0;
            let bits = [value(2 * i), value(2 * i + 1)].map(|v| v.to_bits() >> 16);
            bits[0] | bits[1] << 16
        };
        let halves = |word: u32| {
            [word << 16, word & 0xffff_0000].map(|bits| f64::from(f32::from_bits(bits)))
        };
        for rows in 1..=TILE_ROWS {
            for steps in [0usize, 1, 2, 7, 33] {
                let a: Vec<u32> = (0..steps * rows).map(|i| pair(i + 7)).collect();
                let b: Vec<u32> = (0..steps * TILE_COLS).map(|i| pair(i + 1)).collect();
                let mut got = Tile([[9.0; TILE_COLS]; TILE_ROWS]);
                multiply(Packing::Pairs, &a, rows, &b, &mut got);
                for (r, row) in got.0.iter().enumerate().take(rows) {
                    for (c, got) in row.iter().enumerate() {
                        let products = (0..steps).flat_map(|s| {
                            let (x, y) = (halves(a[s * rows + r]), halves(b[s * TILE_COLS + c]));
                            [x[0] * y[0], x[1] * y[1]]
                        });
                        let (want, size) =
                            products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                        let off = (f64::from(*got) - want).abs();
                        assert!(off <= size * 1e-6, "rows {rows}, steps {steps}: {r} {c}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_path_has_the_bits_of_the_definition_at_every_row_and_step_count() {
        for rows in 1..=TILE_ROWS {
            for steps in [0usize, 1, 2, 7, 33] {
                let value = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
                let a: Vec<u32> = (0..steps * rows).map(|i| value(i + 7).to_bits()).collect();
                let b: Vec<u32> = (0..steps * TILE_COLS)
                    .map(|i| value(i + 1).to_bits())
                    .collect();
                let mut want = Tile::new();
                portable(&a, rows, &b, &mut want);
                for (name, path) in paths() {
                    let mut got = Tile([[9.0; TILE_COLS]; TILE_ROWS]);
                    path(&a, rows, &b, &mut got);
                    assert_eq!(
                        got.0[..rows],
                        want.0[..rows],
                        "{name}, rows {rows}, steps {steps}"
                    );
                }
            }
        }
    }
}
