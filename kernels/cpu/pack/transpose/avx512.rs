//! 16×16 transposes in AVX-512 registers.

use std::arch::x86_64::{
    __m512i, _mm256_maskz_loadu_epi16, _mm512_cvtepu16_epi32, _mm512_loadu_si512,
    _mm512_mask_storeu_epi32, _mm512_maskz_loadu_epi32, _mm512_shuffle_i32x4, _mm512_slli_epi32,
    _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
    _mm512_unpacklo_epi64,
};

use super::Source;
use crate::cpu::tile::TILE_COLS;

/// An array of sixteen, written out: a closure would not be inlined into functions with wider instructions.
macro_rules! sixteen {
    ($i:ident => $value:expr) => {
        sixteen!($i, $value; 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    };
    ($i:ident, $value:expr; $($n:literal),*) => {
        [$({ const $i: usize = $n; $value }),*]
    };
}

/// 16×16 transpose of 32-bit elements: two rounds inside 128-bit lanes, two rounds of lanes. A macro, because an array
/// passed to or returned from a function goes through memory.
macro_rules! transpose {
    ($v:expr) => {{
        let v: [__m512i; 16] = $v;
        let a: [__m512i; 16] = sixteen!(I => {
            let pair = I / 2 * 2;
            match I % 2 {
                0 => _mm512_unpacklo_epi32(v[pair], v[pair + 1]),
                _ => _mm512_unpackhi_epi32(v[pair], v[pair + 1]),
            }
        });
        // b[4g + c]: elements 4·lane + c of rows 4g..4g+4.
        let b: [__m512i; 16] = sixteen!(I => {
            let (g, c) = (I / 4 * 4, I % 4);
            let (low, high) = (a[g + c / 2], a[g + c / 2 + 2]);
            match c % 2 {
                0 => _mm512_unpacklo_epi64(low, high),
                _ => _mm512_unpackhi_epi64(low, high),
            }
        });
        sixteen!(I => {
            let (part, c) = (I / 4, I % 4);
            let halves = match part / 2 {
                0 => [
                    _mm512_shuffle_i32x4(b[c], b[4 + c], 0x44),
                    _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x44),
                ],
                _ => [
                    _mm512_shuffle_i32x4(b[c], b[4 + c], 0xee),
                    _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xee),
                ],
            };
            match part % 2 {
                0 => _mm512_shuffle_i32x4(halves[0], halves[1], 0x88),
                _ => _mm512_shuffle_i32x4(halves[0], halves[1], 0xdd),
            }
        })
    }};
}

/// Transposes `blocks` × 16 steps of 16 columns; a step's outputs are 32 apart. Empty columns give zeros.
///
/// # Safety
/// AVX-512 (F, BW, VL); non-empty columns hold `16 · blocks` steps of `source`; `to` has room for the last step's 16
/// outputs at `32 · (16 · blocks − 1)`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(in super::super) unsafe fn columns(
    source: Source,
    columns: &[&[u8]; 16],
    blocks: usize,
    to: *mut u32,
) {
    let masks: [u16; 16] = sixteen!(C => if columns[C].is_empty() { 0 } else { !0 });
    let pointers: [*const u8; 16] = sixteen!(C => columns[C].as_ptr());
    for block in 0..blocks {
        let step = 16 * block;
        // A fixed sixteen of everything keeps the block in registers; masked-out loads touch nothing.
        // SAFETY: in bounds by the caller's promise; the loads need no alignment.
        let v = sixteen!(C => unsafe {
            match source {
                Source::F32 | Source::Pairs => {
                    _mm512_maskz_loadu_epi32(masks[C], pointers[C].wrapping_add(4 * step).cast())
                }
                Source::Bf16 => {
                    let half = pointers[C].wrapping_add(2 * step).cast();
                    let half = _mm256_maskz_loadu_epi16(masks[C], half);
                    _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)
                }
            }
        });
        for (i, &v) in transpose!(v).iter().enumerate() {
            // SAFETY: the step's row starts at 32·(step + i) and has 16 elements there.
            unsafe { _mm512_storeu_si512(to.add(32 * (step + i)).cast(), v) };
        }
    }
}

/// Transposes `blocks` × 16 elements of up to 16 rows into steps of `rows.len()`.
///
/// # Safety
/// AVX-512F; 1 to 16 rows of at least `16 · blocks` elements; `to` has `16 · blocks · rows.len()` elements, and `room`,
/// at least that many, that may be written over.
#[target_feature(enable = "avx512f")]
pub(in super::super) unsafe fn rows(rows: &[&[f32]], blocks: usize, to: *mut u32, room: usize) {
    let n = rows.len();
    let mask = ((1u32 << n) - 1) as u16;
    // The last row again for rows that are not there: their lanes are overwritten or masked off.
    let pointers: [*const f32; 16] = sixteen!(R => rows.get(R).unwrap_or(&rows[n - 1]).as_ptr());
    for block in 0..blocks {
        // SAFETY: in bounds by the caller's promise.
        let v = sixteen!(R => unsafe {
            _mm512_loadu_si512(pointers[R].add(16 * block).cast())
        });
        let start = 16 * block * n;
        let v = transpose!(v);
        if start + 15 * n + 16 <= room {
            for (i, &v) in v.iter().enumerate() {
                // What spills over is overwritten by the next step: masked stores take several times as long.
                // SAFETY: 16 elements from the step's start are within `room`.
                unsafe { _mm512_storeu_si512(to.add(start + n * i).cast(), v) };
            }
        } else {
            for (i, &v) in v.iter().enumerate() {
                // SAFETY: the mask keeps the store to the step's n elements.
                unsafe { _mm512_mask_storeu_epi32(to.add(start + n * i).cast(), mask, v) };
            }
        }
    }
}

/// # Safety
/// AVX-512F; `from` has 16 steps of n ≤ 16 elements, `rows` at least n rows with 16 columns from `first` on.
#[target_feature(enable = "avx512f")]
pub(in super::super) unsafe fn steps(
    from: *const u32,
    n: usize,
    first: usize,
    rows: &mut [[f32; TILE_COLS]],
) {
    let mask = ((1u32 << n) - 1) as u16;
    // SAFETY: the mask keeps the load to the n elements of step i.
    let v = sixteen!(I => unsafe {
        _mm512_maskz_loadu_epi32(mask, from.wrapping_add(n * I).cast())
    });
    for (row, &v) in rows.iter_mut().zip(&transpose!(v)).take(n) {
        // SAFETY: 16 columns from `first` on, by the caller's promise.
        unsafe { _mm512_storeu_si512(row.as_mut_ptr().add(first).cast(), v) };
    }
}
