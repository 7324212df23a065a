//! `tenp_kmeans_centres` against the CPU.

mod support;

use half::bf16;
use rand::RngExt as _;
use simt::Buffer;
use support::layer::Layer;
use support::segments::Table;
use support::{BF16_ROUNDING, Sim, assert_close, bytes_of, rng, view, view_mut};
use tenp_kernels::cpu::segments::{Segments, WeightedSegments, update_centres};
use tenp_kernels::device::kmeans_centres::{KmeansCentres, kmeans_centres, scratch_len};

fn table(seed: u64, hidden: usize, widths: &[usize]) -> Table {
    let layer = Layer::random(&mut rng(seed), hidden, widths);
    Table::new(layer, Sim::unlike(seed as usize))
}

/// Centres on both sides: packed, and in f32.
struct Clustering {
    points: Table,
    neurons: Vec<(usize, usize)>,
    flipped: Vec<bool>,
    weights: Vec<f32>,
    clusters: Vec<Vec<usize>>,
    centres: Table,
}

impl Clustering {
    /// Moves the centres: GU, DT and the numbers of members that counted.
    fn run(&self, sim: Sim) -> (Buffer<bf16>, Buffer<bf16>, Vec<i32>) {
        let (ids, _) = self.points.pick(&self.neurons);
        let hidden = self.points.hidden;
        let mut offsets = vec![0i32];
        for cluster in &self.clusters {
            offsets.push(offsets[offsets.len() - 1] + cluster.len() as i32);
        }
        let mut members: Vec<i32> = self.clusters.concat().iter().map(|&m| m as i32).collect();
        // Segments of no cluster: the list has room for all.
        members.resize(ids.len().max(members.len()), 0);
        let signs: Vec<f32> = self
            .flipped
            .iter()
            .map(|&f| if f { -1.0 } else { 1.0 })
            .collect();
        let num_centres = self.clusters.len();
        let (segment_ids, signs) = (
            Buffer::input("segment_ids", &ids),
            Buffer::input("signs", &signs),
        );
        let weights = Buffer::input("weights", &self.weights);
        let offsets = Buffer::input("member_offsets", &offsets);
        let member_ids = Buffer::input("member_ids", &members);
        let scratch = Buffer::output("scratch", scratch_len(num_centres, hidden));
        let gate_up = Buffer::in_out("centre_gate_up", &self.centres.layer.gate_up());
        let down_t = Buffer::in_out("centre_down_t", &self.centres.layer.down_t());
        let num_weighted = Buffer::output("num_weighted", num_centres);
        let args = KmeansCentres {
            segments: self.points.view(),
            segment_ids: view(&segment_ids),
            signs: Some(view(&signs)),
            weights: view(&weights),
            member_offsets: view(&offsets),
            member_ids: view(&member_ids),
            scratch: view_mut(&scratch),
            centre_gate_up: view_mut(&gate_up),
            centre_down_t: view_mut(&down_t),
            num_weighted: view_mut(&num_weighted),
            num_segments: ids.len(),
            num_centres,
            hidden,
        };
        // SAFETY: ids and offsets are those of the tables above.
        sim.go(unsafe { kmeans_centres(args) });
        (gate_up, down_t, num_weighted.written().unwrap())
    }

    /// The same on the CPU.
    fn expected(&self) -> (Segments, Vec<usize>) {
        let (_, segments) = self.points.pick(&self.neurons);
        let (_, mut centres) = self.centres.pick(&self.centres.all());
        let points = WeightedSegments {
            segments: &segments,
            flipped: &self.flipped,
            weights: &self.weights,
        };
        let counts = update_centres(points, &self.clusters, &mut centres).unwrap();
        (centres, counts)
    }

    fn check(&self, sim: Sim) {
        let hidden = self.points.hidden;
        let (gate_up, down_t, counts) = self.run(sim);
        let (want, want_counts) = self.expected();
        assert!(
            counts
                .iter()
                .map(|&c| c as usize)
                .eq(want_counts.iter().copied())
        );
        let (gate_up, down_t) = (gate_up.to_vec(), down_t.to_vec());
        for (c, &count) in want_counts.iter().enumerate() {
            let row = c / 8 * 16 + c % 8;
            let got = [
                &gate_up[row * hidden..][..hidden],
                &gate_up[(row + 8) * hidden..][..hidden],
                &down_t[c * hidden..][..hidden],
            ];
            let parts = want.parts(c);
            let size = parts.concat().iter().fold(0f32, |m, v| m.max(v.abs()));
            for (got, want) in got.iter().zip(parts) {
                for (got, &want) in got.iter().zip(want) {
                    if count < 2 {
                        assert_eq!(got.to_bits(), bf16::from_f32(want).to_bits(), "centre {c}");
                    }
                    let want = f64::from(want);
                    let tolerance = BF16_ROUNDING * want.abs() + 1e-6 * f64::from(size);
                    assert_close(got.to_f64(), want, tolerance, || format!("centre {c}"));
                }
            }
        }
    }
}

