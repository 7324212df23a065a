//! The MoE block on a backend: grouped experts, combine, and the calibration sums beside them.

use std::ops::Range;

use half::bf16;
use tenp_kernels::KernelError;
use tenp_kernels::device::expert_sums::{ExpertSums, expert_sums};
use tenp_kernels::device::geometry::partial_stride;
use tenp_kernels::device::moe_accumulate::{AccumulatePartials, accumulate_partials};
use tenp_kernels::device::moe_combine::{
    CombineInto, ExpertOutputs, MoeCombine, SharedOutput, moe_combine,
};
use tenp_kernels::device::moe_contribution::{MoeContribution, Projected, moe_contribution};
use tenp_kernels::device::moe_direction::{MoeDirection, ROW_DOTS, TOKEN_DOTS, moe_direction};
use tenp_kernels::device::moe_down::{MoeDown, moe_down, square_partials};
use tenp_kernels::device::moe_gate_up::{MoeGateUp, Partials, moe_gate_up};
use tenp_kernels::device::moe_row_norms::{MoeRowNorms, moe_row_norms};
use tenp_kernels::device::moe_schedule::{ExpertTables, moe_schedule};
use tenp_kernels::device::{Backend, DeviceSlice, DeviceSliceMut, InOut, Memory, Product, Tile};
use tenp_kernels::params::{TENP_NUM_ACTIVATION_SUMS, TENP_NUM_CONTRIBUTION_SUMS};

use super::layer::Moe;
use super::moments::DeviceMoments;
use super::planned::Planned;
use super::routing::Grouped;
use super::sums::{DeviceSums, LabelSums};
use super::{DeviceModel, zeros};
use crate::error::AtLayer;
use crate::{ModelError, Observer};

/// A block of tokens at a MoE layer.
pub(super) struct MoeBlock<'a> {
    pub(super) layer: usize,
    pub(super) rows: Range<usize>,
    pub(super) label: usize,
    pub(super) moe: &'a Moe,
    pub(super) arena: DeviceSlice<'a, u8>,
    /// `[tokens, H]` the normed input.
    pub(super) x: DeviceSlice<'a, bf16>,
    /// The same, not rounded.
    pub(super) x_f32: DeviceSlice<'a, f32>,
}

impl<'a> MoeBlock<'a> {
    pub(super) fn num_tokens(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn num_rows(&self) -> usize {
        self.rows.len() * self.moe.spec.top_k
    }

    fn experts(&self) -> Result<ExpertTables<'a>, KernelError> {
        Ok(ExpertTables {
            layout: &self.moe.layout,
            neuron_offsets: self.moe.neuron_offsets.of(self.arena)?,
            widths: self.moe.expert_widths.of(self.arena)?,
        })
    }
}

/// What is made beside a block's output.
pub(super) enum Beside<'a, 'w, B: Backend> {
    Nothing,
    /// Calibration sums.
    Sums(&'a mut DeviceSums<B>),
    /// Second moments instead of the output.
    Moments(&'a mut DeviceMoments<'w, B>),
}

/// What is wanted of the down product.
#[derive(Default)]
struct Outputs<'a> {
    y_f32: Option<DeviceSliceMut<'a, f32>>,
    y_bf16: Option<DeviceSliceMut<'a, bf16>>,
    /// Sums of squares of y.
    squares: Option<DeviceSliceMut<'a, f32>>,
}

