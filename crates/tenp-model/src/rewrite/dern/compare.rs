//! Where neurons are compared: on the CPU, or by the kernels of a GPU in bf16 with sums in f32.

use std::ops::Range;

use bytemuck::Pod;
use half::bf16;
use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::cpu::segments::{
    Match, MeasuredExpert, Segments, Similarity, WeightedSegments, best_matches,
};
use tenp_kernels::device::segment_match::{
    SegmentBest, SegmentMatch, SegmentTable, items_of, segment_assign, segment_best,
    segment_similarity,
};
use tenp_kernels::device::segment_norms::{SegmentNorms, segment_norms};
use tenp_kernels::device::{Backend, Memory as _, PaddedLayout};
use tenp_kernels::{Compute, KernelError, RaggedLayout};

use super::clusters::{Clustering, DeviceClusters, HostClusters};

/// Best matches of the neurons of one expert.
pub(super) type Matches = Vec<Option<Match>>;

/// Finds which neurons are most alike.
pub(super) trait Comparing {
    /// What decides the last bits.
    fn name(&self) -> String;

    /// For each expert of `rows`, the most alike neuron of all `columns` for each of its neurons.
    fn best_matches(
        &self,
        rows: &[ExpertWeights<'_>],
        columns: &[ExpertWeights<'_>],
        similarity: Similarity,
    ) -> Result<Vec<Matches>, KernelError>;

    /// A clustering of points that starts from `centres`.
    fn clustering<'a>(
        &'a self,
        points: WeightedSegments<'a>,
        centres: Segments,
    ) -> Result<Box<dyn Clustering + 'a>, KernelError>;
}

/// On the CPU.
pub(super) struct OnCpu(pub(super) Compute);

impl Comparing for OnCpu {
    fn name(&self) -> String {
        match self.0 {
            Compute::F32 => "f32".to_owned(),
            Compute::Bf16 => "bf16".to_owned(),
        }
    }

    fn best_matches(
        &self,
        rows: &[ExpertWeights<'_>],
        columns: &[ExpertWeights<'_>],
        similarity: Similarity,
    ) -> Result<Vec<Matches>, KernelError> {
        let measured = MeasuredExpert::all(columns)?;
        // One expert's rows in memory at a time.
        rows.iter()
            .map(|expert| {
                let rows = Segments::of_expert(expert)?;
                best_matches(self.0, &rows, &measured, similarity)
            })
            .collect()
    }

    fn clustering<'a>(
        &'a self,
        points: WeightedSegments<'a>,
        centres: Segments,
    ) -> Result<Box<dyn Clustering + 'a>, KernelError> {
        Ok(Box::new(HostClusters::new(self.0, points, centres)))
    }
}

/// By kernels.
pub(super) struct OnDevice<B>(pub(super) B);

/// Packed neurons with their norms.
pub(super) struct Table<B: Backend> {
    pub(super) gate_up: B::Buffer<bf16>,
    pub(super) down_t: B::Buffer<bf16>,
    inverse: B::Buffer<f32>,
    pub(super) num_neurons: usize,
    hidden: usize,
    /// Padded numbers of each expert's neurons.
    groups: Vec<Range<usize>>,
}

impl<B: Backend> Table<B> {
    pub(super) fn view(&self) -> SegmentTable<'_> {
        SegmentTable {
            gate_up: self.gate_up.view(),
            down_t: self.down_t.view(),
            inverse: self.inverse.view(),
            num_neurons: self.num_neurons,
        }
    }

    pub(super) fn row_ids(&self) -> Vec<i32> {
        let ids = self.groups.iter().cloned().flatten();
        ids.map(|id| id as i32).collect()
    }
}

/// What rows are compared by.
pub(super) enum By<'a> {
    Similarity(Similarity),
    /// Cosine of v, with signs of the rows.
    Cosine(&'a [f32]),
}

/// Results `[groups, rows]`.
pub(super) struct Found<B: Backend> {
    pub(super) values: B::Buffer<f32>,
    pub(super) ids: B::Buffer<i32>,
    flips: Option<B::Buffer<i32>>,
}

impl<B: Backend> OnDevice<B> {
    pub(super) fn upload<T: Pod>(
        &self,
        what: &'static str,
        values: &[T],
    ) -> Result<B::Buffer<T>, KernelError> {
        let mut buffer = self.0.alloc(what, values.len())?;
        self.0.write(buffer.view_mut(), values)?;
        Ok(buffer)
    }

    pub(super) fn read<T: Pod>(&self, buffer: &B::Buffer<T>) -> Result<Vec<T>, KernelError> {
        let view = buffer.view();
        let mut values = vec![T::zeroed(); view.len()];
        self.0.read(view, &mut values)?;
        Ok(values)
    }

