//! Six rows by 16 columns at a time: 24 accumulators of 4 among 32 registers. Pairs need the bf16 dot products of Armv8.6.

use std::arch::aarch64::{
    float32x4_t, vdupq_n_f32, vfmaq_f32, vld1q_dup_f32, vld1q_f32, vst1q_f32,
};
use std::arch::asm;

use super::{TILE_COLS, Tile};

/// # Safety
/// `a` has `steps · rows` elements, `b` has `steps · 32`, 1 ≤ rows ≤ 14.
#[target_feature(enable = "neon")]
pub(super) unsafe fn multiply_f32(
    steps: usize,
    a: *const u32,
    rows: usize,
    b: *const u32,
    tile: &mut Tile,
) {
    by_blocks!(block_f32, steps, a, rows, b, tile);
}

/// # Safety
/// As [`multiply_f32`], and the bf16 extension.
#[target_feature(enable = "neon,bf16")]
pub(super) unsafe fn multiply_pairs(
    steps: usize,
    a: *const u32,
    rows: usize,
    b: *const u32,
    tile: &mut Tile,
) {
    by_blocks!(block_pairs, steps, a, rows, b, tile);
}

/// A block kernel over steps of one element, or of a pair of bf16, of each row and output.
macro_rules! block_kernel {
    ($name:ident, $features:literal, $accumulate:ident) => {
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize>(
            steps: usize,
            mut a: *const f32,
            pitch: usize,
            mut b: *const f32,
            tile: &mut Tile,
            first: usize,
            half: usize,
        ) {
            let mut acc = [[vdupq_n_f32(0.0); 4]; R];
            for _ in 0..steps {
                // SAFETY: step i reads 16 of b's 32 elements and R of a's `pitch`, inside both by the caller's lengths.
                unsafe {
                    let b_now = [
                        vld1q_f32(b),
                        vld1q_f32(b.add(4)),
                        vld1q_f32(b.add(8)),
                        vld1q_f32(b.add(12)),
                    ];
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let x = vld1q_dup_f32(a.add(r));
                        acc[0] = $accumulate(acc[0], b_now[0], x);
                        acc[1] = $accumulate(acc[1], b_now[1], x);
                        acc[2] = $accumulate(acc[2], b_now[2], x);
                        acc[3] = $accumulate(acc[3], b_now[3], x);
                    }
                }
                a = a.wrapping_add(pitch);
                b = b.wrapping_add(TILE_COLS);
            }
            for (r, acc) in acc.iter().enumerate() {
                let row = tile.0[first + r][16 * half..].as_mut_ptr();
                for (i, acc) in acc.iter().enumerate() {
                    // SAFETY: 16 · half + 4 · i + 4 ≤ 32.
                    unsafe { vst1q_f32(row.add(4 * i), *acc) };
                }
            }
        }
    };
}

block_kernel!(block_f32, "neon", vfmaq_f32);
block_kernel!(block_pairs, "neon,bf16", dot_pairs);

/// `acc + b · x` for pairs of bf16 in the words of `b` and `x`. Written as its instruction: the intrinsic is not stable.
#[inline]
#[target_feature(enable = "neon,bf16")]
fn dot_pairs(mut acc: float32x4_t, b: float32x4_t, x: float32x4_t) -> float32x4_t {
    // SAFETY: works on registers only.
    unsafe {
        asm!(
            "bfdot {acc:v}.4s, {b:v}.8h, {x:v}.8h",
            acc = inout(vreg) acc,
            b = in(vreg) b,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}
