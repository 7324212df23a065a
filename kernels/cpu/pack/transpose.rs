//! 16×16 transposes in AVX-512 registers: how rows become steps.
#![cfg(target_arch = "x86_64")]

use crate::cpu::tile::TILE_COLS;
use std::arch::x86_64::{
    __m512i, _mm256_loadu_epi16, _mm512_cvtepu16_epi32, _mm512_loadu_si512,
    _mm512_mask_storeu_epi32, _mm512_maskz_loadu_epi32, _mm512_setzero_si512, _mm512_shuffle_i32x4,
    _mm512_slli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

/// What 16 consecutive steps of a column are in memory.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Source {
    /// 16 f32.
    F32,
    /// 16 bf16, to be widened.
    Bf16,
    /// 16 pairs of bf16, as they are.
    Pairs,
}

/// # Safety
/// AVX-512F; non-empty columns hold 16 steps of `source` at step `from`; `to` has 15 · 32 + 16 elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn columns(source: Source, columns: &[&[u8]; 16], from: usize, to: *mut u32) {
    let mut v = [_mm512_setzero_si512(); 16];
    for (v, column) in v.iter_mut().zip(columns) {
        if column.is_empty() {
            continue;
        }
        // SAFETY: in bounds by the caller's promise; the loads need no alignment.
        unsafe {
            *v = match source {
                Source::F32 | Source::Pairs => {
                    _mm512_loadu_si512(column.as_ptr().add(4 * from).cast())
                }
                Source::Bf16 => {
                    let half = _mm256_loadu_epi16(column.as_ptr().add(2 * from).cast());
                    _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)
                }
            };
        }
    }
    for (i, v) in transpose(&v).into_iter().enumerate() {
        // SAFETY: row i starts at 32·i and has 16 elements there.
        unsafe { _mm512_storeu_si512(to.add(32 * i).cast(), v) };
    }
}

/// # Safety
/// AVX-512F; at most 16 rows, each with 16 elements at `from`; `to` has `16 · rows.len()` elements, and `room`, at
/// least that many, that may be written over.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn rows(rows: &[&[f32]], from: usize, to: *mut u32, room: usize) {
    let mut v = [_mm512_setzero_si512(); 16];
    for (v, row) in v.iter_mut().zip(rows) {
        // SAFETY: in bounds by the caller's promise.
        *v = unsafe { _mm512_loadu_si512(row.as_ptr().add(from).cast()) };
    }
    let n = rows.len();
    let mask = ((1u32 << n) - 1) as u16;
    for (i, v) in transpose(&v).into_iter().enumerate() {
        if n * i + 16 <= room {
            // What spills over is overwritten by the next step: masked stores take several times as long.
            // SAFETY: 16 elements from n·i are within `room`.
            unsafe { _mm512_storeu_si512(to.add(n * i).cast(), v) };
        } else {
            // SAFETY: the mask keeps the store to n elements at n·i.
            unsafe { _mm512_mask_storeu_epi32(to.add(n * i).cast(), mask, v) };
        }
    }
}

/// # Safety
/// AVX-512F; `from` has 16 steps of n ≤ 16 elements, `rows` at least n rows with 16 columns from `first` on.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn steps(
    from: *const u32,
    n: usize,
    first: usize,
    rows: &mut [[f32; TILE_COLS]],
) {
    let mut v = [_mm512_setzero_si512(); 16];
    let mask = ((1u32 << n) - 1) as u16;
    for (i, v) in v.iter_mut().enumerate() {
        // SAFETY: the mask keeps the load to the n elements of step i.
        *v = unsafe { _mm512_maskz_loadu_epi32(mask, from.add(n * i).cast()) };
    }
    for (row, v) in rows.iter_mut().zip(transpose(&v)).take(n) {
        // SAFETY: 16 columns from `first` on, by the caller's promise.
        unsafe { _mm512_storeu_si512(row.as_mut_ptr().add(first).cast(), v) };
    }
}

/// 16×16 transpose of 32-bit elements: two rounds inside 128-bit lanes, two rounds of lanes.
#[target_feature(enable = "avx512f")]
fn transpose(v: &[__m512i; 16]) -> [__m512i; 16] {
    let mut a = [_mm512_setzero_si512(); 16];
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    // b[4g + c]: elements 4·lane + c of rows 4g..4g+4.
    let mut b = [_mm512_setzero_si512(); 16];
    for g in 0..4 {
        b[4 * g] = _mm512_unpacklo_epi64(a[4 * g], a[4 * g + 2]);
        b[4 * g + 1] = _mm512_unpackhi_epi64(a[4 * g], a[4 * g + 2]);
        b[4 * g + 2] = _mm512_unpacklo_epi64(a[4 * g + 1], a[4 * g + 3]);
        b[4 * g + 3] = _mm512_unpackhi_epi64(a[4 * g + 1], a[4 * g + 3]);
    }
    let mut out = [_mm512_setzero_si512(); 16];
    for c in 0..4 {
        let low01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x44);
        let high01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xee);
        let low23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x44);
        let high23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xee);
        out[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        out[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        out[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        out[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
    out
}
