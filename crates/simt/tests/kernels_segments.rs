//! `tenp_segment_*` against the CPU.

mod support;

use half::bf16;
use rand::RngExt as _;
use simt::{Buffer, Schedule};
use support::layer::Layer;
use support::segments::{By, Matches, Table, compare};
use support::{AWKWARD_WIDTHS, Sim, assert_close, bytes_of, rng, view, view_mut};
use tenp_kernels::Compute;
use tenp_kernels::cpu::segments::{
    MeasuredExpert, Similarity, WeightedSegments, assign, best_matches,
};
use tenp_kernels::device::segment_match::{SegmentBest, segment_best};

fn table(seed: u64, hidden: usize, widths: &[usize]) -> Table {
    let layer = Layer::random(&mut rng(seed), hidden, widths);
    Table::new(layer, Sim::unlike(seed as usize))
}

#[test]
fn norms_are_those_of_the_weights() {
    for (i, hidden) in [8, 72, 264, 1408].into_iter().enumerate() {
        let table = table(i as u64, hidden, &[17, 0, 8, 33]);
        let neurons = table.layer.layout.total();
        let (squares, inverse) = (
            table.squares.written().unwrap(),
            table.inverse.written().unwrap(),
        );
        let mut padding = vec![true; neurons];
        let (ids, segments) = table.pick(&table.all());
        for (&id, want) in ids.iter().zip(segments.squares()) {
            padding[id as usize] = false;
            let all = [want.gate, want.up, want.down, want.all()];
            for (part, want) in all.into_iter().enumerate() {
                let at = part * neurons + id as usize;
                if part < 3 {
                    assert_close(squares[at], want, 1e-13 * want, || format!("{part} {id}"));
                }
                assert_eq!(inverse[at], (1.0 / want.sqrt()) as f32);
            }
        }
        for at in (0..4 * neurons).filter(|at| padding[at % neurons]) {
            assert_eq!(inverse[at], 0.0);
        }
    }
}

fn kinds() -> [Similarity; 4] {
    let of = |lambda_gate, lambda_up, lambda_down, sign_canonical| Similarity {
        lambda_gate,
        lambda_up,
        lambda_down,
        sign_canonical,
    };
    [
        of(0.0, 0.5, 0.5, false),
        of(0.0, 0.5, 0.5, true),
        of(0.25, 0.5, 0.25, true),
        of(1.0, 0.0, 0.0, false),
    ]
}

fn check_similarity(rows: &Table, neurons: &[(usize, usize)], columns: &Table, sim: Sim) {
    let (ids, segments) = rows.pick(neurons);
    let views = MeasuredExpert::all(&columns.layer.views()).unwrap();
    for (similarity, sim) in kinds()
        .into_iter()
        .flat_map(|k| sim.both().map(|sim| (k, sim)))
    {
        let by = By::Similarity(similarity);
        let got = compare(rows, &ids, columns, &columns.groups(), &by, sim);
        let values = got.values.written().unwrap();
        let (found, flips) = (got.ids.written().unwrap(), got.flips.written().unwrap());
        for (g, view) in views.iter().enumerate() {
            let one = std::slice::from_ref(view);
            let want = best_matches(Compute::F32, &segments, one, similarity).unwrap();
            for (r, want) in want.iter().enumerate() {
                let at = g * ids.len() + r;
                let what = || format!("{similarity:?} row {r} of {neurons:?} group {g}");
                let Some(want) = want else {
                    assert_eq!(
                        (values[at], found[at]),
                        (f32::NEG_INFINITY, -1),
                        "{}",
                        what()
                    );
                    continue;
                };
                assert_close(f64::from(values[at]), f64::from(want.value), 2e-6, what);
                assert_eq!(found[at] as usize, want.neuron, "{}", what());
                assert_eq!(flips[at] == 1, want.flipped, "{}", what());
            }
        }
    }
}

