//! The kept expert's neuron that each dropped neuron is most alike.

use std::ops::Range;

use rayon::prelude::*;

use super::products::{Columns, PARTS, Products, Rows, for_each_tile, larger_than};
use super::{SegmentSquares, Segments, inverse_norm, segment_squares};
use crate::cpu::dispatch::multiversion;
use crate::cpu::moe::ExpertWeights;
use crate::cpu::panels::row_runs;
use crate::cpu::tile::{TILE_COLS, Tile};
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

    /// Whether three cosines count for the flipped segment.
    #[allow(clippy::inline_always)]
    #[inline(always)]
    fn flips(&self, [_, up, down]: [f32; PARTS]) -> bool {
        self.sign_canonical && up < 0.0 && down < 0.0
    }

    /// The value of three cosines.
    #[allow(clippy::inline_always)]
    #[inline(always)]
    fn of(&self, cosines: [f32; PARTS]) -> f32 {
        let [gate, up, down] = cosines;
        let rest = self.lambda_up * up + self.lambda_down * down;
        let rest = if self.flips(cosines) { -rest } else { rest };
        self.lambda_gate * gate + rest
    }
}

/// An expert whose neurons segments are compared with: its weights, and their norms, which are taken once.
#[derive(Clone, Debug)]
pub struct MeasuredExpert<'a> {
    weights: ExpertWeights<'a>,
    inverses: Vec<ColumnBlock>,
}

impl<'a> MeasuredExpert<'a> {
    /// Measures an expert.
    ///
    /// # Errors
    /// Matrices that do not fit together.
    pub fn new(weights: ExpertWeights<'a>) -> Result<Self, KernelError> {
        Ok(Self {
            inverses: column_blocks(&segment_squares(&weights)?),
            weights,
        })
    }

    /// Measures experts.
    ///
    /// # Errors
    /// Matrices that do not fit together.
    pub fn all(experts: &[ExpertWeights<'a>]) -> Result<Vec<Self>, KernelError> {
        experts.par_iter().map(|&e| Self::new(e)).collect()
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
/// Experts of another hidden size than the rows.
pub fn best_matches(
    compute: Compute,
    rows: &Segments,
    experts: &[MeasuredExpert<'_>],
    similarity: Similarity,
) -> Result<Vec<Option<Match>>, KernelError> {
    for expert in experts {
        expert.weights.check(rows.hidden())?;
    }
    let packed = Rows::new(compute, rows, similarity.wanted())?;
    let row_inverse = inverses(rows.squares());
    let tasks: Vec<(usize, Range<usize>)> = (0..experts.len())
        .flat_map(|e| row_runs(0..rows.len(), experts.len()).map(move |run| (e, run)))
        .collect();
    let found: Vec<Vec<Option<Match>>> = tasks
        .par_iter()
        .map(|(e, run)| {
            let expert = &experts[*e];
            let neurons = Columns::of_expert(&expert.weights);
            let mut best = vec![None; run.len()];
            for_each_tile(&packed, run, &neurons, |products| {
                let best = &mut best[products.first_row - run.start..];
                let columns = &expert.inverses[products.first_column / TILE_COLS];
                take_best(similarity, *e, products, &row_inverse, columns, best);
            });
            best
        })
        .collect();
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

/// The same in blocks of a tile's columns, NaN behind the last: what is no column compares with nothing.
fn column_blocks(squares: &[SegmentSquares]) -> Vec<ColumnBlock> {
    inverses(squares)
        .chunks(TILE_COLS)
        .map(|chunk| {
            let mut block = [[f32::NAN; TILE_COLS]; PARTS];
            for (c, inverse) in chunk.iter().enumerate() {
                for (part, &inverse) in inverse.iter().enumerate() {
                    block[part][c] = inverse;
                }
            }
            block
        })
        .collect()
}

/// Inverse norms of a tile's columns.
type ColumnBlock = [[f32; TILE_COLS]; PARTS];

fn take_best(
    similarity: Similarity,
    expert: usize,
    products: &Products<'_>,
    row_inverse: &[[f32; PARTS]],
    columns: &ColumnBlock,
    best: &mut [Option<Match>],
) {
    let rows = &row_inverse[products.first_row..][..products.rows];
    let mut values = Tile::new();
    tile_values(&similarity, products.tiles, rows, columns, &mut values);
    for (r, best) in best[..products.rows].iter_mut().enumerate() {
        let Some((c, value)) = larger_than(best.map(|b| b.value), &values.0[r]) else {
            continue;
        };
        let cosines =
            std::array::from_fn(|p| products.tiles[p].0[r][c] * rows[r][p] * columns[p][c]);
        *best = Some(Match {
            expert,
            neuron: products.first_column + c,
            value,
            flipped: similarity.flips(cosines),
        });
    }
}

multiversion! {
    fn tile_values(
        similarity: &Similarity,
        tiles: &[Tile; PARTS],
        rows: &[[f32; PARTS]],
        columns: &ColumnBlock,
        values: &mut Tile,
    ) {
        for (r, row) in rows.iter().enumerate() {
            let [gate, up, down] = [&tiles[0].0[r], &tiles[1].0[r], &tiles[2].0[r]];
            for c in 0..TILE_COLS {
                values.0[r][c] = similarity.of([
                    gate[c] * row[0] * columns[0][c],
                    up[c] * row[1] * columns[1][c],
                    down[c] * row[2] * columns[2][c],
                ]);
            }
        }
    }
}
