//! Copies, uploads beside work, dense products.

use half::bf16;
use tenp_kernels::device::elementwise::{Add, add};
use tenp_kernels::device::{Backend, DenseShape, InOut, InputLayout, Memory as _, WeightLayout};

use super::{F32_ROUNDING, On, Size, assert_close, bf16_values, f32_values, rng, sampled, widened};

/// Both layouts of the weight, pitches, sums added to what is there; bf16 to f32, bf16 to bf16, f32 to f32.
pub fn dense_products<B: Backend>(on: On<'_, B>, size: Size) {
    let sizes: &[(usize, usize, usize)] = match size {
        Size::Small => &[(1, 8, 7), (5, 65, 33), (0, 8, 8), (129, 24, 1)],
        Size::Real => &[(1, 2048, 102_400), (3000, 2048, 1408), (65, 7168, 129)],
    };
    for &(rows, inner, outputs) in sizes {
        for (x_layout, layout) in [
            (InputLayout::Rows, WeightLayout::OutputRows),
            (InputLayout::Rows, WeightLayout::InnerRows),
            (InputLayout::InnerRows, WeightLayout::InnerRows),
        ] {
            let dense = DenseShape {
                x_layout,
                layout,
                ..DenseShape::new(rows, inner, outputs)
            };
            check_dense(
                on,
                &DenseShape {
                    x_pitch: dense.x().1 + 8,
                    weight_pitch: dense.weight().1 + 16,
                    ..dense
                },
            );
        }
    }
}

fn check_dense<B: Backend>(on: On<'_, B>, shape: &DenseShape) {
    let mut rng = rng(shape.inner as u64);
    let [x_len, weight_len, out_len] = shape.extents().expect("a valid shape");
    let x = bf16_values(&mut rng, x_len, 1.0);
    let weight = bf16_values(&mut rng, weight_len, 1.0);
    let before = f32_values(&mut rng, out_len, 1.0);
    let (x_there, weight_there) = (on.input(&x), on.input(&weight));
    let (x_wide, weight_wide) = (on.input(&widened(&x)), on.input(&widened(&weight)));
    let mut plain = on.output::<f32>(out_len);
    let mut rounded = on.output::<bf16>(out_len);
    let mut wide = on.input(&before);
    let dense =
        |result: Result<(), tenp_kernels::KernelError>| result.unwrap_or_else(|e| panic!("{e}"));
    dense(
        on.backend
            .dense(shape, x_there.view(), weight_there.view(), plain.view_mut()),
    );
    dense(on.backend.dense(
        shape,
        x_there.view(),
        weight_there.view(),
        rounded.view_mut(),
    ));
    let added = DenseShape {
        accumulate: true,
        ..*shape
    };
    dense(
        on.backend
            .dense(&added, x_wide.view(), weight_wide.view(), wide.view_mut()),
    );
    let (plain, rounded, wide) = (
        on.get(plain.view()),
        on.get(rounded.view()),
        on.get(wide.view()),
    );
    for r in sampled(shape.rows, 20) {
        for o in sampled(shape.outputs, 50) {
            let (mut want, mut size) = (0.0, 0.0);
            for i in 0..shape.inner {
                let at = match shape.layout {
                    WeightLayout::OutputRows => o * shape.weight_pitch + i,
                    WeightLayout::InnerRows => i * shape.weight_pitch + o,
                };
                let x_at = match shape.x_layout {
                    InputLayout::Rows => r * shape.x_pitch + i,
                    InputLayout::InnerRows => i * shape.x_pitch + r,
                };
                let term = x[x_at].to_f64() * weight[at].to_f64();
                want += term;
                size += term.abs();
            }
            let off = 4.0 * (shape.inner as f64 + 2.0) * F32_ROUNDING * (size + 1.0);
            let at = r * shape.out_pitch + o;
            let what = || format!("{shape:?}, row {r}, output {o}");
            assert_close(f64::from(plain[at]), want, off, what);
            // A library may add parts of a long sum in bf16.
            assert_close(
                rounded[at].to_f64(),
                want,
                off + want.abs() / 128.0 + size / 512.0,
                what,
            );
            assert_close(f64::from(wide[at]), want + f64::from(before[at]), off, what);
        }
    }
}

