//! Weighted spherical k-means on v = [gate; up; w]: an expert's own neurons and those it received become as many as it had.

use std::borrow::Cow;

use tenp_kernels::KernelError;
use tenp_kernels::cpu::segments::{Assignment, Segments, WeightedSegments};

use super::compare::Comparing;
use super::start::{SAME, Start};

/// Neurons to be merged.
#[derive(Clone, Debug, Default)]
pub(super) struct Points {
    /// The expert's own come first.
    pub(super) segments: Segments,
    pub(super) weights: Vec<f32>,
    /// Whether a neuron counts with up and w negated.
    pub(super) flipped: Vec<bool>,
    /// How many are the expert's own: its width.
    pub(super) own: usize,
}

impl Points {
    fn view(&self) -> WeightedSegments<'_> {
        WeightedSegments {
            segments: &self.segments,
            flipped: &self.flipped,
            weights: &self.weights,
        }
    }

    /// Whether a neuron can move a centre: it has weight, and a direction.
    pub(super) fn counts(&self, index: usize) -> bool {
        let square = self.segments.squares()[index].all();
        self.weights[index] > 0.0 && square > 0.0 && square.is_finite()
    }

    pub(super) fn norm(&self, index: usize) -> f64 {
        self.segments.squares()[index].all().sqrt()
    }

    /// v, as flipped.
    pub(super) fn values(&self, index: usize) -> impl Iterator<Item = f64> {
        let [gate, up, down] = self.segments.parts(index);
        let sign = if self.flipped[index] { -1.0 } else { 1.0 };
        let gate = gate.iter().map(|v| f64::from(*v));
        gate.chain(up.iter().chain(down).map(move |v| sign * f64::from(*v)))
    }

    pub(super) fn cosine(&self, a: usize, b: usize) -> f64 {
        let dot: f64 = self.values(a).zip(self.values(b)).map(|(x, y)| x * y).sum();
        dot / (self.norm(a) * self.norm(b))
    }

    /// Cosine with a centre.
    fn cosine_with(&self, index: usize, centres: &Segments, centre: usize) -> f64 {
        let parts = centres.parts(centre).concat();
        let dot: f64 = self
            .values(index)
            .zip(parts)
            .map(|(x, y)| x * f64::from(y))
            .sum();
        dot / (self.norm(index) * centres.squares()[centre].all().sqrt())
    }

    fn start(&self, seats: &[usize]) -> Result<Segments, KernelError> {
        let mut centres = Segments::new(self.segments.hidden());
        for &seat in seats {
            let [gate, up, down] = self.segments.parts(seat);
            if self.flipped[seat] {
                let [up, down] = [up, down].map(|part| part.iter().map(|v| -v).collect::<Vec<_>>());
                centres.push([gate, &up, &down])?;
            } else {
                centres.push([gate, up, down])?;
            }
        }
        Ok(centres)
    }
}

/// What a merge came to.
pub(super) struct Merged {
    /// The expert's new neurons.
    pub(super) centres: Segments,
    /// Rounds until nothing changed.
    pub(super) rounds: usize,
}

/// Merges the points into as many neurons as the expert had; `None` where there is nothing to merge: nothing was received,
/// or nothing that was counts.
pub(super) fn merge(
    comparing: &dyn Comparing,
    points: &Points,
    max_rounds: usize,
    start: Start,
) -> Result<Option<Merged>, KernelError> {
    let received = points.own..points.segments.len();
    if points.own == 0 || !received.into_iter().any(|i| points.counts(i)) {
        return Ok(None);
    }
    let centres = points.start(&start.seats(points))?;
    let mut clustering = comparing.clustering(points.view(), centres)?;
    let mut clusters = Vec::new();
    let mut rounds = 0;
    while rounds < max_rounds {
        let found = clustering.assign()?;
        let new = clustered(points, &found, &|| clustering.centres())?;
        if new == clusters {
            break;
        }
        rounds += 1;
        clustering.update(&new)?;
        clusters = new;
    }
    Ok(Some(Merged {
        centres: clustering.finish(&clusters)?,
        rounds,
    }))
}

/// Asks for the centres, which few rounds need here.
type Centres<'a> = &'a dyn Fn() -> Result<Cow<'a, Segments>, KernelError>;

