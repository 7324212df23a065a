//! Six rows by 16 columns at a time: what 16 registers of 8 hold.

use std::arch::x86_64::{
    _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_store_ps,
};

use super::{TILE_COLS, Tile};

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
    by_blocks!(block, steps, a, rows, b, tile);
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
