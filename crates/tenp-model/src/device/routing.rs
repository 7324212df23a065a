//! Which tokens of a block go to which experts.

use tenp_kernels::KernelError;
use tenp_kernels::device::moe_combine::Slots;
use tenp_kernels::device::moe_group::{MoeGroup, group_scratch_len, moe_group};
use tenp_kernels::device::router::{Router, router};
use tenp_kernels::device::{Backend, Memory};

use super::DeviceModel;
use super::moe::MoeBlock;

/// The chosen experts of a block, and the slots grouped by expert.
pub(super) struct Grouped<B: Backend> {
    top_k: usize,
    pub(super) expert_ids: B::Buffer<i32>,
    pub(super) weights: B::Buffer<f32>,
    pub(super) group_offsets: B::Buffer<i32>,
    pub(super) token_of_row: B::Buffer<i32>,
    pub(super) row_of_slot: B::Buffer<i32>,
    pub(super) row_weights: B::Buffer<f32>,
}

impl<B: Backend> Grouped<B> {
    pub(super) fn slots(&self) -> Slots<'_> {
        Slots {
            row_of_slot: self.row_of_slot.view(),
            expert_ids: self.expert_ids.view(),
            weights: self.weights.view(),
            num_tokens: self.expert_ids.view().len() / self.top_k,
            top_k: self.top_k,
        }
    }
}

impl<B: Backend> DeviceModel<'_, B> {
    /// Router logits in f32, choice and grouping.
    pub(super) fn route(&self, block: &MoeBlock<'_>) -> Result<Grouped<B>, KernelError> {
        let (backend, moe) = (&self.backend, block.moe);
        let (tokens, rows) = (block.num_tokens(), block.num_rows());
        let experts = moe.spec.num_experts;
        let router_weight = moe.router.of(block.arena)?;
        let logits = self.product(block.x_f32, router_weight, experts, self.hidden())?;
        let mut grouped = Grouped::<B> {
            top_k: moe.spec.top_k,
            expert_ids: backend.alloc("expert ids", rows)?,
            weights: backend.alloc("routing weights", rows)?,
            group_offsets: backend.alloc("group offsets", experts + 1)?,
            token_of_row: backend.alloc("tokens of rows", rows)?,
            row_of_slot: backend.alloc("rows of slots", rows)?,
            row_weights: backend.alloc("weights of rows", rows)?,
        };
        let correction_bias = moe
            .correction_bias
            .as_ref()
            .map(|bias| bias.of(block.arena))
            .transpose()?;
        backend.run(&router(Router {
            spec: &moe.spec,
            logits: logits.view(),
            correction_bias,
            expert_ids: grouped.expert_ids.view_mut(),
            weights: grouped.weights.view_mut(),
            num_tokens: tokens,
        })?)?;
        let mut scratch = backend.alloc("grouping scratch", group_scratch_len(rows, experts))?;
        let calls = moe_group(MoeGroup {
            expert_ids: grouped.expert_ids.view(),
            slot_weights: grouped.weights.view(),
            scratch: scratch.view_mut(),
            group_offsets: grouped.group_offsets.view_mut(),
            token_of_row: grouped.token_of_row.view_mut(),
            row_of_slot: grouped.row_of_slot.view_mut(),
            row_weights: grouped.row_weights.view_mut(),
            num_tokens: tokens,
            top_k: moe.spec.top_k,
            num_experts: experts,
        })?;
        for call in &calls {
            backend.run(call)?;
        }
        Ok(grouped)
    }
}
