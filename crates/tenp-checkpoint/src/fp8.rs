//! fp8 weights as DeepSeek-V3 stores them: codes of OCP FP8 E4M3 and, in a tensor of its own, one f32 scale for each block
//! of 128 × 128 elements, ceil at the tails; value = code · scale.

mod regroup;

pub(crate) use regroup::{PADDING, Regroup};

/// Rows and columns that share a scale.
pub const FP8_BLOCK: usize = 128;

/// What a weight's scales are called, after the weight's own name.
const SCALE_SUFFIX: &str = "_scale_inv";

/// The value of a code; NaN for 7f and ff.
#[allow(clippy::inline_always)]
#[inline(always)]
pub(crate) fn decode(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    // Exponent bias 7 becomes 127; below the least normal a code counts steps of 2⁻⁹.
    let normal = f32::from_bits((magnitude << 20) + (120 << 23));
    let value = match magnitude {
        0..8 => magnitude as f32 / 512.0,
        0x7f => f32::NAN,
        _ => normal,
    };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

/// Whether codes hold a NaN.
pub fn holds_nan(codes: &[u8]) -> bool {
    codes.iter().any(|code| code & 0x7f == 0x7f)
}

/// Name of the scales of a weight.
pub(crate) fn scale_name(weight: &str) -> String {
    format!("{weight}{SCALE_SUFFIX}")
}

/// Name of the weight whose scales a tensor holds, from its name.
pub fn weight_of_scale(name: &str) -> Option<&str> {
    name.strip_suffix(SCALE_SUFFIX)
}

/// Shape of the scales of a matrix.
pub(crate) fn scale_shape(rows: usize, cols: usize) -> [usize; 2] {
    [rows.div_ceil(FP8_BLOCK), cols.div_ceil(FP8_BLOCK)]
}

/// `out = code · scale` for a whole row; `scales` are its blocks', little-endian.
pub(crate) fn widen_row(codes: &[u8], scales: &[[u8; 4]], out: &mut [f32]) {
    let blocks = codes.chunks(FP8_BLOCK).zip(out.chunks_mut(FP8_BLOCK));
    for ((codes, out), scale) in blocks.zip(scales) {
        let scale = f32::from_le_bytes(*scale);
        for (out, code) in out.iter_mut().zip(codes) {
            *out = decode(*code) * scale;
        }
    }
}

/// A block of numbers that cannot be scaled into fp8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a NaN or an infinity in the block of 128 × 128 weights from row {row}, column {col} on")]
pub struct NonFinite {
    /// First row of the block.
    pub row: usize,
    /// First column of the block.
    pub col: usize,
}

/// Largest value of a code.
const MAX: f32 = 448.0;

/// The code nearest to a value, ties to even; the largest where the value is beyond it.
#[allow(clippy::inline_always)]
#[inline(always)]
pub(crate) fn encode(value: f32) -> u8 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // The last bit of 1.5 · 2^14 is worth 2⁻⁹: adding it leaves the steps, rounded to even, in the low bits.
    let small = (f32::from_bits(magnitude) + 24576.0).to_bits() & 0xf;
    // Half a step less one, one more where the kept part is odd: the carry rounds to even.
    let normal = ((magnitude + 0x7_ffff + (magnitude >> 20 & 1)) >> 20).wrapping_sub(120 << 3);
    let code = if magnitude < 0x3c80_0000 {
        small
    } else {
        normal.min(0x7e)
    };
    code as u8 | (bits >> 24 & 0x80) as u8
}

/// The scale that takes numbers of at most `peak` into fp8.
pub(crate) fn scale_of(peak: f32) -> f32 {
    let scale = peak / MAX;
    if scale > 0.0 { scale } else { 1.0 }
}

/// The same, rounded up to a bf16 number: it is the same where scales are stored in bf16, and nothing is beyond the largest code.
pub(crate) fn storable_scale_of(peak: f32) -> f32 {
    let bits = scale_of(peak).to_bits();
    f32::from_bits(bits.saturating_add(0xffff) & 0xffff_0000)
}

