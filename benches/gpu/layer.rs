//! A MoE layer's launches, as the benches time them: generic, so that the executor can show that they are sound.

use half::bf16;
use tenp_kernels::device::expert_sums::{ExpertSums, expert_sums};
use tenp_kernels::device::gram::gram_matrices;
use tenp_kernels::device::moe_accumulate::{AccumulatePartials, accumulate_partials};
use tenp_kernels::device::moe_combine::{
    CombineInto, ExpertOutputs, MoeCombine, Slots, moe_combine,
};
use tenp_kernels::device::moe_contribution::{MoeContribution, Projected, moe_contribution};
use tenp_kernels::device::moe_direction::{MoeDirection, moe_direction};
use tenp_kernels::device::moe_down::{MoeDown, moe_down};
use tenp_kernels::device::moe_gate_up::{MoeGateUp, Partials, moe_gate_up};
use tenp_kernels::device::moe_group::{
    GatherRows, MoeGroup, gather_rows, group_scratch_len, moe_group,
};
use tenp_kernels::device::moe_schedule::{ExpertTables, Schedule, ScheduleOut, moe_schedule};
use tenp_kernels::device::{Backend, Memory as _, PaddedLayout, Product, Tile};
use tenp_kernels::{KernelError, RaggedLayout};

#[path = "scoring.rs"]
mod scoring;

use scoring::Scoring;

use super::cases::Case;
use super::inputs::{Noise, Weights};

struct Tiles<B: Backend> {
    product: Product,
    order: B::Buffer<i32>,
    tile_offsets: B::Buffer<i32>,
    partial_offsets: B::Buffer<i64>,
}

impl<B: Backend> Tiles<B> {
    fn new(backend: &B, product: Product, experts: usize) -> Result<Self, KernelError> {
        Ok(Self {
            product,
            order: backend.alloc("schedule", experts)?,
            tile_offsets: backend.alloc("schedule", experts + 1)?,
            partial_offsets: backend.alloc("schedule", experts + 1)?,
        })
    }

    fn view(&self) -> Schedule<'_> {
        Schedule {
            order: self.order.view(),
            tile_offsets: self.tile_offsets.view(),
        }
    }

    fn out(&mut self, outputs: Option<usize>) -> ScheduleOut<'_> {
        ScheduleOut {
            product: self.product,
            outputs,
            order: self.order.view_mut(),
            tile_offsets: self.tile_offsets.view_mut(),
            partial_offsets: outputs.is_none().then(|| self.partial_offsets.view_mut()),
        }
    }
}

/// A case on a backend.
pub struct Layer<'a, B: Backend> {
    backend: &'a B,
    weights: &'a Weights<B>,
    pub case: Case,
    pub layout: PaddedLayout,
    pub x: Vec<B::Buffer<bf16>>,
    neuron_offsets: B::Buffer<i32>,
    widths: B::Buffer<i32>,
    expert_ids: B::Buffer<i32>,
    slot_weights: B::Buffer<f32>,
    scratch: B::Buffer<i32>,
    group_offsets: B::Buffer<i32>,
    token_of_row: B::Buffer<i32>,
    row_of_slot: B::Buffer<i32>,
    row_weights: B::Buffer<f32>,
    gate_up: Tiles<B>,
    down: Tiles<B>,
    pub h: B::Buffer<bf16>,
    pub y: B::Buffer<bf16>,
    combined: B::Buffer<f32>,
    /// Rows of x in the experts' order, where a launch of its own gathers them.
    ordered: Option<B::Buffer<bf16>>,
    scoring: Option<Scoring<B>>,
}

/// The tile that the model takes for a case.
pub fn chosen_tile(backend: &impl Backend, case: &Case) -> Tile {
    let shape = &case.shape;
    Tile::choose(backend.has_wgmma(), case.tokens, shape.top_k, shape.experts)
}

