//! The fit of one expert, in f64.
//!
//! S are the kept neurons, R the removed, W the down projection: W' = W_S + W_R C_RS (C_SS + λ·mean(diag C_SS)·I)⁻¹.

use nalgebra::{Cholesky, DMatrix};

use crate::moments::ExpertMoments;

/// Ridges λ that are tried, relative to the mean of the diagonal.
const RIDGES: [f64; 6] = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
/// How often a ridge is raised tenfold where the system is singular.
const RAISES: usize = 6;
/// Rows of W' that are made at once, about.
const ROWS: usize = 1024;
/// Rounding that the comparison of two errors allows for.
const SLACK: f64 = 1e-9;

/// An expert to be fitted.
pub(super) struct Problem<'a> {
    pub(super) moments: &'a ExpertMoments,
    /// S, ascending.
    pub(super) kept: &'a [u32],
    /// W, `[H, K]`.
    pub(super) down: &'a [f32],
    /// H.
    pub(super) hidden: usize,
}

/// A fit. Errors are tr((W − W'E) C (W − W'E)ᵀ): over all tokens, and over those held out by a fit without them.
#[derive(Clone, Debug)]
pub(super) struct Solution {
    /// W', `[H, S]`; absent where cutting alone is best.
    pub(super) down: Option<Vec<f32>>,
    /// λ.
    pub(super) ridge: Option<f64>,
    /// The system was singular with the λ chosen.
    pub(super) raised: bool,
    pub(super) cut: [f64; 2],
    pub(super) recovered: [f64; 2],
}

/// C in its parts.
struct Moments {
    ss: DMatrix<f64>,
    sr: DMatrix<f64>,
    rr: DMatrix<f64>,
}

impl Moments {
    fn of(gram: &[f64], width: usize, kept: &[usize], removed: &[usize]) -> Self {
        let part = |rows: &[usize], columns: &[usize]| {
            DMatrix::from_fn(rows.len(), columns.len(), |r, c| {
                gram[rows[r] * width + columns[c]]
            })
        };
        Self {
            ss: part(kept, kept),
            sr: part(kept, removed),
            rr: part(removed, removed),
        }
    }

    fn plus(&self, other: &Self) -> Self {
        Self {
            ss: &self.ss + &other.ss,
            sr: &self.sr + &other.sr,
            rr: &self.rr + &other.rr,
        }
    }

    /// Z = (C_SS + λ·mean(diag C_SS)·I)⁻¹ C_SR; `None` where that has no Cholesky factor.
    fn fit(&self, ridge: f64) -> Option<DMatrix<f64>> {
        let mean = self.ss.trace() / self.ss.nrows() as f64;
        let mut system = self.ss.clone();
        for i in 0..system.nrows() {
            system[(i, i)] += ridge * mean;
        }
        let factor = Cholesky::new(system)?;
        let fit = factor.solve(&self.sr);
        fit.iter().all(|v| v.is_finite()).then_some(fit)
    }

    /// What cutting alone costs: tr(W_R C_RR W_Rᵀ), with G = W_Rᵀ W_R.
    fn cut(&self, g: &DMatrix<f64>) -> f64 {
        g.dot(&self.rr)
    }

    /// The same with what the kept neurons take over: tr(G (C_RR − ZᵀC_SR − C_RS Z + ZᵀC_SS Z)).
    fn error(&self, g: &DMatrix<f64>, fit: &DMatrix<f64>) -> f64 {
        let fit_g = fit * g;
        let fitted = &self.ss * fit;
        self.cut(g) - 2.0 * fit_g.dot(&self.sr) + fit_g.dot(&fitted)
    }
}

