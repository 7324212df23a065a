//! `tenp_moe_combine`, `tenp_moe_direction` and `tenp_expert_sums` against the formulas and the CPU.

mod support;

use half::bf16;
use simt::{Buffer, Schedule};
use support::layer::Layer;
use support::moe::{Grouped, Routing, Tables};
use support::sums::{Direction, direction, expert_sums_of};
use support::{F32_ROUNDING, Sim, assert_close, bytes_of, f32_values, rng, view, view_mut};
use tenp_kernels::cpu::direction::{ExpertSums, TokenContext, accumulate_expert_sums};
use tenp_kernels::device::InOut;
use tenp_kernels::device::moe_combine::{
    CombineInto, ExpertOutputs, MoeCombine, SharedOutput, Slots, moe_combine,
};

/// A batch around which everything is known, its expert outputs random.
struct Case {
    hidden: usize,
    routing: Routing,
    grouped: Grouped,
    tables: Tables,
    /// `[rows, H]`; NaN where an expert has no neurons, so that a read shows.
    y: Vec<f32>,
    x: Vec<f32>,
    residual: Vec<f32>,
    shared: Vec<f32>,
    logits: Vec<f32>,
}

const WIDTHS: [usize; 5] = [16, 0, 1, 40, 8];

impl Case {
    /// With `lost`, some slots have ids that are no expert's.
    fn new(seed: u64, hidden: usize, tokens: usize, top_k: usize, lost: bool) -> Self {
        let mut rng = rng(seed);
        let layer = Layer::random(&mut rng, 8, &WIDTHS);
        let mut routing = Routing::random(&mut rng, 5, tokens, top_k, &[0, 1, 2, 3, 4]);
        if lost {
            for id in routing.ids.iter_mut().step_by(3) {
                *id = if *id % 2 == 0 { -1 } else { 5 };
            }
        }
        let grouped = Grouped::new(&routing, Sim::unlike(0));
        let mut y = f32_values(&mut rng, tokens * top_k * hidden, 1.0);
        let rows = grouped.row_of_slot.to_vec();
        for (&id, &row) in routing.ids.iter().zip(&rows) {
            if row >= 0 && WIDTHS[id as usize] == 0 {
                y[row as usize * hidden..][..hidden].fill(f32::NAN);
            }
        }
        Self {
            hidden,
            grouped,
            tables: Tables::new(&layer.layout),
            y,
            x: f32_values(&mut rng, tokens * hidden, 1.0),
            residual: f32_values(&mut rng, tokens * hidden, 2.0),
            shared: f32_values(&mut rng, tokens * hidden, 1.0),
            logits: f32_values(&mut rng, tokens, 4.0),
            routing,
        }
    }

    fn slots(&self) -> Slots<'_> {
        Slots {
            row_of_slot: view(&self.grouped.row_of_slot),
            expert_ids: view(&self.grouped.expert_ids),
            weights: view(&self.grouped.slot_weights),
            num_tokens: self.routing.num_tokens(),
            top_k: self.routing.top_k,
        }
    }

    /// Row and weight of the token's slots that have an output.
    fn outputs_of(&self, token: usize) -> Vec<(usize, f32)> {
        let (rows, k) = (self.grouped.row_of_slot.to_vec(), self.routing.top_k);
        (token * k..(token + 1) * k)
            .filter(|&slot| rows[slot] >= 0 && WIDTHS[self.routing.ids[slot] as usize] > 0)
            .map(|slot| (rows[slot] as usize, self.routing.weights[slot]))
            .collect()
    }

    /// m, in slot order.
    fn combined(&self) -> Vec<f32> {
        let mut m = vec![0f32; self.x.len()];
        for (token, m) in m.chunks_exact_mut(self.hidden).enumerate() {
            for (row, weight) in self.outputs_of(token) {
                for (m, y) in m.iter_mut().zip(&self.y[row * self.hidden..]) {
                    *m = y.mul_add(weight, *m);
                }
            }
        }
        m
    }

    /// y rounded to bf16, and the case with it.
    fn rounded(mut self) -> (Self, Buffer<bf16>) {
        let y: Vec<bf16> = self.y.iter().map(|&v| bf16::from_f32(v)).collect();
        self.y = support::widened(&y);
        (self, Buffer::input("y", &y))
    }
}