impl<'a, B: Backend> Layer<'a, B> {
    /// Groups the tokens too, so that every launch can be timed by itself.
    pub fn new(
        backend: &'a B,
        weights: &'a Weights<B>,
        noise: &Noise,
        case: Case,
        ids: &[i32],
        scored: bool,
        tile: Tile,
    ) -> Result<Self, KernelError> {
        let (shape, rows) = (case.shape, ids.len());
        let layout = PaddedLayout::new(&RaggedLayout::new(case.widths.of(&shape))?)?;
        let ints = |values: &[i32]| {
            let mut buffer = backend.alloc("table", values.len())?;
            backend.write(buffer.view_mut(), values)?;
            Ok::<_, KernelError>(buffer)
        };
        let mut slot_weights = backend.alloc("routing weights", rows)?;
        backend.write(
            slot_weights.view_mut(),
            &vec![1.0 / shape.top_k as f32; rows],
        )?;
        let tokens = case.tokens;
        let x = (0..weights.gate_up.len())
            .map(|s| noise.buffer(backend, tokens * shape.hidden, 77 * s))
            .collect::<Result<Vec<_>, _>>()?;
        let scoring = scored
            .then(|| Scoring::new(backend, noise, &case, &layout, tile))
            .transpose()?;
        let mut layer = Self {
            backend,
            weights,
            case,
            x,
            neuron_offsets: ints(layout.neuron_offsets())?,
            widths: ints(layout.widths())?,
            expert_ids: ints(ids)?,
            slot_weights,
            scratch: backend.alloc("scratch", group_scratch_len(rows, shape.experts))?,
            group_offsets: backend.alloc("group offsets", shape.experts + 1)?,
            token_of_row: backend.alloc("tokens of rows", rows)?,
            row_of_slot: backend.alloc("rows of slots", rows)?,
            row_weights: backend.alloc("weights of rows", rows)?,
            gate_up: Tiles::new(backend, Product::gate_up(tile), shape.experts)?,
            down: Tiles::new(backend, Product::down(tile), shape.experts)?,
            // Down reads whole tiles of h, and a baseline reads h without writing it.
            h: noise.buffer(backend, rows * layout.hidden_pitch(), 3)?,
            y: backend.alloc("y", rows * shape.hidden)?,
            combined: backend.alloc("combined", tokens * shape.hidden)?,
            ordered: None,
            scoring,
            layout,
        };
        layer.group()?;
        Ok(layer)
    }

    /// From now on a launch gathers the rows before the products, which then need not.
    pub fn order_rows(&mut self) -> Result<(), KernelError> {
        let len = self.num_rows() * self.case.shape.hidden;
        self.ordered = Some(self.backend.alloc("ordered rows", len)?);
        Ok(())
    }

    fn gather(&mut self, set: usize) -> Result<(), KernelError> {
        let rows = self.num_rows();
        let Some(ordered) = &mut self.ordered else {
            return Ok(());
        };
        let args = GatherRows {
            input: self.x[set].view(),
            row_ids: self.token_of_row.view(),
            out: ordered.view_mut(),
            num_live_rows: None,
            input_rows: self.case.tokens,
            rows,
            cols: self.case.shape.hidden,
        };
        // SAFETY: the ids are tokens, as the grouping kernel wrote them.
        self.backend.run(&unsafe { gather_rows(args) }?)
    }

    pub fn num_rows(&self) -> usize {
        self.case.tokens * self.case.shape.top_k
    }

    /// Rows in the order of the groups: token of each.
    pub fn tokens_of_rows(&self) -> Result<Vec<i32>, KernelError> {
        let mut tokens = vec![0; self.num_rows()];
        self.backend.read(self.token_of_row.view(), &mut tokens)?;
        Ok(tokens)
    }

