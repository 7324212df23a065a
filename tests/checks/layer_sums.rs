//! A whole MoE layer with its scoring, against the CPU at bf16; the combine's other forms.

use half::bf16;
use tenp_kernels::cpu::direction::{ExpertSums, TokenContext, accumulate_expert_sums};
use tenp_kernels::cpu::moe::{ExpertActivations, combine, expert_forward};
use tenp_kernels::cpu::neuron::{NeuronSums, accumulate_neuron_sums};
use tenp_kernels::device::expert_sums::{self as wrapper, expert_sums, to_cpu_sums};
use tenp_kernels::device::moe_combine::{
    CombineInto, ExpertOutputs, MoeCombine, SharedOutput, moe_combine,
};
use tenp_kernels::device::moe_direction::{MoeDirection, ROW_DOTS, TOKEN_DOTS, moe_direction};
use tenp_kernels::device::{Backend, InOut, Memory as _, Product, Tile};
use tenp_kernels::params::{
    TENP_NUM_ACTIVATION_SUMS, TENP_NUM_CONTRIBUTION_SUMS, TENP_NUM_EXPERT_SUMS,
};
use tenp_kernels::{Compute, RaggedLayout};

use super::batch::Batch;
use super::products::{contribution, down, gate_up, with_outputs};
use super::{F32_ROUNDING, On, Size, assert_close, distance, f32_values, rng, widened};

/// Statistics of a layer over one batch; tables of neurons without padding.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    pub experts: Vec<ExpertSums>,
    /// Σ |h|, Σ (g h)², its maximum, Σ h, Σ h²; contribution and its absolute value.
    pub neurons: Vec<Vec<f64>>,
    pub combined: Vec<f32>,
}

/// Direction and the experts' sums of y.
fn direction<B: Backend>(
    batch: &Batch<'_, B>,
    y: ExpertOutputs<'_>,
    residual: &[f32],
) -> (B::Buffer<f32>, B::Buffer<f32>, Vec<ExpertSums>) {
    let (on, tokens, rows) = (batch.on, batch.num_tokens(), batch.num_rows());
    let experts = batch.layer.num_experts();
    let (x, residual) = (on.input(&widened(&batch.x)), on.input(residual));
    let mut combined = on.output::<f32>(tokens * batch.layer.hidden);
    let mut row_dots = on.output::<f64>(ROW_DOTS * rows);
    let mut row_peaks = on.output::<f32>(rows);
    let mut row_inverse = on.output::<f32>(rows);
    let mut token_dots = on.output::<f64>(TOKEN_DOTS * tokens);
    on.go(moe_direction(MoeDirection {
        experts: batch.tables(),
        y,
        slots: batch.slots(),
        x: x.view(),
        residual: residual.view(),
        combined: combined.view_mut(),
        row_dots: row_dots.view_mut(),
        row_peaks: row_peaks.view_mut(),
        row_inverse: row_inverse.view_mut(),
        token_dots: token_dots.view_mut(),
        hidden: batch.layer.hidden,
    }));
    let mut sums = on.filled(0f64, TENP_NUM_EXPERT_SUMS as usize * experts);
    let (mut counts, mut non_finite) = (on.filled(0i64, experts), on.filled(0i64, experts));
    on.go(expert_sums(wrapper::ExpertSums {
        group_offsets: batch.grouped.group_offsets.view(),
        token_of_row: batch.grouped.token_of_row.view(),
        row_weights: batch.grouped.row_weights.view(),
        row_dots: row_dots.view(),
        row_peaks: row_peaks.view(),
        token_dots: token_dots.view(),
        sums: sums.view_mut(),
        tokens: counts.view_mut(),
        non_finite: non_finite.view_mut(),
        num_rows: rows,
        num_tokens: tokens,
        num_experts: experts,
    }));
    let tables = (
        on.get(sums.view()),
        on.get(counts.view()),
        on.get(non_finite.view()),
    );
    let sums = to_cpu_sums(&tables.0, &tables.1, &tables.2).expect("whole tables");
    (combined, row_inverse, sums)
}

/// All of it on the backend.
pub fn scored<B: Backend>(batch: &Batch<'_, B>, residual: &[f32], tile: Tile) -> Scored {
    let (h, partials) = gate_up(batch, Product::gate_up_stats(tile));
    let outputs = down(batch, &h, Product::down(tile));
    let y = ExpertOutputs::F32(outputs.y_f32.view());
    let (combined, row_inverse, experts) = direction(batch, y, residual);
    let projected = with_outputs(batch, &outputs.y_bf16);
    let operands = (&h, projected, &row_inverse);
    let contributions = contribution(batch, operands, Product::contribution(tile));
    let mut sums = partials
        .expect("the entry makes them")
        .accumulated(batch, TENP_NUM_ACTIVATION_SUMS);
    sums.extend(contributions.accumulated(batch, TENP_NUM_CONTRIBUTION_SUMS));
    let layout = &batch.layer.layout;
    let tables = sums.chunks_exact(layout.total());
    Scored {
        experts,
        neurons: tables
            .map(|t| layout.unpad(t).expect("a whole table"))
            .collect(),
        combined: batch.on.get(combined.view()),
    }
}