/// Token counts, experts a token, hidden sizes: one chunk, part of one, more than a block takes at once.
const SHAPES: [(usize, usize, usize); 6] = [
    (0, 2, 8),
    (1, 1, 8),
    (3, 5, 72),
    (9, 4, 136),
    (2, 3, 2048),
    (2, 2, 2120),
];

#[test]
fn m_is_the_sum_in_slot_order() {
    for (i, (tokens, k, hidden)) in SHAPES.into_iter().enumerate() {
        let case = Case::new(10 + i as u64, hidden, tokens, k, i % 2 == 1);
        let y = Buffer::input("y", &case.y);
        let m = Buffer::<f32>::output("combined", case.x.len());
        Sim::unlike(i).go(moe_combine(MoeCombine {
            experts: case.tables.view(),
            y: ExpertOutputs::F32(view(&y)),
            slots: case.slots(),
            shared: None,
            combined: Some(view_mut(&m)),
            into: CombineInto::Nothing,
            hidden,
        }));
        assert_eq!(m.written().unwrap(), case.combined());
    }
}

#[test]
fn shared_output_and_residual_are_added_last() {
    for (i, (tokens, k, hidden)) in SHAPES.into_iter().enumerate() {
        let (case, y) = Case::new(20 + i as u64, hidden, tokens, k, false).rounded();
        let shared = Buffer::input("shared", &case.shared);
        let logits = Buffer::input("logits", &case.logits);
        let m = case.combined();
        for gated in [false, true] {
            let stream = Buffer::in_out("residual", &case.residual);
            let fresh = Buffer::<f32>::output("out", case.x.len());
            for into in [
                CombineInto::Residual(InOut::Over(view_mut(&stream))),
                CombineInto::Fresh(view_mut(&fresh)),
            ] {
                Sim::unlike(i + 1).go(moe_combine(MoeCombine {
                    experts: case.tables.view(),
                    y: ExpertOutputs::Bf16(view(&y)),
                    slots: case.slots(),
                    shared: Some(SharedOutput {
                        output: view(&shared),
                        logits: gated.then(|| view(&logits)),
                    }),
                    combined: None,
                    into,
                    hidden,
                }));
            }
            let (stream, fresh) = (stream.to_vec(), fresh.written().unwrap());
            for (at, &m) in m.iter().enumerate() {
                let logit = f64::from(case.logits[at / hidden]);
                let gate = if gated {
                    1.0 / (1.0 + (-logit).exp())
                } else {
                    1.0
                };
                let want = f64::from(m) + gate * f64::from(case.shared[at]);
                let tolerance = 8.0 * F32_ROUNDING * (1.0 + want.abs());
                let what = || format!("{hidden} {at} {gated}");
                assert_close(f64::from(fresh[at]), want, tolerance, what);
                assert_eq!(stream[at], case.residual[at] + fresh[at]);
            }
        }
    }
}

fn check_direction(case: &Case, y: ExpertOutputs<'_>, sim: Sim) {
    let hidden = case.hidden;
    let got = direction(
        &case.tables,
        y,
        case.slots(),
        (&case.x, &case.residual),
        sim,
    );
    let m = case.combined();
    assert_eq!(got.combined.written().unwrap(), m);
    check_rows(case, &got);
    let dots = got.token_dots.written().unwrap();
    let rows = case.grouped.row_of_slot.to_vec();
    for (t, dots) in dots.chunks_exact(5).enumerate() {
        let at = t * hidden..(t + 1) * hidden;
        let (x, r) = (&case.x[at.clone()], &case.residual[at.clone()]);
        let after: Vec<f32> = r.iter().zip(&m[at]).map(|(r, m)| r + m).collect();
        let k = case.routing.top_k;
        let weights = (t * k..(t + 1) * k).filter(|&s| rows[s] >= 0);
        let weights: f64 = weights.map(|s| f64::from(case.routing.weights[s])).sum();
        let want = [
            dot(x, x).0,
            dot(r, r).0,
            dot(r, &after).0,
            dot(&after, &after).0,
        ];
        for (got, want) in dots[..4].iter().zip(want) {
            assert_close(*got, want, 1e-12 * hidden as f64, || format!("token {t}"));
        }
        assert_eq!(dots[4], weights);
    }
}

