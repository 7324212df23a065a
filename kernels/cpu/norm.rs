//! Root-mean-square normalisation.

use rayon::prelude::*;

use super::dispatch::multiversion;
use super::reduce::sum_squares;
use crate::KernelError;
use crate::error::check_len;

/// `out = x / sqrt(mean(x²) + eps) · weight` over rows of `weight.len()`.
///
/// # Errors
/// [`KernelError::Length`] if `x` is no multiple of the weight's length or `out` differs from `x`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f64, out: &mut [f32]) -> Result<(), KernelError> {
    let width = weight.len().max(1);
    check_len("rms_norm input", x.len() / width * width, x.len())?;
    check_len("rms_norm output", x.len(), out.len())?;
    out.par_chunks_mut(width)
        .zip(x.par_chunks(width))
        .with_min_len(64)
        .for_each(|(out, x)| {
            let scale = 1.0 / (sum_squares(x) / width as f64 + eps).sqrt();
            scale_rows(x, weight, scale as f32, out);
        });
    Ok(())
}

/// [`rms_norm`] in place, on the first `weight.len()` elements of every `pitch` (`pitch` ≥ weight length).
///
/// # Errors
/// [`KernelError::Length`] if `x` is no multiple of `pitch`.
pub fn rms_norm_strided(
    x: &mut [f32],
    pitch: usize,
    weight: &[f32],
    eps: f64,
) -> Result<(), KernelError> {
    check_len("rms_norm rows", x.len() / pitch.max(1) * pitch, x.len())?;
    x.par_chunks_mut(pitch.max(1))
        .with_min_len(64)
        .for_each(|row| {
            let row = &mut row[..weight.len()];
            let scale = 1.0 / (sum_squares(row) / weight.len() as f64 + eps).sqrt();
            scale_in_place(row, weight, scale as f32);
        });
    Ok(())
}

multiversion! {
    fn scale_rows(x: &[f32], weight: &[f32], scale: f32, out: &mut [f32]) {
        for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
            *o = v * scale * w;
        }
    }
}

multiversion! {
    fn scale_in_place(x: &mut [f32], weight: &[f32], scale: f32) {
        for (v, &w) in x.iter_mut().zip(weight) {
            *v = *v * scale * w;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_formula() {
        let x: Vec<f32> = (0..3 * 20).map(|i| (i as f32 - 25.0) * 0.1).collect();
        let weight: Vec<f32> = (0..20).map(|i| 1.0 + i as f32 * 0.01).collect();
        let mut out = vec![0.0; x.len()];
        rms_norm(&x, &weight, 1e-6, &mut out).unwrap();
        for (row, out) in x.chunks(20).zip(out.chunks(20)) {
            let mean: f64 = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 20.0;
            for i in 0..20 {
                let want = f64::from(row[i]) / (mean + 1e-6).sqrt() * f64::from(weight[i]);
                assert!((f64::from(out[i]) - want).abs() < 1e-6);
            }
        }
        let mut strided = x.clone();
        rms_norm_strided(&mut strided, 20, &weight[..12], 1e-6).unwrap();
        assert_eq!(strided[12..20], x[12..20]);
        assert!(rms_norm(&x, &weight[..7], 1e-6, &mut out).is_err());
    }
}
