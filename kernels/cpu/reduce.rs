//! Sums with a fixed shape: 16 interleaved lanes, folded pairwise. Deterministic and wide at once.

use super::dispatch::multiversion;

#[allow(clippy::inline_always)]
#[inline(always)]
pub(crate) fn fold16(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

multiversion! {
    /// `[x·x, x·y, y·y]` in f64, for vectors of equal length.
    pub fn dots(x: &[f32], y: &[f32]) -> [f64; 3] {
        let mut lanes = [[0f64; 8]; 3];
        let (xc, xr) = x.as_chunks::<8>();
        let (yc, yr) = y.as_chunks::<8>();
        for (a, b) in xc.iter().zip(yc) {
            for i in 0..8 {
                let (a, b) = (f64::from(a[i]), f64::from(b[i]));
                lanes[0][i] += a * a;
                lanes[1][i] += a * b;
                lanes[2][i] += b * b;
            }
        }
        for (i, (a, b)) in xr.iter().zip(yr).enumerate() {
            let (a, b) = (f64::from(*a), f64::from(*b));
            lanes[0][i] += a * a;
            lanes[1][i] += a * b;
            lanes[2][i] += b * b;
        }
        lanes.map(|l| ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7])))
    }
}

multiversion! {
    /// `Σ x²` in f64.
    pub fn sum_squares(x: &[f32]) -> f64 {
        let mut lanes = [0f64; 8];
        let (chunks, rest) = x.as_chunks::<8>();
        for chunk in chunks {
            for (lane, &v) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(v) * f64::from(v);
            }
        }
        for (lane, &v) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(v) * f64::from(v);
        }
        ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
    }
}

multiversion! {
    /// Largest |x|; NaN if any element is NaN.
    pub fn max_abs(x: &[f32]) -> f32 {
        let mut max = 0f32;
        for &v in x {
            let v = v.abs();
            // Not `f32::max`, which would drop a NaN.
            max = if v > max || v.is_nan() { v } else { max };
        }
        max
    }
}
