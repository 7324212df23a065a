//! `tenp_pack_gate_up` and `tenp_pack_down` against the host's packing, `tenp_dequantise_fp8` against the format.

mod around;

use around::{read, run, write};
use half::bf16;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use simt::{Buffer, Schedule};
use tenp_kernels::FP8_BLOCK;
use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::device::PaddedLayout;
use tenp_kernels::device::dequantise_fp8::{DequantiseFp8, dequantise_fp8};
use tenp_kernels::device::pack::{PackDown, PackGateUp, pack_down, pack_gate_up};
use tenp_kernels::{MatrixView, RaggedLayout};

const WIDTHS: [usize; 11] = [0, 1, 7, 8, 16, 63, 64, 65, 127, 128, 129];

/// Any bits: NaN and infinities are weights too.
fn weights(rng: &mut ChaCha8Rng, count: usize) -> Vec<bf16> {
    (0..count).map(|_| bf16::from_bits(rng.random())).collect()
}

fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// An expert in checkpoint order.
struct Source {
    width: usize,
    hidden: usize,
    gate: Vec<bf16>,
    up: Vec<bf16>,
    down: Vec<bf16>,
}

impl Source {
    fn new(rng: &mut ChaCha8Rng, width: usize, hidden: usize) -> Self {
        let mut make = || weights(rng, width * hidden);
        Self {
            width,
            hidden,
            gate: make(),
            up: make(),
            down: make(),
        }
    }

    /// The neurons `keep` alone, in that order.
    fn kept(&self, keep: &[i32]) -> Self {
        let rows = |from: &[bf16]| -> Vec<bf16> {
            keep.iter()
                .flat_map(|&j| &from[j as usize * self.hidden..][..self.hidden])
                .copied()
                .collect()
        };
        let down = (0..self.hidden)
            .flat_map(|h| {
                keep.iter()
                    .map(move |&j| self.down[h * self.width + j as usize])
            })
            .collect();
        Self {
            width: keep.len(),
            hidden: self.hidden,
            gate: rows(&self.gate),
            up: rows(&self.up),
            down,
        }
    }

    /// The host's packing.
    fn packed(&self) -> (Vec<bf16>, Vec<bf16>) {
        let layout = PaddedLayout::new(&RaggedLayout::new(vec![self.width]).unwrap()).unwrap();
        let (width, hidden) = (self.width, self.hidden);
        let views = [ExpertWeights {
            gate: MatrixView::from_bf16(width, hidden, &self.gate).unwrap(),
            up: MatrixView::from_bf16(width, hidden, &self.up).unwrap(),
            down: MatrixView::from_bf16(hidden, width, &self.down).unwrap(),
        }];
        let mut gate_up = vec![bf16::NAN; 2 * layout.total() * hidden];
        let mut down = vec![bf16::NAN; layout.total() * hidden];
        layout.pack_gate_up(hidden, &views, &mut gate_up).unwrap();
        layout.pack_down(hidden, &views, &mut down).unwrap();
        (gate_up, down)
    }

    fn packed_by_kernel(&self, keep: Option<&[i32]>, schedule: Schedule) -> (Vec<bf16>, Vec<bf16>) {
        let width = keep.map_or(self.width, <[i32]>::len);
        let width_padded = width.next_multiple_of(16);
        let keep = keep.map(|keep| Buffer::input("keep", keep));
        let (gate, up) = (
            Buffer::input("gate", &self.gate),
            Buffer::input("up", &self.up),
        );
        // Rows of down begin anywhere.
        let shifted: Vec<bf16> = [bf16::ONE].iter().chain(&self.down).copied().collect();
        let down = Buffer::input("down", &shifted);
        let gate_up_out = Buffer::<bf16>::output("gate_up", 2 * width_padded * self.hidden);
        let down_out = Buffer::<bf16>::output("down_t", width_padded * self.hidden);
        let args = PackGateUp {
            gate: read(&gate),
            up: read(&up),
            keep: keep.as_ref().map(read),
            out: write(&gate_up_out),
            source_width: self.width,
            width,
            width_padded,
            hidden: self.hidden,
        };
        // SAFETY: the ids are neurons of the source.
        run(schedule, &unsafe { pack_gate_up(args) }.unwrap());
        let call = pack_down(PackDown {
            down: read(&down).slice(1..shifted.len()).unwrap(),
            keep: keep.as_ref().map(read),
            out: write(&down_out),
            source_width: self.width,
            width,
            width_padded,
            hidden: self.hidden,
        })
        .unwrap();
        run(schedule, &call);
        (gate_up_out.written().unwrap(), down_out.written().unwrap())
    }
}