impl<B: Backend> DeviceModel<'_, B> {
    /// Adds the block's output to `hidden`, which `block.x` is the normed form of; not where only moments are wanted.
    pub(super) fn moe(
        &self,
        block: &MoeBlock<'_>,
        mut hidden: DeviceSliceMut<'_, f32>,
        observer: &dyn Observer,
        beside: Beside<'_, '_, B>,
    ) -> Result<(), ModelError> {
        let layer = block.layer;
        let grouped = self.route(block).at(layer)?;
        let sums = match beside {
            Beside::Nothing => None,
            Beside::Sums(sums) => Some(sums),
            Beside::Moments(moments) => return self.measured(block, &grouped, moments).at(layer),
        };
        let shared = self.shared(block).at(layer)?;
        let shared = shared.as_ref().map(|(output, logits)| SharedOutput {
            output: output.view(),
            logits: logits.as_ref().map(Memory::view),
        });
        let output = match sums {
            Some(sums) => {
                let (sums, gram) = sums.label(&self.backend, block.label).at(layer)?;
                let mut m = self
                    .scored(block, &grouped, hidden.as_slice(), (sums, gram))
                    .at(layer)?;
                if let Some(shared) = shared {
                    self.add(m.view_mut(), shared.output, shared.logits)
                        .at(layer)?;
                }
                self.add(hidden.reborrow(), m.view(), None).at(layer)?;
                Some(m)
            }
            None if observer.wants_outputs() => {
                let mut out = self
                    .backend
                    .alloc("output of a MoE layer", hidden.len())
                    .at(layer)?;
                let into = CombineInto::Fresh(out.view_mut());
                self.plain(block, &grouped, shared, into).at(layer)?;
                self.add(hidden.reborrow(), out.view(), None).at(layer)?;
                Some(out)
            }
            None => {
                let into = CombineInto::Residual(InOut::Over(hidden));
                self.plain(block, &grouped, shared, into).at(layer)?;
                None
            }
        };
        if let Some(output) = output.filter(|_| observer.wants_outputs()) {
            let mut ids = vec![0i32; grouped.expert_ids.view().len()];
            self.backend
                .read(grouped.expert_ids.view(), &mut ids)
                .at(layer)?;
            let ids: Vec<u32> = ids.iter().map(|id| id.unsigned_abs()).collect();
            observer.routed(layer, block.rows.clone(), &ids)?;
            let mut values = vec![0.0; output.view().len()];
            self.backend.read(output.view(), &mut values).at(layer)?;
            observer.moe_output(layer, block.rows.clone(), &values)?;
        }
        Ok(())
    }

    /// The shared expert's output, and the logits of its gate.
    #[allow(clippy::type_complexity, reason = "two optional results")]
    fn shared(
        &self,
        block: &MoeBlock<'_>,
    ) -> Result<Option<(B::Buffer<f32>, Option<B::Buffer<f32>>)>, KernelError> {
        let Some(mlp) = &block.moe.shared else {
            return Ok(None);
        };
        let output = self.mlp(mlp, block.arena, block.x)?;
        let gate = block.moe.shared_gate.as_ref();
        let logits = gate
            .map(|gate| self.project(gate, block.arena, block.x))
            .transpose()?;
        Ok(Some((output, logits)))
    }

    /// The tile for a block, by its rows per expert.
    fn tile(&self, block: &MoeBlock<'_>) -> Tile {
        let spec = &block.moe.spec;
        Tile::choose(
            self.backend.has_wgmma(),
            block.num_tokens(),
            spec.top_k,
            spec.num_experts,
        )
    }

    /// Experts and combine.
    fn plain(
        &self,
        block: &MoeBlock<'_>,
        grouped: &Grouped<B>,
        shared: Option<SharedOutput<'_>>,
        into: CombineInto<'_>,
    ) -> Result<(), KernelError> {
        let (h, down) = self.activations(block, grouped)?;
        let len = block.num_rows() * self.hidden();
        let mut y = self.backend.alloc::<bf16>("expert outputs", len)?;
        let outputs = Outputs {
            y_bf16: Some(y.view_mut()),
            ..Outputs::default()
        };
        self.down(block, grouped, &down, h.view(), outputs)?;
        self.backend.run(&moe_combine(MoeCombine {
            experts: block.experts()?,
            y: ExpertOutputs::Bf16(y.view()),
            slots: grouped.slots(),
            shared,
            combined: None,
            into,
            hidden: self.hidden(),
        })?)
    }

    /// Experts, and the moments of their activations.
    fn measured(
        &self,
        block: &MoeBlock<'_>,
        grouped: &Grouped<B>,
        moments: &mut DeviceMoments<'_, B>,
    ) -> Result<(), KernelError> {
        let (rows, count) = (block.num_rows(), block.moe.spec.num_experts);
        let (backend, product) = (&self.backend, Product::down(self.tile(block)));
        let num_partials = square_partials(&product, self.hidden());
        let mut squares = backend.alloc("squares of outputs", num_partials * rows)?;
        let (h, down) = self.activations(block, grouped)?;
        let outputs = Outputs {
            squares: Some(squares.view_mut()),
            ..Outputs::default()
        };
        self.down(block, grouped, &down, h.view(), outputs)?;
        let mut inverse = backend.alloc("inverse norms", rows)?;
        let mut norms = backend.alloc("norms of rows", rows)?;
        let mut non_finite = zeros(backend, "damaged rows", count)?;
        backend.run(&moe_row_norms(MoeRowNorms {
            experts: block.experts()?,
            square_partials: squares.view(),
            group_offsets: grouped.group_offsets.view(),
            row_inverse: inverse.view_mut(),
            row_norms: Some(norms.view_mut()),
            non_finite: non_finite.view_mut(),
            num_rows: rows,
            num_partials,
        })?)?;
        let pitch = block.moe.layout.hidden_pitch();
        moments.add(
            backend,
            &block.rows,
            grouped,
            (h.view(), pitch),
            norms.view(),
        )
    }

    /// h of every row, and the schedule of the down product.
    #[allow(clippy::type_complexity, reason = "two results")]
    fn activations(
        &self,
        block: &MoeBlock<'_>,
        grouped: &Grouped<B>,
    ) -> Result<(B::Buffer<bf16>, Planned<B>), KernelError> {
        let (backend, hidden) = (&self.backend, self.hidden());
        let tile = self.tile(block);
        let experts = block.experts()?;
        let count = block.moe.spec.num_experts;
        let mut gate_up = Planned::<B>::new(backend, Product::gate_up(tile), count, false)?;
        let mut down = Planned::<B>::new(backend, Product::down(tile), count, false)?;
        let schedules = vec![gate_up.out(None), down.out(Some(hidden))];
        backend.run(&moe_schedule(
            &experts,
            grouped.group_offsets.view(),
            schedules,
        )?)?;
        let h = self.gate_up(block, grouped, &gate_up, None)?;
        Ok((h, down))
    }

    /// h of every row.
    fn gate_up(
        &self,
        block: &MoeBlock<'_>,
        grouped: &Grouped<B>,
        plan: &Planned<B>,
        partials: Option<(DeviceSliceMut<'_, f32>, usize)>,
    ) -> Result<B::Buffer<bf16>, KernelError> {
        let (backend, pitch) = (&self.backend, block.moe.layout.hidden_pitch());
        let mut h = backend.alloc("expert hidden states", block.num_rows() * pitch)?;
        let sums = partials.map(|(partials, stride)| {
            let partials = Partials {
                partials,
                offsets: plan.partial_offsets(),
                stride,
            };
            (grouped.row_weights.view(), partials)
        });
        let args = MoeGateUp {
            product: plan.product,
            experts: block.experts()?,
            gate_up: block.moe.gate_up.of(block.arena)?,
            x: block.x,
            token_of_row: Some(grouped.token_of_row.view()),
            h: h.view_mut(),
            group_offsets: grouped.group_offsets.view(),
            schedule: plan.schedule(),
            sums,
            x_rows: block.num_tokens(),
            num_rows: block.num_rows(),
            hidden: self.hidden(),
            hidden_pitch: pitch,
        };
        backend.run(&moe_gate_up(args, backend.multiprocessors())?)?;
        Ok(h)
    }

    /// y of every row, in the forms wanted.
    fn down(
        &self,
        block: &MoeBlock<'_>,
        grouped: &Grouped<B>,
        plan: &Planned<B>,
        h: DeviceSlice<'_, bf16>,
        outputs: Outputs<'_>,
    ) -> Result<(), KernelError> {
        let args = MoeDown {
            product: plan.product,
            experts: block.experts()?,
            down_t: block.moe.down_t.of(block.arena)?,
            h,
            y_f32: outputs.y_f32,
            y_bf16: outputs.y_bf16,
            square_partials: outputs.squares,
            group_offsets: grouped.group_offsets.view(),
            schedule: plan.schedule(),
            num_rows: block.num_rows(),
            hidden: self.hidden(),
            hidden_pitch: block.moe.layout.hidden_pitch(),
        };
        let backend = &self.backend;
        backend.run(&moe_down(args, backend.multiprocessors())?)
    }

    /// Experts, combine and every sum; returns m = Σ g y. Where there are Gram matrices the contributions are made of them.
    fn scored(
        &self,
        block: &MoeBlock<'_>,
        grouped: &Grouped<B>,
        residual: DeviceSlice<'_, f32>,
        (sums, gram): (&mut LabelSums<B>, Option<DeviceSlice<'_, bf16>>),
    ) -> Result<B::Buffer<f32>, KernelError> {
        let (backend, hidden) = (&self.backend, self.hidden());
        let (tokens, rows) = (block.num_tokens(), block.num_rows());
        let (experts, layout) = (block.experts()?, &block.moe.layout);
        let (tile, pitch) = (self.tile(block).with_sums(), layout.hidden_pitch());
        let count = block.moe.spec.num_experts;
        let mut gate_up = Planned::<B>::new(backend, Product::gate_up_stats(tile), count, true)?;
        let mut down = Planned::<B>::new(backend, Product::down(tile), count, false)?;
        let mut contribution =
            Planned::<B>::new(backend, Product::contribution(tile), count, true)?;
        let schedules = vec![
            gate_up.out(None),
            down.out(Some(hidden)),
            contribution.out(None),
        ];
        backend.run(&moe_schedule(
            &experts,
            grouped.group_offsets.view(),
            schedules,
        )?)?;

        let stride = partial_stride(rows, tile, pitch, layout.total());
        let room = TENP_NUM_ACTIVATION_SUMS.max(TENP_NUM_CONTRIBUTION_SUMS) as usize * stride;
        let mut partials = backend.alloc::<f32>("partial sums of neurons", room)?;
        let h = self.gate_up(
            block,
            grouped,
            &gate_up,
            Some((partials.view_mut(), stride)),
        )?;
        let accumulate =
            |plan: &Planned<B>, partials: &B::Buffer<f32>, sums: &mut B::Buffer<f64>| {
                backend.run(&accumulate_partials(AccumulatePartials {
                    product: plan.product,
                    experts,
                    partials: partials.view(),
                    offsets: plan.partial_offsets(),
                    stride,
                    group_offsets: grouped.group_offsets.view(),
                    sums: sums.view_mut(),
                })?)
            };
        accumulate(&gate_up, &partials, &mut sums.activations)?;

        let mut y = backend.alloc::<f32>("expert outputs", rows * hidden)?;
        let bf16_len = if gram.is_some() { 0 } else { rows * hidden };
        let mut y_bf16 = backend.alloc::<bf16>("expert outputs", bf16_len)?;
        let outputs = Outputs {
            y_f32: Some(y.view_mut()),
            y_bf16: gram.is_none().then(|| y_bf16.view_mut()),
            squares: None,
        };
        self.down(block, grouped, &down, h.view(), outputs)?;

        let (m, row_inverse) = self.directions(block, grouped, (y.view(), residual), sums)?;
        let args = MoeContribution {
            product: contribution.product,
            experts,
            projected: match gram {
                Some(gram) => Projected::Gram { gram },
                None => Projected::Outputs {
                    down_t: block.moe.down_t.of(block.arena)?,
                    y: y_bf16.view(),
                },
            },
            h: h.view(),
            row_inverse: row_inverse.view(),
            sums: Partials {
                partials: partials.view_mut(),
                offsets: contribution.partial_offsets(),
                stride,
            },
            group_offsets: grouped.group_offsets.view(),
            schedule: contribution.schedule(),
            num_rows: rows,
            hidden,
            hidden_pitch: pitch,
        };
        backend.run(&moe_contribution(args, backend.multiprocessors())?)?;
        accumulate(&contribution, &partials, &mut sums.contributions)?;
        sums.num_tokens += tokens;
        Ok(m)
    }

    /// Combine, and the sums of experts; returns m and the rows' 1 / (‖y‖ + 1e-8).
    #[allow(clippy::type_complexity, reason = "two results")]
    fn directions(
        &self,
        block: &MoeBlock<'_>,
        grouped: &Grouped<B>,
        (y, residual): (DeviceSlice<'_, f32>, DeviceSlice<'_, f32>),
        sums: &mut LabelSums<B>,
    ) -> Result<(B::Buffer<f32>, B::Buffer<f32>), KernelError> {
        let (backend, hidden) = (&self.backend, self.hidden());
        let (tokens, rows) = (block.num_tokens(), block.num_rows());
        let mut m = backend.alloc::<f32>("combined outputs", tokens * hidden)?;
        let mut row_dots = backend.alloc::<f64>("dot products of rows", ROW_DOTS * rows)?;
        let mut row_peaks = backend.alloc::<f32>("peaks of rows", rows)?;
        let mut row_inverse = backend.alloc::<f32>("inverse norms", rows)?;
        let mut token_dots = backend.alloc::<f64>("dot products of tokens", TOKEN_DOTS * tokens)?;
        backend.run(&moe_direction(MoeDirection {
            experts: block.experts()?,
            y: ExpertOutputs::F32(y),
            slots: grouped.slots(),
            x: block.x_f32,
            residual,
            combined: m.view_mut(),
            row_dots: row_dots.view_mut(),
            row_peaks: row_peaks.view_mut(),
            row_inverse: row_inverse.view_mut(),
            token_dots: token_dots.view_mut(),
            hidden,
        })?)?;
        backend.run(&expert_sums(ExpertSums {
            group_offsets: grouped.group_offsets.view(),
            token_of_row: grouped.token_of_row.view(),
            row_weights: grouped.row_weights.view(),
            row_dots: row_dots.view(),
            row_peaks: row_peaks.view(),
            token_dots: token_dots.view(),
            sums: sums.experts.view_mut(),
            tokens: sums.tokens.view_mut(),
            non_finite: sums.non_finite.view_mut(),
            num_rows: rows,
            num_tokens: tokens,
            num_experts: block.moe.spec.num_experts,
        })?)?;
        Ok((m, row_inverse))
    }
}
