//! ldmatrix and mma: fragments by the PTX ISA's own words, products against a plain sum in f64.

use half::bf16;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use simt::{Buffer, Executor, Fault, FaultKind, Schedule};

use crate::fault_of;

#[repr(C)]
#[derive(Clone, Copy)]
struct FragmentParams {
    a: *const u16,
    b: *const u16,
    c: *const f32,
    d: *mut f32,
    registers: *mut u32,
}

struct Output {
    d: Buffer<f32>,
    registers: Buffer<u32>,
}

fn run(entry: &str, schedule: Schedule, a: &[u16], b: &[u16], c: &[f32]) -> Result<Output, Fault> {
    let (a, b, c) = (
        Buffer::input("a", a),
        Buffer::input("b", b),
        Buffer::input("c", c),
    );
    let (d, registers) = (Buffer::output("d", 128), Buffer::output("registers", 128));
    let params = FragmentParams {
        a: a.ptr(),
        b: b.ptr(),
        c: c.ptr(),
        d: d.mut_ptr(),
        registers: registers.mut_ptr(),
    };
    Executor::new(schedule).launch(entry, [1; 3], [32, 1, 1], 768, &params)?;
    Ok(Output { d, registers })
}

fn run_zeros(entry: &str, schedule: Schedule) -> Result<Output, Fault> {
    run(entry, schedule, &[0; 256], &[0; 128], &[0.0; 128])
}

/// A [16][16], B [16][8], C [16][8], and A·B + C summed in f64.
struct Product {
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    d: Vec<f64>,
}

fn product(seed: u64) -> Product {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut values = |count: usize| -> Vec<f32> {
        (0..count)
            .map(|_| bf16::from_f32(rng.random_range(-1.0..1.0)).to_f32())
            .collect()
    };
    let (a, b, c) = (values(256), values(128), values(128));
    let dot = |i: usize| -> f64 {
        let (row, column) = (i / 8, i % 8);
        (0..16)
            .map(|k| f64::from(a[row * 16 + k]) * f64::from(b[k * 8 + column]))
            .sum()
    };
    let d = (0..128).map(|i| dot(i) + f64::from(c[i])).collect();
    Product { a, b, c, d }
}

fn bits(values: impl IntoIterator<Item = f32>) -> Vec<u16> {
    values
        .into_iter()
        .map(|v| bf16::from_f32(v).to_bits())
        .collect()
}

fn assert_close(got: &[f32], want: &[f64]) {
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        // 17 terms of at most 1, each rounded once.
        assert!(
            (f64::from(got) - want).abs() < 17.0 * 2f64.powi(-20),
            "{i}: {got} {want}"
        );
    }
}

/// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", for `.bf16`: a_i, i in 0..8.
fn place_in_a(lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane % 4);
    let row = if matches!(i, 0 | 1 | 4 | 5) {
        group
    } else {
        group + 8
    };
    let column = thread * 2 + (i & 1) + if i < 4 { 0 } else { 8 };
    (row, column)
}

/// The same for b_i, i in 0..4.
fn place_in_b(lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane % 4);
    let row = thread * 2 + (i & 1) + if i < 2 { 0 } else { 8 };
    (row, group)
}

/// The same for c_i and d_i, i in 0..4.
fn place_in_d(lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane % 4);
    let row = if i < 2 { group } else { group + 8 };
    (row, thread * 2 + (i & 1))
}

#[test]
fn mma_fragments_lie_where_the_isa_says() {
    let p = product(1);
    let spread = |per_lane: usize, of: &dyn Fn(usize, usize) -> f32| -> Vec<f32> {
        (0..32 * per_lane)
            .map(|i| of(i / per_lane, i % per_lane))
            .collect()
    };
    let a = spread(8, &|lane, i| {
        let (row, column) = place_in_a(lane, i);
        p.a[row * 16 + column]
    });
    let b = spread(4, &|lane, i| {
        let (row, column) = place_in_b(lane, i);
        p.b[row * 8 + column]
    });
    let c = spread(4, &|lane, i| {
        let (row, column) = place_in_d(lane, i);
        p.c[row * 8 + column]
    });
    for schedule in Schedule::UNLIKE {
        let out = run(
            "test_mma_fragments",
            schedule,
            &bits(a.clone()),
            &bits(b.clone()),
            &c,
        );
        let got = out.unwrap().d.written().unwrap();
        let want: Vec<f64> = (0..128)
            .map(|i| {
                let (row, column) = place_in_d(i / 4, i % 4);
                p.d[row * 8 + column]
            })
            .collect();
        assert_close(&got, &want);
    }
}