fn check_rows(case: &Case, got: &Direction) {
    let (hidden, k) = (case.hidden, case.routing.top_k);
    let (dots, peaks) = (got.row_dots.to_vec(), got.row_peaks.to_vec());
    let inverse = got.row_inverse.to_vec();
    let rows = case.grouped.row_of_slot.to_vec();
    let mut lost = Vec::new();
    for (slot, &row) in rows.iter().enumerate() {
        let Ok(row) = usize::try_from(row) else {
            continue;
        };
        let x = &case.x[slot / k * hidden..][..hidden];
        let y = if WIDTHS[case.routing.ids[slot] as usize] > 0 {
            case.y[row * hidden..][..hidden].to_vec()
        } else {
            vec![0.0; hidden]
        };
        for (got, (want, size)) in dots[2 * row..].iter().zip([dot(x, &y), dot(&y, &y)]) {
            assert_close(*got, want, 9.0 * F32_ROUNDING * size, || {
                format!("row {row}")
            });
        }
        let peak = y.iter().fold(0f32, |peak, v| peak.max(v.abs()));
        assert_eq!(peaks[row], peak);
        let norm = dots[2 * row + 1].sqrt();
        let want = if norm > 0.0 { 1.0 / (norm + 1e-8) } else { 0.0 };
        assert_eq!(inverse[row], want as f32);
    }
    // Rows of slots that are routed nowhere are left alone.
    let routed = rows.iter().filter(|&&row| row >= 0).count();
    lost.extend(routed..rows.len());
    assert_eq!(got.row_peaks.unwritten(), lost);
    assert_eq!(got.row_inverse.unwritten(), lost);
}

/// Sum of products and sum of their sizes.
fn dot(a: &[f32], b: &[f32]) -> (f64, f64) {
    let terms = || a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
    (terms().sum(), terms().map(f64::abs).sum())
}

#[test]
fn dot_products_of_rows_and_tokens() {
    for (i, (tokens, k, hidden)) in SHAPES.into_iter().enumerate() {
        let case = Case::new(30 + i as u64, hidden, tokens, k, i % 2 == 1);
        let y = Buffer::input("y", &case.y);
        check_direction(&case, ExpertOutputs::F32(view(&y)), Sim::unlike(i));
        let (case, y) = Case::new(40 + i as u64, hidden, tokens, k, i % 2 == 0).rounded();
        check_direction(&case, ExpertOutputs::Bf16(view(&y)), Sim::unlike(i + 1));
    }
}

fn cpu_sums(case: &Case, before: &[ExpertSums]) -> Vec<ExpertSums> {
    let groups = case.routing.groups();
    let mut y = case.y.clone();
    for e in (0..5).filter(|&e| WIDTHS[e] == 0) {
        let rows = groups.rows(e);
        y[rows.start * case.hidden..rows.end * case.hidden].fill(0.0);
    }
    let m = case.combined();
    let context = TokenContext {
        x: &case.x,
        residual: &case.residual,
        combined: &m,
    };
    let mut sums = before.to_vec();
    accumulate_expert_sums(&groups, context, &y, case.hidden, &mut sums).unwrap();
    sums
}

fn assert_same_sums(got: &[ExpertSums], want: &[ExpertSums]) {
    for (e, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!((got.tokens, got.non_finite), (want.tokens, want.non_finite));
        assert_eq!(got.output_peak, want.output_peak);
        // What the sizes of the terms make of the f32 sums of eight products.
        let scale = want.gated_norm + want.norm_sq;
        for (name, got, want, tolerance) in [
            ("gate", got.gate, want.gate, 1e-12 * want.gate),
            (
                "share",
                got.normalised_gate,
                want.normalised_gate,
                1e-12 * want.gate,
            ),
            ("norm", got.norm, want.norm, 1e-6 * want.norm),
            ("square", got.norm_sq, want.norm_sq, 1e-6 * want.norm_sq),
            (
                "gated",
                got.gated_norm,
                want.gated_norm,
                1e-6 * want.gated_norm,
            ),
            ("direction", got.direction, want.direction, 1e-6 * scale),
            (
                "residual",
                got.residual_direction,
                want.residual_direction,
                1e-6 * want.residual_direction,
            ),
        ] {
            assert_close(got, want, tolerance, || format!("{name} of expert {e}"));
        }
    }
}