/// Codes and scales of `[rows, cols]` values: for each block, the scale of its largest magnitude.
pub(crate) fn quantise(
    (rows, cols): (usize, usize),
    values: &[f32],
    scale_of: fn(f32) -> f32,
) -> Result<(Vec<u8>, Vec<u8>), NonFinite> {
    let [down, across] = scale_shape(rows, cols);
    let mut scales = Vec::with_capacity(4 * down * across);
    let mut codes = vec![0; rows * cols];
    let lines = FP8_BLOCK * cols.max(1);
    for (block, (values, codes)) in values
        .chunks(lines)
        .zip(codes.chunks_mut(lines))
        .enumerate()
    {
        for col in (0..cols).step_by(FP8_BLOCK) {
            let range = col..cols.min(col + FP8_BLOCK);
            // Magnitudes order as their bits do, which a vector unit compares without minding NaN.
            let mut peak = 0_i32;
            for row in values.chunks_exact(cols) {
                for value in &row[range.clone()] {
                    peak = peak.max((value.to_bits() & 0x7fff_ffff).cast_signed());
                }
            }
            let peak = f32::from_bits(peak.cast_unsigned());
            if !peak.is_finite() {
                let row = block * FP8_BLOCK;
                return Err(NonFinite { row, col });
            }
            let scale = scale_of(peak);
            scales.extend_from_slice(&scale.to_le_bytes());
            for (row, codes) in values.chunks_exact(cols).zip(codes.chunks_exact_mut(cols)) {
                for (code, value) in codes[range.clone()].iter_mut().zip(&row[range.clone()]) {
                    *code = encode(value / scale);
                }
            }
        }
    }
    Ok((codes, scales))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_values_of_the_format() {
        for code in 0..=255u8 {
            // OCP 8-bit floating point specification 1.0: 2^(e − 7) · (1 + m/8), or 2^−6 · m/8 where e is 0.
            let (e, m) = (i32::from(code >> 3 & 15), f32::from(code & 7));
            let magnitude = if e == 0 {
                m / 8.0 * (-6_f32).exp2()
            } else {
                (1.0 + m / 8.0) * ((e - 7) as f32).exp2()
            };
            let got = decode(code);
            if code & 0x7f == 0x7f {
                assert!(got.is_nan() && holds_nan(&[0, code]));
            } else {
                assert_eq!(got.abs(), magnitude, "{code:#04x}");
                assert_eq!(got.is_sign_negative(), code & 0x80 != 0);
                assert!(!holds_nan(&[code]));
            }
        }
    }

    #[test]
    fn storable_scales_are_the_next_bf16_numbers() {
        for peak in [1e-30_f32, 0.3, 1.0, 447.9, 448.0, 3e5] {
            let (exact, scale) = (scale_of(peak), storable_scale_of(peak));
            assert_eq!(scale.to_bits() & 0xffff, 0);
            assert!(
                scale >= exact && scale <= exact * (1.0 + 1.0 / 128.0),
                "{peak}"
            );
        }
        assert_eq!(
            (storable_scale_of(448.0), storable_scale_of(0.0)),
            (1.0, 1.0)
        );
    }

    #[test]
    fn every_block_of_a_row_has_its_scale() {
        let scales = [2_f32, 0.5].map(f32::to_le_bytes);
        let mut out = [0.0; 130];
        widen_row(&[0x38; 130], &scales, &mut out);
        assert_eq!((out[0], out[127], out[128], out[129]), (2.0, 2.0, 0.5, 0.5));
    }

    /// Against a search of the nearest code, which does not share a line with it.
    #[test]
    fn values_become_the_nearest_code_and_ties_the_even_one() {
        let nearest = |value: f64| {
            let distance = |code: u8| (f64::from(decode(code)) - value).abs();
            let best = (0..0x7f).min_by(|a, b| {
                let order = distance(*a).total_cmp(&distance(*b));
                order.then((a & 1).cmp(&(b & 1)))
            });
            best.unwrap()
        };
        let mut values: Vec<f32> = (0..0x7f).map(decode).collect();
        let ties: Vec<f32> = values
            .windows(2)
            .map(|w| f32::midpoint(w[0], w[1]))
            .collect();
        values.extend(ties.iter().flat_map(|t| [*t, t.next_down(), t.next_up()]));
        values.extend((0..4000_u16).map(|i| f32::from(i) * 0.117_3));
        values.extend([1e-30, 447.9, 460.0, 1e9, f32::MIN_POSITIVE]);
        for value in values {
            let want = nearest(f64::from(value).min(448.0));
            assert_eq!(encode(value), want, "{value}");
            assert_eq!(encode(-value), want | 0x80, "-{value}");
        }
    }

    #[test]
    fn quantised_blocks_use_the_whole_range_and_are_off_by_half_a_step() {
        let (rows, cols) = (130, 140);
        let values: Vec<f32> = (0..rows * cols)
            .map(|i| ((i * 7919 % 1009) as f32 / 500.0 - 1.0) * (1.0 + (i / 5000) as f32))
            .collect();
        let (codes, scales) = quantise((rows, cols), &values, scale_of).unwrap();
        assert_eq!(scales.len(), 4 * 4);
        let scales = scales.as_chunks::<4>().0;
        let mut wide = vec![0.0; cols];
        for row in 0..rows {
            let own = &scales[row / 128 * 2..][..2];
            widen_row(&codes[row * cols..][..cols], own, &mut wide);
            for (col, (got, want)) in wide.iter().zip(&values[row * cols..]).enumerate() {
                let scale = f32::from_le_bytes(own[col / 128]);
                // Half a step: 2^−4 of the value, or of the least normal below it.
                let bound = want.abs().max(scale / 64.0) / 16.0;
                assert!(
                    (got - want).abs() <= bound * 1.000_01,
                    "{row} {col}: {got} {want}"
                );
            }
        }
        let (codes, scales) = quantise((2, 2), &[0.0, -0.0, 0.0, 0.0], scale_of).unwrap();
        assert_eq!(
            (codes, scales),
            (vec![0, 0x80, 0, 0], 1_f32.to_le_bytes().to_vec())
        );
        let mut bad = values;
        bad[129 * cols + 139] = f32::NAN;
        assert_eq!(
            quantise((rows, cols), &bad, scale_of),
            Err(NonFinite { row: 128, col: 128 })
        );
    }
}