    fn tables(&self) -> ExpertTables<'_> {
        ExpertTables {
            layout: &self.layout,
            neuron_offsets: self.neuron_offsets.view(),
            widths: self.widths.view(),
        }
    }

    fn slots(&self) -> Slots<'_> {
        Slots {
            row_of_slot: self.row_of_slot.view(),
            expert_ids: self.expert_ids.view(),
            weights: self.slot_weights.view(),
            num_tokens: self.case.tokens,
            top_k: self.case.shape.top_k,
        }
    }

    /// Sorts the slots by expert.
    pub fn group(&mut self) -> Result<(), KernelError> {
        let calls = moe_group(MoeGroup {
            expert_ids: self.expert_ids.view(),
            slot_weights: self.slot_weights.view(),
            scratch: self.scratch.view_mut(),
            group_offsets: self.group_offsets.view_mut(),
            token_of_row: self.token_of_row.view_mut(),
            row_of_slot: self.row_of_slot.view_mut(),
            row_weights: self.row_weights.view_mut(),
            num_tokens: self.case.tokens,
            top_k: self.case.shape.top_k,
            num_experts: self.case.shape.experts,
        })?;
        calls.iter().try_for_each(|call| self.backend.run(call))
    }

    fn schedule(&mut self, scored: bool) -> Result<(), KernelError> {
        let hidden = self.case.shape.hidden;
        let tables = ExpertTables {
            layout: &self.layout,
            neuron_offsets: self.neuron_offsets.view(),
            widths: self.widths.view(),
        };
        let mut outs = vec![self.down.out(Some(hidden))];
        match &mut self.scoring {
            Some(scoring) if scored => {
                outs.push(scoring.gate_up.out(None));
                outs.push(scoring.contribution.out(None));
            }
            _ => outs.push(self.gate_up.out(None)),
        }
        let call = moe_schedule(&tables, self.group_offsets.view(), outs)?;
        self.backend.run(&call)
    }

    fn run_gate_up(&mut self, set: usize, scored: bool) -> Result<(), KernelError> {
        let shape = self.case.shape;
        let num_rows = self.num_rows();
        let tables = ExpertTables {
            layout: &self.layout,
            neuron_offsets: self.neuron_offsets.view(),
            widths: self.widths.view(),
        };
        let (tiles, sums) = match &mut self.scoring {
            Some(scoring) if scored => {
                let sums = Partials {
                    partials: scoring.activation.view_mut(),
                    offsets: scoring.gate_up.partial_offsets.view(),
                    stride: scoring.strides[0],
                };
                (&scoring.gate_up, Some((self.row_weights.view(), sums)))
            }
            _ => (&self.gate_up, None),
        };
        let args = MoeGateUp {
            product: tiles.product,
            experts: tables,
            gate_up: self.weights.gate_up[set].view(),
            x: match &self.ordered {
                Some(ordered) => ordered.view(),
                None => self.x[set].view(),
            },
            token_of_row: match &self.ordered {
                Some(_) => None,
                None => Some(self.token_of_row.view()),
            },
            h: self.h.view_mut(),
            group_offsets: self.group_offsets.view(),
            schedule: tiles.view(),
            sums,
            x_rows: match &self.ordered {
                Some(_) => num_rows,
                None => self.case.tokens,
            },
            num_rows,
            hidden: shape.hidden,
            hidden_pitch: self.layout.hidden_pitch(),
        };
        let call = moe_gate_up(args, self.backend.multiprocessors())?;
        self.backend.run(&call)
    }

    fn run_down(&mut self, set: usize, scored: bool) -> Result<(), KernelError> {
        let num_rows = self.num_rows();
        let tables = ExpertTables {
            layout: &self.layout,
            neuron_offsets: self.neuron_offsets.view(),
            widths: self.widths.view(),
        };
        let y_f32 = self.scoring.as_mut().filter(|_| scored);
        let args = MoeDown {
            product: self.down.product,
            experts: tables,
            down_t: self.weights.down_t[set].view(),
            h: self.h.view(),
            y_f32: y_f32.map(|s| s.y_f32.view_mut()),
            y_bf16: Some(self.y.view_mut()),
            square_partials: None,
            group_offsets: self.group_offsets.view(),
            schedule: self.down.view(),
            num_rows,
            hidden: self.case.shape.hidden,
            hidden_pitch: self.layout.hidden_pitch(),
        };
        let call = moe_down(args, self.backend.multiprocessors())?;
        self.backend.run(&call)
    }

    /// The schedule and the three products of grouped tokens: what the baselines do.
    pub fn experts(&mut self, set: usize) -> Result<(), KernelError> {
        self.schedule(false)?;
        self.gather(set)?;
        self.run_gate_up(set, false)?;
        self.run_down(set, false)
    }

    /// From routed tokens to their combined outputs.
    pub fn forward(&mut self, set: usize) -> Result<(), KernelError> {
        self.group()?;
        self.experts(set)?;
        let tables = ExpertTables {
            layout: &self.layout,
            neuron_offsets: self.neuron_offsets.view(),
            widths: self.widths.view(),
        };
        let slots = Slots {
            row_of_slot: self.row_of_slot.view(),
            expert_ids: self.expert_ids.view(),
            weights: self.slot_weights.view(),
            num_tokens: self.case.tokens,
            top_k: self.case.shape.top_k,
        };
        let call = moe_combine(MoeCombine {
            experts: tables,
            y: ExpertOutputs::Bf16(self.y.view()),
            slots,
            shared: None,
            combined: None,
            into: CombineInto::Fresh(self.combined.view_mut()),
            hidden: self.case.shape.hidden,
        })?;
        self.backend.run(&call)
    }

    /// The experts' Gram matrices.
    pub fn make_gram(&mut self, set: usize) -> Result<(), KernelError> {
        let down_t = self.weights.down_t[set].view();
        let hidden = self.case.shape.hidden;
        if let Some(scoring) = &mut self.scoring {
            let matrices = gram_matrices(self.backend, &self.layout, down_t, hidden)?;
            scoring.gram = Some(matrices);
        }
        Ok(())
    }

    /// The contributions' product alone, of what [`Self::scored`] left; in Gram form where [`Self::make_gram`] was called and
    /// `gram` says so.
    pub fn project(&mut self, set: usize, gram: bool) -> Result<(), KernelError> {
        let Some(mut scoring) = self.scoring.take() else {
            return Ok(());
        };
        let done = self.contribution(&mut scoring, set, gram);
        self.scoring = Some(scoring);
        done
    }

    /// The directions alone, of what [`Self::scored`] left: with their sums, and the combined outputs that come with them.
    pub fn directions(&mut self) -> Result<(), KernelError> {
        let Some(mut scoring) = self.scoring.take() else {
            return Ok(());
        };
        let mut combined = std::mem::replace(&mut self.combined, self.backend.alloc("none", 0)?);
        let done = self.direction(&mut scoring, &mut combined);
        self.combined = combined;
        self.scoring = Some(scoring);
        done
    }

    /// A forward pass with every statistic of a calibration. Nothing without the buffers for it.
    pub fn scored(&mut self, set: usize) -> Result<(), KernelError> {
        self.group()?;
        self.schedule(true)?;
        self.gather(set)?;
        self.run_gate_up(set, true)?;
        self.run_down(set, true)?;
        let Some(mut scoring) = self.scoring.take() else {
            return Ok(());
        };
        let mut combined = std::mem::replace(&mut self.combined, self.backend.alloc("none", 0)?);
        let done = self
            .direction(&mut scoring, &mut combined)
            .and_then(|()| self.contributions(&mut scoring, set));
        self.combined = combined;
        self.scoring = Some(scoring);
        done
    }

    fn direction(
        &self,
        s: &mut Scoring<B>,
        combined: &mut B::Buffer<f32>,
    ) -> Result<(), KernelError> {
        self.backend.run(&moe_direction(MoeDirection {
            experts: self.tables(),
            y: ExpertOutputs::F32(s.y_f32.view()),
            slots: self.slots(),
            x: s.x_f32.view(),
            residual: s.residual.view(),
            combined: combined.view_mut(),
            row_dots: s.row_dots.view_mut(),
            row_peaks: s.row_peaks.view_mut(),
            row_inverse: s.row_inverse.view_mut(),
            token_dots: s.token_dots.view_mut(),
            hidden: self.case.shape.hidden,
        })?)?;
        let [tokens, non_finite] = &mut s.counts;
        self.backend.run(&expert_sums(ExpertSums {
            group_offsets: self.group_offsets.view(),
            token_of_row: self.token_of_row.view(),
            row_weights: self.row_weights.view(),
            row_dots: s.row_dots.view(),
            row_peaks: s.row_peaks.view(),
            token_dots: s.token_dots.view(),
            sums: s.expert_sums.view_mut(),
            tokens: tokens.view_mut(),
            non_finite: non_finite.view_mut(),
            num_rows: self.num_rows(),
            num_tokens: self.case.tokens,
            num_experts: self.case.shape.experts,
        })?)
    }

    fn contribution(&self, s: &mut Scoring<B>, set: usize, gram: bool) -> Result<(), KernelError> {
        let projected = match &s.gram {
            Some(matrices) if gram => Projected::Gram {
                gram: matrices.view(),
            },
            _ => Projected::Outputs {
                down_t: self.weights.down_t[set].view(),
                y: self.y.view(),
            },
        };
        let args = MoeContribution {
            product: s.contribution.product,
            experts: self.tables(),
            projected,
            h: self.h.view(),
            row_inverse: s.row_inverse.view(),
            sums: Partials {
                partials: s.contributions.view_mut(),
                offsets: s.contribution.partial_offsets.view(),
                stride: s.strides[1],
            },
            group_offsets: self.group_offsets.view(),
            schedule: s.contribution.view(),
            num_rows: self.num_rows(),
            hidden: self.case.shape.hidden,
            hidden_pitch: self.layout.hidden_pitch(),
        };
        self.backend
            .run(&moe_contribution(args, self.backend.multiprocessors())?)
    }

    fn contributions(&self, s: &mut Scoring<B>, set: usize) -> Result<(), KernelError> {
        self.contribution(s, set, false)?;
        for (tiles, partials, stride) in [
            (&s.gate_up, &s.activation, s.strides[0]),
            (&s.contribution, &s.contributions, s.strides[1]),
        ] {
            self.backend.run(&accumulate_partials(AccumulatePartials {
                product: tiles.product,
                experts: self.tables(),
                partials: partials.view(),
                offsets: tiles.partial_offsets.view(),
                stride,
                group_offsets: self.group_offsets.view(),
                sums: s.neuron_sums.view_mut(),
            })?)?;
        }
        Ok(())
    }
}
