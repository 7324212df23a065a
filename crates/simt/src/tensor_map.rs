//! Tensor maps as the executor reads them: `TensorMap` of `src-cpp/hopper.hpp`, in the place of a `CUtensorMap`.

use tenp_kernels::device::TensorMap;
use tenp_kernels::device::tensor_map::BOX_INNER;

/// What tells a map from other bytes.
const MAGIC: u64 = 0x7061_6d2d_746d_6973;

/// Sixteen words of one map.
pub fn encode(map: &TensorMap) -> [u64; 16] {
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let mut words = [0; 16];
    words[..8].copy_from_slice(&[
        MAGIC,
        map.address,
        map.inner,
        map.rows,
        map.pitch_bytes,
        pair(BOX_INNER, map.box_rows),
        pair(128, 0),
        map.group_pitch_bytes,
    ]);
    words
}

/// The arguments of an entry with maps, as one block: the parameters, and at the next multiple of 128 bytes the maps.
pub(crate) fn arguments(params: &[u64], maps: Option<&[TensorMap; 3]>) -> Vec<u64> {
    let mut words = params.to_vec();
    if let Some(maps) = maps {
        words.resize(words.len().next_multiple_of(16), 0);
        words.extend(maps.iter().flat_map(encode));
    }
    words
}
