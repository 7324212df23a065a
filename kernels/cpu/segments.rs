//! DERN's segments (arXiv 2509.10377, `docs/methods.md` section 5): which kept expert a dropped expert's neuron is most
//! alike, and one step of the spherical k-means that merges neurons.
//!
//! A segment is one neuron with everything that belongs to it: its gate row, its up row and its column w of the down
//! projection. (up, w) and (−up, −w) are the same neuron, which is what flipping means here.

mod kmeans;
mod products;
mod similarity;

use rayon::prelude::*;

pub use kmeans::{Assignment, WeightedSegments, assign, update_centres};
pub use similarity::{Match, MeasuredExpert, Similarity, best_matches};

use super::moe::ExpertWeights;
use super::neuron::column_squares;
use super::reduce::sum_squares;
use crate::KernelError;
use crate::error::check_len;

/// Squared norms of a neuron's gate row, up row and down column.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SegmentSquares {
    /// ‖gate row‖².
    pub gate: f64,
    /// ‖up row‖².
    pub up: f64,
    /// ‖w‖².
    pub down: f64,
}

impl SegmentSquares {
    /// ‖v‖² of v = [gate; up; w].
    #[must_use]
    pub fn all(&self) -> f64 {
        self.gate + self.up + self.down
    }
}

/// 1 / norm; 0 where the norm is zero or not finite, so that such a vector has cosine 0 with everything, or NaN, which
/// is never the best.
pub(crate) fn inverse_norm(square: f64) -> f32 {
    if square > 0.0 && square.is_finite() {
        (1.0 / square.sqrt()) as f32
    } else {
        0.0
    }
}

/// Segments in f32, one after another; `[n, H]` of each part.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Segments {
    hidden: usize,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    squares: Vec<SegmentSquares>,
}

impl Segments {
    /// No segments yet, of hidden size `hidden`.
    #[must_use]
    pub fn new(hidden: usize) -> Self {
        Self {
            hidden,
            ..Self::default()
        }
    }

    /// All neurons of an expert.
    ///
    /// # Errors
    /// Matrices that do not fit together.
    pub fn of_expert(expert: &ExpertWeights<'_>) -> Result<Self, KernelError> {
        let mut segments = Self::new(expert.gate.cols());
        let neurons: Vec<usize> = (0..expert.width()).collect();
        segments.extend(expert, &neurons)?;
        Ok(segments)
    }

    /// Adds neurons of an expert, in the order given.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for an expert of another hidden size or whose matrices do not fit together,
    /// [`KernelError::Index`] for a neuron it does not have; nothing is added then.
    pub fn extend(
        &mut self,
        expert: &ExpertWeights<'_>,
        neurons: &[usize],
    ) -> Result<(), KernelError> {
        expert.check(self.hidden)?;
        let width = expert.width();
        if let Some(&index) = neurons.iter().find(|&&n| n >= width) {
            return Err(KernelError::Index {
                what: "segment",
                index,
                len: width,
            });
        }
        let (h, first) = (self.hidden, self.len());
        let len = (first + neurons.len()) * h;
        for part in [&mut self.gate, &mut self.up, &mut self.down] {
            part.resize(len, 0.0);
        }
        for (i, &neuron) in neurons.iter().enumerate() {
            let at = (first + i) * h..(first + i + 1) * h;
            expert.gate.widen_row(neuron, &mut self.gate[at.clone()])?;
            expert.up.widen_row(neuron, &mut self.up[at])?;
        }
        // Rows of the down projection are long and columns far apart: widen each row once.
        let mut row = vec![0f32; width];
        let down = &mut self.down[first * h..];
        for r in 0..h {
            expert.down.widen_row(r, &mut row)?;
            for (i, &neuron) in neurons.iter().enumerate() {
                down[i * h + r] = row[neuron];
            }
        }
        let this = &*self;
        let more: Vec<SegmentSquares> = (first..first + neurons.len())
            .into_par_iter()
            .map(|i| squares_of(this.parts(i)))
            .collect();
        self.squares.extend(more);
        Ok(())
    }

    /// Adds one segment.
    ///
    /// # Errors
    /// [`KernelError::Length`] if a part is not `[H]`.
    pub fn push(&mut self, parts: [&[f32]; 3]) -> Result<(), KernelError> {
        for part in parts {
            check_len("part of a segment", self.hidden, part.len())?;
        }
        self.gate.extend_from_slice(parts[0]);
        self.up.extend_from_slice(parts[1]);
        self.down.extend_from_slice(parts[2]);
        self.squares.push(squares_of(parts));
        Ok(())
    }

    /// Replaces a segment by one whose parts are `[H]`.
    fn set(&mut self, index: usize, parts: [&[f32]; 3]) {
        let at = index * self.hidden..(index + 1) * self.hidden;
        self.gate[at.clone()].copy_from_slice(parts[0]);
        self.up[at.clone()].copy_from_slice(parts[1]);
        self.down[at].copy_from_slice(parts[2]);
        self.squares[index] = squares_of(parts);
    }

    /// Number of segments.
    #[must_use]
    pub fn len(&self) -> usize {
        self.squares.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.squares.is_empty()
    }

    /// Hidden size H.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Gate row, up row and down column of a segment.
    ///
    /// # Panics
    /// If there is no such segment.
    #[must_use]
    pub fn parts(&self, index: usize) -> [&[f32]; 3] {
        let at = index * self.hidden..(index + 1) * self.hidden;
        [&self.gate[at.clone()], &self.up[at.clone()], &self.down[at]]
    }

    /// Squared norms of every segment.
    #[must_use]
    pub fn squares(&self) -> &[SegmentSquares] {
        &self.squares
    }

    /// All gate rows, all up rows, all down columns, `[n, H]` each.
    pub(crate) fn tables(&self) -> [&[f32]; 3] {
        [&self.gate, &self.up, &self.down]
    }
}

fn squares_of(parts: [&[f32]; 3]) -> SegmentSquares {
    let [gate, up, down] = parts.map(sum_squares);
    SegmentSquares { gate, up, down }
}

/// Squared norms of an expert's neurons, without a copy of its weights.
///
/// # Errors
/// Matrices that do not fit together.
pub fn segment_squares(expert: &ExpertWeights<'_>) -> Result<Vec<SegmentSquares>, KernelError> {
    let hidden = expert.gate.cols();
    expert.check(hidden)?;
    let mut row = vec![0f32; hidden];
    column_squares(&expert.down)?
        .into_iter()
        .enumerate()
        .map(|(neuron, down)| {
            expert.gate.widen_row(neuron, &mut row)?;
            let gate = sum_squares(&row);
            expert.up.widen_row(neuron, &mut row)?;
            let up = sum_squares(&row);
            Ok(SegmentSquares { gate, up, down })
        })
        .collect()
}

#[cfg(test)]
mod tests;
