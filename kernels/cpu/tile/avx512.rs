//! 14 rows by 32 columns at a time: what 32 registers of 16 hold.

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
