//! Rounds of the spherical k-means, on the CPU or by kernels.

use std::borrow::Cow;

use half::bf16;
use tenp_kernels::cpu::segments::{Assignment, Segments, WeightedSegments, assign, update_centres};
use tenp_kernels::device::kmeans_centres::{KmeansCentres, kmeans_centres, scratch_len};
use tenp_kernels::device::{Backend, Memory as _};
use tenp_kernels::{Compute, KernelError};

use super::compare::{By, OnDevice, Table};
use super::with_expert;

/// A clustering in progress.
pub(super) trait Clustering {
    /// The centre that each point is nearest to.
    fn assign(&self) -> Result<Vec<Option<Assignment>>, KernelError>;

    /// The centres as they are.
    fn centres(&self) -> Result<Cow<'_, Segments>, KernelError>;

    /// Moves the centres to their members.
    fn update(&mut self, clusters: &[Vec<usize>]) -> Result<(), KernelError>;

    /// The centres of the clusters last given, with all their bits.
    fn finish(self: Box<Self>, clusters: &[Vec<usize>]) -> Result<Segments, KernelError>;
}

/// On the CPU.
pub(super) struct HostClusters<'a> {
    compute: Compute,
    points: WeightedSegments<'a>,
    centres: Segments,
}

impl<'a> HostClusters<'a> {
    pub(super) fn new(compute: Compute, points: WeightedSegments<'a>, centres: Segments) -> Self {
        Self {
            compute,
            points,
            centres,
        }
    }
}

impl Clustering for HostClusters<'_> {
    fn assign(&self) -> Result<Vec<Option<Assignment>>, KernelError> {
        assign(self.compute, self.points, &self.centres)
    }

    fn centres(&self) -> Result<Cow<'_, Segments>, KernelError> {
        Ok(Cow::Borrowed(&self.centres))
    }

    fn update(&mut self, clusters: &[Vec<usize>]) -> Result<(), KernelError> {
        update_centres(self.points, clusters, &mut self.centres).map(drop)
    }

    fn finish(self: Box<Self>, _clusters: &[Vec<usize>]) -> Result<Segments, KernelError> {
        // They are where the last update moved them.
        Ok(self.centres)
    }
}

/// Where kernels run: points and centres stay there from round to round, in bf16.
pub(super) struct DeviceClusters<'a, B: Backend> {
    on: &'a OnDevice<B>,
    points: WeightedSegments<'a>,
    signs: Vec<f32>,
    point_table: Table<B>,
    point_ids: B::Buffer<i32>,
    sign_buffer: B::Buffer<f32>,
    weights: B::Buffer<f32>,
    /// Where the centres began, with all their bits.
    start: Segments,
    /// By centre: whether it is no longer there.
    moved: Vec<bool>,
    centre_table: Table<B>,
    scratch: B::Buffer<f32>,
}

impl<'a, B: Backend> DeviceClusters<'a, B> {
    /// Neither points nor centres are none.
    pub(super) fn new(
        on: &'a OnDevice<B>,
        points: WeightedSegments<'a>,
        start: Segments,
    ) -> Result<Self, KernelError> {
        let sign = |flipped: &bool| if *flipped { -1.0 } else { 1.0 };
        let signs: Vec<f32> = points.flipped.iter().map(sign).collect();
        let table = |neurons| with_expert(neurons, |expert| on.table(&[*expert]));
        let point_table = table(points.segments)?;
        let scratch = scratch_len(start.len(), start.hidden());
        Ok(Self {
            point_ids: on.upload("ids of neurons", &point_table.row_ids())?,
            sign_buffer: on.upload("signs of neurons", &signs)?,
            weights: on.upload("weights of neurons", points.weights)?,
            centre_table: table(&start)?,
            scratch: on.0.alloc("sums of clusters", scratch)?,
            moved: vec![false; start.len()],
            on,
            points,
            signs,
            point_table,
            start,
        })
    }
}

impl<B: Backend> Clustering for DeviceClusters<'_, B> {
    fn assign(&self) -> Result<Vec<Option<Assignment>>, KernelError> {
        let by = By::Cosine(&self.signs);
        let found = self
            .on
            .compare(&self.point_table, &self.centre_table, &by)?;
        let (values, ids) = (self.on.read(&found.values)?, self.on.read(&found.ids)?);
        let assignment = |(id, &cosine): (&i32, &f32)| {
            let centre = usize::try_from(*id).ok()?;
            Some(Assignment { centre, cosine })
        };
        Ok(ids.iter().zip(&values).map(assignment).collect())
    }

    fn centres(&self) -> Result<Cow<'_, Segments>, KernelError> {
        let hidden = self.start.hidden();
        let gate_up: Vec<bf16> = self.on.read(&self.centre_table.gate_up)?;
        let down: Vec<bf16> = self.on.read(&self.centre_table.down_t)?;
        let wide = |rows: &[bf16], row: usize| -> Vec<f32> {
            let row = &rows[row * hidden..(row + 1) * hidden];
            row.iter().map(|v| v.to_f32()).collect()
        };
        let mut centres = Segments::new(hidden);
        for (c, moved) in self.moved.iter().enumerate() {
            if *moved {
                // Eight gate rows, then their up rows.
                let gate = c / 8 * 16 + c % 8;
                let parts = [
                    wide(&gate_up, gate),
                    wide(&gate_up, gate + 8),
                    wide(&down, c),
                ];
                centres.push(parts.each_ref().map(Vec::as_slice))?;
            } else {
                centres.push(self.start.parts(c))?;
            }
        }
        Ok(Cow::Owned(centres))
    }

    fn update(&mut self, clusters: &[Vec<usize>]) -> Result<(), KernelError> {
        let (num_segments, num_centres) = (self.points.segments.len(), clusters.len());
        let mut offsets = vec![0i32];
        let mut members = Vec::with_capacity(num_segments);
        for cluster in clusters {
            members.extend(cluster.iter().map(|&member| member as i32));
            offsets.push(members.len() as i32);
        }
        // The rest of the list is in no cluster.
        members.resize(num_segments, 0);
        let offsets = self.on.upload("offsets of clusters", &offsets)?;
        let members = self.on.upload("members of clusters", &members)?;
        let mut counts = self.on.0.alloc("members that count", num_centres)?;
        let args = KmeansCentres {
            segments: self.point_table.view(),
            segment_ids: self.point_ids.view(),
            signs: Some(self.sign_buffer.view()),
            weights: self.weights.view(),
            member_offsets: offsets.view(),
            member_ids: members.view(),
            scratch: self.scratch.view_mut(),
            centre_gate_up: self.centre_table.gate_up.view_mut(),
            centre_down_t: self.centre_table.down_t.view_mut(),
            num_weighted: counts.view_mut(),
            num_segments,
            num_centres,
            hidden: self.start.hidden(),
        };
        // SAFETY: the ids are neurons of the table, members are points, each in one cluster.
        let call = unsafe { kmeans_centres(args) }?;
        self.on.0.run(&call)?;
        self.on.measure(&mut self.centre_table)?;
        for (moved, count) in self.moved.iter_mut().zip(self.on.read::<i32>(&counts)?) {
            *moved |= count > 0;
        }
        Ok(())
    }

    fn finish(self: Box<Self>, clusters: &[Vec<usize>]) -> Result<Segments, KernelError> {
        let mut centres = self.centres()?.into_owned();
        if clusters.len() == centres.len() {
            update_centres(self.points, clusters, &mut centres)?;
        }
        Ok(centres)
    }
}
