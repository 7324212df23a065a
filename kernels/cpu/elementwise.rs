//! exp, sigmoid, SiLU, softmax: one implementation for every instruction set, so that f32 results are the same
//! everywhere.

use rayon::prelude::*;

use super::dispatch::multiversion;

/// e^x to about 1 ulp; NaN stays NaN, large arguments saturate at the ends of the f32 range.
///
/// Range reduction by ln 2 in two parts and a degree-6 polynomial, the classic scheme of Cephes' `expf`.
#[allow(clippy::inline_always)]
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding it rounds to an integer held in the low mantissa bits
    // Comparisons, not `clamp` on a possibly-NaN value: NaN must fall through.
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    let t = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = t - ROUND;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 5.000_000_3e-1);
    let p = p.mul_add(r * r, r) + 1.0;
    let exponent = t.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    p * f32::from_bits(exponent)
}

/// 1 / (1 + e^−x).
#[allow(clippy::inline_always)]
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x · sigmoid(x).
#[allow(clippy::inline_always)]
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

multiversion! {
    /// Softmax of `row` in place. The sum runs over 16 interleaved lanes, added pairwise.
    pub fn softmax(row: &mut [f32]) {
        let mut max = f32::NEG_INFINITY;
        for &v in row.iter() {
            max = if v > max { v } else { max };
        }
        let mut lanes = [0f32; 16];
        let (chunks, rest) = row.as_chunks_mut::<16>();
        for chunk in chunks {
            for (v, lane) in chunk.iter_mut().zip(&mut lanes) {
                *v = exp(*v - max);
                *lane += *v;
            }
        }
        for (v, lane) in rest.iter_mut().zip(&mut lanes) {
            *v = exp(*v - max);
            *lane += *v;
        }
        let scale = 1.0 / super::reduce::fold16(lanes);
        for v in row.iter_mut() {
            *v *= scale;
        }
    }
}

multiversion! {
    /// `out += scale · x`.
    pub fn add_scaled(out: &mut [f32], x: &[f32], scale: f32) {
        for (o, &v) in out.iter_mut().zip(x) {
            *o = v.mul_add(scale, *o);
        }
    }
}

/// `out += x`, on all threads where it is long.
pub fn add(out: &mut [f32], x: &[f32]) {
    const CHUNK: usize = 1 << 14;
    if out.len() <= CHUNK {
        return add_chunk(out, x);
    }
    out.par_chunks_mut(CHUNK)
        .zip(x.par_chunks(CHUNK))
        .for_each(|(out, x)| add_chunk(out, x));
}

multiversion! {
    fn add_chunk(out: &mut [f32], x: &[f32]) {
        for (o, &v) in out.iter_mut().zip(x) {
            *o += v;
        }
    }
}

/// Whether every element is finite.
pub fn all_finite(x: &[f32]) -> bool {
    x.par_chunks(1 << 14).all(chunk_is_finite)
}

multiversion! {
    fn chunk_is_finite(x: &[f32]) -> bool {
        // All exponent bits set: infinity or NaN.
        x.iter().fold(0u32, |max, v| max.max(v.to_bits() & 0x7f80_0000)) < 0x7f80_0000
    }
}

multiversion! {
    /// Natural logarithm of the sum of exponentials, in f64 from f32 logits.
    pub fn log_sum_exp(row: &[f32]) -> f64 {
        let mut max = f32::NEG_INFINITY;
        for &v in row {
            max = if v > max { v } else { max };
        }
        let mut lanes = [0f64; 16];
        let (chunks, rest) = row.as_chunks::<16>();
        for chunk in chunks {
            for (&v, lane) in chunk.iter().zip(&mut lanes) {
                *lane += f64::from(exp(v - max));
            }
        }
        for (&v, lane) in rest.iter().zip(&mut lanes) {
            *lane += f64::from(exp(v - max));
        }
        f64::from(max) + lanes.iter().sum::<f64>().ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_and_keeps_nan() {
        let mut x = -86.0f32;
        while x < 88.0 {
            let want = f64::from(x).exp();
            let got = f64::from(exp(x));
            assert!(
                (got - want).abs() <= want * 2.4e-7,
                "exp({x}) = {got}, want {want}"
            );
            x += 0.013;
        }
        assert!(exp(f32::NAN).is_nan() && silu(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(f32::INFINITY) > 1e38);
    }

    #[test]
    fn softmax_sums_to_one_and_matches_f64() {
        for len in [1usize, 2, 15, 16, 17, 100] {
            let values: Vec<f32> = (0..len)
                .map(|i| ((i * 37 % 23) as f32) * 0.3 - 3.0)
                .collect();
            let total: f64 = values.iter().map(|&v| f64::from(v).exp()).sum();
            let mut got = values.clone();
            softmax(&mut got);
            for (g, v) in got.iter().zip(&values) {
                let want = f64::from(*v).exp() / total;
                assert!((f64::from(*g) - want).abs() < 1e-6 * want);
            }
            assert!((log_sum_exp(&values) - total.ln()).abs() < 1e-6);
        }
    }
}
