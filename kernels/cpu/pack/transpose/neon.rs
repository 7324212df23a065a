//! The same of 4 × 4 blocks in NEON registers.

use std::arch::aarch64::{
    uint32x4_t, vdupq_n_u32, vld1_u16, vld1q_u32, vreinterpretq_u32_u64, vreinterpretq_u64_u32,
    vshll_n_u16, vst1q_u32, vtrn1q_u32, vtrn1q_u64, vtrn2q_u32, vtrn2q_u64,
};

use super::Source;
use crate::cpu::tile::TILE_COLS;

/// Transposes 4 × 4 elements.
#[inline]
#[target_feature(enable = "neon")]
fn transpose(v: [uint32x4_t; 4]) -> [uint32x4_t; 4] {
    let wide = |v| vreinterpretq_u64_u32(v);
    let low = [vtrn1q_u32(v[0], v[1]), vtrn1q_u32(v[2], v[3])].map(wide);
    let high = [vtrn2q_u32(v[0], v[1]), vtrn2q_u32(v[2], v[3])].map(wide);
    [
        vtrn1q_u64(low[0], low[1]),
        vtrn1q_u64(high[0], high[1]),
        vtrn2q_u64(low[0], low[1]),
        vtrn2q_u64(high[0], high[1]),
    ]
    .map(|v| vreinterpretq_u32_u64(v))
}

/// Transposes `blocks` × 16 steps of 16 columns; a step's outputs are 32 apart. Empty columns give zeros.
///
/// # Safety
/// Non-empty columns hold `16 · blocks` steps of `source`; `to` has room for the last step's 16 outputs at
/// `32 · (16 · blocks − 1)`.
#[target_feature(enable = "neon")]
pub(in super::super) unsafe fn columns(
    source: Source,
    columns: &[&[u8]; 16],
    blocks: usize,
    to: *mut u32,
) {
    for (group, columns) in columns.as_chunks::<4>().0.iter().enumerate() {
        for step in (0..16 * blocks).step_by(4) {
            let mut v = [vdupq_n_u32(0); 4];
            for (v, column) in v.iter_mut().zip(columns) {
                if column.is_empty() {
                    continue;
                }
                let from = column.as_ptr();
                // SAFETY: steps `step..step + 4` are in bounds by the caller's promise; the loads need no alignment.
                *v = unsafe {
                    match source {
                        Source::F32 | Source::Pairs => vld1q_u32(from.add(4 * step).cast()),
                        Source::Bf16 => vshll_n_u16::<16>(vld1_u16(from.add(2 * step).cast())),
                    }
                };
            }
            for (i, v) in transpose(v).into_iter().enumerate() {
                // SAFETY: the step's row starts at 32·(step + i) and has 16 elements there.
                unsafe { vst1q_u32(to.add(TILE_COLS * (step + i) + 4 * group), v) };
            }
        }
    }
}

/// Transposes `blocks` × 16 elements of up to 16 rows into steps of `rows.len()`.
///
/// # Safety
/// 1 to 16 rows of at least `16 · blocks` elements; `to` has `16 · blocks · rows.len()` elements.
#[target_feature(enable = "neon")]
pub(in super::super) unsafe fn rows(rows: &[&[f32]], blocks: usize, to: *mut u32, _room: usize) {
    let n = rows.len();
    for (group, rows) in rows.chunks(4).enumerate() {
        // The last row again for rows that are not there: their lanes are not stored.
        let pointers: [*const u32; 4] =
            std::array::from_fn(|r| rows[r.min(rows.len() - 1)].as_ptr().cast());
        for first in (0..16 * blocks).step_by(4) {
            // SAFETY: in bounds by the caller's promise.
            let v = pointers.map(|from| unsafe { vld1q_u32(from.add(first)) });
            for (i, v) in transpose(v).into_iter().enumerate() {
                // SAFETY: the step's elements of these rows, which are among its n.
                unsafe { store(v, rows.len(), to.add((first + i) * n + 4 * group)) };
            }
        }
    }
}

/// # Safety
/// `from` has 16 steps of n ≤ 16 elements, `rows` at least n rows with 16 columns from `first` on.
#[target_feature(enable = "neon")]
pub(in super::super) unsafe fn steps(
    from: *const u32,
    n: usize,
    first: usize,
    rows: &mut [[f32; TILE_COLS]],
) {
    for (group, rows) in rows[..n].chunks_mut(4).enumerate() {
        for step in (0..16).step_by(4) {
            let mut v = [vdupq_n_u32(0); 4];
            for (i, v) in v.iter_mut().enumerate() {
                // SAFETY: the step's elements of these rows, which are among its n.
                *v = unsafe { load(from.add((step + i) * n + 4 * group), rows.len()) };
            }
            for (row, v) in rows.iter_mut().zip(transpose(v)) {
                // SAFETY: 16 columns from `first` on, by the caller's promise.
                unsafe { vst1q_u32(row.as_mut_ptr().add(first + step).cast(), v) };
            }
        }
    }
}

/// # Safety
/// `from` has `count` elements, 1 to 4.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load(from: *const u32, count: usize) -> uint32x4_t {
    let mut lanes = [0_u32; 4];
    // SAFETY: by the caller's promise; four elements are read only where there are four.
    unsafe {
        if count == 4 {
            return vld1q_u32(from);
        }
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count);
        vld1q_u32(lanes.as_ptr())
    }
}

/// # Safety
/// `to` has room for `count` elements, 1 to 4.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store(v: uint32x4_t, count: usize, to: *mut u32) {
    let mut lanes = [0_u32; 4];
    // SAFETY: by the caller's promise; four elements are written only where there is room for four.
    unsafe {
        if count == 4 {
            return vst1q_u32(to, v);
        }
        vst1q_u32(lanes.as_mut_ptr(), v);
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count);
    }
}