fn on_cpu<B: Backend>(batch: &Batch<'_, B>, residual: &[f32]) -> Scored {
    let (x, hidden) = (widened(&batch.x), batch.layer.hidden);
    let (views, groups) = (batch.layer.views(), &batch.groups);
    let mut activations = ExpertActivations::default();
    activations.keep_packed_outputs(true);
    expert_forward(Compute::Bf16, &views, groups, &x, &mut activations).expect("shapes fit");
    let y = activations.outputs();
    let mut combined = vec![0f32; x.len()];
    combine(groups, y, hidden, &mut combined).expect("shapes fit");
    let context = TokenContext {
        x: &x,
        residual,
        combined: &combined,
    };
    let mut experts = vec![ExpertSums::default(); views.len()];
    let norms =
        accumulate_expert_sums(groups, context, y, hidden, &mut experts).expect("shapes fit");
    let ragged = RaggedLayout::new(batch.layer.widths.clone()).expect("small widths");
    let mut sums = NeuronSums::new(ragged);
    accumulate_neuron_sums(&views, groups, &activations, &norms, &mut sums).expect("shapes fit");
    let neurons = vec![
        sums.activation,
        sums.gated_energy,
        sums.gated_peak,
        sums.mean,
        sums.second_moment,
        sums.contribution,
        sums.contribution_abs,
    ];
    Scored {
        experts,
        neurons,
        combined,
    }
}

fn compare(got: &Scored, want: &Scored) {
    let double = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    let off = distance(&double(&got.combined), &double(&want.combined));
    assert!(off < 1e-3, "combined: {off}");
    for (s, (got, want)) in got.neurons.iter().zip(&want.neurons).enumerate() {
        let off = distance(got, want);
        assert!(off < 3e-3, "sum {s} of the neurons: {off}");
    }
    for (e, (got, want)) in got.experts.iter().zip(&want.experts).enumerate() {
        assert_eq!((got.tokens, got.non_finite), (want.tokens, want.non_finite));
        for (name, got, want) in [
            ("gate", got.gate, want.gate),
            ("share", got.normalised_gate, want.normalised_gate),
            ("norm", got.norm, want.norm),
            ("square", got.norm_sq, want.norm_sq),
            ("gated", got.gated_norm, want.gated_norm),
            ("direction", got.direction, want.direction),
            ("residual", got.residual_direction, want.residual_direction),
            ("peak", got.output_peak, want.output_peak),
        ] {
            assert_close(got, want, 3e-3 * want, || format!("{name} of expert {e}"));
        }
    }
}

pub fn a_scored_layer_is_that_of_the_cpu<B: Backend>(on: On<'_, B>, size: Size) {
    let batches = match size {
        Size::Small => vec![Batch::awkward(on, 31, 72, 90)],
        Size::Real => vec![Batch::real(on, 31, 1500), Batch::awkward(on, 32, 4096, 200)],
    };
    for batch in batches {
        let residual = f32_values(&mut rng(99), batch.x.len(), 2.0);
        let want = on_cpu(&batch, &residual);
        for tile in super::products::scoring_tiles(on) {
            compare(&scored(&batch, &residual, tile), &want);
        }
    }
}

/// residual + (m + sigmoid(logit) · shared), with y in both precisions, in place and apart.
pub fn shared_outputs_and_residuals_are_added<B: Backend>(on: On<'_, B>, size: Size) {
    let (hidden, tokens) = match size {
        Size::Small => (72, 9),
        Size::Real => (7168, 500),
    };
    let batch = Batch::awkward(on, 41, hidden, tokens);
    let mut rng = rng(42);
    let y: Vec<bf16> = super::bf16_values(&mut rng, batch.num_rows() * hidden, 1.0);
    let mut values = || f32_values(&mut rng, tokens * hidden, 1.0);
    let (shared, residual) = (values(), values());
    let logits = f32_values(&mut super::rng(43), tokens, 3.0);
    let (y_bf16, y_f32) = (on.input(&y), on.input(&widened(&y)));
    let (shared_there, logits_there) = (on.input(&shared), on.input(&logits));
    let mut stream = on.input(&residual);
    let mut combined = on.output::<f32>(tokens * hidden);
    let mut run = |y: ExpertOutputs<'_>, combined: &mut B::Buffer<f32>| {
        on.go(moe_combine(MoeCombine {
            experts: batch.tables(),
            y,
            slots: batch.slots(),
            shared: Some(SharedOutput {
                output: shared_there.view(),
                logits: Some(logits_there.view()),
            }),
            combined: Some(combined.view_mut()),
            into: CombineInto::Residual(InOut::Over(stream.view_mut())),
            hidden,
        }));
        on.get(stream.view())
    };
    let first = run(ExpertOutputs::Bf16(y_bf16.view()), &mut combined);
    let m = on.get(combined.view());
    let slots = on.get(batch.grouped.row_of_slot.view());
    let top_k = batch.routing.top_k;
    for t in 0..tokens {
        let gate = 1.0 / (1.0 + (-f64::from(logits[t])).exp());
        for c in super::sampled(hidden, 50) {
            let (mut want, mut size) = (0.0, 1.0);
            for slot in t * top_k..(t + 1) * top_k {
                if batch.layer.widths[batch.routing.ids[slot] as usize] > 0 {
                    let term = f64::from(batch.routing.weights[slot])
                        * y[slots[slot] as usize * hidden + c].to_f64();
                    want += term;
                    size += term.abs();
                }
            }
            let at = t * hidden + c;
            let tolerance = 16.0 * F32_ROUNDING * size;
            assert_close(f64::from(m[at]), want, tolerance, || {
                format!("m of {t}, {c}")
            });
            let want = f64::from(residual[at]) + want + gate * f64::from(shared[at]);
            let tolerance = tolerance + 64.0 * F32_ROUNDING * 3.0;
            assert_close(f64::from(first[at]), want, tolerance, || {
                format!("{t}, {c}")
            });
        }
    }
    run(ExpertOutputs::F32(y_f32.view()), &mut combined);
    assert_eq!(on.get(combined.view()), m, "the same numbers, not rounded");
}
