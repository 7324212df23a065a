//! `tenp_embedding`, `tenp_convert_rows`, `tenp_silu_mul`, `tenp_add`, `tenp_count_non_finite` against plain loops.

mod around;

use around::{read, run, write};
use half::{bf16, f16};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use simt::{Buffer, Schedule};
use tenp_kernels::device::InOut;
use tenp_kernels::device::elementwise::{Add, SiluMul, add, count_non_finite, silu_mul};
use tenp_kernels::device::rows::{ConvertRows, Elements, Embedding, convert_rows, embedding};

/// Around the vectors and the block.
const WIDTHS: [usize; 15] = [
    0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 260, 1032, 2048, 2056,
];

const DAMAGED: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];

fn rng(seed: usize) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed as u64)
}

/// Numbers in ±3, some of them damaged.
fn values(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count)
        .map(|_| match rng.random_range(0..40) {
            i @ 0..3 => DAMAGED[i],
            _ => rng.random_range(-3.0..3.0),
        })
        .collect()
}

/// Equal bits, but for the payload of NaN.
#[track_caller]
fn assert_same(got: f32, want: f32, what: &str) {
    let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
    assert!(same, "{what}: {got} {want}");
}

#[test]
fn embeddings_are_rows_of_the_table() {
    for (i, hidden) in WIDTHS.into_iter().filter(|w| w % 8 == 0).enumerate() {
        let mut rng = rng(i);
        let (vocab, ids) = (5, [4, 0, -1, 3, 3, 5, i32::MIN, i32::MAX]);
        let table: Vec<bf16> = values(&mut rng, vocab * hidden)
            .into_iter()
            .map(bf16::from_f32)
            .collect();
        let (table_buffer, id_buffer) =
            (Buffer::input("table", &table), Buffer::input("ids", &ids));
        let out = Buffer::<f32>::output("hidden_states", ids.len() * hidden);
        let call = embedding(Embedding {
            table: read(&table_buffer),
            ids: read(&id_buffer),
            hidden_states: write(&out),
            num_tokens: ids.len(),
            vocab_size: vocab,
            hidden,
        })
        .unwrap();
        run(Schedule::UNLIKE[i % 4], &call);
        let got = out.written().unwrap();
        for (t, &id) in ids.iter().enumerate() {
            for c in 0..hidden {
                let want = match usize::try_from(id) {
                    Ok(id) if id < vocab => table[id * hidden + c].to_f32(),
                    _ => f32::NAN,
                };
                assert_same(got[t * hidden + c], want, "embedding");
            }
        }
    }
}

/// One conversion: `shift` moves every base off its alignment, the pads make the pitches longer than a row.
struct Conversion {
    cols: usize,
    shift: usize,
    in_pad: usize,
    out_pad: usize,
    extras: bool,
    schedule: Schedule,
}

const ROWS: usize = 5;

