//! Gram matrices of a layer's experts, in passes whose contributions take less time with them.

use half::bf16;
use tenp_kernels::KernelError;
use tenp_kernels::cost::{Ceilings, ExpertWork, MoeWork};
use tenp_kernels::device::gram::{gram_bytes, gram_matrices};
use tenp_kernels::device::{Backend, DeviceSlice, PaddedLayout};

use super::DeviceModel;
use super::layer::Moe;

/// Whether a layer's contributions are made of Gram matrices in a pass over so many tokens. The experts' real rows are known where
/// the kernels run only: all are taken to get as many.
fn wins(layout: &PaddedLayout, hidden: usize, top_k: usize, tokens: usize, blocks: usize) -> bool {
    let rows = tokens * top_k / layout.num_experts().max(1);
    let experts = (0..layout.num_experts()).map(|e| ExpertWork {
        width: layout.range(e).len(),
        rows,
    });
    let work = MoeWork {
        hidden,
        tokens,
        experts: experts.collect(),
    };
    // Of whichever GPU it is: only the ratio of its ceilings decides, and only where a floor is one of bytes.
    work.gram_wins(blocks, Ceilings::H200)
}

impl<B: Backend> DeviceModel<'_, B> {
    /// The layer's Gram matrices for a pass over `tokens` tokens in `blocks` blocks, if the contributions take less time with them.
    pub(super) fn gram(
        &self,
        moe: &Moe,
        arena: DeviceSlice<'_, u8>,
        (tokens, blocks): (usize, usize),
    ) -> Result<Option<B::Buffer<bf16>>, KernelError> {
        let hidden = self.hidden();
        if !wins(&moe.layout, hidden, moe.spec.top_k, tokens, blocks) {
            return Ok(None);
        }
        let down_t = moe.down_t.of(arena)?;
        gram_matrices(&self.backend, &moe.layout, down_t, hidden).map(Some)
    }

    /// Bytes of the largest layer's in a pass over `tokens` tokens in `blocks` blocks.
    pub(super) fn gram_bytes(&self, tokens: usize, blocks: usize) -> usize {
        let top_k = self.checkpoint.config().moe.top_k;
        let store = self.store.borrow();
        let layouts = store.layouts().iter();
        layouts
            .filter(|layout| wins(layout, self.hidden(), top_k, tokens, blocks))
            .map(gram_bytes)
            .max()
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