#[test]
fn ldmatrix_hands_out_rows_and_columns() {
    let a: Vec<u16> = (0..256).collect();
    for (kind, matrices, transposed) in [
        (0.0, 4, false),
        (1.0, 4, true),
        (2.0, 2, false),
        (3.0, 2, true),
    ] {
        let out = run(
            "test_ldmatrix",
            Schedule::Random(3),
            &a,
            &[0; 128],
            &[kind; 128],
        )
        .unwrap();
        let registers = out.registers.written().unwrap();
        for (i, got) in registers.into_iter().enumerate() {
            // Register m of a lane: elements 2 (lane % 4) and the next of row lane / 4 of matrix m, or of its transpose.
            let (lane, matrix) = (i / 4, i % 4);
            let element = |column: usize| {
                let (row, column) = if transposed {
                    (column, lane / 4)
                } else {
                    (lane / 4, column)
                };
                u32::from(a[(matrix * 8 + row) * 8 + column])
            };
            let column = lane % 4 * 2;
            let want = if matrix < matrices {
                element(column) | element(column + 1) << 16
            } else {
                0
            };
            assert_eq!(got, want, "kind {kind}, lane {lane}, register {matrix}");
        }
    }
}

#[test]
fn products_through_shared_memory() {
    for seed in 0..20 {
        let p = product(seed);
        let schedule = Schedule::UNLIKE[seed as usize % 4];
        let transpose = |v: &[f32], columns: usize| -> Vec<f32> {
            let rows = v.len() / columns;
            (0..v.len())
                .map(|i| v[i % rows * columns + i / rows])
                .collect()
        };
        let plain = run(
            "test_mma",
            schedule,
            &bits(p.a.clone()),
            &bits(transpose(&p.b, 8)),
            &p.c,
        );
        assert_close(&plain.unwrap().d.written().unwrap(), &p.d);
        let a = bits(transpose(&p.a, 16));
        let transposed = run(
            "test_mma_transposed",
            schedule,
            &a,
            &bits(p.b.clone()),
            &p.c,
        );
        assert_close(&transposed.unwrap().d.written().unwrap(), &p.d);
    }
}

#[test]
fn products_of_what_is_no_number() {
    let mut p = product(7);
    p.a[5 * 16 + 3] = f32::NAN;
    p.b[9 * 8 + 2] = f32::INFINITY;
    let b: Vec<f32> = (0..128).map(|i| p.b[i % 16 * 8 + i / 16]).collect();
    let out = run("test_mma", Schedule::Forward, &bits(p.a), &bits(b), &p.c).unwrap();
    for (i, d) in out.d.written().unwrap().into_iter().enumerate() {
        // NaN stays in its row, infinity in its column.
        assert_eq!(d.is_finite(), i / 8 != 5 && i % 8 != 2, "{i}: {d}");
    }
}

#[test]
fn matrix_instructions_used_wrongly() {
    let fault = fault_of("test_ldmatrix_misaligned", FaultKind::Misaligned, run_zeros);
    assert_eq!(fault.thread, Some(1), "{fault}");
    fault_of("test_ldmatrix_no_syncwarp", FaultKind::Race, run_zeros);
    fault_of("test_ldmatrix_own_rows", FaultKind::Race, run_zeros);
    fault_of(
        "test_ldmatrix_unwritten",
        FaultKind::Uninitialised,
        run_zeros,
    );
    fault_of("test_ldmatrix_of_global", FaultKind::OutOfBounds, run_zeros);
    let fault = fault_of("test_mma_in_branch", FaultKind::WarpDivergence, run_zeros);
    assert!(fault.detail.contains("wait at mma"), "{fault}");
}