#[test]
fn whole_experts_are_packed_as_on_the_host() {
    for (i, width) in WIDTHS.into_iter().enumerate() {
        for (j, hidden) in [8, 64, 72, 136].into_iter().enumerate() {
            let mut rng = ChaCha8Rng::seed_from_u64((width * 1000 + hidden) as u64);
            let source = Source::new(&mut rng, width, hidden);
            let (gate_up, down) = source.packed();
            let got = source.packed_by_kernel(None, Schedule::UNLIKE[(i + j) % 4]);
            assert_eq!(bits(&got.0), bits(&gate_up), "GU {width} {hidden}");
            assert_eq!(bits(&got.1), bits(&down), "DT {width} {hidden}");
        }
    }
}

#[test]
fn kept_neurons_are_gathered_in_order() {
    for (i, width) in WIDTHS.into_iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(7 + width as u64);
        let source = Source::new(&mut rng, 130, 72);
        // Ascending with gaps, and any order with repeats.
        let gaps: Vec<i32> = (0..130).step_by(2).take(width).collect();
        let any: Vec<i32> = (0..width).map(|_| rng.random_range(0..130)).collect();
        for keep in [&gaps, &any] {
            let (gate_up, down) = source.kept(keep).packed();
            let got = source.packed_by_kernel(Some(keep), Schedule::UNLIKE[i % 4]);
            assert_eq!(bits(&got.0), bits(&gate_up), "GU {width}");
            assert_eq!(bits(&got.1), bits(&down), "DT {width}");
        }
    }
}

#[test]
fn columns_that_are_not_there_become_nan() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let source = Source::new(&mut rng, 5, 16);
    let keep = Buffer::input("keep", &[4, 5, -1, i32::MIN, i32::MAX, -2, 0]);
    let down = Buffer::input("down", &source.down);
    let out = Buffer::<bf16>::output("down_t", 16 * 16);
    let call = pack_down(PackDown {
        down: read(&down),
        keep: Some(read(&keep)),
        out: write(&out),
        source_width: 5,
        width: 7,
        width_padded: 16,
        hidden: 16,
    })
    .unwrap();
    run(Schedule::Random(3), &call);
    let got = out.written().unwrap();
    for (neuron, row) in got.chunks_exact(16).enumerate() {
        for (h, &value) in row.iter().enumerate() {
            let column = |j: usize| source.down[h * 5 + j].to_bits();
            match neuron {
                0 => assert_eq!(value.to_bits(), column(4)),
                6 => assert_eq!(value.to_bits(), column(0)),
                1..6 => assert!(value.is_nan()),
                _ => assert_eq!(value.to_bits(), 0),
            }
        }
    }
}

/// OCP 8-bit floating point specification, E4M3: bias 7, no infinity, S.1111.111 is NaN.
fn e4m3(code: u8) -> f64 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => sign * mantissa / 8.0 * 2f64.powi(-6),
        _ => sign * (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    }
}

fn check_fp8(rows: usize, cols: usize, shift: usize, schedule: Schedule) {
    let mut rng = ChaCha8Rng::seed_from_u64((rows * 10_000 + cols) as u64);
    let codes: Vec<u8> = (0..rows * cols + shift).map(|_| rng.random()).collect();
    let across = cols.div_ceil(FP8_BLOCK);
    let mut scales: Vec<f32> = (0..rows.div_ceil(FP8_BLOCK) * across)
        .map(|_| rng.random_range(1e-3..2.0))
        .collect();
    if scales.len() > 2 {
        scales[1] = f32::INFINITY;
        scales[2] = f32::NAN;
    }
    let (code_buffer, scale_buffer) = (
        Buffer::input("in", &codes),
        Buffer::input("scales", &scales),
    );
    let out = Buffer::<bf16>::output("out", rows * cols);
    let call = dequantise_fp8(DequantiseFp8 {
        input: read(&code_buffer).slice(shift..codes.len()).unwrap(),
        scales: read(&scale_buffer),
        out: write(&out),
        rows,
        cols,
    })
    .unwrap();
    run(schedule, &call);
    for (i, got) in out.written().unwrap().into_iter().enumerate() {
        let scale = scales[i / cols / FP8_BLOCK * across + i % cols / FP8_BLOCK];
        // The product of 4 and 24 bits is rounded to f32 first, as documented.
        let want = bf16::from_f32((e4m3(codes[i + shift]) * f64::from(scale)) as f32);
        assert!(
            got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()),
            "[{rows}, {cols}] {i}: {got} {want}"
        );
    }
}

#[test]
fn fp8_blocks_with_tails() {
    for (i, cols) in [0, 1, 15, 16, 127, 128, 129, 144, 300, 2048]
        .into_iter()
        .enumerate()
    {
        for (j, rows) in [1, 2, 128, 130].into_iter().enumerate() {
            let schedule = Schedule::UNLIKE[(i + j) % 4];
            check_fp8(rows, cols, 0, schedule);
            if j == 1 {
                check_fp8(rows, cols, 1, schedule);
            }
        }
    }
}
