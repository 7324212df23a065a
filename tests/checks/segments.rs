//! Packing, and DERN's kernels: norms, best matches, clusters.

use half::bf16;
use tenp_kernels::Compute;
use tenp_kernels::cpu::segments::{
    MeasuredExpert, Segments, Similarity, WeightedSegments, assign, best_matches, update_centres,
};
use tenp_kernels::device::kmeans_centres::{KmeansCentres, kmeans_centres, scratch_len};
use tenp_kernels::device::pack::{PackDown, PackGateUp, pack_down, pack_gate_up};
use tenp_kernels::device::segment_match::{
    SegmentBest, SegmentMatch, SegmentTable, items_of, segment_assign, segment_best,
    segment_similarity,
};
use tenp_kernels::device::segment_norms::{SegmentNorms, segment_norms};
use tenp_kernels::device::{Backend, Memory as _};

use super::layer::Layer;
use super::{AWKWARD_WIDTHS, BF16_ROUNDING, On, Size, assert_close, bf16_values, rng};

/// All neurons, or every third, into device form: what packing on the host makes of the same neurons.
pub fn packing<B: Backend>(on: On<'_, B>, size: Size) {
    let (hidden, widths): (usize, &[usize]) = match size {
        Size::Small => (72, &AWKWARD_WIDTHS),
        Size::Real => (2048, &[1408, 65]),
    };
    for &source_width in widths {
        let mut rng = rng(source_width as u64);
        let mut values = || bf16_values(&mut rng, source_width * hidden, 1.0);
        let (gate, up, down) = (values(), values(), values());
        let (gate_there, up_there) = (on.input(&gate), on.input(&up));
        let down_there = on.input(&down);
        for step in [1, 3] {
            let keep: Vec<i32> = (0..source_width as i32).step_by(step).collect();
            let keep_there = on.input(&keep);
            let (width, padded) = (keep.len(), keep.len().next_multiple_of(16));
            let mut gate_up = on.output::<bf16>(2 * padded * hidden);
            let mut down_t = on.output::<bf16>(padded * hidden);
            let keep_view = (step > 1).then(|| keep_there.view());
            let args = PackGateUp {
                gate: gate_there.view(),
                up: up_there.view(),
                keep: keep_view,
                out: gate_up.view_mut(),
                source_width,
                width,
                width_padded: padded,
                hidden,
            };
            // SAFETY: the ids are below the source's width.
            on.go(unsafe { pack_gate_up(args) });
            on.go(pack_down(PackDown {
                down: down_there.view(),
                keep: keep_view,
                out: down_t.view_mut(),
                source_width,
                width,
                width_padded: padded,
                hidden,
            }));
            let (gate_up, down_t) = (on.get(gate_up.view()), on.get(down_t.view()));
            for j in 0..padded {
                let kept = keep.get(j).map(|&k| k as usize);
                for c in 0..hidden {
                    let row = 16 * (j / 8) + j % 8;
                    let got = [
                        gate_up[row * hidden + c],
                        gate_up[(row + 8) * hidden + c],
                        down_t[j * hidden + c],
                    ];
                    let want = kept.map_or([bf16::ZERO; 3], |k| {
                        [
                            gate[k * hidden + c],
                            up[k * hidden + c],
                            down[c * source_width + k],
                        ]
                    });
                    assert_eq!(got, want, "width {source_width}, neuron {j}, column {c}");
                }
            }
        }
    }
}

/// A layer's neurons with their norms.
struct Table<B: Backend> {
    layer: Layer,
    gate_up: B::Buffer<bf16>,
    down_t: B::Buffer<bf16>,
    inverse: B::Buffer<f32>,
    squares: B::Buffer<f64>,
}

impl<B: Backend> Table<B> {
    fn new(on: On<'_, B>, layer: Layer) -> Self {
        let neurons = layer.layout.total();
        let mut table = Self {
            gate_up: on.input(&layer.gate_up()),
            down_t: on.input(&layer.down_t()),
            inverse: on.output(4 * neurons),
            squares: on.output(3 * neurons),
            layer,
        };
        on.go(segment_norms(SegmentNorms {
            gate_up: table.gate_up.view(),
            down_t: table.down_t.view(),
            squares: Some(table.squares.view_mut()),
            inverse: Some(table.inverse.view_mut()),
            num_neurons: neurons,
            hidden: table.layer.hidden,
        }));
        table
    }

