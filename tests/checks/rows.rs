//! The kernels that go row by row: norms, routers, sums, conversions, fp8, gathering.

use half::{bf16, f16};
use tenp_kernels::FP8_BLOCK;
use tenp_kernels::cpu::router::{GroupLimit, RouterSpec};
use tenp_kernels::device::dequantise_fp8::{DequantiseFp8, dequantise_fp8};
use tenp_kernels::device::elementwise::{Add, SiluMul, add, count_non_finite, silu_mul};
use tenp_kernels::device::moe_group::{GatherRows, gather_rows};
use tenp_kernels::device::rms_norm::{RmsNorm, rms_norm};
use tenp_kernels::device::router::{Router, router};
use tenp_kernels::device::rows::{
    ConvertRows, Elements, Embedding, ScaleRows, convert_rows, embedding, scale_rows,
};
use tenp_kernels::device::{Backend, InOut, Memory as _};

use super::{AWKWARD_WIDTHS, BF16_ROUNDING, On, Size, assert_close, bf16_values, f32_values, rng};

/// Row widths of a check, none of them zero.
fn widths(size: Size) -> Vec<usize> {
    let mut widths = AWKWARD_WIDTHS[1..].to_vec();
    widths.push(1024);
    if size == Size::Real {
        widths.extend([2048, 4096, 7168, 5001]);
    }
    widths
}

pub(super) fn num_rows(size: Size) -> usize {
    match size {
        Size::Small => 5,
        Size::Real => 3000,
    }
}

/// out = s / √(mean(s²) + eps) · weight, s = x + addend in place of x. The rounded form is that of the f32 form.
pub fn norms<B: Backend>(on: On<'_, B>, size: Size) {
    let rows = num_rows(size);
    for width in widths(size) {
        let mut rng = rng(width as u64);
        let mut values = |count| f32_values(&mut rng, count, 3.0);
        let (x, addend, weight) = (values(rows * width), values(rows * width), values(width));
        let (mut stream, addend_there) = (on.input(&x), on.input(&addend));
        let weight_there = on.input(&weight);
        let mut out = on.output::<f32>(rows * width);
        let mut rounded = on.output::<bf16>(rows * width);
        on.go(rms_norm(RmsNorm {
            x: InOut::Over(stream.view_mut()),
            addend: Some(addend_there.view()),
            weight: weight_there.view(),
            out_f32: Some(out.view_mut()),
            out_bf16: Some(rounded.view_mut()),
            eps: 1e-6,
            rows,
            width,
            x_pitch: width,
            out_pitch: width,
        }));
        let sums: Vec<f32> = x.iter().zip(&addend).map(|(a, b)| a + b).collect();
        assert_eq!(on.get(stream.view()), sums);
        let (out, rounded) = (on.get(out.view()), on.get(rounded.view()));
        for (r, s) in sums.chunks_exact(width).enumerate() {
            let square: f64 = s.iter().map(|&v| f64::from(v).powi(2)).sum();
            let scale = 1.0 / (square / width as f64 + 1e-6).sqrt();
            for c in 0..width {
                let want = f64::from(s[c]) * scale * f64::from(weight[c]);
                let got = out[r * width + c];
                assert_close(f64::from(got), want, 4e-6 * want.abs(), || {
                    format!("norm of {width}, row {r}, element {c}")
                });
                assert_eq!(
                    rounded[r * width + c].to_bits(),
                    bf16::from_f32(got).to_bits()
                );
            }
        }
    }
}

