//! Rotary position embedding: plain, linear and YaRN frequencies; neighbouring or half-split pairs.

use rayon::prelude::*;

use crate::KernelError;
use crate::error::check_len;

/// Frequency scaling.
#[derive(Clone, Debug, PartialEq)]
pub enum RotaryScaling {
    /// Plain.
    None,
    /// Positions divided by a factor.
    Linear(f64),
    /// YaRN, arXiv 2309.00071 section 3.
    Yarn {
        /// Context extension factor.
        factor: f64,
        /// Rotations at which a frequency stops being scaled.
        beta_fast: f64,
        /// Rotations at which a frequency is fully scaled.
        beta_slow: f64,
        /// Context length before extension.
        original_max_positions: usize,
        /// Multiplies cos and sin.
        attention_factor: f64,
    },
}

/// cos and sin of every (position, pair).
#[derive(Clone, Debug)]
pub struct RotaryTable {
    pairs: usize,
    interleaved: bool,
    leading: bool,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RotaryTable {
    /// Table for `positions` positions of heads with `dim` rotary elements; `interleaved` pairs are neighbours.
    ///
    /// # Errors
    /// [`KernelError::Invalid`] for an odd `dim`.
    pub fn new(
        dim: usize,
        theta: f64,
        scaling: &RotaryScaling,
        interleaved: bool,
        positions: usize,
    ) -> Result<Self, KernelError> {
        if !dim.is_multiple_of(2) {
            return Err(KernelError::Invalid {
                what: "rotary dimension",
                why: format!("{dim} is odd"),
            });
        }
        let pairs = dim / 2;
        let frequencies = inverse_frequencies(dim, theta, scaling);
        let scale = match scaling {
            RotaryScaling::Yarn {
                attention_factor, ..
            } => *attention_factor,
            _ => 1.0,
        };
        let (mut cos, mut sin) = (
            Vec::with_capacity(positions * pairs),
            Vec::with_capacity(positions * pairs),
        );
        for position in 0..positions {
            for &frequency in &frequencies {
                // Reference implementations keep frequencies and angles in f32; at long positions the rounding of the
                // angle is visible, so the same roundings are made here.
                let angle = f64::from(position as f32 * frequency);
                cos.push((angle.cos() * scale) as f32);
                sin.push((angle.sin() * scale) as f32);
            }
        }
        Ok(Self {
            pairs,
            interleaved,
            leading: false,
            cos,
            sin,
        })
    }

    /// The same table for the first elements of a head instead of the last.
    #[must_use]
    pub fn of_leading_elements(self) -> Self {
        Self {
            leading: true,
            ..self
        }
    }

    /// Number of positions the table holds.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.cos.len().checked_div(self.pairs).unwrap_or(0)
    }

    /// Pairs of a head.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// Whether pairs are neighbours.
    #[must_use]
    pub fn is_interleaved(&self) -> bool {
        self.interleaved
    }

    /// Whether the first elements of a head are rotated, [`Self::of_leading_elements`].
    #[must_use]
    pub fn is_leading(&self) -> bool {
        self.leading
    }

    /// `[positions, pairs]` cosines.
    #[must_use]
    pub fn cosines(&self) -> &[f32] {
        &self.cos
    }

    /// `[positions, pairs]` sines.
    #[must_use]
    pub fn sines(&self) -> &[f32] {
        &self.sin
    }