impl Conversion {
    fn check(&self, dtype: usize) {
        let mut rng = rng(self.cols * 100 + dtype * 10 + self.shift);
        let (in_pitch, out_pitch) = (self.cols + self.in_pad, self.cols + self.out_pad);
        let len = ROWS * in_pitch + self.shift;
        let wide = values(&mut rng, len);
        let f32s = Buffer::input("in", &wide);
        let bf16s: Vec<bf16> = wide.iter().map(|&v| bf16::from_f32(v)).collect();
        // All kinds of f16, subnormal ones too.
        let f16s: Vec<f16> = (0..len).map(|_| f16::from_bits(rng.random())).collect();
        let (bf16_buffer, f16_buffer) = (Buffer::input("in", &bf16s), Buffer::input("in", &f16s));
        let from = self.shift..len;
        let input = match dtype {
            0 => Elements::F32(read(&f32s).slice(from).unwrap()),
            1 => Elements::Bf16(read(&bf16_buffer).slice(from).unwrap()),
            _ => Elements::F16(read(&f16_buffer).slice(from).unwrap()),
        };
        let source = |i: usize| match dtype {
            0 => wide[i + self.shift],
            1 => bf16s[i + self.shift].to_f32(),
            _ => f16s[i + self.shift].to_f32(),
        };
        let bias = values(&mut rng, self.cols);
        let bias_buffer = Buffer::input("bias", &bias);
        let places = [3, 0, 6, 4, 1];
        let place_buffer = Buffer::input("out_rows", &places);
        let num_out_rows = if self.extras { 7 } else { ROWS };
        let out_len = num_out_rows * out_pitch + self.shift;
        let (out_f32, out_bf16) = (
            Buffer::<f32>::output("out_f32", out_len),
            Buffer::<bf16>::output("out_bf16", out_len),
        );
        let args = ConvertRows {
            input,
            bias: self.extras.then(|| read(&bias_buffer)),
            out_rows: self.extras.then(|| read(&place_buffer)),
            out_f32: Some(write(&out_f32).slice(self.shift..out_len).unwrap()),
            out_bf16: Some(write(&out_bf16).slice(self.shift..out_len).unwrap()),
            rows: ROWS,
            cols: self.cols,
            in_pitch,
            num_out_rows,
            out_pitch,
            clip: self.extras.then_some(1.5),
        };
        // SAFETY: the places are apart and below 7.
        run(self.schedule, &unsafe { convert_rows(args) }.unwrap());
        let (got, got_bf16) = (out_f32.to_vec(), out_bf16.to_vec());
        let mut left_alone = vec![true; out_len];
        for (r, &place) in places.iter().enumerate() {
            for (c, &bias) in bias.iter().enumerate() {
                let mut want = source(r * in_pitch + c);
                if self.extras {
                    want = (want + bias).clamp(-1.5, 1.5);
                }
                let place = if self.extras { place as usize } else { r };
                let at = self.shift + place * out_pitch + c;
                assert_same(got[at], want, "convert");
                assert_same(
                    got_bf16[at].to_f32(),
                    bf16::from_f32(want).to_f32(),
                    "convert",
                );
                left_alone[at] = false;
            }
        }
        let expected: Vec<usize> = (0..out_len).filter(|&i| left_alone[i]).collect();
        assert_eq!(out_f32.unwritten(), expected);
        assert_eq!(out_bf16.unwritten(), expected);
    }
}

#[test]
fn rows_are_converted_whatever_their_alignment() {
    for (i, cols) in WIDTHS.into_iter().enumerate() {
        for dtype in 0..3 {
            let pads = [(0, 0, 0), (0, 8, 16), (1, 0, 0), (0, 3, 8), (0, 8, 3)];
            for (j, (shift, in_pad, out_pad)) in pads.into_iter().enumerate() {
                let case = Conversion {
                    cols,
                    shift,
                    in_pad,
                    out_pad,
                    extras: (i + j) % 2 == 0,
                    schedule: Schedule::UNLIKE[(i + j + dtype) % 4],
                };
                case.check(dtype);
            }
        }
    }
}

#[test]
fn one_output_may_be_left_out() {
    let x = Buffer::input("in", &[1.5f32; 24]);
    let (out_f32, out_bf16) = (
        Buffer::<f32>::output("out_f32", 24),
        Buffer::<bf16>::output("out_bf16", 24),
    );
    for wide in [false, true] {
        let args = ConvertRows {
            input: Elements::F32(read(&x)),
            bias: None,
            out_rows: None,
            out_f32: wide.then(|| write(&out_f32)),
            out_bf16: (!wide).then(|| write(&out_bf16)),
            rows: 3,
            cols: 8,
            in_pitch: 8,
            num_out_rows: 3,
            out_pitch: 8,
            clip: None,
        };
        // SAFETY: there is no map of rows.
        run(Schedule::Forward, &unsafe { convert_rows(args) }.unwrap());
    }
    assert_eq!(out_f32.written().unwrap(), [1.5; 24]);
    assert_eq!(out_bf16.written().unwrap(), [bf16::from_f32(1.5); 24]);
}