/// Softmax, sigmoid with a bias, group-limited; NaN in one token's logits stays there.
pub fn routers<B: Backend>(on: On<'_, B>, size: Size) {
    let tokens = match size {
        Size::Small => 19,
        Size::Real => 20_000,
    };
    let limit = |num_groups, top_groups, top_two_sum| {
        Some(GroupLimit {
            num_groups,
            top_groups,
            top_two_sum,
        })
    };
    for (i, (num_experts, top_k, sigmoid, groups, normalise)) in [
        (8, 2, false, None, true),
        (60, 4, false, None, false),
        (64, 6, false, limit(8, 3, false), false),
        (256, 8, true, limit(8, 4, true), true),
        (129, 7, true, None, true),
    ]
    .into_iter()
    .enumerate()
    {
        let mut rng = rng(i as u64);
        let spec = RouterSpec {
            num_experts,
            top_k,
            sigmoid,
            correction_bias: sigmoid.then(|| f32_values(&mut rng, num_experts, 0.2)),
            groups,
            normalise,
            scaling: 1.5,
        };
        let logits = f32_values(&mut rng, tokens * num_experts, 4.0);
        let want = spec.route(&mut logits.clone()).expect("a valid router");
        let (ids, weights) = routed(on, &spec, &logits);
        // Where two scores differ by a rounding, either order is right: a few tokens in many hundreds.
        let same = |t: usize| {
            let at = t * top_k..(t + 1) * top_k;
            let ids = ids[at.clone()].iter().map(|&e| e as u32);
            ids.eq(want.expert_ids[at].iter().copied())
        };
        let differing: Vec<usize> = (0..tokens).filter(|&t| !same(t)).collect();
        assert!(differing.len() * 200 <= tokens, "{spec:?}: {differing:?}");
        for t in (0..tokens).filter(|t| !differing.contains(t)) {
            for at in t * top_k..(t + 1) * top_k {
                let (got, want) = (f64::from(weights[at]), f64::from(want.weights[at]));
                assert_close(got, want, 2e-5 * want.abs(), || {
                    format!("{spec:?} token {t}")
                });
            }
        }
        let mut dirty = logits;
        dirty[3 * num_experts + 1] = f32::NAN;
        let (dirty_ids, dirty_weights) = routed(on, &spec, &dirty);
        for at in (0..tokens * top_k).filter(|at| at / top_k != 3) {
            let same = dirty_ids[at] == ids[at] && dirty_weights[at] == weights[at];
            assert!(same, "{spec:?}: NaN of token 3 is in slot {at}");
        }
        let in_range = |id: &i32| (0..num_experts as i32).contains(id);
        assert!(dirty_ids.iter().all(in_range), "{spec:?}");
    }
}

/// Experts and weights of every token.
fn routed<B: Backend>(on: On<'_, B>, spec: &RouterSpec, logits: &[f32]) -> (Vec<i32>, Vec<f32>) {
    let tokens = logits.len() / spec.num_experts;
    let logits_there = on.input(logits);
    let bias_there = spec.correction_bias.as_ref().map(|b| on.input(b));
    let mut ids = on.output::<i32>(tokens * spec.top_k);
    let mut weights = on.output::<f32>(tokens * spec.top_k);
    on.go(router(Router {
        spec,
        logits: logits_there.view(),
        correction_bias: bias_there.as_ref().map(|b| b.view()),
        expert_ids: ids.view_mut(),
        weights: weights.view_mut(),
        num_tokens: tokens,
    }));
    (on.get(ids.view()), on.get(weights.view()))
}

