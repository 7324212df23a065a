//! Operands of the tile kernel: rows of activations, and blocks of 32 weight rows or columns.

use super::dispatch::multiversion;
use super::tile::TILE_COLS;
use crate::matrix::{Dtype, MatrixView, widen};
use crate::{Compute, KernelError};

/// How operands are held for the tile kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// f32 bits, one inner index per step.
    F32,
    /// f32 bits of values rounded to bf16: bf16 compute where there are no bf16 dot products.
    Rounded,
    /// Two bf16 values of neighbouring inner indices per step, the first in the low half.
    Pairs,
}

impl Packing {
    pub(crate) fn of(compute: Compute) -> Self {
        match compute {
            Compute::F32 => Self::F32,
            Compute::Bf16 if super::isa() == super::Isa::Avx512Bf16 => Self::Pairs,
            Compute::Bf16 => Self::Rounded,
        }
    }

    /// Steps that an inner dimension of `inner` takes.
    pub(crate) const fn steps(self, inner: usize) -> usize {
        match self {
            Self::F32 | Self::Rounded => inner,
            Self::Pairs => inner.div_ceil(2),
        }
    }
}

/// Bits of `x` rounded to bf16, nearest even; NaN stays NaN.
#[allow(clippy::inline_always)]
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        (bits >> 16) | 0x40
    } else {
        rounded
    }
}

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
    fn round_in_place(out: &mut [u32]) {
        for v in out.iter_mut() {
            *v = bf16_bits(f32::from_bits(*v)) << 16;
        }
    }
}