#[test]
fn similarity_at_awkward_widths() {
    let columns = table(10, 40, &AWKWARD_WIDTHS);
    let rows = table(11, 40, &[65, 0, 3]);
    check_similarity(&rows, &rows.all(), &columns, Sim::unlike(1));
    for (i, count) in [0, 1, 7, 64].into_iter().enumerate() {
        check_similarity(&rows, &rows.all()[4..4 + count], &columns, Sim::unlike(i));
    }
}

#[test]
fn similarity_at_awkward_hidden_sizes() {
    for (i, hidden) in [8, 32, 136].into_iter().enumerate() {
        let columns = table(20 + i as u64, hidden, &[130, 5]);
        let rows = table(30 + i as u64, hidden, &[9]);
        check_similarity(&rows, &rows.all(), &columns, Sim::unlike(i + 2));
    }
}

#[test]
fn experts_as_wide_as_real_ones() {
    let columns = table(40, 16, &[1408]);
    let rows = table(41, 16, &[70]);
    check_similarity(&rows, &rows.all(), &columns, Sim::unlike(3));
}

fn best_over_groups(
    matches: &Matches,
    num_groups: usize,
    sim: Sim,
) -> (Vec<f32>, Vec<i32>, Vec<i32>) {
    let rows = matches.values.len() / num_groups;
    let value = Buffer::output("best_value", rows);
    let group = Buffer::output("best_group", rows);
    let id = Buffer::output("best_id", rows);
    sim.go(segment_best(SegmentBest {
        values: view(&matches.values),
        ids: view(&matches.ids),
        best_value: view_mut(&value),
        best_group: view_mut(&group),
        best_id: view_mut(&id),
        num_groups,
        num_rows: rows,
    }));
    let written = |b: &Buffer<i32>| b.written().unwrap();
    (value.written().unwrap(), written(&group), written(&id))
}

#[test]
fn the_best_expert_is_that_of_the_cpu_and_ties_go_to_the_lower() {
    // Expert 2 is expert 0 once more, and its first neuron stands twice in it.
    let mut layer = Layer::random(&mut rng(50), 24, &[20, 33, 20, 300]);
    let first = &mut layer.experts[0];
    for part in [&mut first.gate, &mut first.up] {
        part.copy_within(0..24, 7 * 24);
    }
    for row in first.down.chunks_exact_mut(20) {
        row[7] = row[0];
    }
    let first = &layer.experts[0];
    let copy = [&first.gate, &first.up, &first.down].map(Clone::clone);
    [
        layer.experts[2].gate,
        layer.experts[2].up,
        layer.experts[2].down,
    ] = copy;
    let columns = Table::new(layer, Sim::unlike(0));
    let groups = columns.groups();
    let (ids, segments) = columns.pick(&columns.all());
    let places = Sim::unlike(2).both();
    for (similarity, sim) in kinds().into_iter().flat_map(|k| places.map(|sim| (k, sim))) {
        let by = By::Similarity(similarity);
        let matches = compare(&columns, &ids, &columns, &groups, &by, sim);
        let (value, group, id) = best_over_groups(&matches, 4, Sim::unlike(1));
        let views = MeasuredExpert::all(&columns.layer.views()).unwrap();
        let want = best_matches(Compute::F32, &segments, &views, similarity).unwrap();
        for (r, want) in want.iter().enumerate() {
            let want = want.unwrap();
            assert_eq!((group[r], id[r]), (want.expert as i32, want.neuron as i32));
            assert_close(f64::from(value[r]), 1.0, 1e-6, || format!("row {r}"));
        }
        assert_eq!((group[7], id[7], group[20 + 33], id[20 + 33]), (0, 0, 0, 0));
    }
}

#[test]
fn groups_where_nothing_compares_never_win() {
    let matches = |values: &[f32], ids: &[i32]| Matches {
        values: Buffer::input("values", values),
        ids: Buffer::input("ids", ids),
        flips: Buffer::output("flips", 0),
    };
    let none = f32::NEG_INFINITY;
    let got = best_over_groups(
        &matches(
            &[none, 0.5, none, f32::NAN, -0.5, none, 0.5, -2.0, 0.25],
            &[-1, 4, -1, 0, 3, -1, 9, 1, -1],
        ),
        3,
        Sim::unlike(0),
    );
    assert_eq!(got.0, [0.5, 0.5, none]);
    assert_eq!(got.1, [2, 0, -1]);
    assert_eq!(got.2, [9, 4, -1]);
}

