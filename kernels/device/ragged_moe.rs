//! One MoE layer whose experts differ in width, over memory that someone else owns: what another runtime calls.
//!
//! ```text
//! let moe = RaggedMoe::new(&widths, hidden)?;         // on the host, once
//! moe.pack(&experts, &mut gate_up, &mut down_t)?;     // to be copied to the GPU, with moe.tables()
//! moe.workspace_bytes(tokens, top_k)                  // one per stream that runs at the same time
//! moe.forward(&runner, weights, batch, out, workspace)?;
//! ```
//!
//! Nothing is allocated and nothing waits, no size depends on the routing, and all scratch is the caller's: so a forward
//! pass can be captured into a CUDA graph, and two streams disturb each other only if they are given the same workspace.

use half::bf16;

use super::call::{Call, Runner};
use super::geometry::{Product, Tile};
use super::moe_combine::{CombineInto, ExpertOutputs, MoeCombine, Slots, moe_combine};
use super::moe_down::{MoeDown, moe_down};
use super::moe_gate_up::{MoeGateUp, moe_gate_up};
use super::moe_group::{MoeGroup, group_scratch_len, moe_group};
use super::moe_schedule::{ExpertTables, Schedule, ScheduleOut, moe_schedule};
use super::packed::PaddedLayout;
use super::view::{DeviceSlice, DeviceSliceMut};
use crate::cpu::moe::ExpertWeights;
use crate::{KernelError, RaggedLayout};

/// Parts of the workspace begin at multiples of this.
const ALIGNMENT: usize = 256;

/// The shape of a layer: what the host has to know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaggedMoe {
    layout: PaddedLayout,
    hidden: usize,
}

/// A layer's weights and tables on the GPU.
#[derive(Clone, Copy, Debug)]
pub struct MoeWeights<'a> {
    /// `[2S, H]`, as [`RaggedMoe::pack`] writes it.
    pub gate_up: DeviceSlice<'a, bf16>,
    /// `[S, H]`, as [`RaggedMoe::pack`] writes it.
    pub down_t: DeviceSlice<'a, bf16>,
    /// [`RaggedMoe::tables`].
    pub tables: DeviceSlice<'a, i32>,
}

/// Routed tokens on the GPU.
#[derive(Clone, Copy, Debug)]
pub struct MoeBatch<'a> {
    /// `[tokens, H]`.
    pub x: DeviceSlice<'a, bf16>,
    /// `[tokens, top_k]`; an id that is no expert's adds nothing.
    pub expert_ids: DeviceSlice<'a, i32>,
    /// `[tokens, top_k]`.
    pub weights: DeviceSlice<'a, f32>,
    /// Number of tokens.
    pub num_tokens: usize,
    /// Experts of a token.
    pub top_k: usize,
}

/// Where the parts of a workspace begin, and its size.
struct Parts {
    scratch: usize,
    group_offsets: usize,
    token_of_row: usize,
    row_of_slot: usize,
    row_weights: usize,
    orders: [usize; 2],
    tile_offsets: [usize; 2],
    h: usize,
    y: usize,
    bytes: usize,
}

impl RaggedMoe {
    /// A layer of experts with `widths` neurons over `hidden` features.
    ///
    /// # Errors
    /// [`KernelError::Invalid`] if `hidden` is no multiple of 8, or the experts are more than the kernels count.
    pub fn new(widths: &[usize], hidden: usize) -> Result<Self, KernelError> {
        super::check::check_multiple("hidden size", hidden, 8)?;
        if widths.is_empty() || widths.len() > super::moe_group::MAX_EXPERTS {
            return Err(KernelError::Invalid {
                what: "experts",
                why: format!(
                    "{}, of 1 to {}",
                    widths.len(),
                    super::moe_group::MAX_EXPERTS
                ),
            });
        }
        let layout = PaddedLayout::new(&RaggedLayout::new(widths.to_vec())?)?;
        Ok(Self { layout, hidden })
    }

    /// Places of the experts' neurons.
    #[must_use]
    pub const fn layout(&self) -> &PaddedLayout {
        &self.layout
    }

    /// Hidden size H.
    #[must_use]
    pub const fn hidden(&self) -> usize {
        self.hidden
    }

    /// Elements of `gate_up` and of `down_t`.
    #[must_use]
    pub fn weight_lens(&self) -> [usize; 2] {
        let neurons = self.layout.total() * self.hidden;
        [2 * neurons, neurons]
    }

