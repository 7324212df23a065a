//! Seeded random scores for the controls: one ChaCha stream per layer or expert, so that no order of work matters.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What the numbers are for; keeps expert and neuron scores of one seed apart.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    Experts,
    Neurons,
}

/// `count` numbers in [0, 1) that depend on nothing but the arguments.
pub(super) fn random_scores(seed: u64, purpose: Purpose, stream: u64, count: usize) -> Vec<f64> {
    // The key is laid out here, not by `seed_from_u64`, whose mixing may change between versions of the crate.
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8] = match purpose {
        Purpose::Experts => 1,
        Purpose::Neurons => 2,
    };
    let mut generator = ChaCha8Rng::from_seed(key);
    generator.set_stream(stream);
    (0..count)
        .map(|_| (generator.next_u64() >> 11) as f64 * (-53_f64).exp2())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_and_purposes_differ_and_repeat() {
        let first = random_scores(7, Purpose::Experts, 0, 4);
        assert_eq!(first, random_scores(7, Purpose::Experts, 0, 4));
        assert_eq!(first[..2], random_scores(7, Purpose::Experts, 0, 2));
        assert_ne!(first, random_scores(7, Purpose::Experts, 1, 4));
        assert_ne!(first, random_scores(7, Purpose::Neurons, 0, 4));
        assert_ne!(first, random_scores(8, Purpose::Experts, 0, 4));
        assert!(first.iter().all(|score| (0.0..1.0).contains(score)));
    }
}