/// Fits W'. The ridge is the one whose fit to the other tokens is best on those held out; where none is better there than
/// cutting alone, nothing is changed.
pub(super) fn solve(problem: &Problem<'_>) -> Solution {
    let width = problem.down.len() / problem.hidden.max(1);
    let kept: Vec<usize> = problem.kept.iter().map(|&id| id as usize).collect();
    let mut removed: Vec<usize> = (0..width).collect();
    removed.retain(|id| kept.binary_search(id).is_err());
    let columns = |ids: &[usize]| {
        DMatrix::from_fn(problem.hidden, ids.len(), |r, c| {
            f64::from(problem.down[r * width + ids[c]])
        })
    };
    let [fitted, held] =
        [0, 1].map(|k| Moments::of(&problem.moments.sums[k], width, &kept, &removed));
    let all = fitted.plus(&held);
    let lost = columns(&removed);
    let g = lost.tr_mul(&lost);
    let mut solution = Solution {
        down: None,
        ridge: None,
        raised: false,
        cut: [all.cut(&g), held.cut(&g)],
        recovered: [all.cut(&g), held.cut(&g)],
    };
    let Some((chosen, held_error)) = choose(&fitted, &held, &g) else {
        return solution;
    };
    let Some((ridge, fit, error)) = raise(&all, &g, chosen) else {
        solution.raised = true;
        return solution;
    };
    assert!(
        error <= solution.cut[0] * (1.0 + SLACK),
        "least squares is never worse than cutting: {error} and {}",
        solution.cut[0]
    );
    solution.down = Some(moved(problem, &kept, &lost, &fit.transpose()));
    solution.recovered = [error, held_error];
    solution.ridge = Some(ridge);
    solution.raised = ridge > chosen;
    solution
}

/// W' = W_S + W_R Zᵀ, `[H, S]` by rows, some of them at a time.
fn moved(
    problem: &Problem<'_>,
    kept: &[usize],
    lost: &DMatrix<f64>,
    fit: &DMatrix<f64>,
) -> Vec<f32> {
    let hidden = problem.hidden;
    let width = problem.down.len() / hidden.max(1);
    // Parts of about the same size: a product of very few rows would be summed in another order.
    let rows = hidden.div_ceil(hidden.div_ceil(ROWS).max(1));
    let mut new = Vec::with_capacity(hidden * kept.len());
    for first in (0..hidden).step_by(rows.max(1)) {
        let part = lost.rows(first, rows.min(hidden - first)) * fit;
        for (row, moved) in part.row_iter().enumerate() {
            let old = &problem.down[(first + row) * width..][..width];
            let own = kept.iter().map(|&id| f64::from(old[id]));
            new.extend(own.zip(moved.iter()).map(|(own, more)| (own + more) as f32));
        }
    }
    new
}

/// Bytes that a fit holds beside the moments it is given: W in f32, the removed columns of W and a part of W' in f64, W' in
/// f32, the parts of the moments (fitted, held out, both), the system and its factor, the solution and its products.
pub(crate) fn held_bytes(hidden: usize, width: usize, kept: usize) -> usize {
    let removed = width - kept;
    let moments = kept * kept + kept * removed + removed * removed;
    let system = 2 * kept * kept + 3 * kept * removed + removed * removed;
    let weights = hidden * removed + hidden.min(ROWS) * kept;
    size_of::<f32>() * hidden * (width + kept) + size_of::<f64>() * (3 * moments + system + weights)
}

/// Operations of a fit, about: for every ridge a factor, a solution and its error, and once for all tokens; the columns of W.
pub(crate) fn operations(hidden: usize, width: usize, kept: usize) -> f64 {
    let (h, s, r) = (hidden as f64, kept as f64, (width - kept) as f64);
    let ridge = s.powi(3) / 3.0 + 4.0 * s * s * r + 2.0 * s * r * r;
    (RIDGES.len() + 1) as f64 * ridge + 2.0 * h * r * (r + s)
}

/// Operations a second of one thread, from one fit of a made-up expert of about this width.
pub(crate) fn rate(width: usize) -> f64 {
    let width = width.clamp(16, 384);
    let (kept, hidden) = (width / 2, 64);
    let wave = |i: usize| ((i * 37) % 101) as f64 / 101.0;
    // v vᵀ + I: positive definite.
    let gram: Vec<f64> = (0..width * width)
        .map(|i| (i / width, i % width))
        .map(|(row, col)| wave(row) * wave(col) + f64::from(u8::from(row == col)))
        .collect();
    let moments = ExpertMoments {
        sums: [gram.clone(), gram],
        outputs: [1.0; 2],
    };
    let kept_ids: Vec<u32> = (0..kept as u32).collect();
    let down: Vec<f32> = (0..hidden * width).map(|i| wave(i) as f32).collect();
    let started = std::time::Instant::now();
    let solution = solve(&Problem {
        moments: &moments,
        kept: &kept_ids,
        down: &down,
        hidden,
    });
    std::hint::black_box(solution);
    operations(hidden, width, kept) / started.elapsed().as_secs_f64()
}

