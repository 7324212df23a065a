//! A MoE layer without statistics against f64, with the experts' outputs in both precisions.

use tenp_kernels::device::moe_combine::{CombineInto, ExpertOutputs, MoeCombine, moe_combine};
use tenp_kernels::device::{Backend, Memory as _, Product, Tile};

use super::batch::Batch;
use super::products::{down, gate_up};
use super::{On, Size, distance, sampled};

/// The layer's output for some tokens, nothing rounded but weights and x.
fn in_f64<B: Backend>(batch: &Batch<'_, B>, tokens: &[usize]) -> Vec<f64> {
    let (layer, routing, hidden) = (&batch.layer, &batch.routing, batch.layer.hidden);
    let mut out = vec![0f64; tokens.len() * hidden];
    for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(hidden)) {
        let x = &batch.x[token * hidden..][..hidden];
        for slot in token * routing.top_k..(token + 1) * routing.top_k {
            let e = routing.ids[slot] as usize;
            let (expert, width) = (&layer.experts[e], layer.widths[e]);
            for j in 0..width {
                let dot = |row: &[half::bf16]| -> f64 {
                    let terms = row.iter().zip(x);
                    terms.map(|(w, x)| w.to_f64() * x.to_f64()).sum()
                };
                let gate = dot(&expert.gate[j * hidden..][..hidden]);
                let h = gate / (1.0 + (-gate).exp()) * dot(&expert.up[j * hidden..][..hidden]);
                let h = h * f64::from(routing.weights[slot]);
                for (out, down) in out.iter_mut().zip(expert.down[j..].iter().step_by(width)) {
                    *out += h * down.to_f64();
                }
            }
        }
    }
    out
}

/// The combined output of some tokens.
fn combined<B: Backend>(batch: &Batch<'_, B>, y: ExpertOutputs<'_>, tokens: &[usize]) -> Vec<f64> {
    let (on, hidden) = (batch.on, batch.layer.hidden);
    let mut out = on.output::<f32>(batch.num_tokens() * hidden);
    on.go(moe_combine(MoeCombine {
        experts: batch.tables(),
        y,
        slots: batch.slots(),
        shared: None,
        combined: None,
        into: CombineInto::Fresh(out.view_mut()),
        hidden,
    }));
    let out = on.get(out.view());
    let rows = tokens.iter().map(|&t| &out[t * hidden..][..hidden]);
    rows.flatten().map(|&v| f64::from(v)).collect()
}

/// h is rounded to bf16 before the down product, and that is most of the error with y in f32. y in bf16 rounds once more, as
/// much again, so the two together come to √2 of it.
#[allow(
    clippy::print_stdout,
    reason = "`cargo test -- --nocapture` lists the errors"
)]
pub fn outputs_in_bf16_cost_no_more_than_activations_in_bf16<B: Backend>(
    on: On<'_, B>,
    size: Size,
) {
    let batch = match size {
        Size::Small => Batch::awkward(on, 61, 72, 60),
        Size::Real => Batch::real(on, 61, 700),
    };
    let tokens = sampled(batch.num_tokens(), 16);
    let want = in_f64(&batch, &tokens);
    for tile in Tile::of(on.backend.has_wgmma()) {
        let (h, _) = gate_up(&batch, Product::gate_up(tile));
        let outputs = down(&batch, &h, Product::down(tile));
        let off = |y| distance(&combined(&batch, y, &tokens), &want);
        let unrounded = off(ExpertOutputs::F32(outputs.y_f32.view()));
        let rounded = off(ExpertOutputs::Bf16(outputs.y_bf16.view()));
        println!("{tile:?}: y in f32 {unrounded:.2e}, in bf16 {rounded:.2e}");
        assert!(unrounded < 2.5e-3, "{tile:?}: y in f32: {unrounded}");
        assert!(rounded < 3.5e-3, "{tile:?}: y in bf16: {rounded}");
        assert!(
            rounded < 1.7 * unrounded,
            "{tile:?}: {rounded}, {unrounded}"
        );
    }
}