/// Members of every cluster, of those that count. A cluster without any takes the neuron farthest from its centre, of a
/// cluster that can spare one; a neuron that is its centre is not taken.
fn clustered(
    points: &Points,
    found: &[Option<Assignment>],
    centres: Centres<'_>,
) -> Result<Vec<Vec<usize>>, KernelError> {
    let mut clusters = vec![Vec::new(); points.own];
    let mut placed: Vec<(f32, usize, usize)> = Vec::new();
    for (index, found) in found.iter().enumerate() {
        if let Some(found) = found.filter(|_| points.counts(index)) {
            clusters[found.centre].push(index);
            placed.push((found.cosine, index, found.centre));
        }
    }
    placed.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    if clusters.iter().all(|cluster| !cluster.is_empty()) {
        return Ok(clusters);
    }
    let centres = centres()?;
    let mut farthest = placed.into_iter();
    for cluster in 0..clusters.len() {
        if !clusters[cluster].is_empty() {
            continue;
        }
        let Some((_, index, from)) = farthest.find(|&(_, _, from)| clusters[from].len() > 1) else {
            break;
        };
        if points.cosine_with(index, &centres, from) > SAME {
            break;
        }
        clusters[from].retain(|&member| member != index);
        clusters[cluster].push(index);
    }
    Ok(clusters)
}

#[cfg(test)]
mod tests {
    use tenp_kernels::Compute;

    use super::super::compare::OnCpu;
    use super::*;

    const HIDDEN: usize = 16;

    /// Numbers in [−1, 1) without a pattern.
    fn part(seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..HIDDEN)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn neuron(seed: u64) -> [Vec<f32>; 3] {
        [part(3 * seed + 1), part(3 * seed + 2), part(3 * seed + 3)]
    }

    fn points(own: &[[Vec<f32>; 3]], received: &[([Vec<f32>; 3], f32, bool)]) -> Points {
        let mut points = Points {
            segments: Segments::new(HIDDEN),
            own: own.len(),
            ..Points::default()
        };
        let own = own.iter().map(|n| (n, 0.5, false));
        for (neuron, weight, flipped) in own.chain(received.iter().map(|(n, w, f)| (n, *w, *f))) {
            points
                .segments
                .push(neuron.each_ref().map(Vec::as_slice))
                .unwrap();
            points.weights.push(weight);
            points.flipped.push(flipped);
        }
        points
    }

    fn own(count: u64) -> Vec<[Vec<f32>; 3]> {
        (0..count).map(neuron).collect()
    }

    fn negated([gate, up, down]: &[Vec<f32>; 3]) -> [Vec<f32>; 3] {
        let minus = |part: &Vec<f32>| part.iter().map(|v| -v).collect();
        [gate.clone(), minus(up), minus(down)]
    }

    fn run(points: &Points, start: Start) -> Option<Merged> {
        merge(&OnCpu(Compute::F32), points, 30, start).unwrap()
    }

    /// The expert's neurons are its old ones, in their old places.
    #[track_caller]
    fn assert_old(points: &Points, merged: &Merged, tolerance: f32) {
        assert_eq!(merged.centres.len(), points.own);
        for i in 0..points.own {
            let (new, old) = (
                merged.centres.parts(i).concat(),
                points.segments.parts(i).concat(),
            );
            for (a, b) in new.iter().zip(&old) {
                assert!((a - b).abs() <= tolerance, "neuron {i}: {a} is not {b}");
            }
        }
    }

    #[test]
    fn nothing_that_counts_changes_nothing() {
        let own = own(6);
        assert!(run(&points(&own, &[]), Start::Peak).is_none());
        assert!(run(&points(&own, &[(neuron(9), 0.0, false)]), Start::Peak).is_none());
        let zero = [0; 3].map(|_| vec![0.0; HIDDEN]);
        assert!(run(&points(&own, &[(zero, 1.0, false)]), Start::Peak).is_none());
    }

