//! The kept expert's neuron that each dropped neuron is most alike.

use std::ops::Range;

use rayon::prelude::*;

use super::products::{Columns, PARTS, Products, Rows, for_each_tile};
use super::{SegmentSquares, Segments, inverse_norm, segment_squares};
use crate::cpu::moe::ExpertWeights;
use crate::cpu::panels::row_runs;
use crate::{Compute, KernelError};

/// `λ_g cos(gate, gate') + λ_u cos(up, up') + λ_d cos(w, w')`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Similarity {
    /// λ_g.
    pub lambda_gate: f32,
    /// λ_u.
    pub lambda_up: f32,
    /// λ_d.
    pub lambda_down: f32,
    /// Where the cosines of up and down are both negative, both count positive: (up, w) and (−up, −w) are one neuron.
    pub sign_canonical: bool,
}

impl Default for Similarity {
    fn default() -> Self {
        Self {
            lambda_gate: 0.0,
            lambda_up: 0.5,
            lambda_down: 0.5,
            sign_canonical: false,
        }
    }
}

impl Similarity {
    /// The parts whose cosines matter. Others are not read, whatever is in them.
    fn wanted(&self) -> [bool; PARTS] {
        [
            self.lambda_gate != 0.0,
            self.lambda_up != 0.0 || self.sign_canonical,
            self.lambda_down != 0.0 || self.sign_canonical,
        ]
    }

    /// The value of three cosines, and whether it is that of the flipped segment.
    fn of(&self, [gate, up, down]: [f32; PARTS]) -> (f32, bool) {
        let flipped = self.sign_canonical && up < 0.0 && down < 0.0;
        let sign = if flipped { -1.0 } else { 1.0 };
        let rest = self.lambda_up * (sign * up) + self.lambda_down * (sign * down);
        (self.lambda_gate * gate + rest, flipped)
    }
}

/// The neuron that a segment is most alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Match {
    /// Index of its expert.
    pub expert: usize,
    /// Its number in that expert.
    pub neuron: usize,
    /// How alike they are, 1 at most where the λ add up to 1.
    pub value: f32,
    /// Whether the segment must be flipped to be so.
    pub flipped: bool,
}

/// The best match of every row among all neurons of `experts`; ties go to the lower expert, then to the lower neuron.
/// `None` for a row that compares with nothing: there is no neuron, or every value is NaN.
///
/// Rows are packed as a whole, at `4 · H` bytes (`2 · H` for bf16) a row and part that matters: of a large layer give the
/// segments of one dropped expert at a time.
///
/// # Errors
/// Matrices that do not fit together or to the rows.
pub fn best_matches(
    compute: Compute,
    rows: &Segments,
    experts: &[ExpertWeights<'_>],
    similarity: Similarity,
) -> Result<Vec<Option<Match>>, KernelError> {
    for expert in experts {
        expert.check(rows.hidden())?;
    }
    let packed = Rows::new(compute, rows, similarity.wanted())?;
    let row_inverse = inverses(rows.squares());
    let tasks: Vec<(usize, Range<usize>)> = (0..experts.len())
        .flat_map(|e| row_runs(0..rows.len(), experts.len()).map(move |run| (e, run)))
        .collect();
    let found = tasks
        .par_iter()
        .map(|(e, run)| {
            let column_inverse = inverses(&segment_squares(&experts[*e])?);
            let mut best = vec![None; run.len()];
            let columns = Columns::of_expert(&experts[*e]);
            for_each_tile(&packed, run, &columns, |products| {
                let best = &mut best[products.first_row - run.start..];
                take_best(
                    similarity,
                    *e,
                    products,
                    &row_inverse,
                    &column_inverse,
                    best,
                );
            });
            Ok(best)
        })
        .collect::<Result<Vec<Vec<Option<Match>>>, KernelError>>()?;
    let mut best: Vec<Option<Match>> = vec![None; rows.len()];
    for ((_, run), found) in tasks.into_iter().zip(found) {
        for (best, found) in best[run].iter_mut().zip(found) {
            if found.is_some_and(|f| best.is_none_or(|b| f.value > b.value)) {
                *best = found;
            }
        }
    }
    Ok(best)
}

fn inverses(squares: &[SegmentSquares]) -> Vec<[f32; PARTS]> {
    let of = |s: &SegmentSquares| [s.gate, s.up, s.down].map(inverse_norm);
    squares.iter().map(of).collect()
}

fn take_best(
    similarity: Similarity,
    expert: usize,
    products: &Products<'_>,
    row_inverse: &[[f32; PARTS]],
    column_inverse: &[[f32; PARTS]],
    best: &mut [Option<Match>],
) {
    for (r, best) in best[..products.rows].iter_mut().enumerate() {
        let row = row_inverse[products.first_row + r];
        for (c, column) in column_inverse[products.first_column..][..products.columns]
            .iter()
            .enumerate()
        {
            let cosine = |part: usize| products.tiles[part].0[r][c] * row[part] * column[part];
            let (value, flipped) = similarity.of([cosine(0), cosine(1), cosine(2)]);
            // False for NaN.
            if value > best.map_or(f32::NEG_INFINITY, |b| b.value) {
                *best = Some(Match {
                    expert,
                    neuron: products.first_column + c,
                    value,
                    flipped,
                });
            }
        }
    }
}
