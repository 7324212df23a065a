//! Everything that needs a GPU, in one binary: the checks of the kernels (`tests/checks`) at small and real sizes, the
//! model's pass (`passes`), and what only the GPU has. The same checks run on the executor in every `cargo test`.
//!
//! | variable | |
//! |---|---|
//! | `TENP_REQUIRE_GPU=1` | without a GPU the tests fail; otherwise they say so and pass |
//! | `TENP_REPO` | the repository, where the binary was carried to another machine |
//! | `TENP_CHECK_SIZE=small` | leaves real sizes out (compute-sanitizer is slow) |
//! | `TENP_REPEATS` | how often repeats run; 200 without it |
//! | `TENP_GPU_POISON=0` | results are not filled before (compute-sanitizer's initcheck) |

// `cargo test -- --nocapture` lists the errors.
#![allow(clippy::print_stdout)]

#[path = "../../../tests/checks/mod.rs"]
mod checks;
#[path = "../../tenp-checkpoint/tests/support/fp8.rs"]
mod fp8;
mod only_gpu;
mod passes;
mod support;

use std::io::Write as _;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use checks::{
    On, Size, attention, batch, bounds, layer_sums, memory, plain_layer, products, repeats, rotary,
    rows, segments,
};
use half::bf16;
use tenp_kernels::KernelError;
use tenp_kernels::device::{
    DenseShape, Device, GroupedDense, GroupedProduct, Timer, WeightLayout, gpu_count,
};

/// Bytes that an H200 does not have.
const TOO_MUCH: usize = 1 << 42;

/// The one GPU of this process, opened once; `None` and a line on stderr without one.
///
/// # Panics
/// If there is one that does not open, or there must be one.
fn gpu(name: &str) -> Option<&'static Device> {
    static DEVICE: OnceLock<Result<Device, KernelError>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| {
        let poison = std::env::var("TENP_GPU_POISON").as_deref() != Ok("0");
        checks::POISON.store(poison, Ordering::Relaxed);
        Device::open(0)
    });
    match device {
        Ok(device) => Some(device),
        Err(error) => {
            let required = std::env::var("TENP_REQUIRE_GPU").as_deref() == Ok("1");
            assert!(
                error.is_environment() && !required,
                "{name}: no GPU: {error}"
            );
            // Past the capture of the test harness, or nobody would read it.
            let _ = writeln!(std::io::stderr(), "skipped: {name}: no GPU: {error}");
            None
        }
    }
}

fn repeats() -> usize {
    let wanted = std::env::var("TENP_REPEATS").ok();
    wanted.map_or(200, |n| n.parse().expect("TENP_REPEATS is a number"))
}

fn sizes() -> &'static [Size] {
    match std::env::var("TENP_CHECK_SIZE").as_deref() {
        Ok("small") => &[Size::Small],
        _ => &[Size::Small, Size::Real],
    }
}

macro_rules! on_the_gpu {
    ($($family:ident::$check:ident,)*) => {
        $(
            #[test]
            fn $check() {
                let Some(device) = gpu(stringify!($check)) else { return };
                for &size in sizes() {
                    $family::$check(On::new(device, repeats()), size);
                }
                device.synchronize().unwrap_or_else(|e| panic!("{e}"));
            }
        )*
    };
}

every_check!(on_the_gpu);

macro_rules! passes {
    ($($([$module:ident])? $check:ident($($argument:expr)?),)*) => {
        $(
            #[test]
            fn $check() {
                let Some(device) = gpu(stringify!($check)) else { return };
                passes::$($module::)?$check(&|_| device.clone() $(, $argument)?);
            }
        )*
    };
}