#[test]
fn bad_weights_match_nothing_and_harm_no_other() {
    let (mut rows, mut columns) = (
        Layer::random(&mut rng(60), 24, &[10]),
        Layer::random(&mut rng(61), 24, &[40]),
    );
    rows.experts[0].up[3 * 24 + 1] = bf16::NAN;
    rows.experts[0].gate[4 * 24..5 * 24].fill(bf16::INFINITY);
    rows.experts[0].up[5 * 24..6 * 24].fill(bf16::ZERO);
    columns.experts[0].down[17 * 40 + 6] = bf16::INFINITY;
    columns.experts[0].gate[9 * 24] = bf16::NAN;
    let rows = Table::new(rows, Sim::unlike(0));
    let columns = Table::new(columns, Sim::unlike(0));
    check_similarity(&rows, &rows.all(), &columns, Sim::new(Schedule::Reversed));
    let (ids, _) = rows.pick(&rows.all());
    let by = By::Similarity(Similarity::default());
    for sim in Sim::unlike(0).both() {
        let got = compare(&rows, &ids, &columns, &columns.groups(), &by, sim);
        let found = got.ids.to_vec();
        assert_eq!(found[3], -1);
        let others = found.iter().enumerate().filter(|(r, _)| *r != 3);
        assert!(others.into_iter().all(|(_, &id)| id >= 0 && id != 6));
    }
}

#[test]
fn equal_bits_whatever_the_schedule() {
    let (rows, columns) = (table(70, 40, &[70]), table(71, 40, &[150, 20]));
    let (ids, _) = rows.pick(&rows.all());
    let run = |by: &By<'_>, sim: Sim| {
        let got = compare(&rows, &ids, &columns, &columns.groups(), by, sim);
        (
            bytes_of(&got.values),
            bytes_of(&got.ids),
            bytes_of(&got.flips),
        )
    };
    for by in [By::Similarity(kinds()[2]), By::Cosine(&[1.0; 70])] {
        for way in 0..2 {
            let first = run(&by, Sim::unlike(0).both()[way]);
            assert!((1..4).all(|i| run(&by, Sim::unlike(i).both()[way]) == first));
        }
    }
}

#[test]
fn assignments_are_those_of_the_cpu() {
    let mut rng = rng(80);
    let sizes = [(8, 1, 1), (40, 65, 130), (72, 130, 64)];
    let cases = sizes.into_iter().enumerate();
    for (i, (hidden, n, centres), sim) in
        cases.flat_map(|(i, sizes)| Sim::unlike(i).both().map(|sim| (i, sizes, sim)))
    {
        let (points, centres) = (
            table(81 + i as u64, hidden, &[n]),
            table(91 + i as u64, hidden, &[centres]),
        );
        let (ids, segments) = points.pick(&points.all());
        let flipped: Vec<bool> = (0..n).map(|_| rng.random()).collect();
        let signs: Vec<f32> = flipped
            .iter()
            .map(|&f| if f { -1.0 } else { 1.0 })
            .collect();
        let by = By::Cosine(&signs);
        let got = compare(&points, &ids, &centres, &centres.groups(), &by, sim);
        let (values, found) = (got.values.written().unwrap(), got.ids.written().unwrap());
        let weighted = WeightedSegments {
            segments: &segments,
            flipped: &flipped,
            weights: &vec![1.0; n],
        };
        let want = assign(Compute::F32, weighted, &centres.pick(&centres.all()).1).unwrap();
        for (r, want) in want.iter().enumerate() {
            let want = want.unwrap();
            assert_eq!(found[r] as usize, want.centre, "row {r}");
            let (got, want) = (f64::from(values[r]), f64::from(want.cosine));
            assert_close(got, want, 2e-6, || format!("row {r}"));
        }
        assert!(got.flips.written().unwrap().iter().all(|&f| f == 0));
    }
}
