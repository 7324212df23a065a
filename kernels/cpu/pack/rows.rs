//! Rows of activations: `[rows, inner]` to `[steps, rows]` and back.

use super::transpose;
use super::{Packing, bf16_bits};
use crate::cpu::dispatch::multiversion;
use crate::cpu::panels::grow;
use crate::cpu::tile::TILE_COLS;

/// Packs up to 14 rows of length `inner` as `[steps, rows]`.
pub(crate) fn pack_rows(packing: Packing, rows: &[&[f32]], out: &mut [u32]) {
    match packing {
        Packing::F32 => interleave(rows, out),
        Packing::Rounded => {
            interleave(rows, out);
            round_in_place(out);
        }
        Packing::Pairs => interleave_pairs(rows, out),
    }
}

multiversion! {
    pub(super) fn round_in_place(out: &mut [u32]) {
        for v in out.iter_mut() {
            *v = bf16_bits(f32::from_bits(*v)) << 16;
        }
    }
}

fn interleave(rows: &[&[f32]], out: &mut [u32]) {
    let n = rows.len();
    if transpose::is_available() {
        let inner = rows[0].len();
        let blocks = inner / 16;
        assert!(n <= 16 && out.len() == inner * n && rows.iter().all(|r| r.len() == inner));
        // SAFETY: available; lengths asserted above.
        unsafe { transpose::rows(rows, blocks, out.as_mut_ptr(), out.len()) };
        for (r, row) in rows.iter().enumerate() {
            for (i, &v) in row.iter().enumerate().skip(16 * blocks) {
                out[i * n + r] = v.to_bits();
            }
        }
        return;
    }
    for (r, row) in rows.iter().enumerate() {
        for (o, &v) in out.iter_mut().skip(r).step_by(n).zip(row.iter()) {
            *o = v.to_bits();
        }
    }
}

fn interleave_pairs(rows: &[&[f32]], out: &mut [u32]) {
    thread_local! {
        static PAIRS: std::cell::RefCell<Vec<u32>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    let steps = rows[0].len().div_ceil(2);
    PAIRS.with(|cell| {
        let mut pairs = cell.take();
        grow(&mut pairs, rows.len() * steps);
        for (row, pairs) in rows.iter().zip(pairs.chunks_exact_mut(steps)) {
            to_pairs(row, pairs);
        }
        // A pair is moved as the bits of an f32 would be.
        let mut paired: [&[f32]; 16] = [&[]; 16];
        for (slot, pairs) in paired
            .iter_mut()
            .zip(pairs[..rows.len() * steps].chunks_exact(steps))
        {
            *slot = bytemuck::cast_slice(pairs);
        }
        interleave(&paired[..rows.len()], out);
        cell.replace(pairs);
    });
}

multiversion! {
    pub(super) fn to_pairs(values: &[f32], out: &mut [u32]) {
        let (pairs, rest) = values.as_chunks::<2>();
        for (o, p) in out.iter_mut().zip(pairs) {
            *o = bf16_bits(p[0]) | (bf16_bits(p[1]) << 16);
        }
        if let [last] = rest {
            out[pairs.len()] = bf16_bits(*last);
        }
    }
}

/// Undoes [`pack_rows`] for a run of f32 steps: `packed` is `[count, n]`, and row r gets `count` values from `first` on.
pub(crate) fn unpack_steps(packed: &[u32], n: usize, first: usize, rows: &mut [[f32; TILE_COLS]]) {
    let count = packed.len() / n;
    let mut done = 0;
    if transpose::is_available() {
        assert!(
            n <= 16 && rows.len() >= n && first + count <= TILE_COLS && packed.len() == count * n
        );
        while done + 16 <= count {
            // SAFETY: available; 16 steps of n elements at done·n, and 16 columns at first + done of n rows.
            unsafe {
                transpose::steps(packed.as_ptr().add(done * n), n, first + done, rows);
            };
            done += 16;
        }
    }
    for (j, step) in packed.chunks_exact(n).enumerate().skip(done) {
        for (row, &v) in rows.iter_mut().zip(step) {
            row[first + j] = f32::from_bits(v);
        }
    }
}