passes! {
    logits_of_every_family(),
    calibration_has_the_sums_of_the_cpu(),
    branches_and_cached_tokens_have_the_logits_of_the_whole_sequence(),
    damaged_weights_are_named(),
    layers_with_fewer_experts(),
    continuations_are_the_same(),
    prompts_are_completed_together_as_alone(),
    calibration_has_the_same_bits(repeats()),
    [merging] neurons_are_merged_as_on_the_cpu(),
    [recovery] experts_are_fitted_as_on_the_cpu(),
    [resuming] statistics_that_are_let_go_of_are_written(),
    [sharing] shares_merge_to_the_whole(),
    [fp8] logits_of_fp8_weights(),
    [resuming] a_stopped_calibration_goes_on_with_the_same_bits(),
}

#[test]
fn a_decode_step_is_captured() {
    if let Some(device) = gpu("a_decode_step_is_captured") {
        only_gpu::a_decode_step_is_captured(device);
    }
}

#[test]
fn streams_do_not_disturb_each_other() {
    if let Some(device) = gpu("streams_do_not_disturb_each_other") {
        only_gpu::streams_do_not_disturb_each_other(device, repeats());
    }
}

#[test]
fn a_foreign_stream_is_launched_on() {
    if let Some(device) = gpu("a_foreign_stream_is_launched_on") {
        only_gpu::a_foreign_stream_is_launched_on(device);
    }
}

#[test]
fn the_gpu_is_described() {
    let Some(device) = gpu("the_gpu_is_described") else {
        return;
    };
    let properties = device.properties();
    println!("{properties:?}");
    assert!(!properties.name.is_empty() && properties.capability >= (8, 0));
    assert!(properties.multiprocessors > 0 && properties.l2_bytes > 0);
    let free = device.free_bytes().expect("asked");
    assert!(0 < free && free <= properties.memory_bytes as u64);
    let again = Device::open(properties.ordinal).expect("a second handle");
    assert_eq!(again.properties(), properties);
}

#[test]
fn no_such_gpu() {
    if gpu("no_such_gpu").is_none() {
        return;
    }
    let count = gpu_count().expect("there is one");
    let error = Device::open(count).expect_err("numbered from 0");
    assert_eq!(
        error,
        KernelError::NoSuchGpu {
            ordinal: count,
            count
        }
    );
}

