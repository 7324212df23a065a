//! The launches that `benches/gpu_moe.rs` times, on the executor at sizes it can run, and the shapes of its cases.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "the bench uses what this does not, and neither is a library"
)]

#[path = "../../../benches/gpu/cases.rs"]
mod cases;
#[path = "../../../benches/gpu/graphs.rs"]
mod graphs;
#[path = "../../../benches/gpu/inputs.rs"]
mod inputs;
#[path = "../../../benches/gpu/layer.rs"]
mod layer;
#[path = "../../../benches/gpu/segments.rs"]
mod segments;

use cases::{Case, Routing, SHAPES, Shape, Widths, cases};
use graphs::{Part, Step};
use inputs::{Noise, Weights};
use layer::{Layer, chosen_tile};
use segments::Comparison;
use simt::{Schedule, Simulated};
use tenp_kernels::device::{Runner as _, Tile};

const TINY: Shape = Shape {
    name: "tiny",
    hidden: 40,
    width: 72,
    experts: 6,
    top_k: 2,
};

#[test]
fn every_launch_is_sound() {
    let noise = Noise::new(0.2);
    for (i, widths) in Widths::ALL.into_iter().enumerate() {
        let backend = match i % 2 {
            0 => Simulated::new(Schedule::UNLIKE[i % 4]),
            _ => Simulated::new(Schedule::UNLIKE[i % 4]).with_wgmma(),
        };
        let weights = Weights::new(&backend, &noise, &TINY, 3).unwrap();
        for (tokens, routing) in [
            (1, Routing::Uniform),
            (9, Routing::Zipf),
            (40, Routing::ManyEmpty),
        ] {
            let case = Case {
                shape: TINY,
                tokens,
                widths,
                routing,
            };
            let ids = routing.ids(&TINY, tokens);
            // More rows than its few tokens ask for, so that sm_90's products come in.
            let tile = if backend.has_wgmma() {
                Tile::W64
            } else {
                chosen_tile(&backend, &case)
            };
            let mut layer = Layer::new(&backend, &weights, &noise, case, &ids, true, tile).unwrap();
            if routing == Routing::Zipf {
                layer.order_rows().unwrap();
            }
            for set in 0..3 {
                layer.experts(set).unwrap();
                layer.scored(set).unwrap();
                layer.project(set, false).unwrap();
                layer.make_gram(set).unwrap();
                layer.project(set, true).unwrap();
                layer.directions().unwrap();
            }
            let mut step = Step::new(&backend, &weights, &layer.x, case, &ids).unwrap();
            for part in [Part::Layer, Part::Experts] {
                let calls = step.calls(part).unwrap();
                assert_eq!(calls.len(), if part == Part::Layer { 3 * 5 } else { 3 * 3 });
                for call in calls {
                    backend.run(&call).unwrap();
                }
            }
            layer.forward(1).unwrap();
            let mut tokens_of_rows = layer.tokens_of_rows().unwrap();
            tokens_of_rows.sort_unstable();
            let all = (0..tokens as i32).flat_map(|t| [t, t]);
            assert!(tokens_of_rows.into_iter().eq(all));
        }
    }
}

#[test]
fn segments_of_one_expert_are_compared_with_those_that_stay() {
    let noise = Noise::new(0.2);
    for wgmma in [false, true] {
        let backend = Simulated::new(Schedule::UNLIKE[0]);
        let backend = if wgmma { backend.with_wgmma() } else { backend };
        let weights = Weights::new(&backend, &noise, &TINY, 2).unwrap();
        let mut comparison = Comparison::new(&backend, &weights, &TINY).unwrap();
        assert_eq!((comparison.rows, comparison.columns), (72, 5 * 72));
        let pairs = 72.0 * 360.0;
        assert_eq!(comparison.costs().0, 2.0 * pairs * 40.0 * 2.0);
        for set in 0..2 {
            comparison.run(set).unwrap();
        }
    }
}

/// Checksums of ragged widths, a row for each share, and of the ids of 500 tokens, a row for each routing, by shape.
/// tests/peers/check_cases.py reads them here and compares them with what the Python benches draw.
const DRAWN_WIDTHS: [[usize; 4]; 2] = [
    [4_734_632, 2_151_696, 3_913_336, 3_130_360],
    [3_137_600, 1_419_824, 2_581_784, 2_066_000],
];
const DRAWN_IDS: [[usize; 4]; 3] = [
    [512_995_979, 139_209_889, 250_089_774, 250_089_774],
    [461_982_047, 129_409_411, 237_758_028, 237_758_028],
    [498_129_902, 138_736_319, 245_048_047, 245_048_047],
];

fn checksum(values: impl IntoIterator<Item = usize>) -> usize {
    values.into_iter().zip(1_usize..).map(|(v, i)| v * i).sum()
}

#[test]
fn draws_are_those_that_the_python_benches_repeat() {
    let widths = [Widths::Ragged75, Widths::Ragged50]
        .map(|widths| SHAPES.map(|shape| checksum(widths.of(&shape))));
    assert_eq!(widths, DRAWN_WIDTHS);
    let ids = Routing::ALL.map(|routing| {
        SHAPES.map(|shape| {
            let ids = routing.ids(&shape, 500);
            checksum(ids.into_iter().map(|id| id as usize))
        })
    });
    assert_eq!(ids, DRAWN_IDS);
}

#[test]
fn widths_and_routings_are_what_they_are_called() {
    for shape in SHAPES {
        for (widths, share) in [
            (Widths::Full, 1.0),
            (Widths::Uniform75, 0.75),
            (Widths::Ragged75, 0.75),
            (Widths::Ragged50, 0.5),
        ] {
            let of = widths.of(&shape);
            let mean = of.iter().sum::<usize>() as f64 / (shape.width * shape.experts) as f64;
            assert!(
                (mean - share).abs() < 0.02,
                "{} {}: {mean}",
                shape.name,
                widths.name()
            );
            assert!(of.iter().all(|&w| w <= shape.width));
        }
        assert!(Widths::SomeZero.of(&shape).contains(&0));
        let counts = |routing: Routing| {
            let ids = routing.ids(&shape, 500);
            let mut counts = vec![0usize; shape.experts];
            for token in ids.chunks_exact(shape.top_k) {
                let mut token = token.to_vec();
                token.sort_unstable();
                token.dedup();
                assert_eq!(token.len(), shape.top_k, "an expert twice");
                for id in token {
                    counts[id as usize] += 1;
                }
            }
            counts
        };
        let empty = |counts: &[usize]| counts.iter().filter(|&&c| c == 0).count();
        assert!(empty(&counts(Routing::ManyEmpty)) * 2 > shape.experts);
        assert_eq!(empty(&counts(Routing::Uniform)), 0);
        let largest = |routing| counts(routing).into_iter().max();
        assert!(largest(Routing::Zipf) > largest(Routing::Uniform).map(|c| 2 * c));
        let work = cases(&shape, "short")[0];
        let ids = work.routing.ids(&shape, work.tokens);
        assert_eq!(work.work(&ids).rows(), work.tokens * shape.top_k);
        let full = cases(&shape, "full");
        assert!(full.len() == 7 * 6 * 3);
        assert!(full.iter().all(|c| Case::named(&c.name()) == Some(*c)));
        let name = format!("{}/8 tokens/full/uniform", shape.name);
        assert!(Case::named(&name).is_some());
        for wrong in [
            format!("{name}/"),
            format!("{name} "),
            format!("x{name}"),
            "8 tokens".into(),
        ] {
            assert_eq!(Case::named(&wrong), None, "{wrong}");
        }
    }
}
