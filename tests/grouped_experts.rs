//! The grouped forward pass and the scoring sums against an f64 computation from the definitions
//! (`docs/methods.md` sections 1 and 2), at widths and token counts that straddle every tile boundary.

use half::bf16;
use tenp_kernels::cpu::direction::{ExpertSums, TokenContext, accumulate_expert_sums};
use tenp_kernels::cpu::moe::{ExpertActivations, ExpertWeights, combine, expert_forward};
use tenp_kernels::cpu::neuron::{NeuronSums, accumulate_neuron_sums, neuron_weight_norms};
use tenp_kernels::{Compute, ExpertGroups, MatrixView, RaggedLayout};

fn value(seed: usize, i: usize) -> f32 {
    let x = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ (seed as u64).wrapping_mul(0xd1b5_4a32_d192_ed03);
    let x = (x ^ (x >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
}

struct Expert {
    width: usize,
    gate: Vec<bf16>,
    up: Vec<bf16>,
    down: Vec<bf16>,
}

impl Expert {
    fn random(seed: usize, width: usize, hidden: usize) -> Self {
        let scale = 1.0 / (hidden as f32).sqrt();
        let make = |s: usize, n: usize| {
            (0..n)
                .map(|i| bf16::from_f32(value(s, i) * scale))
                .collect()
        };
        Self {
            width,
            gate: make(seed * 3, width * hidden),
            up: make(seed * 3 + 1, width * hidden),
            down: make(seed * 3 + 2, hidden * width),
        }
    }

    fn view(&self, hidden: usize) -> ExpertWeights<'_> {
        ExpertWeights {
            gate: MatrixView::from_bf16(self.width, hidden, &self.gate).unwrap(),
            up: MatrixView::from_bf16(self.width, hidden, &self.up).unwrap(),
            down: MatrixView::from_bf16(hidden, self.width, &self.down).unwrap(),
        }
    }

    /// (h, y) of one token in f64.
    fn reference(&self, x: &[f32]) -> (Vec<f64>, Vec<f64>) {
        let hidden = x.len();
        let dot = |row: &[bf16]| -> f64 {
            row.iter()
                .zip(x)
                .map(|(w, x)| w.to_f64() * f64::from(*x))
                .sum()
        };
        let h: Vec<f64> = (0..self.width)
            .map(|j| {
                let gate = dot(&self.gate[j * hidden..(j + 1) * hidden]);
                gate / (1.0 + (-gate).exp()) * dot(&self.up[j * hidden..(j + 1) * hidden])
            })
            .collect();
        let y = (0..hidden).map(|r| {
            (0..self.width)
                .map(|j| self.down[r * self.width + j].to_f64() * h[j])
                .sum()
        });
        let y: Vec<f64> = y.collect();
        (h, y)
    }
}

struct Case {
    hidden: usize,
    experts: Vec<Expert>,
    top_k: usize,
    x: Vec<f32>,
    ids: Vec<u32>,
    gates: Vec<f32>,
}

impl Case {
    /// `route(token, slot)` is the expert of a slot.
    fn new(
        hidden: usize,
        widths: &[usize],
        tokens: usize,
        top_k: usize,
        route: impl Fn(usize, usize) -> u32,
    ) -> Self {
        Self {
            hidden,
            experts: widths
                .iter()
                .enumerate()
                .map(|(e, &w)| Expert::random(e + 1, w, hidden))
                .collect(),
            top_k,
            x: (0..tokens * hidden).map(|i| value(777, i)).collect(),
            ids: (0..tokens * top_k)
                .map(|i| route(i / top_k, i % top_k))
                .collect(),
            gates: (0..tokens * top_k)
                .map(|i| 0.1 + value(5, i).abs())
                .collect(),
        }
    }

    fn groups(&self) -> ExpertGroups {
        ExpertGroups::new(self.experts.len(), self.top_k, &self.ids, &self.gates).unwrap()
    }

    fn views(&self) -> Vec<ExpertWeights<'_>> {
        self.experts.iter().map(|e| e.view(self.hidden)).collect()
    }
}

fn cases() -> Vec<Case> {
    let awkward = [0usize, 1, 7, 8, 63, 64, 65, 127, 128, 129];
    vec![
        Case::new(48, &awkward, 61, 2, |t, s| ((t * 3 + s * 5) % 10) as u32),
        // One expert has one token, one has none, the rest share.
        Case::new(33, &[16, 17, 40, 31], 30, 1, |t, _| {
            if t == 7 { 0 } else { 1 + (t % 2) as u32 }
        }),
        // Every token on one expert.
        Case::new(64, &[96, 96, 20], 29, 1, |_, _| 2),
        Case::new(70, &[1408], 15, 1, |_, _| 0),
    ]
}

