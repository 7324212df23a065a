//! Second moments of a layer's activations where its kernels run: products of f32 through the backend, summed in f32 over
//! the layer and widened at its end.

use std::ops::Range;

use half::bf16;
use tenp_kernels::KernelError;
use tenp_kernels::device::rows::{ScaleRows, scale_rows};
use tenp_kernels::device::{Backend, DenseShape, DeviceSlice, Memory};

use super::routing::Grouped;
use super::sums::downloaded;
use super::{uploaded, zeros};
use crate::moments::{ExpertMoments, MomentsWanted};

/// Running moments of a layer.
pub(super) struct DeviceMoments<'w, B: Backend> {
    wanted: &'w MomentsWanted<'w>,
    /// By expert, of the tokens fitted and of those held out: `[K, K]`.
    sums: Vec<Option<[B::Buffer<f32>; 2]>>,
    outputs: Vec<[f64; 2]>,
}

/// Rows of an expert that go into one part.
struct Part {
    expert: usize,
    held: usize,
    /// Where their numbers are in the list of all parts.
    place: Range<usize>,
}

impl<'w, B: Backend> DeviceMoments<'w, B> {
    pub(super) fn new(backend: &B, wanted: &'w MomentsWanted<'w>) -> Result<Self, KernelError> {
        let square = wanted.width * wanted.width;
        let part = || zeros(backend, "second moments of experts", square);
        let sums = wanted
            .experts
            .iter()
            .map(|wanted| wanted.then(|| Ok([part()?, part()?])).transpose())
            .collect::<Result<_, KernelError>>()?;
        Ok(Self {
            outputs: vec![[0.0; 2]; wanted.experts.len()],
            wanted,
            sums,
        })
    }

    /// Adds a block: `tokens` are its tokens; h `[rows, pitch]` and ‖y‖ `[rows]` are their experts'.
    pub(super) fn add(
        &mut self,
        backend: &B,
        tokens: &Range<usize>,
        grouped: &Grouped<B>,
        (h, pitch): (DeviceSlice<'_, bf16>, usize),
        norms: DeviceSlice<'_, f64>,
    ) -> Result<(), KernelError> {
        let offsets = downloaded(backend, grouped.group_offsets.view())?;
        let token_of_row = downloaded(backend, grouped.token_of_row.view())?;
        let gates = downloaded(backend, grouped.row_weights.view())?;
        let norms = downloaded(backend, norms)?;
        let (mut ids, mut parts) = (Vec::new(), Vec::new());
        for expert in 0..self.sums.len() {
            let own = offsets[expert] as usize..offsets[expert + 1] as usize;
            for held in 0..2 {
                let start = ids.len();
                for row in own.clone() {
                    let token = tokens.start + token_of_row[row] as usize;
                    if usize::from(self.wanted.held[token]) == held {
                        ids.push(row as i32);
                        let gate = if self.wanted.gated { gates[row] } else { 1.0 };
                        self.outputs[expert][held] += (f64::from(gate) * norms[row]).powi(2);
                    }
                }
                let place = start..ids.len();
                if self.wanted.experts[expert] && !place.is_empty() {
                    parts.push(Part {
                        expert,
                        held,
                        place,
                    });
                }
            }
        }
        self.multiply(backend, (&ids, &parts), grouped, (h, pitch))
    }

    fn multiply(
        &mut self,
        backend: &B,
        (ids, parts): (&[i32], &[Part]),
        grouped: &Grouped<B>,
        (h, in_pitch): (DeviceSlice<'_, bf16>, usize),
    ) -> Result<(), KernelError> {
        let cols = self.wanted.width;
        let out_pitch = cols.next_multiple_of(8);
        let Some(most) = parts.iter().map(|part| part.place.len()).max() else {
            return Ok(());
        };
        let ids = uploaded(backend, "rows of experts", ids)?;
        let mut scaled = backend.alloc::<f32>("scaled activations", most * out_pitch)?;
        let weights = grouped.row_weights.view();
        for part in parts {
            let rows = part.place.len();
            // SAFETY: the rows are those of `h`, below the number of their gate weights.
            backend.run(&unsafe {
                scale_rows(ScaleRows {
                    input: h,
                    row_ids: ids.view().slice(part.place.clone())?,
                    scales: self.wanted.gated.then_some(weights),
                    out: scaled.view_mut(),
                    rows,
                    cols,
                    num_in_rows: weights.len(),
                    in_pitch,
                    out_pitch,
                })?
            })?;
            let shape = DenseShape {
                accumulate: true,
                ..DenseShape::gram(rows, cols, out_pitch)
            };
            let sums = self.sums[part.expert].as_mut();
            let sums = &mut sums.expect("parts are of experts that are wanted")[part.held];
            backend.dense(&shape, scaled.view(), scaled.view(), sums.view_mut())?;
        }
        Ok(())
    }

    /// By expert.
    pub(super) fn finish(self, backend: &B) -> Result<Vec<ExpertMoments>, KernelError> {
        let wide = |buffer: &B::Buffer<f32>| -> Result<Vec<f64>, KernelError> {
            let values = downloaded(backend, buffer.view())?;
            Ok(values.into_iter().map(f64::from).collect())
        };
        let experts = self.sums.iter().zip(self.outputs);
        experts
            .map(|(sums, outputs)| {
                Ok(ExpertMoments {
                    sums: match sums {
                        Some([fitted, held]) => [wide(fitted)?, wide(held)?],
                        None => Default::default(),
                    },
                    outputs,
                })
            })
            .collect()
    }
}
