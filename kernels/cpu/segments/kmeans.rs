//! One step of weighted spherical k-means on v = [gate; up; w].

use rayon::prelude::*;

use super::products::{Columns, PARTS, Products, Rows, for_each_tile, larger_than};
use super::{Segments, inverse_norm};
use crate::cpu::dispatch::multiversion;
use crate::cpu::panels::row_runs;
use crate::cpu::tile::{TILE_COLS, TILE_ROWS, Tile};
use crate::error::check_len;
use crate::{Compute, KernelError};

/// Segments to be clustered.
#[derive(Clone, Copy, Debug)]
pub struct WeightedSegments<'a> {
    /// n segments.
    pub segments: &'a Segments,
    /// `[n]`: whether the segment counts with up and w negated.
    pub flipped: &'a [bool],
    /// `[n]`, 0 or more: how much the segment counts in the centre of its cluster.
    pub weights: &'a [f32],
}

impl WeightedSegments<'_> {
    fn check(&self) -> Result<(), KernelError> {
        let n = self.segments.len();
        check_len("flips of segments", n, self.flipped.len())?;
        check_len("weights of segments", n, self.weights.len())
    }

    /// Whether the segment can move a centre: it has weight, and a direction.
    fn counts(&self, index: usize) -> bool {
        let square = self.segments.squares()[index].all();
        self.weights[index] > 0.0 && square > 0.0 && square.is_finite()
    }

    fn sign(&self, index: usize, part: usize) -> f32 {
        if self.flipped[index] && part > 0 {
            -1.0
        } else {
            1.0
        }
    }
}

/// The centre that a segment belongs to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Assignment {
    /// Index of the centre.
    pub centre: usize,
    /// Cosine of v and the centre.
    pub cosine: f32,
}

/// The centre with the largest cosine for every segment, ties to the lower centre; `None` where every cosine is NaN.
///
/// # Errors
/// Lengths and hidden sizes that do not fit together.
pub fn assign(
    compute: Compute,
    points: WeightedSegments<'_>,
    centres: &Segments,
) -> Result<Vec<Option<Assignment>>, KernelError> {
    points.check()?;
    let segments = points.segments;
    check_len(
        "hidden size of centres",
        segments.hidden(),
        centres.hidden(),
    )?;
    let rows = Rows::new(compute, segments, [true; PARTS])?;
    let columns = Columns::of_segments(centres)?;
    let inverses = |of: &Segments| -> Vec<f32> {
        let squares = of.squares().iter();
        squares.map(|s| inverse_norm(s.all())).collect()
    };
    let row_inverse = inverses(segments);
    // NaN behind the last: what is no centre compares with nothing.
    let mut column_inverse = inverses(centres);
    column_inverse.resize(centres.len().next_multiple_of(TILE_COLS), f32::NAN);
    let column_inverse = column_inverse.as_chunks::<TILE_COLS>().0;
    let runs: Vec<_> = row_runs(0..segments.len(), 1).collect();
    let found: Vec<Vec<Option<Assignment>>> = runs
        .par_iter()
        .map(|run| {
            let mut best = vec![None; run.len()];
            for_each_tile(&rows, run, &columns, |products| {
                let best = &mut best[products.first_row - run.start..];
                let columns = &column_inverse[products.first_column / TILE_COLS];
                take_nearest(products, points, &row_inverse, columns, best);
            });
            best
        })
        .collect();
    Ok(found.concat())
}

fn take_nearest(
    products: &Products<'_>,
    points: WeightedSegments<'_>,
    row_inverse: &[f32],
    column_inverse: &[f32; TILE_COLS],
    best: &mut [Option<Assignment>],
) {
    let mut rows = [(0f32, 0f32); TILE_ROWS];
    for (r, row) in rows[..products.rows].iter_mut().enumerate() {
        let index = products.first_row + r;
        *row = (row_inverse[index], points.sign(index, 1));
    }
    let mut cosines = Tile::new();
    tile_cosines(
        products.tiles,
        &rows[..products.rows],
        column_inverse,
        &mut cosines,
    );
    for (r, best) in best[..products.rows].iter_mut().enumerate() {
        if let Some((c, cosine)) = larger_than(best.map(|b| b.cosine), &cosines.0[r]) {
            let centre = products.first_column + c;
            *best = Some(Assignment { centre, cosine });
        }
    }
}