fn relative(got: impl Iterator<Item = f64>, want: impl Iterator<Item = f64>) -> f64 {
    let (mut error, mut norm) = (0f64, 1e-300);
    for (g, w) in got.zip(want) {
        error += (g - w).powi(2);
        norm += w * w;
    }
    (error / norm).sqrt()
}

#[test]
fn activations_can_be_read_by_neuron() {
    let (hidden, widths) = (20, [0, 1, 7, 8, 31, 32, 33, 65]);
    let case = Case::new(hidden, &widths, 61, 2, |token, slot| {
        ((token * 5 + slot * 3) % 8) as u32
    });
    let groups = case.groups();
    let views: Vec<_> = case.experts.iter().map(|e| e.view(hidden)).collect();
    for (compute, tolerance) in [(Compute::F32, 1e-5), (Compute::Bf16, 3e-2)] {
        let mut activations = ExpertActivations::default();
        expert_forward(compute, &views, &groups, &case.x, &mut activations).unwrap();
        for (e, expert) in case.experts.iter().enumerate() {
            let rows = groups.rows(e);
            let h = activations.transposed_h(&groups, e, expert.width);
            assert_eq!(h.len(), expert.width * rows.len());
            for (r, &token) in groups.token_ids()[rows.clone()].iter().enumerate() {
                let x = &case.x[token as usize * hidden..][..hidden];
                for (j, want) in expert.reference(x).0.into_iter().enumerate() {
                    let got = f64::from(h[j * rows.len() + r]);
                    assert!(
                        (got - want).abs() <= tolerance,
                        "expert {e}, row {r}, neuron {j}"
                    );
                }
            }
        }
    }
}

#[test]
fn outputs_and_sums_match_f64() {
    for case in cases() {
        let (groups, views, hidden) = (case.groups(), case.views(), case.hidden);
        let tokens = groups.num_tokens();
        let residual: Vec<f32> = (0..tokens * hidden).map(|i| value(31, i)).collect();
        for (compute, tolerance) in [(Compute::F32, 2e-6), (Compute::Bf16, 1.5e-2)] {
            let mut a = ExpertActivations::default();
            a.keep_packed_outputs(true);
            expert_forward(compute, &views, &groups, &case.x, &mut a).unwrap();
            let mut combined = vec![f32::NAN; tokens * hidden];
            combine(&groups, a.outputs(), hidden, &mut combined).unwrap();
            let mut expert_sums = vec![ExpertSums::default(); views.len()];
            let context = TokenContext {
                x: &case.x,
                residual: &residual,
                combined: &combined,
            };
            let norms =
                accumulate_expert_sums(&groups, context, a.outputs(), hidden, &mut expert_sums)
                    .unwrap();
            let layout =
                RaggedLayout::new(views.iter().map(ExpertWeights::width).collect()).unwrap();
            let mut sums = NeuronSums::new(layout.clone());
            accumulate_neuron_sums(&views, &groups, &a, &norms, &mut sums).unwrap();

            let mut want_combined = vec![0f64; tokens * hidden];
            for (e, expert) in case.experts.iter().enumerate() {
                let mut contribution = vec![0f64; expert.width];
                let mut second = vec![0f64; expert.width];
                let mut energy = vec![0f64; expert.width];
                let (mut norm_sum, mut direction) = (0f64, 0f64);
                for row in groups.rows(e) {
                    let token = groups.token_ids()[row] as usize;
                    let x = &case.x[token * hidden..(token + 1) * hidden];
                    let (h, y) = expert.reference(x);
                    let got = &a.outputs()[row * hidden..(row + 1) * hidden];
                    if expert.width > 0 {
                        let r = relative(got.iter().map(|v| f64::from(*v)), y.iter().copied());
                        assert!(r < tolerance, "y of expert {e}: {r}");
                    } else {
                        assert!(got.iter().all(|&v| v == 0.0));
                    }
                    let gate = f64::from(groups.weights()[row]);
                    let norm = y.iter().map(|v| v * v).sum::<f64>().sqrt();
                    let xx: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
                    let xy: f64 = x.iter().zip(&y).map(|(x, y)| f64::from(*x) * y).sum();
                    norm_sum += norm;
                    if norm > 0.0 {
                        direction += gate * norm * (1.0 - xy / (xx.sqrt() * norm));
                    }
                    for j in 0..expert.width {
                        let projected: f64 = (0..hidden)
                            .map(|r| expert.down[r * expert.width + j].to_f64() * y[r])
                            .sum();
                        contribution[j] += h[j] * projected / (norm + 1e-8);
                        second[j] += h[j] * h[j];
                        energy[j] += (gate * h[j]).powi(2);
                    }
                    for (c, y) in want_combined[token * hidden..].iter_mut().zip(&y) {
                        *c += gate * y;
                    }
                }
                let range = layout.range(e);
                let pairs = [
                    (&sums.contribution[range.clone()], &contribution),
                    (&sums.second_moment[range.clone()], &second),
                    (&sums.gated_energy[range.clone()], &energy),
                ];
                for (k, (got, want)) in pairs.into_iter().enumerate() {
                    let r = relative(got.iter().copied(), want.iter().copied());
                    assert!(
                        groups.rows(e).is_empty() || r < tolerance,
                        "sum {k} of expert {e}: {r}"
                    );
                    assert!(!groups.rows(e).is_empty() || got.iter().all(|&v| v == 0.0));
                }
                let s = &expert_sums[e];
                assert_eq!(s.tokens as usize, groups.rows(e).len());
                assert!((s.norm - norm_sum).abs() <= tolerance * norm_sum);
                assert!((s.direction - direction).abs() <= tolerance * direction.abs());
                // The contributions of all neurons add up to the norm of the output.
                let total: f64 = sums.contribution[range].iter().sum();
                assert!(
                    (total - s.norm).abs() <= tolerance * s.norm + 1e-12,
                    "identity of expert {e}"
                );
            }
            let r = relative(
                combined.iter().map(|v| f64::from(*v)),
                want_combined.into_iter(),
            );
            assert!(r < tolerance, "combined: {r}");
        }
    }
}