#[test]
fn sums_of_experts_are_those_of_the_cpu() {
    // One expert with more rows than threads, some with none.
    let mut crowded = Case::new(50, 16, 300, 1, false);
    crowded.routing = Routing::all_to(5, 300, 3);
    crowded.grouped = Grouped::new(&crowded.routing, Sim::unlike(1));
    let shapes = SHAPES.into_iter().enumerate();
    let cases = shapes.map(|(i, (t, k, h))| Case::new(51 + i as u64, h, t, k, false));
    for (i, case) in cases.chain([crowded]).enumerate() {
        let sim = Sim::unlike(i);
        let before: Vec<ExpertSums> = (0..5)
            .map(|e| ExpertSums {
                tokens: 10 + e,
                direction: 0.5,
                output_peak: 0.25,
                ..ExpertSums::default()
            })
            .collect();
        let y = Buffer::input("y", &case.y);
        let context = (&case.x[..], &case.residual[..]);
        let outputs = ExpertOutputs::F32(view(&y));
        let made = direction(&case.tables, outputs, case.slots(), context, sim);
        let got = expert_sums_of(&case.grouped, &made, &before, sim);
        assert_same_sums(&got, &cpu_sums(&case, &before));
    }
}

#[test]
fn equal_bits_whatever_the_schedule() {
    let case = Case::new(70, 72, 40, 3, false);
    let y = Buffer::input("y", &case.y);
    let run = |sim: Sim| {
        let context = (&case.x[..], &case.residual[..]);
        let outputs = ExpertOutputs::F32(view(&y));
        let made = direction(&case.tables, outputs, case.slots(), context, sim);
        let sums = expert_sums_of(&case.grouped, &made, &[ExpertSums::default(); 5], sim);
        (bytes_of(&made.row_dots), bytes_of(&made.token_dots), sums)
    };
    let first = run(Sim::unlike(0));
    for i in 1..4 {
        assert!(run(Sim::unlike(i)) == first);
    }
}

#[test]
fn bad_outputs_count_and_stay_with_their_token() {
    let clean = Case::new(80, 72, 12, 2, false);
    let mut dirty = Case::new(80, 72, 12, 2, false);
    let rows: Vec<(usize, f32)> = dirty.outputs_of(3);
    dirty.y[rows[0].0 * 72 + 5] = f32::NAN;
    let infinite = dirty.outputs_of(7)[0].0;
    dirty.y[infinite * 72 + 70] = f32::INFINITY;
    let sim = Sim::new(Schedule::Reversed);
    let run = |case: &Case| {
        let y = Buffer::input("y", &case.y);
        let context = (&case.x[..], &case.residual[..]);
        let made = direction(
            &case.tables,
            ExpertOutputs::F32(view(&y)),
            case.slots(),
            context,
            sim,
        );
        let sums = expert_sums_of(&case.grouped, &made, &[ExpertSums::default(); 5], sim);
        (made, sums)
    };
    let ((want, _), (got, sums)) = (run(&clean), run(&dirty));
    assert_same_sums(&sums, &cpu_sums(&dirty, &[ExpertSums::default(); 5]));
    assert_eq!(sums.iter().map(|s| s.non_finite).sum::<u64>(), 2);
    assert!(got.row_peaks.to_vec()[rows[0].0].is_nan());
    assert_eq!(got.row_inverse.to_vec()[rows[0].0], 0.0);
    let (want, got) = (want.combined.to_vec(), got.combined.to_vec());
    for (at, (want, got)) in want.iter().zip(&got).enumerate() {
        if ![3, 7].contains(&(at / 72)) {
            assert_eq!(want, got);
        }
    }
}