    fn view(&self) -> SegmentTable<'_> {
        SegmentTable {
            gate_up: self.gate_up.view(),
            down_t: self.down_t.view(),
            inverse: self.inverse.view(),
            num_neurons: self.layer.layout.total(),
        }
    }

    /// Padded numbers of every neuron, and the same segments for the CPU.
    fn all(&self) -> (Vec<i32>, Segments) {
        let mut segments = Segments::new(self.layer.hidden);
        let mut ids = Vec::new();
        for (e, view) in self.layer.views().iter().enumerate() {
            let neurons: Vec<usize> = (0..self.layer.widths[e]).collect();
            let start = self.layer.layout.range(e).start;
            ids.extend(neurons.iter().map(|n| (start + n) as i32));
            segments.extend(view, &neurons).expect("its own neurons");
        }
        (ids, segments)
    }
}

fn table<B: Backend>(on: On<'_, B>, seed: u64, hidden: usize, widths: &[usize]) -> Table<B> {
    Table::new(on, Layer::random(&mut rng(seed), hidden, widths))
}

/// Best value and neuron `[groups, rows]` of every row among each expert's neurons.
fn matches<B: Backend>(
    on: On<'_, B>,
    (rows, ids): (&Table<B>, &[i32]),
    columns: &Table<B>,
    similarity: Option<Similarity>,
    (groups, wgmma): (&[std::ops::Range<usize>], bool),
) -> (B::Buffer<f32>, B::Buffer<i32>) {
    let items = items_of(ids.len(), groups).expect("small numbers");
    let (items_there, ids_there) = (on.input(&items), on.input(ids));
    let count = groups.len() * ids.len();
    let (mut values, mut found) = (on.output::<f32>(count), on.output::<i32>(count));
    let args = SegmentMatch {
        rows: rows.view(),
        row_ids: ids_there.view(),
        columns: columns.view(),
        items: &items,
        items_on_device: items_there.view(),
        best_value: values.view_mut(),
        best_id: found.view_mut(),
        best_flip: None,
        num_rows: ids.len(),
        hidden: rows.layer.hidden,
        wgmma,
    };
    // SAFETY: the ids are neurons of the table, and the items were copied above.
    on.go(unsafe {
        match similarity {
            Some(similarity) => segment_similarity(args, similarity),
            None => segment_assign(args, None),
        }
    });
    (values, found)
}

pub fn norms_and_similarity<B: Backend>(on: On<'_, B>, size: Size) {
    let (hidden, row_widths, column_widths): (usize, &[usize], &[usize]) = match size {
        Size::Small => (40, &[33, 0], &AWKWARD_WIDTHS),
        Size::Real => (2048, &[300], &[1408, 65, 704]),
    };
    let rows = table(on, 1, hidden, row_widths);
    let columns = table(on, 2, hidden, column_widths);
    let (ids, segments) = rows.all();
    let neurons = rows.layer.layout.total();
    let (squares, inverse) = (on.get(rows.squares.view()), on.get(rows.inverse.view()));
    for (&id, want) in ids.iter().zip(segments.squares()) {
        for (part, want) in [want.gate, want.up, want.down].into_iter().enumerate() {
            let at = part * neurons + id as usize;
            assert_close(squares[at], want, 1e-12 * want, || {
                format!("square {part} of {id}")
            });
            let want = 1.0 / want.sqrt();
            assert_close(f64::from(inverse[at]), want, 1e-6 * want, || {
                format!("{part} of {id}")
            });
        }
    }
    for wgmma in forms(on) {
        check_best(on, (&rows, &ids, &segments), &columns, wgmma);
    }
}

/// With the products of every GPU, and those of sm_90 where there are.
fn forms<B: Backend>(on: On<'_, B>) -> impl Iterator<Item = bool> {
    let count = 1 + usize::from(on.backend.has_wgmma());
    [false, true].into_iter().take(count)
}