#[test]
fn activations_match_f64() {
    for (i, cols) in WIDTHS.into_iter().enumerate() {
        for (j, pad) in [0, 4, 5].into_iter().enumerate() {
            let mut rng = rng(300 + i);
            let (rows, pitch) = (3, cols + pad);
            let mut gate = values(&mut rng, rows * pitch);
            if pitch > 8 {
                gate[1] = 200.0;
                gate[2] = -200.0;
            }
            let up = values(&mut rng, rows * pitch);
            let (gates, ups) = (Buffer::input("gate", &gate), Buffer::input("up", &up));
            let out = Buffer::<bf16>::output("out", rows * cols);
            let call = silu_mul(SiluMul {
                gate: read(&gates),
                up: read(&ups),
                out: write(&out),
                rows,
                cols,
                pitch,
            })
            .unwrap();
            run(Schedule::UNLIKE[(i + j) % 4], &call);
            for (at, got) in out.written().unwrap().into_iter().enumerate() {
                let from = at / cols * pitch + at % cols;
                let (g, u) = (f64::from(gate[from]), f64::from(up[from]));
                // −∞ stays what it is, as on the CPU.
                let silu = if g == f64::NEG_INFINITY {
                    g
                } else {
                    g / (1.0 + (-g).exp())
                };
                let (got, want) = (f64::from(got.to_f32()), silu * u);
                let same = got == want || (got.is_nan() && want.is_nan());
                // Half a unit of bf16, what the exponential is off by, and where it saturates.
                assert!(
                    same || (got - want).abs() <= want.abs() * (1.0 / 256.0 + 1e-5) + 1e-34,
                    "{g} {u}: {got} {want}"
                );
            }
        }
    }
}

#[test]
fn sums_with_and_without_gates_and_in_place() {
    for (i, cols) in WIDTHS.into_iter().enumerate() {
        for (j, (gated, in_place)) in [(false, false), (true, true), (true, false), (false, true)]
            .into_iter()
            .enumerate()
        {
            let mut rng = rng(400 + i);
            let rows = 4;
            let (a, b) = (values(&mut rng, rows * cols), values(&mut rng, rows * cols));
            let logits = [0.3f32, -200.0, 200.0, f32::NAN];
            let (b_buffer, logit_buffer) =
                (Buffer::input("b", &b), Buffer::input("row_logits", &logits));
            let a_buffer = if in_place {
                Buffer::in_out("a", &a)
            } else {
                Buffer::input("a", &a)
            };
            let out = Buffer::<f32>::output("out", rows * cols);
            let call = add(Add {
                a: if in_place {
                    InOut::Over(write(&a_buffer))
                } else {
                    InOut::Apart(read(&a_buffer), Some(write(&out)))
                },
                b: read(&b_buffer),
                row_logits: gated.then(|| read(&logit_buffer)),
                rows,
                cols,
            })
            .unwrap();
            run(Schedule::UNLIKE[(i + j) % 4], &call);
            let got = if in_place {
                a_buffer.to_vec()
            } else {
                out.written().unwrap()
            };
            for (at, got) in got.into_iter().enumerate() {
                let gate = if gated {
                    1.0 / (1.0 + (-f64::from(logits[at / cols])).exp())
                } else {
                    1.0
                };
                let want = f64::from(a[at]) + gate * f64::from(b[at]);
                let got = f64::from(got);
                let same = got == want || (got.is_nan() && want.is_nan());
                assert!(same || (got - want).abs() < 2e-6, "{at}: {got} {want}");
            }
        }
    }
}

#[test]
fn damaged_numbers_are_counted_on_top() {
    for (i, len) in [0usize, 1, 3, 4, 5, 255, 1024, 8191, 8192, 8193, 20_000]
        .into_iter()
        .enumerate()
    {
        for shift in [0, 1] {
            let x = values(&mut rng(500 + i), len + shift);
            let (x_buffer, count) = (Buffer::input("x", &x), Buffer::in_out("count", &[7i32]));
            let part = read(&x_buffer).slice(shift..len + shift).unwrap();
            let call = count_non_finite(part, write(&count), 1).unwrap();
            run(Schedule::UNLIKE[(i + shift) % 4], &call);
            let want = x[shift..].iter().filter(|v| !v.is_finite()).count();
            assert_eq!(count.to_vec(), [7 + want as i32]);
        }
    }
}