/// An upload starts behind what was asked of its target, runs beside other work, and is there for what is asked after
/// its end. The same host memory is filled again as soon as it may be.
pub fn uploads_beside_work<B: Backend>(on: On<'_, B>, size: Size) {
    let len = match size {
        Size::Small => 3000,
        Size::Real => 16 << 20,
    };
    let backend = on.backend;
    let bytes = 4 * len;
    let mut staging = backend.staging(bytes).unwrap_or_else(|e| panic!("{e}"));
    let mut target = backend
        .alloc::<u8>("upload", bytes + 4)
        .unwrap_or_else(|e| panic!("{e}"));
    let mut sum = on.filled(0f32, len);
    let rounds = 5;
    for round in 0..rounds {
        let value = 1.5 + round as f32;
        let memory = B::staging_bytes(&mut staging).unwrap_or_else(|e| panic!("{e}"));
        for word in memory.chunks_exact_mut(4) {
            word.copy_from_slice(&value.to_le_bytes());
        }
        let idle = backend.idle(target).unwrap_or_else(|e| panic!("{e}"));
        let transfer = backend.start_transfer(staging, idle, bytes);
        let transfer = transfer.unwrap_or_else(|e| panic!("{e}"));
        // Work beside it.
        let ones = on.filled(1f32, len);
        add_to(on, &mut sum, ones.view());
        let done = backend.finish_transfer(transfer);
        (staging, target) = done.unwrap_or_else(|e| panic!("{e}"));
        // Asked for now and not waited for: the next upload must not overtake it.
        let there = target.view().slice(0..bytes).and_then(|v| v.cast::<f32>());
        add_to(on, &mut sum, there.expect("aligned"));
    }
    let want: f32 = (0..rounds).map(|round| 2.5 + round as f32).sum();
    assert!(on.get(sum.view()).iter().all(|&v| v == want));
    let idle = backend.idle(target).unwrap_or_else(|e| panic!("{e}"));
    let transfer = backend.start_transfer(staging, idle, bytes + 1);
    assert!(transfer.is_err(), "more than the host's memory holds");
}

fn add_to<B: Backend>(
    on: On<'_, B>,
    sum: &mut B::Buffer<f32>,
    b: tenp_kernels::device::DeviceSlice<'_, f32>,
) {
    let cols = b.len();
    on.go(add(Add {
        a: InOut::Over(sum.view_mut()),
        b,
        row_logits: None,
        rows: 1,
        cols,
    }));
}

pub fn copies_keep_their_places<B: Backend>(on: On<'_, B>, _: Size) {
    let values: Vec<i32> = (0..1000).collect();
    let from = on.input(&values);
    let mut to = on.filled(-7i32, 1000);
    let backend = on.backend;
    let part = to.view_mut().slice(100..350).expect("inside");
    let source = from.view().slice(3..253).expect("inside");
    backend.copy(source, part).unwrap_or_else(|e| panic!("{e}"));
    backend
        .clear(to.view_mut().slice(990..1000).expect("inside"))
        .unwrap_or_else(|e| panic!("{e}"));
    let mut want = vec![-7; 1000];
    want[100..350].copy_from_slice(&values[3..253]);
    want[990..].fill(0);
    assert_eq!(on.get(to.view()), want);
    let short = to.view_mut().slice(0..5).expect("inside");
    assert!(backend.copy(from.view(), short).is_err());
    assert!(backend.write(to.view_mut(), &[1, 2]).is_err());
    assert!(backend.read(to.view(), &mut [0; 3]).is_err());
    assert_eq!(on.get(on.input::<f32>(&[]).view()), [0f32; 0]);
}