/// The best match of every row among all experts of `columns`.
fn check_best<B: Backend>(
    on: On<'_, B>,
    (rows, ids, segments): (&Table<B>, &[i32], &Segments),
    columns: &Table<B>,
    wgmma: bool,
) {
    let layout = &columns.layer.layout;
    let widths = columns.layer.widths.iter().enumerate();
    let groups: Vec<_> = widths
        .map(|(e, width)| layout.range(e).start..layout.range(e).start + width)
        .collect();
    let similarity = Similarity::default();
    let (values, found) = matches(on, (rows, ids), columns, Some(similarity), (&groups, wgmma));
    let mut best = (on.output::<f32>(ids.len()), on.output::<i32>(ids.len()));
    let mut best_id = on.output::<i32>(ids.len());
    on.go(segment_best(SegmentBest {
        values: values.view(),
        ids: found.view(),
        best_value: best.0.view_mut(),
        best_group: best.1.view_mut(),
        best_id: best_id.view_mut(),
        num_groups: groups.len(),
        num_rows: ids.len(),
    }));
    let views = columns.layer.views();
    let experts = MeasuredExpert::all(&views).expect("shapes fit");
    let want = best_matches(Compute::F32, segments, &experts, similarity).expect("shapes fit");
    let (value, group) = (on.get(best.0.view()), on.get(best.1.view()));
    let mut same = 0;
    for (r, (want, id)) in want.iter().zip(on.get(best_id.view())).enumerate() {
        let want = want.as_ref().expect("there are columns");
        assert_close(f64::from(value[r]), f64::from(want.value), 2e-5, || {
            format!("row {r}")
        });
        same += usize::from(group[r] as usize == want.expert && id as usize == want.neuron);
    }
    // Two columns may be equally alike but for a rounding.
    assert!(same + 2 >= ids.len(), "{same} of {}", ids.len());
}

pub fn clusters<B: Backend>(on: On<'_, B>, size: Size) {
    let (hidden, width, num_centres) = match size {
        Size::Small => (24, 70, 5),
        Size::Real => (2048, 1000, 64),
    };
    let points = table(on, 3, hidden, &[width]);
    let centres = table(on, 4, hidden, &[num_centres]);
    let (ids, segments) = points.all();
    let (_, mut expected) = centres.all();
    let weights: Vec<f32> = (0..width).map(|i| (i % 4) as f32).collect();
    let flipped = vec![false; width];
    let weighted = WeightedSegments {
        segments: &segments,
        flipped: &flipped,
        weights: &weights,
    };
    let want = assign(Compute::F32, weighted, &expected).expect("shapes fit");
    let mut members = Vec::new();
    for wgmma in forms(on) {
        let one = 0..num_centres;
        let (_, found) = matches(
            on,
            (&points, &ids),
            &centres,
            None,
            (std::slice::from_ref(&one), wgmma),
        );
        members = vec![Vec::new(); num_centres];
        let mut agreeing = 0;
        for (i, (&centre, want)) in on.get(found.view()).iter().zip(&want).enumerate() {
            agreeing += usize::from(want.as_ref().expect("finite").centre == centre as usize);
            members[centre as usize].push(i);
        }
        assert!(
            agreeing + 2 >= width,
            "{agreeing} of {width}, wgmma {wgmma}"
        );
    }
    let counts = update_centres(weighted, &members, &mut expected).expect("shapes fit");
    let mut offsets = vec![0i32];
    for cluster in &members {
        offsets.push(offsets[offsets.len() - 1] + cluster.len() as i32);
    }
    let member_ids: Vec<i32> = members.concat().iter().map(|&m| m as i32).collect();
    let (ids_there, weights_there) = (on.input(&ids), on.input(&weights));
    let (offsets_there, members_there) = (on.input(&offsets), on.input(&member_ids));
    let mut scratch = on.output(scratch_len(num_centres, hidden));
    let mut gate_up = on.input(&centres.layer.gate_up());
    let mut down_t = on.input(&centres.layer.down_t());
    let mut num_weighted = on.output::<i32>(num_centres);
    let args = KmeansCentres {
        segments: points.view(),
        segment_ids: ids_there.view(),
        signs: None,
        weights: weights_there.view(),
        member_offsets: offsets_there.view(),
        member_ids: members_there.view(),
        scratch: scratch.view_mut(),
        centre_gate_up: gate_up.view_mut(),
        centre_down_t: down_t.view_mut(),
        num_weighted: num_weighted.view_mut(),
        num_segments: width,
        num_centres,
        hidden,
    };
    // SAFETY: ids and offsets are those of the tables above.
    on.go(unsafe { kmeans_centres(args) });
    let got_counts = on.get(num_weighted.view());
    assert!(got_counts.iter().map(|&c| c as usize).eq(counts));
    let (gate_up, down_t) = (on.get(gate_up.view()), on.get(down_t.view()));
    for c in 0..num_centres {
        let row = c / 8 * 16 + c % 8;
        let got = [
            &gate_up[row * hidden..],
            &gate_up[(row + 8) * hidden..],
            &down_t[c * hidden..],
        ];
        for (part, (got, want)) in got.iter().zip(expected.parts(c)).enumerate() {
            for (got, &want) in got.iter().zip(want) {
                let want = f64::from(want);
                assert_close(
                    got.to_f64(),
                    want,
                    BF16_ROUNDING * want.abs() + 2e-6,
                    || format!("part {part} of centre {c}"),
                );
            }
        }
    }
}
