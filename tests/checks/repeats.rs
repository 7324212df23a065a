//! The same launch gives the same bits, however often.

use half::bf16;
use tenp_kernels::device::attention::Splits;
use tenp_kernels::device::moe_contribution::Projected;
use tenp_kernels::device::{Backend, Memory as _, Product, Tile};
use tenp_kernels::params::{TENP_NUM_ACTIVATION_SUMS, TENP_NUM_CONTRIBUTION_SUMS};

use super::attention::{Sequences, Span, shape};
use super::batch::Batch;
use super::layer_sums::scored;
use super::products::{contribution, down, gate_up, gram, row_norms, scoring_tiles, with_outputs};
use super::{On, Size, f32_values, rng};

fn batch<B: Backend>(on: On<'_, B>, size: Size) -> Batch<'_, B> {
    match size {
        Size::Small => Batch::awkward(on, 51, 24, 30),
        Size::Real => Batch::real(on, 51, 300),
    }
}

fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Every result must equal the first.
fn repeat<B: Backend, R: PartialEq>(on: On<'_, B>, what: &str, mut run: impl FnMut() -> R) {
    let first = run();
    for i in 1..on.repeats {
        assert!(run() == first, "{what}: repeat {i} differs");
    }
}

pub fn products_have_the_same_bits<B: Backend>(on: On<'_, B>, size: Size) {
    let batch = batch(on, size);
    for tile in Tile::of(on.backend.has_wgmma()) {
        let (h, _) = gate_up(&batch, Product::gate_up(tile));
        repeat(on, &format!("gate and up, {tile:?}"), || {
            bits(&on.get(gate_up(&batch, Product::gate_up(tile)).0.view()))
        });
        repeat(on, &format!("down, {tile:?}"), || {
            let made = down(&batch, &h, Product::down(tile));
            let y: Vec<u32> = on
                .get(made.y_f32.view())
                .iter()
                .map(|v| v.to_bits())
                .collect();
            (y, on.get(row_norms(&batch, &made).inverse.view()))
        });
    }
    let gram = gram(&batch);
    for tile in scoring_tiles(on) {
        repeat(on, &format!("statistics, {tile:?}"), || {
            let (h, sums) = gate_up(&batch, Product::gate_up_stats(tile));
            let sums = sums.expect("the entry makes them");
            (
                bits(&on.get(h.view())),
                sums.accumulated(&batch, TENP_NUM_ACTIVATION_SUMS),
            )
        });
        let (h, _) = gate_up(&batch, Product::gate_up(tile));
        let outputs = down(&batch, &h, Product::down(tile));
        let norms = row_norms(&batch, &outputs);
        for (form, projected) in [
            ("with y", with_outputs(&batch, &outputs.y_bf16)),
            ("in Gram form", Projected::Gram { gram: gram.view() }),
        ] {
            repeat(on, &format!("contribution {form}, {tile:?}"), || {
                let operands = (&h, projected, &norms.inverse);
                let sums = contribution(&batch, operands, Product::contribution(tile));
                sums.accumulated(&batch, TENP_NUM_CONTRIBUTION_SUMS)
            });
        }
    }
}

pub fn attention_has_the_same_bits<B: Backend>(on: On<'_, B>, size: Size) {
    let (shape, prompts, next): (_, &[Span], &[Span]) = match size {
        Size::Small => (
            shape(4, 2, 16, 16, None),
            &[(0, 70, 70), (9, 3, 3)],
            &[(0, 1, 200), (9, 1, 1)],
        ),
        Size::Real => (
            shape(16, 16, 192, 128, None),
            &[(0, 1000, 1000), (300, 129, 129)],
            &[(0, 1, 5000), (300, 1, 64)],
        ),
    };
    let prompts = Sequences::new(1, shape, prompts);
    repeat(on, "prefill", || bits(&prompts.run(on, None)));
    let next = Sequences::new(2, shape, next);
    let splits = Splits { count: 3, keys: 64 };
    repeat(on, "decode", || bits(&next.run(on, Some(splits))));
}

pub fn a_scored_layer_has_the_same_bits<B: Backend>(on: On<'_, B>, size: Size) {
    let batch = batch(on, size);
    let residual = f32_values(&mut rng(52), batch.x.len(), 1.0);
    for tile in scoring_tiles(on) {
        repeat(on, &format!("a scored layer, {tile:?}"), || {
            scored(&batch, &residual, tile)
        });
    }
}