    /// Packs the experts' weights on the host.
    ///
    /// # Errors
    /// Shapes and lengths that do not fit together.
    pub fn pack(
        &self,
        experts: &[ExpertWeights<'_>],
        gate_up: &mut [bf16],
        down_t: &mut [bf16],
    ) -> Result<(), KernelError> {
        self.layout.pack_gate_up(self.hidden, experts, gate_up)?;
        self.layout.pack_down(self.hidden, experts, down_t)
    }

    /// The neuron offsets, then the widths.
    #[must_use]
    pub fn tables(&self) -> Vec<i32> {
        [self.layout.neuron_offsets(), self.layout.widths()].concat()
    }

    fn parts(&self, num_tokens: usize, top_k: usize) -> Parts {
        let (rows, experts) = (num_tokens * top_k, self.layout.num_experts());
        let mut bytes = 0;
        let mut part = |count: usize, size: usize| {
            let begin = bytes;
            bytes += (count * size).next_multiple_of(ALIGNMENT);
            begin
        };
        Parts {
            scratch: part(group_scratch_len(rows, experts), 4),
            group_offsets: part(experts + 1, 4),
            token_of_row: part(rows, 4),
            row_of_slot: part(rows, 4),
            row_weights: part(rows, 4),
            orders: [part(experts, 4), part(experts, 4)],
            tile_offsets: [part(experts + 1, 4), part(experts + 1, 4)],
            h: part(rows * self.layout.hidden_pitch(), 2),
            y: part(rows * self.hidden, 2),
            bytes,
        }
    }

    /// Bytes of scratch that a batch of up to so many tokens needs.
    #[must_use]
    pub fn workspace_bytes(&self, num_tokens: usize, top_k: usize) -> usize {
        self.parts(num_tokens, top_k).bytes
    }

    /// out = Σ g · down(silu(gate x) · (up x)) of every token, `[tokens, H]`: asks `runner` for the kernels, in order.
    /// Between them lie h and y rounded to bf16; all sums are f32.
    ///
    /// # Errors
    /// Lengths that do not fit together, a workspace that is too small or not 256-byte aligned; the runner's own.
    pub fn forward<R: Runner>(
        &self,
        runner: &R,
        weights: MoeWeights<'_>,
        batch: MoeBatch<'_>,
        out: DeviceSliceMut<'_, f32>,
        workspace: DeviceSliceMut<'_, u8>,
    ) -> Result<(), R::Error> {
        let on = (runner.multiprocessors(), runner.has_wgmma());
        for call in self.calls(on, weights, batch, out, workspace)? {
            runner.run(&call)?;
        }
        Ok(())
    }

    /// The kernels of [`Self::forward`] for a GPU of so many multiprocessors, with or without sm_90's products. They are
    /// to be run one behind the other.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn calls<'a>(
        &'a self,
        (multiprocessors, wgmma): (usize, bool),
        weights: MoeWeights<'a>,
        batch: MoeBatch<'a>,
        out: DeviceSliceMut<'a, f32>,
        workspace: DeviceSliceMut<'a, u8>,
    ) -> Result<Vec<Call<'a>>, KernelError> {
        let (rows, count) = (batch.num_tokens * batch.top_k, self.layout.num_experts());
        let parts = self.parts(batch.num_tokens, batch.top_k);
        let room = Room::new(workspace, parts.bytes)?;
        let tables = ExpertTables {
            layout: &self.layout,
            neuron_offsets: weights.tables.slice(0..count + 1)?,
            widths: weights.tables.slice(count + 1..2 * count + 1)?,
        };
        let tile = Tile::choose(wgmma, batch.num_tokens, batch.top_k, count);
        let (gate_up, down) = (Product::gate_up(tile), Product::down(tile));
        let pitch = self.layout.hidden_pitch();
        let group_offsets = room.read(parts.group_offsets, count + 1);
        let schedule = |which: usize| Schedule {
            order: room.read(parts.orders[which], count),
            tile_offsets: room.read(parts.tile_offsets[which], count + 1),
        };
        let planned = |which: usize, product: Product, outputs| ScheduleOut {
            product,
            outputs,
            order: room.write(parts.orders[which], count),
            tile_offsets: room.write(parts.tile_offsets[which], count + 1),
            partial_offsets: None,
        };
        let mut calls = moe_group(MoeGroup {
            expert_ids: batch.expert_ids,
            slot_weights: batch.weights,
            scratch: room.write(parts.scratch, group_scratch_len(rows, count)),
            group_offsets: room.write(parts.group_offsets, count + 1),
            token_of_row: room.write(parts.token_of_row, rows),
            row_of_slot: room.write(parts.row_of_slot, rows),
            row_weights: room.write(parts.row_weights, rows),
            num_tokens: batch.num_tokens,
            top_k: batch.top_k,
            num_experts: count,
        })?;
        let plans = vec![
            planned(0, gate_up, None),
            planned(1, down, Some(self.hidden)),
        ];
        calls.push(moe_schedule(&tables, group_offsets, plans)?);
        let x = MoeGateUp {
            product: gate_up,
            experts: tables,
            gate_up: weights.gate_up,
            x: batch.x,
            token_of_row: Some(room.read(parts.token_of_row, rows)),
            h: room.write(parts.h, rows * pitch),
            group_offsets,
            schedule: schedule(0),
            sums: None,
            x_rows: batch.num_tokens,
            num_rows: rows,
            hidden: self.hidden,
            hidden_pitch: pitch,
        };
        calls.push(moe_gate_up(x, multiprocessors)?);
        let h = MoeDown {
            product: down,
            experts: tables,
            down_t: weights.down_t,
            h: room.read(parts.h, rows * pitch),
            y_f32: None,
            y_bf16: Some(room.write(parts.y, rows * self.hidden)),
            square_partials: None,
            group_offsets,
            schedule: schedule(1),
            num_rows: rows,
            hidden: self.hidden,
            hidden_pitch: pitch,
        };
        calls.push(moe_down(h, multiprocessors)?);
        calls.push(moe_combine(MoeCombine {
            experts: tables,
            y: ExpertOutputs::Bf16(room.read(parts.y, rows * self.hidden)),
            slots: Slots {
                row_of_slot: room.read(parts.row_of_slot, rows),
                expert_ids: batch.expert_ids,
                weights: batch.weights,
                num_tokens: batch.num_tokens,
                top_k: batch.top_k,
            },
            shared: None,
            combined: None,
            into: CombineInto::Fresh(out),
            hidden: self.hidden,
        })?);
        Ok(calls)
    }
}

