//! The entries that a ragged layer's forward pass may run. An opened GPU finds all of them at once: a lookup may load
//! code, which a stream that is being captured does not allow.

use super::geometry::{Product, Tile};

/// Those of a GPU with, or without, the products of sm_90, for every number of tokens.
pub(super) fn of_ragged_moe(wgmma: bool) -> impl Iterator<Item = &'static str> {
    let products =
        Tile::of(wgmma).flat_map(|t| [Product::gate_up(t).gathering(), Product::down(t).entry]);
    let others = [
        "tenp_moe_group_small",
        "tenp_moe_count",
        "tenp_moe_offsets",
        "tenp_moe_group",
        "tenp_moe_schedule",
        "tenp_moe_combine",
    ];
    others.into_iter().chain(products)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::{DeviceSlice, DeviceSliceMut, MoeBatch, MoeWeights, RaggedMoe};
    use super::*;

    /// Entries of a layer of `experts` experts and 32 features, one of them chosen by each of `tokens` tokens.
    fn entries_of(experts: usize, tokens: usize, wgmma: bool) -> Vec<&'static str> {
        let moe = RaggedMoe::new(&vec![16; experts], 32).unwrap();
        let [gate_up, down_t] = moe.weight_lens();
        let bytes = moe.workspace_bytes(tokens, 1);
        // SAFETY: nothing is read or written: the calls are never run.
        let calls = unsafe {
            let weights = MoeWeights {
                gate_up: DeviceSlice::from_raw(0x1000, gate_up),
                down_t: DeviceSlice::from_raw(0x1000, down_t),
                tables: DeviceSlice::from_raw(0x1000, 2 * experts + 1),
            };
            let batch = MoeBatch {
                x: DeviceSlice::from_raw(0x1000, tokens * 32),
                expert_ids: DeviceSlice::from_raw(0x1000, tokens),
                weights: DeviceSlice::from_raw(0x1000, tokens),
                num_tokens: tokens,
                top_k: 1,
            };
            let out = DeviceSliceMut::from_raw(0x1000, tokens * 32);
            let room = DeviceSliceMut::from_raw(0x1000, bytes);
            moe.calls((132, wgmma), weights, batch, out, room)
                .map(|calls| calls.iter().map(super::super::Call::entry).collect())
        };
        calls.unwrap()
    }

    #[test]
    fn no_forward_pass_runs_an_entry_that_was_not_found_before() {
        for wgmma in [false, true] {
            let found: BTreeSet<_> = of_ragged_moe(wgmma).collect();
            let mut run = BTreeSet::new();
            for experts in [1, 2, 64] {
                for tokens in (0..14).map(|n| (1 << n) * 5 / 4) {
                    run.extend(entries_of(experts, tokens, wgmma));
                }
            }
            assert!(run.is_subset(&found), "{:?}", run.difference(&found));
            // The other way round: all but the products of tiles that no choice leads to.
            let more: Vec<_> = found.difference(&run).collect();
            assert!(
                more.iter()
                    .all(|e| e.contains("_gate_up_") || e.contains("_down_"))
            );
            assert!(more.len() < found.len() / 2, "{more:?}");
        }
    }
}
