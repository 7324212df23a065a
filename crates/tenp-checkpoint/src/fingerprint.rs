//! What a checkpoint is told from another by.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};

use crate::CheckpointError;
use crate::shard::Shard;

/// Tensors of a checkpoint that are looked into, each at a place of its own on the disk: all of a small one, and of a
/// large one no more than take a moment.
const SAMPLES: usize = 4096;

/// Over the config, and every shard's name, length, header and samples.
pub(crate) fn of(config: &[u8], shards: &[Shard]) -> Result<String, CheckpointError> {
    let mut hash = Sha256::new();
    hash.update((config.len() as u64).to_le_bytes());
    hash.update(config);
    let samples = (SAMPLES / shards.len().max(1)).max(1);
    for shard in shards {
        shard.fingerprint(samples, &mut hash)?;
    }
    Ok(hex(&hash.finalize()))
}

/// At most `count` numbers below `len`, spread so that no period of tensors is met at one place only.
pub(crate) fn spread(count: usize, len: usize) -> impl Iterator<Item = usize> {
    // Weyl's sequence of the golden ratio, in 64 bits.
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let all = len <= count;
    (0..count.min(len)).map(move |index| {
        let fraction = STEP.wrapping_mul(index as u64);
        let place = (u128::from(fraction) * len as u128) >> 64;
        if all { index } else { place as usize }
    })
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_few_and_a_spread_of_many() {
        assert!(spread(5, 3).eq(0..3));
        assert_eq!(spread(5, 0).count(), 0);
        // A kind of tensor that every seventh is of gets its share, and the halves theirs.
        let places: Vec<usize> = spread(64, 7000).collect();
        assert!(places.iter().all(|place| *place < 7000));
        for kind in 0..7 {
            let met = places.iter().filter(|place| *place % 7 == kind).count();
            assert!((4..16).contains(&met), "{met}");
        }
        let early = places.iter().filter(|place| **place < 3500).count();
        assert!((30..35).contains(&early), "{early}");
    }
}
