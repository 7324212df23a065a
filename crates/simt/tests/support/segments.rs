//! Packed segments on the executor, and the same on the CPU.

use half::bf16;
use simt::Buffer;
use tenp_kernels::cpu::segments::{Segments, Similarity};
use tenp_kernels::device::segment_match::{
    SegmentItem, SegmentMatch, SegmentTable, items_of, segment_assign, segment_similarity,
};
use tenp_kernels::device::segment_norms::{SegmentNorms, segment_norms};

use super::layer::Layer;
use super::{Sim, view, view_mut};

/// A layer's neurons with their norms.
pub struct Table {
    pub layer: Layer,
    pub gate_up: Buffer<bf16>,
    pub down_t: Buffer<bf16>,
    pub squares: Buffer<f64>,
    pub inverse: Buffer<f32>,
    pub hidden: usize,
}

impl Table {
    pub fn new(layer: Layer, sim: Sim) -> Self {
        let neurons = layer.layout.total();
        let table = Self {
            hidden: layer.hidden,
            gate_up: Buffer::input("gate_up", &layer.gate_up()),
            down_t: Buffer::input("down_t", &layer.down_t()),
            squares: Buffer::output("squares", 3 * neurons),
            inverse: Buffer::output("inverse", 4 * neurons),
            layer,
        };
        sim.go(segment_norms(SegmentNorms {
            gate_up: view(&table.gate_up),
            down_t: view(&table.down_t),
            squares: Some(view_mut(&table.squares)),
            inverse: Some(view_mut(&table.inverse)),
            num_neurons: neurons,
            hidden: table.hidden,
        }));
        table
    }

    pub fn view(&self) -> SegmentTable<'_> {
        SegmentTable {
            gate_up: view(&self.gate_up),
            down_t: view(&self.down_t),
            inverse: view(&self.inverse),
            num_neurons: self.layer.layout.total(),
        }
    }

    /// Padded neuron ids of some neurons (expert, number), and the same segments for the CPU.
    pub fn pick(&self, neurons: &[(usize, usize)]) -> (Vec<i32>, Segments) {
        let mut segments = Segments::new(self.hidden);
        let views = self.layer.views();
        let mut ids = Vec::new();
        for &(expert, neuron) in neurons {
            ids.push((self.layer.layout.range(expert).start + neuron) as i32);
            segments
                .extend(&views[expert], &[neuron])
                .expect("it has that neuron");
        }
        (ids, segments)
    }

    /// Every neuron of every expert.
    pub fn all(&self) -> Vec<(usize, usize)> {
        let widths = self.layer.widths.iter().enumerate();
        widths
            .flat_map(|(e, &w)| (0..w).map(move |n| (e, n)))
            .collect()
    }

    /// The real neurons of each expert, in padded numbers.
    pub fn groups(&self) -> Vec<std::ops::Range<usize>> {
        let starts = self.layer.widths.iter().enumerate();
        starts
            .map(|(e, &width)| {
                let start = self.layer.layout.range(e).start;
                start..start + width
            })
            .collect()
    }
}

/// Results `[groups, rows]`.
pub struct Matches {
    pub values: Buffer<f32>,
    pub ids: Buffer<i32>,
    pub flips: Buffer<i32>,
}

/// What rows are compared by.
pub enum By<'a> {
    Similarity(Similarity),
    /// Cosine of v, with signs of the rows.
    Cosine(&'a [f32]),
}

/// Compares `row_ids` of `rows` with every group of `columns`.
pub fn compare(
    rows: &Table,
    row_ids: &[i32],
    columns: &Table,
    groups: &[std::ops::Range<usize>],
    by: &By<'_>,
    sim: Sim,
) -> Matches {
    let count = groups.len() * row_ids.len();
    let matches = Matches {
        values: Buffer::output("best_value", count),
        ids: Buffer::output("best_id", count),
        flips: Buffer::output("best_flip", count),
    };
    let items: Vec<SegmentItem> = items_of(row_ids.len(), groups).expect("small numbers");
    let items_on_device = Buffer::input("items", &items);
    let ids = Buffer::input("row_ids", row_ids);
    let args = SegmentMatch {
        rows: rows.view(),
        row_ids: view(&ids),
        columns: columns.view(),
        items: &items,
        items_on_device: view(&items_on_device),
        best_value: view_mut(&matches.values),
        best_id: view_mut(&matches.ids),
        best_flip: Some(view_mut(&matches.flips)),
        num_rows: row_ids.len(),
        hidden: rows.hidden,
        wgmma: !sim.portable,
    };
    match by {
        // SAFETY: the ids are neurons of the table, and the items were copied above.
        By::Similarity(similarity) => sim.go(unsafe { segment_similarity(args, *similarity) }),
        By::Cosine(signs) => {
            let signs = Buffer::input("signs", signs);
            // SAFETY: as above.
            sim.go(unsafe { segment_assign(args, Some(view(&signs))) });
        }
    }
    matches
}
