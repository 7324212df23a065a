//! DERN's inner part: the neurons of one expert that goes against those of the three quarters of the experts that stay.

use tenp_kernels::cost::{segment_bytes, segment_flops};
use tenp_kernels::cpu::segments::Similarity;
use tenp_kernels::device::segment_match::{
    SegmentItem, SegmentMatch, SegmentTable, items_of, segment_similarity,
};
use tenp_kernels::device::segment_norms::{SegmentNorms, segment_norms};
use tenp_kernels::device::{Backend, Memory as _, PaddedLayout};
use tenp_kernels::{KernelError, RaggedLayout};

use super::cases::Shape;
use super::inputs::Weights;

/// Parts that the default similarity compares: up rows and down columns.
const PARTS: usize = 2;

/// Best matches of a shape's first expert, over sets of weights.
pub struct Comparison<'a, B: Backend> {
    backend: &'a B,
    weights: &'a Weights<B>,
    hidden: usize,
    pub rows: usize,
    pub columns: usize,
    neurons: usize,
    inverse: Vec<B::Buffer<f32>>,
    row_ids: B::Buffer<i32>,
    items: Vec<SegmentItem>,
    items_there: B::Buffer<SegmentItem>,
    values: B::Buffer<f32>,
    found: B::Buffer<i32>,
}

impl<'a, B: Backend> Comparison<'a, B> {
    pub fn new(
        backend: &'a B,
        weights: &'a Weights<B>,
        shape: &Shape,
    ) -> Result<Self, KernelError> {
        let rows = shape.width;
        let layout = PaddedLayout::new(&RaggedLayout::new(vec![rows; shape.experts])?)?;
        let kept: Vec<_> = (shape.experts / 4..shape.experts)
            .map(|e| layout.range(e).start..layout.range(e).start + rows)
            .collect();
        let items = items_of(rows, &kept)?;
        let mut items_there = backend.alloc("segment items", items.len())?;
        backend.write(items_there.view_mut(), &items)?;
        let ids: Vec<i32> = (0..rows as i32).collect();
        let mut row_ids = backend.alloc("rows of segments", rows)?;
        backend.write(row_ids.view_mut(), &ids)?;
        let neurons = layout.total();
        let norms = |set: usize| {
            let mut inverse = backend.alloc("inverse norms", 4 * neurons)?;
            backend.run(&segment_norms(SegmentNorms {
                gate_up: weights.gate_up[set].view(),
                down_t: weights.down_t[set].view(),
                squares: None,
                inverse: Some(inverse.view_mut()),
                num_neurons: neurons,
                hidden: shape.hidden,
            })?)?;
            Ok::<_, KernelError>(inverse)
        };
        Ok(Self {
            backend,
            weights,
            hidden: shape.hidden,
            rows,
            columns: kept.len() * rows,
            neurons,
            inverse: (0..weights.gate_up.len())
                .map(norms)
                .collect::<Result<_, _>>()?,
            row_ids,
            values: backend.alloc("best values", kept.len() * rows)?,
            found: backend.alloc("best columns", kept.len() * rows)?,
            items,
            items_there,
        })
    }

    /// FLOPs and bytes.
    pub fn costs(&self) -> (f64, f64) {
        let sizes = (self.rows, self.columns);
        (
            segment_flops(sizes, PARTS, self.hidden),
            segment_bytes(sizes, PARTS, self.hidden),
        )
    }

    pub fn run(&mut self, set: usize) -> Result<(), KernelError> {
        let table = SegmentTable {
            gate_up: self.weights.gate_up[set].view(),
            down_t: self.weights.down_t[set].view(),
            inverse: self.inverse[set].view(),
            num_neurons: self.neurons,
        };
        let args = SegmentMatch {
            rows: table,
            row_ids: self.row_ids.view(),
            columns: table,
            items: &self.items,
            items_on_device: self.items_there.view(),
            best_value: self.values.view_mut(),
            best_id: self.found.view_mut(),
            best_flip: None,
            num_rows: self.rows,
            hidden: self.hidden,
            wgmma: self.backend.has_wgmma(),
        };
        // SAFETY: the ids are the first expert's neurons, and the items were copied from these.
        let call = unsafe { segment_similarity(args, Similarity::default()) }?;
        self.backend.run(&call)
    }
}