pub fn elementwise<B: Backend>(on: On<'_, B>, size: Size) {
    let rows = num_rows(size);
    for cols in widths(size) {
        let mut rng = rng(cols as u64);
        let mut values = |count, scale| f32_values(&mut rng, count, scale);
        let (a, b) = (values(rows * cols, 5.0), values(rows * cols, 5.0));
        let logits = values(rows, 3.0);
        let (mut a_there, b_there) = (on.input(&a), on.input(&b));
        let logits_there = on.input(&logits);
        let mut out = on.output::<bf16>(rows * cols);
        on.go(silu_mul(SiluMul {
            gate: a_there.view(),
            up: b_there.view(),
            out: out.view_mut(),
            rows,
            cols,
            pitch: cols,
        }));
        on.go(add(Add {
            a: InOut::Over(a_there.view_mut()),
            b: b_there.view(),
            row_logits: Some(logits_there.view()),
            rows,
            cols,
        }));
        let (out, sums) = (on.get(out.view()), on.get(a_there.view()));
        for i in 0..rows * cols {
            let (a, b) = (f64::from(a[i]), f64::from(b[i]));
            let want = a / (1.0 + (-a).exp()) * b;
            let tolerance = (BF16_ROUNDING + 1e-5) * want.abs();
            assert_close(out[i].to_f64(), want, tolerance, || {
                format!("silu {cols}, {i}")
            });
            let want = a + b / (1.0 + (-f64::from(logits[i / cols])).exp());
            assert_close(f64::from(sums[i]), want, 2e-5, || {
                format!("add {cols}, {i}")
            });
        }
        let mut dirty = a;
        let len = dirty.len();
        dirty[len - 1] = f32::NAN;
        dirty[len / 2] = f32::INFINITY;
        let expected = if len == 1 { 1 } else { 2 };
        let (dirty, mut count) = (on.input(&dirty), on.filled(3i32, 1));
        let multiprocessors = on.backend.multiprocessors();
        on.go(count_non_finite(
            dirty.view(),
            count.view_mut(),
            multiprocessors,
        ));
        assert_eq!(on.get(count.view()), [3 + expected]);
    }
}

pub fn embedding_and_conversions<B: Backend>(on: On<'_, B>, size: Size) {
    let (vocab, rows) = (97, num_rows(size));
    let mut rng = rng(3);
    for hidden in [8, 64, 136, 2048] {
        let table = bf16_values(&mut rng, vocab * hidden, 1.0);
        let ids: Vec<i32> = (0..rows).map(|r| (r * 31 % vocab) as i32).collect();
        let (table_there, ids_there) = (on.input(&table), on.input(&ids));
        let mut out = on.output::<f32>(rows * hidden);
        on.go(embedding(Embedding {
            table: table_there.view(),
            ids: ids_there.view(),
            hidden_states: out.view_mut(),
            num_tokens: rows,
            vocab_size: vocab,
            hidden,
        }));
        for (id, row) in ids.iter().zip(on.get(out.view()).chunks_exact(hidden)) {
            let want = &table[*id as usize * hidden..][..hidden];
            assert!(want.iter().map(|v| v.to_f32()).eq(row.iter().copied()));
        }
    }
    for cols in widths(size) {
        let x = f32_values(&mut rng, rows * cols, 3.0);
        let halves: Vec<f16> = x.iter().map(|&v| f16::from_f32(v)).collect();
        let (x_there, halves_there) = (on.input(&x), on.input(&halves));
        let bias = f32_values(&mut rng, cols, 1.0);
        let bias_there = on.input(&bias);
        for wide in [true, false] {
            let mut out = on.output::<bf16>(rows * cols);
            let args = ConvertRows {
                input: if wide {
                    Elements::F32(x_there.view())
                } else {
                    Elements::F16(halves_there.view())
                },
                bias: Some(bias_there.view()),
                out_rows: None,
                out_f32: None,
                out_bf16: Some(out.view_mut()),
                rows,
                cols,
                in_pitch: cols,
                num_out_rows: rows,
                out_pitch: cols,
                clip: Some(2.5),
            };
            // SAFETY: rows keep their places.
            on.go(unsafe { convert_rows(args) });
            for (i, got) in on.get(out.view()).into_iter().enumerate() {
                let x = if wide { x[i] } else { halves[i].to_f32() };
                let want = bf16::from_f32((x + bias[i % cols]).clamp(-2.5, 2.5));
                assert_eq!(got.to_bits(), want.to_bits(), "{cols}, {i}");
            }
        }
    }
}

/// A code of OCP FP8 E4M3.
fn e4m3(code: u8) -> f64 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
    let size = match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => fraction * 2f64.powi(-6),
        _ => (1.0 + fraction) * 2f64.powi(exponent - 7),
    };
    if code & 128 == 0 { size } else { -size }
}

