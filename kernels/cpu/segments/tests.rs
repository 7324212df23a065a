use half::bf16;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::{Compute, MatrixView};

/// An expert with weights that bf16 holds exactly, kept in bf16.
struct Expert {
    width: usize,
    hidden: usize,
    matrices: [Vec<bf16>; 3],
}

impl Expert {
    fn random(seed: u64, width: usize, hidden: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut matrix = || -> Vec<bf16> {
            (0..width * hidden)
                .map(|_| bf16::from_f32(rng.random_range(-1.0..1.0)))
                .collect()
        };
        Self {
            width,
            hidden,
            matrices: [matrix(), matrix(), matrix()],
        }
    }

    fn view(&self) -> ExpertWeights<'_> {
        let [gate, up, down] = &self.matrices;
        ExpertWeights {
            gate: MatrixView::from_bf16(self.width, self.hidden, gate).unwrap(),
            up: MatrixView::from_bf16(self.width, self.hidden, up).unwrap(),
            down: MatrixView::from_bf16(self.hidden, self.width, down).unwrap(),
        }
    }

    fn measured(&self) -> MeasuredExpert<'_> {
        MeasuredExpert::new(self.view()).unwrap()
    }

    fn segments(&self) -> Segments {
        Segments::of_expert(&self.view()).unwrap()
    }
}

const COMPUTES: [Compute; 2] = [Compute::F32, Compute::Bf16];

fn dot(a: &[f32], b: &[f32]) -> f64 {
    let products = a.iter().zip(b);
    products.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}

/// All of it in f64, one pair at a time.
fn plain_similarity(a: [&[f32]; 3], b: [&[f32]; 3], s: Similarity) -> (f64, bool) {
    let [gate, up, down] = std::array::from_fn(|p| cosine(a[p], b[p]));
    let flipped = s.sign_canonical && up < 0.0 && down < 0.0;
    let sign = if flipped { -1.0 } else { 1.0 };
    let rest = f64::from(s.lambda_up) * up + f64::from(s.lambda_down) * down;
    (f64::from(s.lambda_gate) * gate + sign * rest, flipped)
}

fn kinds() -> [Similarity; 4] {
    let signs = Similarity {
        sign_canonical: true,
        ..Similarity::default()
    };
    let all = Similarity {
        lambda_gate: 0.25,
        lambda_up: 0.5,
        lambda_down: 0.25,
        sign_canonical: true,
    };
    let gate = Similarity {
        lambda_gate: 1.0,
        lambda_up: 0.0,
        lambda_down: 0.0,
        sign_canonical: false,
    };
    [Similarity::default(), signs, all, gate]
}

#[test]
fn segments_are_the_neurons_of_their_expert() {
    let expert = Expert::random(1, 5, 9);
    let all = expert.segments();
    let mut some = Segments::new(9);
    some.extend(&expert.view(), &[4, 0]).unwrap();
    some.push(all.parts(2)).unwrap();
    for (i, neuron) in [4usize, 0, 2].into_iter().enumerate() {
        assert_eq!(some.parts(i), all.parts(neuron));
        let [gate, up, down] = some.parts(i);
        for c in 0..9 {
            assert_eq!(gate[c], expert.matrices[0][neuron * 9 + c].to_f32());
            assert_eq!(up[c], expert.matrices[1][neuron * 9 + c].to_f32());
            assert_eq!(down[c], expert.matrices[2][c * 5 + neuron].to_f32());
        }
        let squares = SegmentSquares {
            gate: sum_squares(gate),
            up: sum_squares(up),
            down: sum_squares(down),
        };
        assert_eq!(some.squares()[i], squares);
    }
    let measured = segment_squares(&expert.view()).unwrap();
    for (a, b) in measured.iter().zip(all.squares()) {
        assert!((a.all() - b.all()).abs() < 1e-12);
        assert!((a.down - b.down).abs() < 1e-12);
    }
    assert!(some.extend(&expert.view(), &[5]).is_err());
    assert!(some.push([&[0.0; 9], &[0.0; 9], &[0.0; 8]]).is_err());
    assert!(Segments::new(8).extend(&expert.view(), &[0]).is_err());
    assert_eq!(some.len(), 3);
}

#[test]
fn best_matches_are_those_of_the_plain_loop() {
    for (hidden, rows, widths) in [
        (1, 1, vec![1]),
        (7, 3, vec![0, 5]),
        (64, 40, vec![33, 1, 70]),
        (130, 15, vec![129, 64]),
    ] {
        let dropped = Expert::random(7, rows, hidden).segments();
        let kept: Vec<Expert> = widths
            .iter()
            .enumerate()
            .map(|(i, &w)| Expert::random(20 + i as u64, w, hidden))
            .collect();
        let views: Vec<_> = kept.iter().map(Expert::measured).collect();
        let columns: Vec<_> = kept.iter().map(Expert::segments).collect();
        for similarity in kinds() {
            for compute in COMPUTES {
                let got = best_matches(compute, &dropped, &views, similarity).unwrap();
                for (r, got) in got.iter().enumerate() {
                    let got = got.expect("there are neurons");
                    let value = |e: usize, n: usize| {
                        plain_similarity(dropped.parts(r), columns[e].parts(n), similarity)
                    };
                    let best = (0..kept.len())
                        .flat_map(|e| (0..kept[e].width).map(move |n| (e, n)))
                        .map(|(e, n)| value(e, n).0)
                        .fold(f64::NEG_INFINITY, f64::max);
                    let (own, flipped) = value(got.expert, got.neuron);
                    // The value is that pair's, and no other pair's is larger.
                    assert!((own - f64::from(got.value)).abs() < 1e-5);
                    assert!(own > best - 1e-5, "{hidden} {r}: {own} {best}");
                    assert_eq!(got.flipped, flipped);
                }
            }
        }
    }
}