    #[test]
    fn exact_duplicates_leave_the_expert_as_it_was() {
        let mut own = own(6);
        // Neurons that are alike within the expert, or zero, must both stay.
        own.push(own[2].clone());
        own.push([0; 3].map(|_| vec![0.0; HIDDEN]));
        for start in [Start::Peak, Start::Random(3, 0), Start::Kept] {
            for (moved, flipped) in [(own[4].clone(), false), (negated(&own[4]), true)] {
                let points = points(&own, &[(moved, 0.25, flipped)]);
                let merged = run(&points, start).unwrap();
                assert_old(&points, &merged, 1e-6);
            }
        }
    }

    #[test]
    fn a_near_neuron_moves_its_centre_by_its_weight() {
        let mut own = own(4);
        for other in [0, 2, 3] {
            own[other][0][7] = 3.0;
        }
        let mut near = own[1].clone();
        near[0][0] += 0.05;
        let points = points(&own, &[(near.clone(), 1.5, false)]);
        let merged = run(&points, Start::Peak).unwrap();
        let unit = |n: &[Vec<f32>; 3]| {
            let v: Vec<f64> = n.concat().iter().map(|v| f64::from(*v)).collect();
            let norm = v.iter().map(|v| v * v).sum::<f64>().sqrt();
            (v.iter().map(|v| v / norm).collect::<Vec<_>>(), norm)
        };
        let ((a, na), (b, nb)) = (unit(&own[1]), unit(&near));
        let mean: Vec<f64> = a.iter().zip(&b).map(|(a, b)| 0.25 * a + 0.75 * b).collect();
        let length = mean.iter().map(|v| v * v).sum::<f64>().sqrt();
        let norm = 0.25 * na + 0.75 * nb;
        let place = (0..4)
            .find(|&i| {
                (f64::from(merged.centres.parts(i)[1][3]) - f64::from(own[1][1][3])).abs() < 0.01
            })
            .unwrap();
        for (got, want) in merged.centres.parts(place).concat().iter().zip(&mean) {
            assert!((f64::from(*got) - want * norm / length).abs() < 1e-6);
        }
        // The others are alone in their clusters.
        for (i, neuron) in own.iter().enumerate().filter(|(i, _)| *i != 1) {
            assert_eq!(
                merged.centres.parts(i),
                neuron.each_ref().map(Vec::as_slice),
                "{i}"
            );
        }
    }

    #[test]
    fn an_empty_cluster_takes_the_farthest() {
        let own = own(3);
        let points = points(&own, &[(neuron(7), 1.0, false), (neuron(8), 1.0, false)]);
        let centres = points.start(&[0, 1, 2]).unwrap();
        let at = |centre, cosine| Some(Assignment { centre, cosine });
        let found = [at(0, 1.0), at(0, 0.9), at(0, 0.3), at(1, 0.1), None];
        assert_eq!(
            clustered(&points, &found, &|| Ok(Cow::Borrowed(&centres))).unwrap(),
            [vec![0, 1], vec![3], vec![2]]
        );
        // The last of a cluster stays, however far.
        let found = [at(0, 1.0), at(1, 0.2), None, None, None];
        assert_eq!(
            clustered(&points, &found, &|| Ok(Cow::Borrowed(&centres))).unwrap(),
            [vec![0], vec![1], vec![]]
        );
    }

    #[test]
    fn seeds_are_the_highest_peaks_without_doubles() {
        let mut own = own(4);
        own[3][0][5] = 4.0;
        let mut peak = neuron(11);
        peak[0][2] = -9.0;
        let mut double = peak.clone();
        double[0][2] = -9.0001;
        let points = points(&own, &[(peak, 1.0, false), (double, 1.0, false)]);
        let seats = Start::Peak.seats(&points);
        assert_eq!(seats.len(), 4);
        assert_eq!(seats[3], 3);
        assert!(seats.contains(&5) && !seats.contains(&4), "{seats:?}");
        // Without weight of its own, an expert gives its places away, and keeps what is left.
        let mut weightless = points.clone();
        weightless.weights[..4].fill(0.0);
        assert_eq!(Start::Peak.seats(&weightless), [0, 1, 2, 5]);
        let (a, b) = (
            Start::Random(1, 2).seats(&points),
            Start::Random(2, 2).seats(&points),
        );
        assert_eq!(a, Start::Random(1, 2).seats(&points));
        assert_ne!(a, b);
    }
}