/// A workspace that was given up to a list of calls, which write and read its parts in turn.
struct Room<'a> {
    address: u64,
    bytes: usize,
    marker: std::marker::PhantomData<&'a mut [u8]>,
}

impl<'a> Room<'a> {
    fn new(workspace: DeviceSliceMut<'a, u8>, bytes: usize) -> Result<Self, KernelError> {
        let (address, got) = workspace.into_raw();
        if got < bytes {
            return Err(KernelError::Length {
                what: "workspace",
                expected: bytes,
                got,
            });
        }
        super::check::check_alignment("workspace", address, ALIGNMENT as u64)?;
        Ok(Self {
            address,
            bytes,
            marker: std::marker::PhantomData,
        })
    }

    fn at<T>(&self, begin: usize, len: usize) -> u64 {
        debug_assert!(begin + len * size_of::<T>() <= self.bytes);
        self.address + begin as u64
    }

    fn read<T: bytemuck::Pod>(&self, begin: usize, len: usize) -> DeviceSlice<'a, T> {
        // SAFETY: a part of the workspace, which is borrowed alone for 'a; `parts` laid it out apart from the others, and
        // the calls that write it run before those that read it.
        unsafe { DeviceSlice::from_raw(self.at::<T>(begin, len), len) }
    }

    fn write<T: bytemuck::Pod>(&self, begin: usize, len: usize) -> DeviceSliceMut<'a, T> {
        // SAFETY: as `read`.
        unsafe { DeviceSliceMut::from_raw(self.at::<T>(begin, len), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_the_workspace_lie_apart() {
        let moe = RaggedMoe::new(&[0, 7, 129], 24).unwrap();
        for (tokens, top_k) in [(0, 1), (1, 1), (5, 2), (3000, 3)] {
            let parts = moe.parts(tokens, top_k);
            let rows = tokens * top_k;
            let ends = [
                (parts.scratch, 4 * group_scratch_len(rows, 3)),
                (parts.group_offsets, 16),
                (parts.token_of_row, 4 * rows),
                (parts.row_of_slot, 4 * rows),
                (parts.row_weights, 4 * rows),
                (parts.orders[0], 12),
                (parts.orders[1], 12),
                (parts.tile_offsets[0], 16),
                (parts.tile_offsets[1], 16),
                (parts.h, 2 * rows * 144),
                (parts.y, 2 * rows * 24),
            ];
            let mut before = 0;
            for (begin, bytes) in ends {
                assert!(begin >= before && begin % ALIGNMENT == 0);
                before = begin + bytes;
            }
            assert!(before <= parts.bytes && parts.bytes == moe.workspace_bytes(tokens, top_k));
        }
    }

    #[test]
    fn shapes_that_the_kernels_do_not_take() {
        assert!(RaggedMoe::new(&[8], 12).is_err());
        assert!(RaggedMoe::new(&[], 16).is_err());
        assert!(RaggedMoe::new(&[1; 1024], 16).is_err());
    }
}