#[test]
fn out_of_memory_says_what_was_wanted() {
    let Some(device) = gpu("out_of_memory_says_what_was_wanted") else {
        return;
    };
    // A handle of its own, for the advice is the device's.
    let device = Device::open(device.properties().ordinal).expect("a second handle");
    device.set_memory_advice("take less");
    let error = device
        .alloc::<u8>("far too much", TOO_MUCH)
        .expect_err("not that much");
    let KernelError::OutOfMemory {
        what,
        wanted_bytes,
        free_bytes,
        advice,
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!((*what, *wanted_bytes), ("far too much", TOO_MUCH as u64));
    assert!(*free_bytes > 0 && *free_bytes < TOO_MUCH as u64);
    assert_eq!(advice, "take less");
    assert!(
        device
            .alloc::<u64>("past all counting", usize::MAX / 2)
            .is_err()
    );
    // The device still works.
    let values = device.upload("after", &[1f32, 2.0]).expect("little");
    assert_eq!(values.to_vec().expect("copied"), [1.0, 2.0]);
}

/// Work of two threads on clones of one device, and on a second handle, does not mix.
#[test]
fn clones_on_two_threads_do_not_mix() {
    let Some(device) = gpu("clones_on_two_threads_do_not_mix") else {
        return;
    };
    let (clone, other) = (device.clone(), Device::open(0).expect("a second handle"));
    std::thread::scope(|scope| {
        for device in [device, &clone, &other] {
            scope.spawn(move || {
                for _ in 0..5 {
                    rows::norms(On::new(device, 1), Size::Small);
                    products::gate_up_and_down_of_every_tile(On::new(device, 1), Size::Small);
                    memory::uploads_beside_work(On::new(device, 1), Size::Small);
                    memory::dense_products(On::new(device, 1), Size::Small);
                }
            });
        }
    });
}

#[test]
fn times_are_those_of_the_work() {
    let Some(device) = gpu("times_are_those_of_the_work") else {
        return;
    };
    // A stream of its own, and the best of several: other tests use the GPU meanwhile.
    let device = &Device::open(device.properties().ordinal).expect("a second handle");
    let timer = Timer::new(device).expect("made");
    let mut buffer = device.zeros::<u8>("to clear", 1 << 28).expect("room");
    let mut time = |count: usize| {
        let once = |_| {
            timer.start(device).expect("recorded");
            for _ in 0..count {
                buffer.view_mut().clear(device).expect("asked");
            }
            timer.stop(device).expect("recorded");
            timer.elapsed().expect("done").as_secs_f64()
        };
        (0..5).map(once).fold(f64::INFINITY, f64::min)
    };
    let (short, long) = (time(2), time(40));
    assert!(short > 0.0 && long > 3.0 * short, "{short} s, {long} s");
}

/// `cublasGemmGroupedBatchedEx`, as the benches use it, against one product after another.
#[test]
fn grouped_dense_is_the_loop() {
    let Some(device) = gpu("grouped_dense_is_the_loop") else {
        return;
    };
    let mut rng = checks::rng(1);
    let hidden = 256;
    let (rows, outputs) = ([0, 1, 64, 33], [64, 128, 0, 104]);
    let count = |of: &[usize; 4]| of.iter().sum::<usize>();
    let x = checks::bf16_values(&mut rng, count(&rows) * hidden, 1.0);
    let weight = checks::bf16_values(&mut rng, count(&outputs) * hidden, 1.0);
    let (x_there, weight_there) = (
        device.upload("x", &x).expect("room"),
        device.upload("w", &weight).expect("room"),
    );
    for layout in [WeightLayout::OutputRows, WeightLayout::InnerRows] {
        let (mut products, mut at, mut end) = (Vec::new(), [0; 2], 0);
        for (&rows, &outputs) in rows.iter().zip(&outputs) {
            let shape = DenseShape {
                layout,
                weight_pitch: if layout == WeightLayout::OutputRows {
                    hidden
                } else {
                    outputs
                },
                ..DenseShape::new(rows, hidden, outputs)
            };
            products.push(GroupedProduct {
                shape,
                x: at[0] * hidden,
                weight: at[1] * hidden,
                out: end,
            });
            at = [at[0] + rows, at[1] + outputs];
            end += (rows * outputs).next_multiple_of(8);
        }
        let untouched = vec![bf16::from_f32(-7.0); end];
        let mut grouped = device.upload("out", &untouched).expect("room");
        let mut single = device.upload("out", &untouched).expect("room");
        let mut view = grouped.view_mut();
        let call = GroupedDense::new(
            device,
            &products,
            x_there.view(),
            weight_there.view(),
            &mut view,
        )
        .expect("products that fit");
        // SAFETY: the buffers are here until the results are read.
        unsafe { call.run(device) }.expect("runs");
        for p in &products {
            let [x_len, weight_len, out_len] = p.shape.extents().expect("valid");
            let x = x_there.view().slice(p.x..p.x + x_len).expect("inside");
            let weight = weight_there.view().slice(p.weight..p.weight + weight_len);
            let out = single
                .view_mut()
                .slice(p.out..p.out + out_len)
                .expect("inside");
            device
                .dense(&p.shape, x, weight.expect("inside"), out)
                .expect("runs");
        }
        let (grouped, single) = (
            grouped.to_vec().expect("read"),
            single.to_vec().expect("read"),
        );
        for (i, (a, b)) in grouped.iter().zip(&single).enumerate() {
            // Either library call may round a sum of 256 terms once more.
            let tolerance = b.to_f64().abs() / 64.0 + 0.1;
            checks::assert_close(a.to_f64(), b.to_f64(), tolerance, || {
                format!("{layout:?} {i}")
            });
        }
    }
}