#[test]
fn scaling_flipping_and_permuting_neurons_leave_scores_alone() {
    let case = Case::new(40, &[33], 25, 1, |_, _| 0);
    let groups = case.groups();
    let run = |expert: &Expert| {
        let views = vec![expert.view(40)];
        let mut a = ExpertActivations::default();
        a.keep_packed_outputs(true);
        expert_forward(Compute::F32, &views, &groups, &case.x, &mut a).unwrap();
        let context = TokenContext {
            x: &case.x,
            residual: &case.x,
            combined: &case.x,
        };
        let mut expert_sums = vec![ExpertSums::default()];
        let norms =
            accumulate_expert_sums(&groups, context, a.outputs(), 40, &mut expert_sums).unwrap();
        let mut sums = NeuronSums::new(RaggedLayout::new(vec![33]).unwrap());
        accumulate_neuron_sums(&views, &groups, &a, &norms, &mut sums).unwrap();
        sums.contribution
    };
    let plain = run(&case.experts[0]);
    let close = |a: &[f64], b: &[f64]| {
        a.iter()
            .zip(b)
            .all(|(a, b)| (a - b).abs() < 1e-5 * (1.0 + b.abs()))
    };

    // Powers of two scale exactly in bf16; −1 flips up row and down column together.
    for factor in [4.0f32, -1.0, -0.5] {
        let mut scaled = Expert::random(1, 33, 40);
        for v in &mut scaled.up[5 * 40..6 * 40] {
            *v = bf16::from_f32(v.to_f32() * factor);
        }
        for row in 0..40 {
            let v = &mut scaled.down[row * 33 + 5];
            *v = bf16::from_f32(v.to_f32() / factor);
        }
        assert!(close(&run(&scaled), &plain), "factor {factor}");
    }

    let mut reversed = Expert::random(1, 33, 40);
    for rows in [&mut reversed.gate, &mut reversed.up] {
        let copy = rows.clone();
        for j in 0..33 {
            rows[j * 40..(j + 1) * 40].copy_from_slice(&copy[(32 - j) * 40..(33 - j) * 40]);
        }
    }
    for row in reversed.down.chunks_mut(33) {
        row.reverse();
    }
    let mut scores = run(&reversed);
    scores.reverse();
    assert!(close(&scores, &plain));
}