    pub(super) fn table(&self, experts: &[ExpertWeights<'_>]) -> Result<Table<B>, KernelError> {
        let hidden = experts.first().map_or(0, |expert| expert.gate.cols());
        let widths: Vec<usize> = experts.iter().map(ExpertWeights::width).collect();
        let layout = PaddedLayout::new(&RaggedLayout::new(widths.clone())?)?;
        let neurons = layout.total();
        let mut host = vec![bf16::ZERO; 2 * neurons * hidden];
        layout.pack_gate_up(hidden, experts, &mut host)?;
        let gate_up = self.upload("gate and up of neurons", &host)?;
        host.truncate(neurons * hidden);
        layout.pack_down(hidden, experts, &mut host)?;
        let mut table: Table<B> = Table {
            gate_up,
            down_t: self.upload("down of neurons", &host)?,
            inverse: self.0.alloc("norms of neurons", 4 * neurons)?,
            num_neurons: neurons,
            hidden,
            groups: widths
                .iter()
                .enumerate()
                .map(|(e, &width)| layout.range(e).start..layout.range(e).start + width)
                .collect(),
        };
        self.measure(&mut table)?;
        Ok(table)
    }

    /// Norms of the neurons as they are.
    pub(super) fn measure(&self, table: &mut Table<B>) -> Result<(), KernelError> {
        self.0.run(&segment_norms(SegmentNorms {
            gate_up: table.gate_up.view(),
            down_t: table.down_t.view(),
            squares: None,
            inverse: Some(table.inverse.view_mut()),
            num_neurons: table.num_neurons,
            hidden: table.hidden,
        })?)
    }

    /// Every row with every group of columns.
    pub(super) fn compare(
        &self,
        rows: &Table<B>,
        columns: &Table<B>,
        by: &By<'_>,
    ) -> Result<Found<B>, KernelError> {
        let ids = rows.row_ids();
        let items = items_of(ids.len(), &columns.groups)?;
        let items_on_device = self.upload("pairs of neurons", &items)?;
        let row_ids = self.upload("ids of neurons", &ids)?;
        let count = columns.groups.len() * ids.len();
        let canonical = matches!(by, By::Similarity(s) if s.sign_canonical);
        let mut found: Found<B> = Found {
            values: self.0.alloc("best values", count)?,
            ids: self.0.alloc("best neurons", count)?,
            flips: canonical
                .then(|| self.0.alloc("flips", count))
                .transpose()?,
        };
        let args = SegmentMatch {
            rows: rows.view(),
            row_ids: row_ids.view(),
            columns: columns.view(),
            items: &items,
            items_on_device: items_on_device.view(),
            best_value: found.values.view_mut(),
            best_id: found.ids.view_mut(),
            best_flip: found.flips.as_mut().map(|flips| flips.view_mut()),
            num_rows: ids.len(),
            hidden: rows.hidden,
            wgmma: self.0.has_wgmma(),
        };
        match by {
            By::Similarity(similarity) => {
                // SAFETY: the ids are neurons of the rows' table, and the items were copied above.
                let call = unsafe { segment_similarity(args, *similarity) }?;
                self.0.run(&call)?;
            }
            By::Cosine(signs) => {
                let signs = self.upload("signs of neurons", signs)?;
                // SAFETY: as above.
                let call = unsafe { segment_assign(args, Some(signs.view())) }?;
                self.0.run(&call)?;
            }
        }
        Ok(found)
    }

    fn matches_of(
        &self,
        rows: &ExpertWeights<'_>,
        columns: &Table<B>,
        similarity: Similarity,
    ) -> Result<Matches, KernelError> {
        let (num_rows, num_groups) = (rows.width(), columns.groups.len());
        if num_rows == 0 || columns.num_neurons == 0 {
            return Ok(vec![None; num_rows]);
        }
        let rows = self.table(std::slice::from_ref(rows))?;
        let found = self.compare(&rows, columns, &By::Similarity(similarity))?;
        let mut best_value = self.0.alloc::<f32>("best values", num_rows)?;
        let mut best_group = self.0.alloc::<i32>("best experts", num_rows)?;
        let mut best_id = self.0.alloc::<i32>("best neurons", num_rows)?;
        self.0.run(&segment_best(SegmentBest {
            values: found.values.view(),
            ids: found.ids.view(),
            best_value: best_value.view_mut(),
            best_group: best_group.view_mut(),
            best_id: best_id.view_mut(),
            num_groups,
            num_rows,
        })?)?;
        let values = self.read::<f32>(&best_value)?;
        let (groups, ids) = (self.read::<i32>(&best_group)?, self.read::<i32>(&best_id)?);
        let flips = found
            .flips
            .as_ref()
            .map(|flips| self.read::<i32>(flips))
            .transpose()?;
        let row = |row: usize| {
            let (expert, neuron) = (
                usize::try_from(groups[row]).ok()?,
                usize::try_from(ids[row]).ok()?,
            );
            let flip = |flips: &Vec<i32>| flips[expert * num_rows + row] == 1;
            Some(Match {
                expert,
                neuron,
                value: values[row],
                flipped: flips.as_ref().is_some_and(flip),
            })
        };
        Ok((0..num_rows).map(row).collect())
    }
}

impl<B: Backend> Comparing for OnDevice<B> {
    fn name(&self) -> String {
        "kernels, bf16".to_owned()
    }

    fn best_matches(
        &self,
        rows: &[ExpertWeights<'_>],
        columns: &[ExpertWeights<'_>],
        similarity: Similarity,
    ) -> Result<Vec<Matches>, KernelError> {
        let columns = self.table(columns)?;
        let rows = rows.iter();
        rows.map(|expert| self.matches_of(expert, &columns, similarity))
            .collect()
    }

    fn clustering<'a>(
        &'a self,
        points: WeightedSegments<'a>,
        centres: Segments,
    ) -> Result<Box<dyn Clustering + 'a>, KernelError> {
        Ok(Box::new(DeviceClusters::new(self, points, centres)?))
    }
}