    /// Rotates the last `2 · pairs` elements of each head of `x` (the first, [`Self::of_leading_elements`]): `[tokens,
    /// heads, head_dim]`, token t at `positions[t]`.
    ///
    /// # Errors
    /// [`KernelError::Length`] for lengths that do not fit, [`KernelError::Index`] for a position past the table.
    pub fn rotate(
        &self,
        x: &mut [f32],
        head_dim: usize,
        positions: &[u32],
    ) -> Result<(), KernelError> {
        let per_token = x.len() / positions.len().max(1);
        check_len("rotary input", per_token * positions.len(), x.len())?;
        if head_dim < 2 * self.pairs || !per_token.is_multiple_of(head_dim.max(1)) {
            return Err(KernelError::Invalid {
                what: "rotary head size",
                why: format!("{head_dim} with {} rotary elements", 2 * self.pairs),
            });
        }
        if let Some(&p) = positions.iter().find(|&&p| p as usize >= self.positions()) {
            return Err(KernelError::Index {
                what: "rotary position",
                index: p as usize,
                len: self.positions(),
            });
        }
        x.par_chunks_mut(per_token.max(1))
            .zip(positions)
            .with_min_len(32)
            .for_each(|(token, &position)| {
                let at = position as usize * self.pairs;
                let (cos, sin) = (
                    &self.cos[at..at + self.pairs],
                    &self.sin[at..at + self.pairs],
                );
                for head in token.chunks_exact_mut(head_dim) {
                    let part = if self.leading {
                        &mut head[..2 * self.pairs]
                    } else {
                        &mut head[head_dim - 2 * self.pairs..]
                    };
                    if self.interleaved {
                        for ((pair, &c), &s) in
                            part.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin)
                        {
                            *pair = [pair[0] * c - pair[1] * s, pair[0] * s + pair[1] * c];
                        }
                    } else {
                        let (low, high) = part.split_at_mut(self.pairs);
                        for (((a, b), &c), &s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                        }
                    }
                }
            });
        Ok(())
    }
}

fn inverse_frequencies(dim: usize, theta: f64, scaling: &RotaryScaling) -> Vec<f32> {
    let plain = |pair: usize| 1.0 / theta.powf(2.0 * pair as f64 / dim as f64);
    match *scaling {
        RotaryScaling::None => (0..dim / 2).map(|p| plain(p) as f32).collect(),
        RotaryScaling::Linear(factor) => (0..dim / 2).map(|p| (plain(p) / factor) as f32).collect(),
        RotaryScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_max_positions,
            ..
        } => {
            // The pair whose wavelength makes `rotations` turns over the original context.
            let pair_at = |rotations: f64| {
                dim as f64
                    * (original_max_positions as f64 / (rotations * std::f64::consts::TAU)).ln()
                    / (2.0 * theta.ln())
            };
            let low = pair_at(beta_fast).floor().max(0.0);
            let high = pair_at(beta_slow).ceil().min(dim as f64 - 1.0);
            let span = if high > low { high - low } else { 0.001 };
            (0..dim / 2)
                .map(|p| {
                    let scaled = ((p as f64 - low) / span).clamp(0.0, 1.0);
                    (plain(p) / factor * scaled + plain(p) * (1.0 - scaled)) as f32
                })
                .collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_pairings_rotate_the_same_plane() {
        let dim = 8;
        let neighbours = RotaryTable::new(dim, 1e4, &RotaryScaling::None, true, 16).unwrap();
        let halves = RotaryTable::new(dim, 1e4, &RotaryScaling::None, false, 16).unwrap();
        let x: Vec<f32> = (0..10).map(|i| i as f32 * 0.3 - 1.0).collect();
        let mut a = x.clone();
        neighbours.rotate(&mut a, 10, &[7]).unwrap();
        let mut b = x.clone();
        for p in 0..4 {
            b[2 + p] = x[2 + 2 * p];
            b[6 + p] = x[2 + 2 * p + 1];
        }
        halves.rotate(&mut b, 10, &[7]).unwrap();
        for p in 0..4 {
            assert_eq!((a[2 + 2 * p], a[3 + 2 * p]), (b[2 + p], b[6 + p]));
        }
        assert_eq!(a[..2], x[..2]);
        let norm = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>();
        assert!((norm(&a) - norm(&x)).abs() < 1e-4);
    }

    #[test]
    fn yarn_keeps_fast_frequencies_and_divides_slow_ones() {
        let scaling = RotaryScaling::Yarn {
            factor: 40.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_positions: 4096,
            attention_factor: 1.0,
        };
        let plain = inverse_frequencies(64, 1e4, &RotaryScaling::None);
        let yarn = inverse_frequencies(64, 1e4, &scaling);
        assert_eq!(plain[0], yarn[0]);
        assert!((plain[31] / yarn[31] - 40.0).abs() < 1e-3);
        assert!(RotaryTable::new(7, 1e4, &scaling, true, 4).is_err());
    }

    #[test]
    fn positions_past_the_table_are_refused() {
        let table = RotaryTable::new(4, 1e4, &RotaryScaling::None, true, 3).unwrap();
        assert!(matches!(
            table.rotate(&mut [0.0; 4], 4, &[3]),
            Err(KernelError::Index {
                index: 3,
                len: 3,
                ..
            })
        ));
    }
}