#[test]
fn a_duplicate_has_similarity_one_and_ties_go_to_the_lower() {
    let kept = Expert::random(3, 50, 40);
    let rows = kept.segments();
    let views = [kept.measured(), kept.measured()];
    for similarity in kinds() {
        for compute in COMPUTES {
            let got = best_matches(compute, &rows, &views, similarity).unwrap();
            for (r, got) in got.iter().enumerate() {
                let got = got.unwrap();
                assert_eq!((got.expert, got.neuron, got.flipped), (0, r, false));
                assert!((got.value - 1.0).abs() < 1e-6);
            }
        }
    }
}

#[test]
fn flipping_both_signs_changes_nothing_where_signs_are_canonical() {
    let kept = Expert::random(5, 30, 24);
    let rows = kept.segments();
    let mut flipped = Segments::new(24);
    for r in 0..rows.len() {
        let [gate, up, down] = rows.parts(r);
        let negated = |part: &[f32]| -> Vec<f32> { part.iter().map(|v| -v).collect() };
        flipped.push([gate, &negated(up), &negated(down)]).unwrap();
    }
    let [plain, canonical, ..] = kinds();
    for compute in COMPUTES {
        let got = best_matches(compute, &flipped, &[kept.measured()], canonical).unwrap();
        let want = best_matches(compute, &rows, &[kept.measured()], canonical).unwrap();
        for (got, want) in got.iter().zip(&want) {
            let (got, want) = (got.unwrap(), want.unwrap());
            assert_eq!((got.neuron, got.value), (want.neuron, want.value));
            assert!(got.flipped && !want.flipped);
        }
        let got = best_matches(compute, &flipped, &[kept.measured()], plain).unwrap();
        assert!(got.iter().all(|m| m.unwrap().value < 0.9));
    }
    // As points of the k-means they are the same too.
    let points = WeightedSegments {
        segments: &flipped,
        flipped: &[true; 30],
        weights: &[1.0; 30],
    };
    let own = assign(Compute::F32, points, &rows).unwrap();
    assert!(own.iter().enumerate().all(|(i, a)| a.unwrap().centre == i));
    let mut centres = Expert::random(6, 30, 24).segments();
    let alone: Vec<Vec<usize>> = (0..30).map(|i| vec![i]).collect();
    update_centres(points, &alone, &mut centres).unwrap();
    assert_eq!(centres, rows);
}

#[test]
fn bad_and_dead_neurons_match_nothing_and_harm_no_other() {
    let kept = Expert::random(8, 20, 16);
    let mut rows = Segments::new(16);
    let (good, bad, dead) = ([0.5f32; 16], [f32::NAN; 16], [0f32; 16]);
    rows.push([&good, &bad, &good]).unwrap();
    rows.push([&bad, &good, &good]).unwrap();
    rows.push([&dead, &dead, &dead]).unwrap();
    let similarity = Similarity::default();
    let mut broken = Expert::random(8, 20, 16);
    broken.matrices[1][3 * 16] = bf16::INFINITY;
    for compute in COMPUTES {
        let got = best_matches(compute, &rows, &[kept.measured()], similarity).unwrap();
        assert_eq!(got[0], None);
        // The gate has no say at λ_g = 0.
        let want = best_matches(compute, &rows, &[broken.measured()], similarity).unwrap();
        assert!(got[1].unwrap().value > 0.0);
        assert_eq!(got[2].unwrap().value, 0.0);
        assert!(want.iter().flatten().all(|m| m.neuron != 3));
        assert_eq!(
            best_matches(compute, &rows, &[], similarity).unwrap(),
            [None; 3]
        );
    }
}

#[test]
fn nothing_received_changes_nothing() {
    let own = Expert::random(9, 65, 33).segments();
    let points = WeightedSegments {
        segments: &own,
        flipped: &[false; 65],
        weights: &[0.3; 65],
    };
    let mut centres = own.clone();
    for compute in COMPUTES {
        let assigned = assign(compute, points, &centres).unwrap();
        let mut clusters = vec![Vec::new(); 65];
        for (i, a) in assigned.iter().enumerate() {
            let a = a.unwrap();
            assert!((a.cosine - 1.0).abs() < 1e-6);
            clusters[a.centre].push(i);
        }
        assert_eq!(
            update_centres(points, &clusters, &mut centres).unwrap(),
            [1; 65]
        );
        assert_eq!(centres, own);
    }
}

