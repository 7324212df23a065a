//! fp8 weights: codes of OCP FP8 E4M3 (largest value 448, no infinities, NaN in the codes 7f and ff), and one f32 scale
//! for each block of 128 × 128, ceil at the tails.

use crate::cpu::multiversion;

/// Rows and columns that share a scale.
pub const FP8_BLOCK: usize = 128;

/// The value of a code. Written as selects, so that loops over codes become vector code.
#[allow(clippy::inline_always)]
#[inline(always)]
fn decode(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    // Exponent bias 7 becomes 127; below the least normal a code counts steps of 2⁻⁹.
    let normal = f32::from_bits((magnitude << 20) + (120 << 23));
    let small = magnitude as f32 * (1.0 / 512.0);
    let value = if magnitude < 8 { small } else { normal };
    let value = if magnitude == 0x7f { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

multiversion! {
    /// `out = code · scale` for columns `first..` of a row, whose blocks' scales these are (little-endian).
    pub(crate) fn dequantise(codes: &[u8], scales: &[[u8; 4]], first: usize, out: &mut [f32]) {
        let mut done = 0;
        while done < out.len() {
            let column = first + done;
            let count = (FP8_BLOCK - column % FP8_BLOCK).min(out.len() - done);
            let scale = f32::from_le_bytes(scales[column / FP8_BLOCK]);
            let codes = &codes[done..done + count];
            for (o, &code) in out[done..done + count].iter_mut().zip(codes) {
                *o = decode(code) * scale;
            }
            done += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_values_of_the_format() {
        for code in 0..=255u8 {
            // OCP 8-bit floating point specification 1.0, section 5.2: (−1)^s · 2^(e − 7) · (1 + m/8), or 2^−6 · m/8.
            let (e, m) = (i32::from(code >> 3 & 15), f32::from(code & 7));
            let magnitude = if e == 0 {
                (m / 8.0) * 2f32.powi(-6)
            } else {
                (1.0 + m / 8.0) * 2f32.powi(e - 7)
            };
            let want = if code & 0x80 == 0 {
                magnitude
            } else {
                -magnitude
            };
            let got = decode(code);
            if code & 0x7f == 0x7f {
                assert!(got.is_nan());
            } else {
                assert_eq!(got.to_bits(), want.to_bits(), "{code:#04x}");
            }
        }
    }

    #[test]
    fn runs_begin_and_end_anywhere_in_a_block() {
        let codes: Vec<u8> = (0..300u32).map(|i| (i * 37 % 251) as u8 & 0xbf).collect();
        let scales = [0.5f32, 3.0, 1e-3].map(f32::to_le_bytes);
        for (first, len) in [
            (0, 300),
            (0, 1),
            (5, 123),
            (5, 124),
            (127, 130),
            (256, 44),
            (3, 0),
        ] {
            let mut out = vec![0f32; len];
            dequantise(&codes[first..], &scales, first, &mut out);
            for (i, &got) in out.iter().enumerate() {
                let scale = f32::from_le_bytes(scales[(first + i) / 128]);
                assert_eq!(got, decode(codes[first + i]) * scale);
            }
        }
    }
}