multiversion! {
    /// `rows` are inverse norms and signs.
    fn tile_cosines(
        tiles: &[Tile; PARTS],
        rows: &[(f32, f32)],
        columns: &[f32; TILE_COLS],
        cosines: &mut Tile,
    ) {
        for (r, &(inverse, sign)) in rows.iter().enumerate() {
            let [gate, up, down] = [&tiles[0].0[r], &tiles[1].0[r], &tiles[2].0[r]];
            for c in 0..TILE_COLS {
                cosines.0[r][c] = (gate[c] + sign * (up[c] + down[c])) * inverse * columns[c];
            }
        }
    }
}

/// Moves every centre to its members and returns how many of them counted.
///
/// `clusters[c]` lists the segments of centre c. Those of weight 0, and those without a finite norm above 0, count
/// nowhere. With no counting member the centre stays; with one it becomes that segment (as flipped) bit for bit;
/// otherwise it is the weighted mean of the members, each scaled to their weighted mean norm, scaled back to that norm.
/// Members that cancel each other out leave it where it is.
///
/// # Errors
/// Lengths that do not fit together, [`KernelError::Index`] for a segment that is not there; no centre has moved then.
pub fn update_centres(
    points: WeightedSegments<'_>,
    clusters: &[Vec<usize>],
    centres: &mut Segments,
) -> Result<Vec<usize>, KernelError> {
    points.check()?;
    check_len("clusters", centres.len(), clusters.len())?;
    let (hidden, len) = (points.segments.hidden(), points.segments.len());
    check_len("hidden size of centres", hidden, centres.hidden())?;
    if let Some(&index) = clusters.iter().flatten().find(|&&i| i >= len) {
        return Err(KernelError::Index {
            what: "member of a cluster",
            index,
            len,
        });
    }
    let moved: Vec<(usize, Option<[Vec<f32>; PARTS]>)> = clusters
        .par_iter()
        .map(|members| {
            let counting: Vec<usize> = members
                .iter()
                .copied()
                .filter(|&i| points.counts(i))
                .collect();
            let centre = match counting[..] {
                [] => None,
                [one] => Some(as_flipped(points, one)),
                _ => mean_direction(points, &counting),
            };
            (counting.len(), centre)
        })
        .collect();
    let mut counts = Vec::with_capacity(moved.len());
    for (c, (count, centre)) in moved.into_iter().enumerate() {
        counts.push(count);
        if let Some([gate, up, down]) = centre {
            centres.set(c, [&gate, &up, &down]);
        }
    }
    Ok(counts)
}

fn as_flipped(points: WeightedSegments<'_>, index: usize) -> [Vec<f32>; PARTS] {
    let parts = points.segments.parts(index);
    std::array::from_fn(|part| {
        let sign = points.sign(index, part);
        parts[part].iter().map(|v| sign * v).collect()
    })
}

/// With v̂ = v/‖v‖ and ν = Σ w‖v‖ / Σ w, the mean of the members scaled to ν is ν Σ w v̂ / Σ w; scaled back to norm ν it
/// is ν s/‖s‖ with s = Σ w v̂.
fn mean_direction(points: WeightedSegments<'_>, members: &[usize]) -> Option<[Vec<f32>; PARTS]> {
    let hidden = points.segments.hidden();
    let mut sums: [Vec<f64>; PARTS] = std::array::from_fn(|_| vec![0f64; hidden]);
    let (mut weights, mut norms) = (0f64, 0f64);
    for &index in members {
        let weight = f64::from(points.weights[index]);
        let norm = points.segments.squares()[index].all().sqrt();
        weights += weight;
        norms += weight * norm;
        let parts = points.segments.parts(index);
        for (part, (sum, values)) in sums.iter_mut().zip(parts).enumerate() {
            let scale = weight / norm * f64::from(points.sign(index, part));
            for (sum, &v) in sum.iter_mut().zip(values) {
                *sum += scale * f64::from(v);
            }
        }
    }
    let length = sums.iter().flatten().map(|s| s * s).sum::<f64>().sqrt();
    // Rounding leaves about 1e-7 of what cancels.
    (length > 1e-6 * weights).then(|| {
        let scale = norms / weights / length;
        sums.map(|sum| sum.iter().map(|s| (s * scale) as f32).collect())
    })
}