/// Clusters of none, one and several members, some of weight 0.
fn clustering(seed: u64, hidden: usize) -> Clustering {
    let mut rng = rng(seed);
    let points = table(seed + 1, hidden, &[40, 300]);
    let neurons: Vec<(usize, usize)> = points.all().into_iter().step_by(2).collect();
    let n = neurons.len();
    let num_centres = 37;
    let mut clusters = vec![Vec::new(); num_centres];
    for member in 0..n {
        // Centre 0 gets none, centre 1 one, centre 2 a third of all.
        let c = match member {
            0 => 1,
            _ if member % 3 == 0 => 2,
            _ => rng.random_range(3..num_centres),
        };
        clusters[c].push(member);
    }
    let weights = (0..n).map(|i| {
        if i % 5 == 1 {
            0.0
        } else {
            rng.random_range(0.1..2.0)
        }
    });
    let weights = weights.collect();
    Clustering {
        flipped: (0..n).map(|i| i % 4 == 0).collect(),
        weights,
        clusters,
        centres: table(seed + 2, hidden, &[num_centres]),
        points,
        neurons,
    }
}

#[test]
fn centres_are_those_of_the_cpu() {
    for (i, hidden) in [8, 72, 1408].into_iter().enumerate() {
        clustering(100 + 10 * i as u64, hidden).check(Sim::unlike(i));
    }
}

#[test]
fn centres_have_equal_bits_whatever_the_schedule() {
    let clustering = clustering(130, 40);
    let run = |sim: Sim| {
        let (gate_up, down_t, counts) = clustering.run(sim);
        (bytes_of(&gate_up), bytes_of(&down_t), counts)
    };
    let first = run(Sim::unlike(0));
    assert!((1..4).all(|i| run(Sim::unlike(i)) == first));
}

#[test]
fn nothing_received_and_movers_of_weight_zero_change_nothing() {
    let own = table(140, 40, &[37, 20]);
    let before = (own.layer.gate_up(), own.layer.down_t());
    let mut clusters: Vec<Vec<usize>> = (0..37).map(|i| vec![i]).collect();
    // The neurons of expert 1 move in with weight 0.
    for mover in 37..57 {
        clusters[mover % 37].push(mover);
    }
    let clustering = Clustering {
        neurons: own.all(),
        flipped: (0..57).map(|i| i >= 37).collect(),
        weights: (0..57).map(|i| if i < 37 { 0.25 } else { 0.0 }).collect(),
        clusters,
        centres: table(141, 40, &[37]),
        points: own,
    };
    clustering.check(Sim::unlike(2));
    let (gate_up, down_t, counts) = clustering.run(Sim::unlike(3));
    let (gate_up, down_t) = (gate_up.to_vec(), down_t.to_vec());
    assert_eq!(counts, [1; 37]);
    for c in 0..37 {
        let row = (c / 8 * 16 + c % 8) * 40;
        assert_eq!(gate_up[row..row + 40], before.0[row..row + 40]);
        assert_eq!(
            gate_up[row + 320..row + 360],
            before.0[row + 320..row + 360]
        );
        assert_eq!(down_t[c * 40..(c + 1) * 40], before.1[c * 40..(c + 1) * 40]);
    }
}

#[test]
fn bad_members_and_opposites_leave_a_centre_alone() {
    let mut layer = Layer::random(&mut rng(150), 16, &[6]);
    // 1 is 0 negated, 2 holds NaN, 3 is zero.
    let expert = &mut layer.experts[0];
    for part in [&mut expert.gate, &mut expert.up] {
        for h in 0..16 {
            part[16 + h] = -part[h];
            part[48 + h] = bf16::ZERO;
        }
        part[35] = bf16::NAN;
    }
    for row in expert.down.chunks_exact_mut(6) {
        row[1] = -row[0];
        row[3] = bf16::ZERO;
    }
    let points = Table::new(layer, Sim::unlike(0));
    Clustering {
        neurons: points.all(),
        flipped: vec![false; 6],
        weights: vec![1.0; 6],
        clusters: vec![vec![0, 1], vec![2, 3], vec![2, 4, 3], vec![5]],
        centres: table(151, 16, &[4]),
        points,
    }
    .check(Sim::unlike(1));
}