#[test]
fn assignments_are_those_of_the_plain_loop() {
    let (points, centres) = (
        Expert::random(10, 45, 21).segments(),
        Expert::random(11, 37, 21).segments(),
    );
    let flipped: Vec<bool> = (0..45).map(|i| i % 3 == 0).collect();
    let weighted = WeightedSegments {
        segments: &points,
        flipped: &flipped,
        weights: &[1.0; 45],
    };
    for compute in COMPUTES {
        let got = assign(compute, weighted, &centres).unwrap();
        for (i, got) in got.iter().enumerate() {
            let got = got.unwrap();
            let v = as_vector(points.parts(i), flipped[i]);
            let to = |c: usize| cosine(&v, &as_vector(centres.parts(c), false));
            let best = (0..37).map(to).fold(f64::NEG_INFINITY, f64::max);
            assert!((to(got.centre) - f64::from(got.cosine)).abs() < 1e-5);
            assert!(to(got.centre) > best - 1e-5);
        }
    }
}

fn as_vector([gate, up, down]: [&[f32]; 3], flipped: bool) -> Vec<f32> {
    let sign = if flipped { -1.0 } else { 1.0 };
    let rest = up.iter().chain(down).map(|v| sign * v);
    gate.iter().copied().chain(rest).collect()
}

#[test]
fn centres_follow_the_formula() {
    let points = Expert::random(12, 9, 13).segments();
    let flipped: Vec<bool> = (0..9).map(|i| i % 2 == 1).collect();
    let weights = [0.5f32, 2.0, 1.0, 0.25, 3.0, 0.0, 1.5, 0.0, 1.0];
    let weighted = WeightedSegments {
        segments: &points,
        flipped: &flipped,
        weights: &weights,
    };
    let clusters = vec![
        vec![0, 1, 2, 3],
        vec![7, 5],
        vec![5, 4],
        vec![],
        vec![6, 7, 8],
    ];
    let before = Expert::random(13, 5, 13).segments();
    let mut centres = before.clone();
    let counts = update_centres(weighted, &clusters, &mut centres).unwrap();
    assert_eq!(counts, [4, 0, 1, 0, 2]);
    // Without a member of weight nothing moves; with one its bits are copied.
    assert_eq!(centres.parts(1), before.parts(1));
    assert_eq!(centres.parts(3), before.parts(3));
    assert_eq!(centres.parts(2), points.parts(4));
    for c in [0, 4] {
        let (mut total, mut norm) = (0f64, 0f64);
        let mut mean = vec![0f64; 39];
        let members = clusters[c].iter().filter(|&&i| weights[i] > 0.0);
        for &i in members.clone() {
            let v = as_vector(points.parts(i), false);
            total += f64::from(weights[i]);
            norm += f64::from(weights[i]) * dot(&v, &v).sqrt();
        }
        norm /= total;
        for &i in members {
            let v = as_vector(points.parts(i), flipped[i]);
            let scale = f64::from(weights[i]) / total * norm / dot(&v, &v).sqrt();
            for (mean, v) in mean.iter_mut().zip(&v) {
                *mean += scale * f64::from(*v);
            }
        }
        let length = mean.iter().map(|m| m * m).sum::<f64>().sqrt();
        let got = as_vector(centres.parts(c), false);
        for (got, mean) in got.iter().zip(&mean) {
            assert!((f64::from(*got) - mean * norm / length).abs() < 1e-6);
        }
        assert!((dot(&got, &got).sqrt() - norm).abs() < 1e-5);
    }
}

#[test]
fn opposites_and_bad_members_leave_a_centre_alone() {
    let mut points = Segments::new(4);
    let (one, minus, zero, nan) = ([1f32; 4], [-1f32; 4], [0f32; 4], [f32::NAN; 4]);
    for part in [&one, &minus, &zero, &nan] {
        points.push([part, part, part]).unwrap();
    }
    let weighted = WeightedSegments {
        segments: &points,
        flipped: &[false; 4],
        weights: &[1.0; 4],
    };
    let before = Expert::random(14, 3, 4).segments();
    let mut centres = before.clone();
    let clusters = [vec![0, 1], vec![2, 3], vec![3, 0]];
    let counts = update_centres(weighted, &clusters, &mut centres).unwrap();
    assert_eq!(counts, [2, 0, 1]);
    assert_eq!(centres.parts(0), before.parts(0));
    assert_eq!(centres.parts(1), before.parts(1));
    assert_eq!(centres.parts(2), points.parts(0));
    assert!(update_centres(weighted, &clusters[..2], &mut centres).is_err());
    let outside = [vec![0], vec![4], vec![]];
    assert!(update_centres(weighted, &outside, &mut centres).is_err());
    let short = WeightedSegments {
        weights: &[1.0; 3],
        ..weighted
    };
    assert!(assign(Compute::F32, short, &centres).is_err());
    assert!(assign(Compute::F32, weighted, &Segments::new(5)).is_err());
}
