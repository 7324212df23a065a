//! A whole layer through every kernel of the scoring pass, against the CPU at bf16.

mod support;

use simt::Buffer;
use support::moe::Batch;
use support::products::{Partials, contribution, down, gate_up};
use support::sums::{direction, expert_sums_of};
use support::{Sim, assert_close, f32_values, rng, view, view_mut, widened};
use tenp_kernels::Compute;
use tenp_kernels::cpu::direction::{ExpertSums, TokenContext, accumulate_expert_sums};
use tenp_kernels::cpu::moe::{ExpertActivations, combine, expert_forward};
use tenp_kernels::cpu::neuron::{NeuronSums, accumulate_neuron_sums};
use tenp_kernels::device::moe_accumulate::{AccumulatePartials, accumulate_partials};
use tenp_kernels::device::moe_combine::{ExpertOutputs, Slots};
use tenp_kernels::device::{Product, Tile};

/// Statistics of a layer over one batch; tables of neurons without padding.
struct Statistics {
    experts: Vec<ExpertSums>,
    /// Sum |h|, sum (g h)², its maximum, sum h, sum h²; contribution and its absolute value.
    neurons: Vec<Vec<f64>>,
    combined: Vec<f32>,
}

fn running_sums(batch: &Batch, partials: &Partials, count: usize, sim: Sim) -> Vec<Vec<f64>> {
    let layout = &batch.layer.layout;
    let sums = Buffer::in_out("sums", &vec![0f64; count * layout.total()]);
    sim.go(accumulate_partials(AccumulatePartials {
        product: partials.tiles.product,
        experts: batch.tables.view(),
        partials: view(&partials.values),
        offsets: view(&partials.tiles.partial_offsets),
        stride: partials.stride,
        group_offsets: view(&batch.grouped.group_offsets),
        sums: view_mut(&sums),
    }));
    let sums = sums.to_vec();
    let tables = sums.chunks_exact(layout.total());
    tables.map(|t| layout.unpad(t).unwrap()).collect()
}

fn on_device(batch: &Batch, residual: &[f32], tile: Tile, sim: Sim) -> Statistics {
    let (h, partials) = gate_up(batch, Product::gate_up_stats(tile), sim);
    let outputs = down(batch, &h, Product::down(tile), sim);
    let slots = Slots {
        row_of_slot: view(&batch.grouped.row_of_slot),
        expert_ids: view(&batch.grouped.expert_ids),
        weights: view(&batch.grouped.slot_weights),
        num_tokens: batch.routing.num_tokens(),
        top_k: batch.routing.top_k,
    };
    let x = widened(&batch.x);
    let y = ExpertOutputs::F32(view(&outputs.y_f32));
    let made = direction(&batch.tables, y, slots, (&x, residual), sim);
    let zeros = vec![ExpertSums::default(); batch.layer.num_experts()];
    let operands = (&h, &outputs.y_bf16, &made.row_inverse);
    let contributions = contribution(batch, operands, Product::contribution(tile), sim);
    let mut neurons = running_sums(batch, &partials.expect("statistics"), 5, sim);
    neurons.extend(running_sums(batch, &contributions, 2, sim));
    Statistics {
        experts: expert_sums_of(&batch.grouped, &made, &zeros, sim),
        neurons,
        combined: made.combined.written().unwrap(),
    }
}

fn on_cpu(batch: &Batch, residual: &[f32]) -> Statistics {
    let (x, hidden) = (widened(&batch.x), batch.layer.hidden);
    let (views, groups) = (batch.layer.views(), &batch.groups);
    let mut activations = ExpertActivations::default();
    activations.keep_packed_outputs(true);
    expert_forward(Compute::Bf16, &views, groups, &x, &mut activations).unwrap();
    let y = activations.outputs();
    let mut combined = vec![0f32; x.len()];
    combine(groups, y, hidden, &mut combined).unwrap();
    let context = TokenContext {
        x: &x,
        residual,
        combined: &combined,
    };
    let mut experts = vec![ExpertSums::default(); views.len()];
    let norms = accumulate_expert_sums(groups, context, y, hidden, &mut experts).unwrap();
    let ragged = tenp_kernels::RaggedLayout::new(batch.layer.widths.clone()).unwrap();
    let mut sums = NeuronSums::new(ragged);
    accumulate_neuron_sums(&views, groups, &activations, &norms, &mut sums).unwrap();
    let NeuronSums {
        activation,
        gated_energy,
        gated_peak,
        mean,
        second_moment,
        contribution,
        contribution_abs,
        ..
    } = sums;
    Statistics {
        experts,
        neurons: vec![
            activation,
            gated_energy,
            gated_peak,
            mean,
            second_moment,
            contribution,
            contribution_abs,
        ],
        combined,
    }
}

/// Difference of two tables over the second's size, in the Euclidean norm.
fn distance(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let off = square(&mut got.iter().zip(want).map(|(a, b)| a - b));
    off / square(&mut want.iter().copied())
}

fn check(batch: &Batch, tile: Tile, sim: Sim) {
    let residual = f32_values(&mut rng(99), batch.x.len(), 2.0);
    let (got, want) = (
        on_device(batch, &residual, tile, sim),
        on_cpu(batch, &residual),
    );
    let double = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    assert!(distance(&double(&got.combined), &double(&want.combined)) < 1e-3);
    for (s, (got, want)) in got.neurons.iter().zip(&want.neurons).enumerate() {
        assert!(
            distance(got, want) < 3e-3,
            "sum {s}: {}",
            distance(got, want)
        );
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

#[test]
fn statistics_are_those_of_the_cpu() {
    check(&Batch::awkward(1, 72, 90), Tile::N64, Sim::unlike(1));
    check(&Batch::awkward(2, 136, 70), Tile::N128, Sim::unlike(2));
    check(&Batch::wide(3, 32, 24), Tile::N64, Sim::unlike(3));
}

#[test]
fn permuted_tokens_give_the_same_combined_rows() {
    // A row depends on its token alone, whatever its neighbours in a tile.
    let batch = Batch::awkward(4, 72, 40);
    let mut other = Batch::awkward(4, 72, 40);
    other.x[..20 * 72].rotate_left(72);
    other.routing.ids[..60].rotate_left(3);
    other.routing.weights[..60].rotate_left(3);
    let other = Batch::new(other.layer, other.routing, other.x);
    let residual = vec![1f32; batch.x.len()];
    let first = on_device(&batch, &residual, Tile::N64, Sim::unlike(0)).combined;
    let again = on_device(&other, &residual, Tile::N64, Sim::unlike(0)).combined;
    assert_eq!(first[72..20 * 72], again[..19 * 72]);
    assert_eq!(first[..72], again[19 * 72..20 * 72]);
    assert_eq!(first[20 * 72..], again[20 * 72..]);
}