#[test]
fn rows_do_not_depend_on_the_batch_and_padding_changes_no_bit() {
    let hidden = 50;
    let case = Case::new(hidden, &[45, 20], 40, 1, |t, _| (t % 2) as u32);
    // The same experts with zero neurons behind the kept ones.
    let padded: Vec<Expert> = case
        .experts
        .iter()
        .map(|e| {
            let mut p = Expert {
                width: 64,
                gate: e.gate.clone(),
                up: e.up.clone(),
                down: Vec::new(),
            };
            p.gate.resize(64 * hidden, bf16::ZERO);
            p.up.resize(64 * hidden, bf16::ZERO);
            for row in e.down.chunks(e.width) {
                p.down.extend_from_slice(row);
                p.down.resize(p.down.len() + 64 - e.width, bf16::ZERO);
            }
            p
        })
        .collect();
    let padded: Vec<ExpertWeights<'_>> = padded.iter().map(|e| e.view(hidden)).collect();
    let groups = case.groups();
    for compute in [Compute::F32, Compute::Bf16] {
        let (mut a, mut b) = (ExpertActivations::default(), ExpertActivations::default());
        expert_forward(compute, &case.views(), &groups, &case.x, &mut a).unwrap();
        expert_forward(compute, &padded, &groups, &case.x, &mut b).unwrap();
        assert_eq!(a.outputs(), b.outputs());

        let one = ExpertGroups::new(2, 1, &case.ids[9..10], &case.gates[9..10]).unwrap();
        let row = (0..groups.num_rows())
            .find(|&r| groups.token_ids()[r] == 9)
            .unwrap();
        expert_forward(
            compute,
            &case.views(),
            &one,
            &case.x[9 * hidden..10 * hidden],
            &mut b,
        )
        .unwrap();
        assert_eq!(b.outputs(), &a.outputs()[row * hidden..(row + 1) * hidden]);
    }
}

#[test]
fn non_finite_outputs_are_counted_and_stay_in_their_expert() {
    let mut case = Case::new(32, &[24, 24], 20, 1, |t, _| (t % 2) as u32);
    case.experts[1].gate[3] = bf16::NAN;
    let (groups, views) = (case.groups(), case.views());
    let mut a = ExpertActivations::default();
    a.keep_packed_outputs(true);
    expert_forward(Compute::F32, &views, &groups, &case.x, &mut a).unwrap();
    let context = TokenContext {
        x: &case.x,
        residual: &case.x,
        combined: &case.x,
    };
    let mut expert_sums = vec![ExpertSums::default(); 2];
    let norms =
        accumulate_expert_sums(&groups, context, a.outputs(), 32, &mut expert_sums).unwrap();
    assert_eq!(
        (expert_sums[0].non_finite, expert_sums[1].non_finite),
        (0, 10)
    );
    let layout = RaggedLayout::new(vec![24, 24]).unwrap();
    let mut sums = NeuronSums::new(layout);
    accumulate_neuron_sums(&views, &groups, &a, &norms, &mut sums).unwrap();
    assert!(sums.contribution.iter().all(|v| v.is_finite()));
    assert!(sums.contribution[24..].iter().all(|&v| v == 0.0));
    assert!(sums.second_moment[..24].iter().all(|v| v.is_finite()));
}

#[test]
fn weight_norms_match_their_definition() {
    let expert = Expert::random(4, 19, 23);
    let (all, down) = neuron_weight_norms(&expert.view(23)).unwrap();
    for j in 0..19 {
        let sq = |v: &[bf16]| v.iter().map(|v| v.to_f64().powi(2)).sum::<f64>();
        let w: f64 = (0..23)
            .map(|r| expert.down[r * 19 + j].to_f64().powi(2))
            .sum();
        let want =
            sq(&expert.gate[j * 23..(j + 1) * 23]) + sq(&expert.up[j * 23..(j + 1) * 23]) + w;
        assert!((down[j] - w).abs() < 1e-12 && (all[j] - want).abs() < 1e-12);
    }
}

#[test]
fn misfits_are_refused_before_anything_is_computed() {
    let case = Case::new(16, &[8, 8], 4, 1, |_, _| 0);
    let views = case.views();
    let groups = ExpertGroups::new(3, 1, &[0, 1, 2, 0], &[1.0; 4]).unwrap();
    let mut a = ExpertActivations::default();
    a.keep_packed_outputs(true);
    assert!(expert_forward(Compute::F32, &views, &groups, &case.x, &mut a).is_err());
    assert!(expert_forward(Compute::F32, &views, &case.groups(), &case.x[1..], &mut a).is_err());
    assert!(ExpertGroups::new(3, 1, &[0, 3], &[1.0; 2]).is_err());
    assert!(ExpertGroups::new(3, 2, &[0, 1, 2], &[1.0; 3]).is_err());
}