/// The best ridge and its error on the tokens held out, if that is below cutting's. Of equals the largest.
fn choose(fitted: &Moments, held: &Moments, g: &DMatrix<f64>) -> Option<(f64, f64)> {
    let mut best: Option<(f64, f64)> = None;
    for ridge in RIDGES.into_iter().rev() {
        let Some(fit) = fitted.fit(ridge) else {
            continue;
        };
        let error = held.error(g, &fit);
        if error < best.map_or(held.cut(g), |(_, least)| least) {
            best = Some((ridge, error));
        }
    }
    best
}

/// The fit with the ridge, raised until the system can be solved well enough to be no worse than cutting.
fn raise(all: &Moments, g: &DMatrix<f64>, chosen: f64) -> Option<(f64, DMatrix<f64>, f64)> {
    let cut = all.cut(g);
    (0..=RAISES).find_map(|raises| {
        let ridge = chosen * 10_f64.powi(raises as i32);
        let fit = all.fit(ridge)?;
        let error = all.error(g, &fit);
        (error <= cut * (1.0 + SLACK)).then_some((ridge, fit, error))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in [−1, 1) without a pattern.
    fn numbers(seed: u64, count: usize) -> Vec<f64> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..count)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
            })
            .collect()
    }

    fn gram(rows: &[Vec<f64>], width: usize) -> Vec<f64> {
        let mut sums = vec![0.0; width * width];
        for h in rows {
            for (i, a) in h.iter().enumerate() {
                for (j, b) in h.iter().enumerate() {
                    sums[i * width + j] += a * b;
                }
            }
        }
        sums
    }

    fn grams(rows: &[Vec<f64>], width: usize) -> ExpertMoments {
        let (held, fitted): (Vec<_>, Vec<_>) = rows
            .iter()
            .cloned()
            .enumerate()
            .partition(|(i, _)| i % 5 == 4);
        let of = |rows: Vec<(usize, Vec<f64>)>| {
            gram(&rows.into_iter().map(|(_, h)| h).collect::<Vec<_>>(), width)
        };
        ExpertMoments {
            sums: [of(fitted), of(held)],
            ..ExpertMoments::default()
        }
    }

    /// Σ‖y − y'‖² by running both.
    fn error(rows: &[Vec<f64>], down: &[f32], kept: &[u32], new: &[f32], hidden: usize) -> f64 {
        let width = down.len() / hidden;
        let mut sum = 0.0;
        for h in rows {
            for r in 0..hidden {
                let whole: f64 = (0..width)
                    .map(|j| f64::from(down[r * width + j]) * h[j])
                    .sum();
                let narrow: f64 = kept
                    .iter()
                    .enumerate()
                    .map(|(c, &j)| f64::from(new[r * kept.len() + c]) * h[j as usize])
                    .sum();
                sum += (whole - narrow).powi(2);
            }
        }
        sum
    }

    fn narrow(seed: u64, width: usize) -> Vec<f32> {
        numbers(seed, width).iter().map(|v| *v as f32).collect()
    }

    #[test]
    fn the_error_is_below_cutting_and_what_running_shows() {
        let (width, hidden) = (12, 5);
        for (seed, count) in [(1, 6), (2, 40), (3, 400)] {
            // Activations with a few common causes, as real ones have.
            let rows: Vec<Vec<f64>> = (0..count)
                .map(|i| {
                    let causes = numbers(1000 * seed + i, 4);
                    let noise = numbers(5000 * seed + i, width);
                    let mix = numbers(seed, 4 * width);
                    (0..width)
                        .map(|j| {
                            (0..4).map(|c| mix[4 * j + c] * causes[c]).sum::<f64>() + 0.3 * noise[j]
                        })
                        .collect()
                })
                .collect();
            let (down, kept) = (narrow(seed + 50, width * hidden), [0, 2, 3, 7, 8, 11]);
            let grams = grams(&rows, width);
            let solution = solve(&Problem {
                moments: &grams,
                kept: &kept,
                down: &down,
                hidden,
            });
            let cut: Vec<f32> = (0..hidden)
                .flat_map(|r| kept.map(|j| down[r * width + j as usize]))
                .collect();
            let before = error(&rows, &down, &kept, &cut, hidden);
            assert!((solution.cut[0] - before).abs() < 1e-5 * before);
            let Some(new) = &solution.down else {
                assert_eq!(count, 6, "enough rows to fit");
                continue;
            };
            let after = error(&rows, &down, &kept, new, hidden);
            assert!(after < before, "{after} {before}");
            assert!((solution.recovered[0] - after).abs() < 1e-4 * before);
        }
    }

    #[test]
    fn a_removed_double_is_recovered_exactly() {
        let (width, hidden) = (8, 4);
        let rows: Vec<Vec<f64>> = (0..200)
            .map(|i| {
                let mut h = numbers(i + 1, width);
                // Neuron 5 is removed: it does what twice the kept neuron 1 does.
                h[5] = 2.0 * h[1];
                h
            })
            .collect();
        let (down, kept) = (narrow(9, width * hidden), [0, 1, 2, 3, 4, 6, 7]);
        let grams = grams(&rows, width);
        let solution = solve(&Problem {
            moments: &grams,
            kept: &kept,
            down: &down,
            hidden,
        });
        assert!(
            solution.recovered[0] < 1e-6 * solution.cut[0],
            "{solution:?}"
        );
        let new = solution.down.unwrap();
        for r in 0..hidden {
            let expected = down[r * width + 1] + 2.0 * down[r * width + 5];
            assert!((new[r * 7 + 1] - expected).abs() < 1e-3);
            assert!((new[r * 7] - down[r * width]).abs() < 1e-3);
        }
    }

    #[test]
    fn a_fit_holds_its_moments_in_three_parts() {
        // H 3, K 5, two kept: 2·2 + 2·3 + 3·3 moments thrice; system and factor, three S × R, one R × R; columns of W.
        let f64s = 3 * 19 + (8 + 18 + 9) + 3 * (3 + 2);
        assert_eq!(held_bytes(3, 5, 2), 4 * 3 * 7 + 8 * f64s);
        // Of many rows, a part at a time.
        let more = held_bytes(5 * ROWS, 5, 2) - held_bytes(ROWS, 5, 2);
        assert_eq!(more, 4 * ROWS * (4 * 7 + 8 * 3));
    }

    #[test]
    fn rows_in_parts_are_rows_of_the_whole() {
        let (width, hidden, kept) = (24, 2 * ROWS + 3, [0, 3, 4, 8, 11, 12, 15, 16, 19, 20]);
        let removed: Vec<usize> = (0..width).filter(|id| !kept.contains(id)).collect();
        let down = narrow(3, width * hidden);
        let columns = |ids: &[usize]| {
            DMatrix::from_fn(hidden, ids.len(), |r, c| {
                f64::from(down[r * width + ids[c]])
            })
        };
        let fit = DMatrix::from_row_slice(removed.len(), kept.len(), &numbers(5, 140));
        let whole = columns(&kept) + columns(&removed) * &fit;
        let whole: Vec<f32> = whole.transpose().iter().map(|v| *v as f32).collect();
        let problem = Problem {
            moments: &ExpertMoments::default(),
            kept: &[],
            down: &down,
            hidden,
        };
        assert_eq!(moved(&problem, &kept, &columns(&removed), &fit), whole);
    }

    #[test]
    fn singular_systems_and_silence() {
        let (width, hidden) = (6, 3);
        let down = narrow(4, width * hidden);
        let kept = [0, 1, 2];
        // No token at all: nothing is known, nothing is changed.
        let silent = ExpertMoments {
            sums: [0; 2].map(|_| vec![0.0; 36]),
            ..ExpertMoments::default()
        };
        let solution = solve(&Problem {
            moments: &silent,
            kept: &kept,
            down: &down,
            hidden,
        });
        assert!(solution.down.is_none() && !solution.raised);
        // Kept neurons that are one another's doubles: singular without a ridge.
        let rows: Vec<Vec<f64>> = (0..50)
            .map(|i| {
                let v = numbers(i + 7, 2);
                vec![v[0], v[0], v[0], v[0], v[1], v[1]]
            })
            .collect();
        let gram = grams(&rows, width);
        let solution = solve(&Problem {
            moments: &gram,
            kept: &kept,
            down: &down,
            hidden,
        });
        assert!(solution.down.is_some());
        assert!(solution.recovered[0] < solution.cut[0]);
        let fitted = Moments::of(&gram.sums[0], width, &[0, 1, 2], &[3, 4, 5]);
        let g = DMatrix::identity(3, 3);
        // A ridge that vanishes in rounding is raised.
        let (ridge, ..) = raise(&fitted, &g, 1e-20).unwrap();
        assert!(ridge > 1e-20, "{ridge}");
        // Not finite: left alone, not a panic.
        let mut damaged = gram.clone();
        damaged.sums[0][0] = f64::NAN;
        let solution = solve(&Problem {
            moments: &damaged,
            kept: &kept,
            down: &down,
            hidden,
        });
        assert!(solution.down.is_none());
    }
}