pub fn fp8_blocks<B: Backend>(on: On<'_, B>, size: Size) {
    let shapes: &[(usize, usize)] = match size {
        Size::Small => &[(3, 1), (130, 129), (1, 257), (129, 144)],
        Size::Real => &[(2048, 7168), (1537, 130)],
    };
    for &(rows, cols) in shapes {
        let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % 256) as u8).collect();
        let blocks = cols.div_ceil(FP8_BLOCK);
        let scales = f32_values(&mut rng(9), rows.div_ceil(FP8_BLOCK) * blocks, 2.0);
        let (codes_there, scales_there) = (on.input(&codes), on.input(&scales));
        let mut out = on.output::<bf16>(rows * cols);
        on.go(dequantise_fp8(DequantiseFp8 {
            input: codes_there.view(),
            scales: scales_there.view(),
            out: out.view_mut(),
            rows,
            cols,
        }));
        for (i, got) in on.get(out.view()).into_iter().enumerate() {
            let scale = scales[i / cols / FP8_BLOCK * blocks + i % cols / FP8_BLOCK];
            let want = bf16::from_f32(e4m3(codes[i]) as f32 * scale);
            let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            assert!(same, "{rows} x {cols}, {i}: {got}, want {want}");
        }
    }
}

pub fn gathered_rows<B: Backend>(on: On<'_, B>, size: Size) {
    let (inputs, rows) = (50, num_rows(size));
    for cols in [8, 64, 136, 2048] {
        let input = bf16_values(&mut rng(cols as u64), inputs * cols, 1.0);
        let ids: Vec<i32> = (0..rows)
            .map(|r| (r * 13 % (inputs + 1)) as i32 - 1)
            .collect();
        let (input_there, ids_there) = (on.input(&input), on.input(&ids));
        let mut out = on.output::<bf16>(rows * cols);
        let args = GatherRows {
            input: input_there.view(),
            row_ids: ids_there.view(),
            out: out.view_mut(),
            num_live_rows: None,
            input_rows: inputs,
            rows,
            cols,
        };
        // SAFETY: every id is below `inputs`.
        on.go(unsafe { gather_rows(args) });
        for (id, got) in ids.iter().zip(on.get(out.view()).chunks_exact(cols)) {
            match usize::try_from(*id) {
                Ok(id) => assert_eq!(got, &input[id * cols..(id + 1) * cols]),
                Err(_) => assert!(got.iter().all(|v| v.to_f32() == 0.0)),
            }
        }
    }
}

/// Rows in any order, twice or not at all; the last vector of a row is filled with zeros.
pub fn scaled_rows<B: Backend>(on: On<'_, B>, size: Size) {
    let (inputs, rows) = (50, num_rows(size));
    for cols in widths(size) {
        let mut rng = rng(cols as u64);
        let (in_pitch, out_pitch) = (cols.next_multiple_of(8) + 8, cols.next_multiple_of(8));
        let input = bf16_values(&mut rng, inputs * in_pitch, 1.0);
        let scales = f32_values(&mut rng, inputs, 2.0);
        let ids: Vec<i32> = (0..rows).map(|r| (r * 13 % inputs) as i32).collect();
        let (input_there, ids_there) = (on.input(&input), on.input(&ids));
        let scales_there = on.input(&scales);
        for scaled in [true, false] {
            let mut out = on.output::<f32>(rows * out_pitch);
            let args = ScaleRows {
                input: input_there.view(),
                row_ids: ids_there.view(),
                scales: scaled.then(|| scales_there.view()),
                out: out.view_mut(),
                rows,
                cols,
                num_in_rows: inputs,
                in_pitch,
                out_pitch,
            };
            // SAFETY: every id is below `inputs`.
            on.go(unsafe { scale_rows(args) });
            for (&id, got) in ids.iter().zip(on.get(out.view()).chunks_exact(out_pitch)) {
                let scale = if scaled { scales[id as usize] } else { 1.0 };
                let row = &input[id as usize * in_pitch..][..cols];
                let want = row.iter().map(|v| (v.to_f32() * scale).to_bits());
                assert!(got[..cols].iter().map(|v| v.to_bits()).eq(want), "{cols}");
                assert!(got[cols..].iter().all(|v| *v == 0.0));
            }
        }
    }
}