fn interleave(rows: &[&[f32]], out: &mut [u32]) {
    let n = rows.len();
    #[cfg(target_arch = "x86_64")]
    if super::isa() >= super::Isa::Avx512 {
        let inner = rows[0].len();
        let blocks = inner / 16;
        assert!(n <= 16 && out.len() == inner * n && rows.iter().all(|r| r.len() == inner));
        for block in 0..blocks {
            // SAFETY: AVX-512 detected; each row has 16 elements at 16·block, `out` has 16·n at 16·block·n.
            unsafe {
                let start = 16 * block * n;
                let room = out.len() - start;
                avx512::transpose_rows(rows, 16 * block, out.as_mut_ptr().add(start), room);
            }
        }
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
        super::panels::grow(&mut pairs, rows.len() * steps);
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
    fn to_pairs(values: &[f32], out: &mut [u32]) {
        let (pairs, rest) = values.as_chunks::<2>();
        for (o, p) in out.iter_mut().zip(pairs) {
            *o = bf16_bits(p[0]) | (bf16_bits(p[1]) << 16);
        }
        if let [last] = rest {
            out[pairs.len()] = bf16_bits(*last);
        }
    }
}

/// Packs weight rows as the 32 columns of a block, `[steps, 32]`: column c is row `rows[c]` of `matrices[c]`, or zero.
pub(crate) struct BlockRows<'a> {
    /// Row bytes of each column; empty for a column of zeros.
    pub(crate) columns: [&'a [u8]; TILE_COLS],
    /// Element type of all of them.
    pub(crate) dtype: Dtype,
    /// Row length.
    pub(crate) inner: usize,
}

impl<'a> BlockRows<'a> {
    /// Columns `first..first + 32` are the matrix's rows; rows past the end are zero.
    pub(crate) fn plain(matrix: &MatrixView<'a>, first: usize) -> Self {
        let columns = std::array::from_fn(|c| {
            if first + c < matrix.rows() {
                matrix.row_bytes(first + c)
            } else {
                &[][..]
            }
        });
        Self {
            columns,
            dtype: matrix.dtype(),
            inner: matrix.cols(),
        }
    }

    /// 16 gate rows, then the 16 up rows of the same neurons; neurons past the end are zero.
    pub(crate) fn gate_up(gate: &MatrixView<'a>, up: &MatrixView<'a>, first: usize) -> Self {
        let columns = std::array::from_fn(|c| {
            let (matrix, row) = if c < 16 {
                (gate, first + c)
            } else {
                (up, first + c - 16)
            };
            if row < matrix.rows() {
                matrix.row_bytes(row)
            } else {
                &[][..]
            }
        });
        Self {
            columns,
            dtype: gate.dtype(),
            inner: gate.cols(),
        }
    }

    /// Writes the block; `out` has `steps(inner) · 32` elements.
    pub(crate) fn pack(&self, packing: Packing, out: &mut [u32]) {
        let steps = packing.steps(self.inner);
        assert_eq!(out.len(), steps * TILE_COLS);
        let mut done = 0;
        #[cfg(target_arch = "x86_64")]
        if super::isa() >= super::Isa::Avx512 {
            // Steps per 16×16 transpose; bf16 pairs are moved as they lie in the file.
            let wide = match (packing, self.dtype) {
                (Packing::Pairs, Dtype::Bf16) => Some(avx512::Source::Pairs),
                (Packing::F32 | Packing::Rounded, Dtype::Bf16) => Some(avx512::Source::Bf16),
                (Packing::F32, Dtype::F32) => Some(avx512::Source::F32),
                _ => None,
            };
            if let Some(source) = wide {
                // Pairs: only whole pairs can be moved.
                let whole = if packing == Packing::Pairs {
                    self.inner / 2
                } else {
                    self.inner
                };
                done = whole / 16 * 16;
                for half in 0..2 {
                    let columns: &[&[u8]; 16] = self.columns[16 * half..16 * half + 16]
                        .try_into()
                        .expect("32 columns are two halves");
                    for column in columns {
                        assert!(
                            column.is_empty() || column.len() == self.inner * self.dtype.size()
                        );
                    }
                    for block in 0..done / 16 {
                        // SAFETY: AVX-512 detected; non-empty columns hold `inner` elements, so 16 steps from
                        // 16·block are inside; `out` has 32 per step.
                        unsafe {
                            let to = out.as_mut_ptr().add(16 * block * TILE_COLS + 16 * half);
                            avx512::transpose_columns(source, columns, 16 * block, to);
                        }
                    }
                }
            }
        }
        self.pack_from(packing, done, out);
    }

    /// Steps `from..` one by one.
    fn pack_from(&self, packing: Packing, from: usize, out: &mut [u32]) {
        let steps = packing.steps(self.inner);
        let per_step = if packing == Packing::Pairs { 2 } else { 1 };
        let size = self.dtype.size();
        let mut values = vec![0f32; self.inner - (from * per_step).min(self.inner)];
        for (c, column) in self.columns.iter().enumerate() {
            if column.is_empty() {
                for step in from..steps {
                    out[step * TILE_COLS + c] = 0;
                }
                continue;
            }
            widen(self.dtype, &column[from * per_step * size..], &mut values);
            for step in from..steps {
                let i = (step - from) * per_step;
                out[step * TILE_COLS + c] = match packing {
                    Packing::F32 => values[i].to_bits(),
                    Packing::Rounded => bf16_bits(values[i]) << 16,
                    Packing::Pairs => {
                        bf16_bits(values[i]) | values.get(i + 1).map_or(0, |&v| bf16_bits(v) << 16)
                    }
                };
            }
        }
    }
}

/// Packs columns `first..first + 32` of `matrix` (`[inner, n]`), zero past the end: the transposed product.
pub(crate) fn pack_columns(
    packing: Packing,
    matrix: &MatrixView<'_>,
    first: usize,
    out: &mut [u32],
) {
    let count = (matrix.cols() - first).min(TILE_COLS);
    let size = matrix.dtype().size();
    let slice = |row: usize| &matrix.row_bytes(row)[first * size..(first + count) * size];
    match packing {
        Packing::F32 | Packing::Rounded => {
            for (row, step) in out.as_chunks_mut::<TILE_COLS>().0.iter_mut().enumerate() {
                columns_f32(matrix.dtype(), slice(row), step);
            }
            if packing == Packing::Rounded && matrix.dtype() != Dtype::Bf16 {
                round_in_place(out);
            }
        }
        Packing::Pairs => {
            for (pair, step) in out.as_chunks_mut::<TILE_COLS>().0.iter_mut().enumerate() {
                let second = if 2 * pair + 1 < matrix.rows() {
                    slice(2 * pair + 1)
                } else {
                    &[][..]
                };
                columns_pairs(matrix.dtype(), slice(2 * pair), second, step);
            }
        }
    }
}

/// One step of a block from up to 32 values, zero past their end.
#[inline]
pub(crate) fn pack_step(values: &[f32], step: &mut [u32; TILE_COLS]) {
    if let Some(whole) = values.first_chunk::<TILE_COLS>() {
        *step = whole.map(f32::to_bits);
    } else {
        *step = [0; TILE_COLS];
        for (to, v) in step.iter_mut().zip(values) {
            *to = v.to_bits();
        }
    }
}

/// Undoes [`pack_rows`] for a run of f32 steps: `packed` is `[count, n]`, and row r gets `count` values from `first` on.
pub(crate) fn unpack_steps(packed: &[u32], n: usize, first: usize, rows: &mut [[f32; TILE_COLS]]) {
    let count = packed.len() / n;
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if super::isa() >= super::Isa::Avx512 {
        assert!(
            n <= 16 && rows.len() >= n && first + count <= TILE_COLS && packed.len() == count * n
        );
        while done + 16 <= count {
            // SAFETY: AVX-512 detected; 16 steps of n elements at done·n, and 16 columns at first + done of n rows.
            unsafe {
                avx512::transpose_steps(packed.as_ptr().add(done * n), n, first + done, rows);
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

multiversion! {
    fn columns_f32(dtype: Dtype, bytes: &[u8], out: &mut [u32; TILE_COLS]) {
        *out = [0; TILE_COLS];
        match dtype {
            Dtype::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *o = u32::from(u16::from_le_bytes(*b)) << 16;
                }
            }
            Dtype::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *o = u32::from_le_bytes(*b);
                }
            }
            Dtype::F16 => {
                let mut values = [0f32; TILE_COLS];
                let n = bytes.len() / 2;
                widen(dtype, bytes, &mut values[..n]);
                *out = values.map(f32::to_bits);
            }
        }
    }
}

multiversion! {
    fn columns_pairs(dtype: Dtype, first: &[u8], second: &[u8], out: &mut [u32; TILE_COLS]) {
        *out = [0; TILE_COLS];
        if dtype == Dtype::Bf16 {
            for (o, b) in out.iter_mut().zip(first.as_chunks::<2>().0) {
                *o = u32::from(u16::from_le_bytes(*b));
            }
            for (o, b) in out.iter_mut().zip(second.as_chunks::<2>().0) {
                *o |= u32::from(u16::from_le_bytes(*b)) << 16;
            }
        } else {
            let mut values = [0f32; TILE_COLS];
            for (bytes, shift) in [(first, 0), (second, 16)] {
                let n = bytes.len() / dtype.size();
                widen(dtype, bytes, &mut values[..n]);
                for (o, &v) in out.iter_mut().zip(&values[..n]) {
                    *o |= bf16_bits(v) << shift;
                }
            }
        }
    }
}

/// Checks that `matrix` is `[rows, cols]`.
pub(crate) fn check_shape(
    what: &'static str,
    matrix: &MatrixView<'_>,
    rows: usize,
    cols: usize,
) -> Result<(), KernelError> {
    if (matrix.rows(), matrix.cols()) == (rows, cols) {
        return Ok(());
    }
    Err(KernelError::Shape {
        what,
        expected: (rows, cols),
        got: (matrix.rows(), matrix.cols()),
    })
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::TILE_COLS;
    use std::arch::x86_64::{
        __m512i, _mm256_loadu_epi16, _mm512_cvtepu16_epi32, _mm512_loadu_si512,
        _mm512_mask_storeu_epi32, _mm512_maskz_loadu_epi32, _mm512_setzero_si512,
        _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi32,
        _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
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
    pub(super) unsafe fn transpose_columns(
        source: Source,
        columns: &[&[u8]; 16],
        from: usize,
        to: *mut u32,
    ) {
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
    pub(super) unsafe fn transpose_rows(rows: &[&[f32]], from: usize, to: *mut u32, room: usize) {
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
    pub(super) unsafe fn transpose_steps(
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
}

#[cfg(test)]
// Coordinates are clearer than nested iterators here.
#[allow(clippy::needless_range_loop)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    fn value(i: usize) -> f32 {
        ((i * 2_654_435_761) % 4001) as f32 / 1000.0 - 2.0
    }

    fn packed_value(
        packing: Packing,
        packed: &[u32],
        pitch: usize,
        inner: usize,
        column: usize,
    ) -> f32 {
        match packing {
            Packing::F32 | Packing::Rounded => f32::from_bits(packed[inner * pitch + column]),
            Packing::Pairs => {
                let pair = packed[inner / 2 * pitch + column];
                f32::from_bits(if inner.is_multiple_of(2) {
                    pair << 16
                } else {
                    pair & 0xffff_0000
                })
            }
        }
    }

    fn packings() -> Vec<Packing> {
        let mut all = vec![Packing::F32, Packing::Rounded];
        if crate::cpu::isa() == crate::cpu::Isa::Avx512Bf16 {
            all.push(Packing::Pairs);
        }
        all
    }

    fn expect(packing: Packing, v: f32) -> f32 {
        if packing == Packing::F32 {
            v
        } else {
            bf16::from_f32(v).to_f32()
        }
    }

    #[test]
    fn bf16_rounding_is_halfs() {
        for i in 0..200_000u32 {
            let x = f32::from_bits(i.wrapping_mul(0x9e37_79b9));
            let (got, want) = (
                f32::from_bits(bf16_bits(x) << 16),
                bf16::from_f32(x).to_f32(),
            );
            assert!(
                got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()),
                "{x}: {got} {want}"
            );
        }
    }

    #[test]
    fn rows_come_out_where_the_tile_reads_them() {
        for packing in packings() {
            for n in [1usize, 3, 13, 14] {
                for inner in [1usize, 2, 15, 16, 17, 33, 130] {
                    let data: Vec<f32> = (0..n * inner).map(value).collect();
                    let rows: Vec<&[f32]> = data.chunks(inner).collect();
                    let mut out = vec![0xdead_beef; packing.steps(inner) * n];
                    pack_rows(packing, &rows, &mut out);
                    for r in 0..n {
                        for i in 0..inner {
                            assert_eq!(
                                packed_value(packing, &out, n, i, r),
                                expect(packing, rows[r][i])
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn weight_blocks_of_every_dtype_match_their_source() {
        for packing in packings() {
            for (rows, inner) in [
                (1usize, 1usize),
                (20, 17),
                (32, 16),
                (40, 33),
                (33, 64),
                (35, 47),
            ] {
                let data: Vec<f32> = (0..rows * inner)
                    .map(|i| f16::from_f32(value(i)).to_f32())
                    .collect();
                let b16: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
                let h16: Vec<u8> = data
                    .iter()
                    .flat_map(|&v| f16::from_f32(v).to_le_bytes())
                    .collect();
                let views = [
                    MatrixView::from_f32(rows, inner, &data).unwrap(),
                    MatrixView::from_bf16(rows, inner, &b16).unwrap(),
                    MatrixView::new(Dtype::F16, rows, inner, &h16).unwrap(),
                ];
                for view in views {
                    let all = view.to_f32();
                    for first in (0..rows).step_by(TILE_COLS) {
                        let mut out = vec![0xdead_beef; packing.steps(inner) * TILE_COLS];
                        BlockRows::plain(&view, first).pack(packing, &mut out);
                        for c in 0..TILE_COLS {
                            for i in 0..inner {
                                let want = if first + c < rows {
                                    expect(packing, all[(first + c) * inner + i])
                                } else {
                                    0.0
                                };
                                assert_eq!(packed_value(packing, &out, TILE_COLS, i, c), want);
                            }
                        }
                    }
                    for first in (0..inner).step_by(TILE_COLS) {
                        let mut out = vec![0xdead_beef; packing.steps(rows) * TILE_COLS];
                        pack_columns(packing, &view, first, &mut out);
                        for c in 0..TILE_COLS {
                            for i in 0..rows {
                                let want = if first + c < inner {
                                    expect(packing, all[i * inner + first + c])
                                } else {
                                    0.0
                                };
                                assert_eq!(packed_value(packing, &out, TILE_COLS, i, c), want);
                            }
                        }
                    }
                }
            }
        }
    }
}
