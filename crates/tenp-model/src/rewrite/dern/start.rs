//! Where the k-means starts: which neurons become the first centres, and which are too alike to.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tenp_checkpoint::plan::{Dern, Initialisation};

use super::merge::Points;

/// Above this cosine two neurons count as one.
pub(super) const SAME: f64 = 1.0 - 1e-6;

/// How candidates are ranked.
#[derive(Clone, Copy, Debug)]
pub(super) enum Start {
    /// By the largest entry of the gate row.
    Peak,
    /// By lot: seed and stream.
    Random(u64, u64),
    /// No ranking: the expert's own neurons are the centres.
    Kept,
}

impl Start {
    /// `stream` tells the experts of a model apart.
    pub(super) fn new(settings: &Dern, stream: usize) -> Self {
        match settings.initialisation {
            Initialisation::Peak => Self::Peak,
            Initialisation::Kept => Self::Kept,
            Initialisation::Random => {
                Self::Random(settings.seed.unwrap_or_default(), stream as u64)
            }
        }
    }

    fn ranks(self, points: &Points) -> Vec<f64> {
        let len = points.segments.len();
        match self {
            Self::Kept => Vec::new(),
            Self::Peak => (0..len)
                .map(|i| {
                    let [gate, ..] = points.segments.parts(i);
                    gate.iter()
                        .fold(0.0_f64, |peak, v| peak.max(f64::from(v.abs())))
                })
                .collect(),
            Self::Random(seed, stream) => {
                let mut key = [0; 32];
                key[..8].copy_from_slice(&seed.to_le_bytes());
                key[8] = 3;
                let mut generator = ChaCha8Rng::from_seed(key);
                generator.set_stream(stream);
                (0..len)
                    .map(|_| (generator.next_u64() >> 11) as f64)
                    .collect()
            }
        }
    }

    /// The first centres, as many as the expert has neurons of its own: neurons that count, the highest ranked first,
    /// without those that are the same as one before. Seats left over go to the expert's own neurons that were passed over,
    /// those that count first. An own neuron has its old place, the others fill the gaps.
    pub(super) fn seats(self, points: &Points) -> Vec<usize> {
        if matches!(self, Self::Kept) {
            return (0..points.own).collect();
        }
        let ranks = self.ranks(points);
        let mut order: Vec<usize> = (0..ranks.len()).filter(|&i| points.counts(i)).collect();
        order.sort_by(|&a, &b| ranks[b].total_cmp(&ranks[a]).then(a.cmp(&b)));
        let sketches = Sketches::new(points);
        let mut chosen: Vec<usize> = Vec::with_capacity(points.own);
        let mut taken = vec![false; ranks.len()];
        for candidate in order {
            if chosen.len() == points.own {
                break;
            }
            // An own neuron stands for a received one that is the same: so no neuron is there twice that was there once.
            let own = (0..points.own)
                .find(|&own| candidate >= points.own && sketches.same(points, own, candidate))
                .filter(|&own| points.counts(own));
            let candidate = own.unwrap_or(candidate);
            if !chosen.iter().any(|&c| sketches.same(points, c, candidate)) {
                taken[candidate] = true;
                chosen.push(candidate);
            }
        }
        for counting in [true, false] {
            let left = (0..points.own).filter(|&own| !taken[own] && points.counts(own) == counting);
            chosen.extend(left.take(points.own - chosen.len()));
        }
        let (mine, mut others): (Vec<usize>, Vec<usize>) =
            chosen.into_iter().partition(|&c| c < points.own);
        others.reverse();
        let mut seats: Vec<Option<usize>> = vec![None; points.own];
        for own in mine {
            seats[own] = Some(own);
        }
        let fill = |seat: Option<usize>| seat.or_else(|| others.pop());
        seats.into_iter().filter_map(fill).collect()
    }
}

/// Projections of every direction v/‖v‖ onto a few fixed unit vectors. Where the cosine of two directions is above
/// [`SAME`] they are closer than 1.42e-3, and so are all their projections; few other pairs pass, and those are looked
/// at in full.
struct Sketches(Vec<[f64; SKETCH]>);

const SKETCH: usize = 6;
const NEAR: f64 = 1.5e-3;

impl Sketches {
    fn new(points: &Points) -> Self {
        let hidden = points.segments.hidden();
        let mut generator = ChaCha8Rng::from_seed([7; 32]);
        let signs: Vec<u64> = (0..3 * hidden).map(|_| generator.next_u64()).collect();
        let scale = 1.0 / ((3 * hidden).max(1) as f64).sqrt();
        let sketch = |i: usize| {
            let mut sums = [0f64; SKETCH];
            for (value, bits) in points.values(i).zip(&signs) {
                for (k, sum) in sums.iter_mut().enumerate() {
                    *sum += if bits >> k & 1 == 1 { value } else { -value };
                }
            }
            let norm = points.norm(i);
            sums.map(|sum| if norm > 0.0 { sum * scale / norm } else { 0.0 })
        };
        Self((0..points.segments.len()).map(sketch).collect())
    }

    fn same(&self, points: &Points, a: usize, b: usize) -> bool {
        let near = |(x, y): (&f64, &f64)| (x - y).abs() < NEAR;
        self.0[a].iter().zip(&self.0[b]).all(near) && points.cosine(a, b) > SAME
    }
}
