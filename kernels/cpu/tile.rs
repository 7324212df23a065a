//! The inner product of everything: a tile of up to 14 rows by 32 outputs over the whole inner dimension.
//!
//! Operands are packed (see `pack.rs`): `a` holds, for each step of the inner dimension, one element of each row; `b`
//! holds one element of each of the 32 outputs. A step is one f32 product, or a pair of bf16 products. 14 × 2 vectors of
//! accumulators fill the AVX-512 register file; nothing is reloaded before the end, so outputs are single FMA chains.

use super::pack::Packing;

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
    #[cfg(target_arch = "x86_64")]
    {
        use super::{Isa, isa};
        match (packing, isa()) {
            (Packing::Pairs, _) => {
                // SAFETY: `Packing::Pairs` is only chosen where `isa()` is Avx512Bf16; lengths asserted above.
                unsafe { avx512::multiply_pairs(steps, a.as_ptr(), rows, b.as_ptr(), tile) };
                return;
            }
            (_, Isa::Avx512 | Isa::Avx512Bf16) => {
                // SAFETY: AVX-512 detected; lengths asserted above.
                unsafe { avx512::multiply_f32(steps, a.as_ptr(), rows, b.as_ptr(), tile) };
                return;
            }
            (_, Isa::Avx2) => {
                // SAFETY: AVX2 and FMA detected; lengths asserted above.
                unsafe { avx2::multiply_f32(steps, a.as_ptr(), rows, b.as_ptr(), tile) };
                return;
            }
            (_, Isa::Portable) => {}
        }
    }
    portable(a, rows, b, tile);
}

