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

#[allow(clippy::inline_always)]
#[inline(always)]
fn fold8(l: [f64; 8]) -> f64 {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}

multiversion! {
    /// `[x·y, y·y]` in f64, for vectors of equal length.
    pub fn dot_and_square(x: &[f32], y: &[f32]) -> [f64; 2] {
        let mut lanes = [[0f64; 8]; 2];
        let (xc, xr) = x.as_chunks::<8>();
        let (yc, yr) = y.as_chunks::<8>();
        for (a, b) in xc.iter().zip(yc) {
            for i in 0..8 {
                let (a, b) = (f64::from(a[i]), f64::from(b[i]));
                lanes[0][i] = a.mul_add(b, lanes[0][i]);
                lanes[1][i] = b.mul_add(b, lanes[1][i]);
            }
        }
        for (i, (a, b)) in xr.iter().zip(yr).enumerate() {
            let (a, b) = (f64::from(*a), f64::from(*b));
            lanes[0][i] = a.mul_add(b, lanes[0][i]);
            lanes[1][i] = b.mul_add(b, lanes[1][i]);
        }
        lanes.map(fold8)
    }
}

multiversion! {
    /// `[r·r, r·(r+m), (r+m)·(r+m)]` in f64, for vectors of equal length; r + m is rounded to f32 as the model does.
    pub fn dots_with_sum(r: &[f32], m: &[f32]) -> [f64; 3] {
        let mut lanes = [[0f64; 8]; 3];
        let (rc, rr) = r.as_chunks::<8>();
        let (mc, mr) = m.as_chunks::<8>();
        for (a, b) in rc.iter().zip(mc) {
            for i in 0..8 {
                let (a, b) = (f64::from(a[i]), f64::from(a[i] + b[i]));
                lanes[0][i] = a.mul_add(a, lanes[0][i]);
                lanes[1][i] = a.mul_add(b, lanes[1][i]);
                lanes[2][i] = b.mul_add(b, lanes[2][i]);
            }
        }
        for (i, (a, b)) in rr.iter().zip(mr).enumerate() {
            let (a, b) = (f64::from(*a), f64::from(a + b));
            lanes[0][i] = a.mul_add(a, lanes[0][i]);
            lanes[1][i] = a.mul_add(b, lanes[1][i]);
            lanes[2][i] = b.mul_add(b, lanes[2][i]);
        }
        lanes.map(fold8)
    }
}

multiversion! {
    /// `Σ x²` in f64.
    pub fn sum_squares(x: &[f32]) -> f64 {
        let mut lanes = [0f64; 8];
        let (chunks, rest) = x.as_chunks::<8>();
        for chunk in chunks {
            for (lane, &v) in lanes.iter_mut().zip(chunk) {
                *lane = f64::from(v).mul_add(f64::from(v), *lane);
            }
        }
        for (lane, &v) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(v) * f64::from(v);
        }
        fold8(lanes)
    }
}

multiversion! {
    /// Largest |x|; NaN if any element is NaN.
    pub fn max_abs(x: &[f32]) -> f32 {
        // The bits of non-negative floats are ordered like the floats, with NaN above infinity.
        let bits = x.iter().fold(0u32, |max, v| max.max(v.to_bits() & 0x7fff_ffff));
        f32::from_bits(bits)
    }
}