/// The plain definition; also the path of machines without AVX2.
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

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, __m512bh, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps,
        _mm512_setzero_ps, _mm512_store_ps,
    };

    use super::{TILE_COLS, Tile};

    /// Calls the kernel instantiated for exactly `rows` rows.
    macro_rules! by_rows {
        ($kernel:ident, $rows:expr, $($arg:expr),*) => {
            match $rows {
                1 => $kernel::<1>($($arg),*), 2 => $kernel::<2>($($arg),*), 3 => $kernel::<3>($($arg),*),
                4 => $kernel::<4>($($arg),*), 5 => $kernel::<5>($($arg),*), 6 => $kernel::<6>($($arg),*),
                7 => $kernel::<7>($($arg),*), 8 => $kernel::<8>($($arg),*), 9 => $kernel::<9>($($arg),*),
                10 => $kernel::<10>($($arg),*), 11 => $kernel::<11>($($arg),*), 12 => $kernel::<12>($($arg),*),
                13 => $kernel::<13>($($arg),*), _ => $kernel::<14>($($arg),*),
            }
        };
    }

    /// # Safety
    /// AVX-512F; `a` has `steps · rows` elements, `b` has `steps · 32`, 1 ≤ rows ≤ 14.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn multiply_f32(
        steps: usize,
        a: *const u32,
        rows: usize,
        b: *const u32,
        tile: &mut Tile,
    ) {
        // SAFETY: passed on unchanged.
        unsafe { by_rows!(tile_f32, rows, steps, a, b, tile) }
    }

    /// # Safety
    /// As [`multiply_f32`], and AVX512_BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn multiply_pairs(
        steps: usize,
        a: *const u32,
        rows: usize,
        b: *const u32,
        tile: &mut Tile,
    ) {
        // SAFETY: passed on unchanged.
        unsafe { by_rows!(tile_pairs, rows, steps, a, b, tile) }
    }

    /// A tile kernel over steps of one element, or of a pair of bf16, of each row and output: `$accumulate(acc, x, b)`
    /// takes what `$broadcast` made of a row's step and `$load` of 16 outputs' step.
    macro_rules! tile_kernel {
        ($name:ident, $features:literal, $broadcast:path, $load:path, $accumulate:path) => {
            #[target_feature(enable = $features)]
            unsafe fn $name<const R: usize>(
                steps: usize,
                mut a: *const u32,
                mut b: *const u32,
                tile: &mut Tile,
            ) {
                let mut acc = [[_mm512_setzero_ps(); 2]; R];
                for _ in 0..steps {
                    // SAFETY: step i reads 32 words of b at 32·i and R of a at R·i, inside both by the caller's lengths.
                    unsafe {
                        let (b0, b1) = ($load(b), $load(b.add(16)));
                        for (r, acc) in acc.iter_mut().enumerate() {
                            let x = $broadcast(a.add(r));
                            acc[0] = $accumulate(acc[0], x, b0);
                            acc[1] = $accumulate(acc[1], x, b1);
                        }
                        a = a.add(R);
                        b = b.add(TILE_COLS);
                    }
                }
                store(&acc, tile);
            }
        };
    }

    tile_kernel!(tile_f32, "avx512f", broadcast, load, multiply_add);
    tile_kernel!(
        tile_pairs,
        "avx512f,avx512bf16",
        broadcast_pair,
        load_pairs,
        _mm512_dpbf16_ps
    );

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(b: *const u32) -> __m512 {
        // SAFETY: the caller's 16 words.
        unsafe { _mm512_loadu_ps(b.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn broadcast(a: *const u32) -> __m512 {
        // SAFETY: the caller's word.
        _mm512_set1_ps(f32::from_bits(unsafe { *a }))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn multiply_add(acc: __m512, x: __m512, b: __m512) -> __m512 {
        _mm512_fmadd_ps(x, b, acc)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn load_pairs(b: *const u32) -> __m512bh {
        // SAFETY: the caller's 16 words; both types are 64 bytes without invalid values.
        unsafe { std::mem::transmute(load(b)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn broadcast_pair(a: *const u32) -> __m512bh {
        // SAFETY: the caller's word; both types are 64 bytes without invalid values.
        unsafe { std::mem::transmute(broadcast(a)) }
    }

    #[target_feature(enable = "avx512f")]
    fn store<const R: usize>(acc: &[[__m512; 2]; R], tile: &mut Tile) {
        for (acc, row) in acc.iter().zip(&mut tile.0) {
            // SAFETY: a tile is 64-byte aligned and its rows are 128 bytes.
            unsafe {
                _mm512_store_ps(row.as_mut_ptr(), acc[0]);
                _mm512_store_ps(row.as_mut_ptr().add(16), acc[1]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_store_ps,
    };

    use super::{TILE_COLS, Tile};

    /// Six rows by 16 columns at a time: what 16 registers hold.
    ///
    /// # Safety
    /// AVX2 and FMA; `a` has `steps · rows` elements, `b` has `steps · 32`, 1 ≤ rows ≤ 14.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn multiply_f32(
        steps: usize,
        a: *const u32,
        rows: usize,
        b: *const u32,
        tile: &mut Tile,
    ) {
        let (a, b): (*const f32, *const f32) = (a.cast(), b.cast());
        let mut first = 0;
        while first < rows {
            let count = (rows - first).min(6);
            for half in 0..2 {
                // SAFETY: rows first..first+count are among `rows`; the half starts at column 0 or 16.
                unsafe {
                    let (a, b) = (a.add(first), b.add(16 * half));
                    match count {
                        1 => block::<1>(steps, a, rows, b, tile, first, half),
                        2 => block::<2>(steps, a, rows, b, tile, first, half),
                        3 => block::<3>(steps, a, rows, b, tile, first, half),
                        4 => block::<4>(steps, a, rows, b, tile, first, half),
                        5 => block::<5>(steps, a, rows, b, tile, first, half),
                        _ => block::<6>(steps, a, rows, b, tile, first, half),
                    }
                }
            }
            first += count;
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn block<const R: usize>(
        steps: usize,
        mut a: *const f32,
        pitch: usize,
        mut b: *const f32,
        tile: &mut Tile,
        first: usize,
        half: usize,
    ) {
        let mut acc = [[_mm256_setzero_ps(); 2]; R];
        for _ in 0..steps {
            // SAFETY: step i reads 16 of b's 32 elements and R of a's `pitch`, inside both by the caller's lengths.
            unsafe {
                let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*a.add(r));
                    acc[0] = _mm256_fmadd_ps(x, b0, acc[0]);
                    acc[1] = _mm256_fmadd_ps(x, b1, acc[1]);
                }
                a = a.wrapping_add(pitch);
                b = b.wrapping_add(TILE_COLS);
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            let row = &mut tile.0[first + r];
            // SAFETY: 16 · half + 16 ≤ 32, and both offsets are multiples of 32 bytes in a 64-byte aligned tile.
            unsafe {
                _mm256_store_ps(row.as_mut_ptr().add(16 * half), acc[0]);
                _mm256_store_ps(row.as_mut_ptr().add(16 * half + 8), acc[1]);
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
        paths
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
