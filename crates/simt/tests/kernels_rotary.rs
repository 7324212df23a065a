//! `tenp_rotary` against the CPU's tables, and `tenp_mla_keys` against its definition.

mod around;

use around::{read, run, write};
use half::bf16;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use simt::{Buffer, Schedule};
use tenp_kernels::cpu::rotary::{RotaryScaling, RotaryTable};
use tenp_kernels::device::InOut;
use tenp_kernels::device::mla_keys::{MlaKeys, mla_keys};
use tenp_kernels::device::rotary::{Angles, Rotary, rotary};

const POSITIONS: usize = 50;
const TOKENS: usize = 5;

fn values(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-3.0..3.0)).collect()
}

fn yarn() -> RotaryScaling {
    RotaryScaling::Yarn {
        factor: 40.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_max_positions: 16,
        attention_factor: 1.3,
    }
}

/// One shape, all its outputs.
#[derive(Clone, Copy)]
struct Case {
    heads: usize,
    head_dim: usize,
    rotary_dim: usize,
    interleaved: bool,
    leading: bool,
    pad: usize,
    clip: Option<f32>,
    moved: bool,
}

impl Case {
    fn table(&self, scaling: &RotaryScaling) -> RotaryTable {
        let (dim, interleaved) = (self.rotary_dim, self.interleaved);
        let table = RotaryTable::new(dim, 1e4, scaling, interleaved, POSITIONS).unwrap();
        if self.leading {
            table.of_leading_elements()
        } else {
            table
        }
    }

    /// The CPU's result, and the input it was made of.
    fn expected(&self, table: &RotaryTable, x: &[f32], positions: &[u32]) -> Vec<f32> {
        let cols = self.heads * self.head_dim;
        let mut want: Vec<f32> = x
            .chunks_exact(cols + self.pad)
            .flat_map(|row| &row[..cols])
            .map(|&v| self.clip.map_or(v, |c| v.clamp(-c, c)))
            .collect();
        if self.rotary_dim > 0 {
            table.rotate(&mut want, self.head_dim, positions).unwrap();
        }
        want
    }

    fn check(&self, scaling: &RotaryScaling, schedule: Schedule, in_place: bool) {
        let mut rng = ChaCha8Rng::seed_from_u64((self.heads * 1000 + self.head_dim) as u64);
        let table = self.table(scaling);
        let cols = self.heads * self.head_dim;
        let pitch = cols + self.pad;
        let x = values(&mut rng, TOKENS * pitch);
        let positions = [0u32, 49, 7, 7, 31];
        let want = self.expected(&table, &x, &positions);
        let places = [2, 5, 0, 6, 3];
        let rows = if self.moved { 7 } else { TOKENS };

        let input = if in_place {
            Buffer::in_out("x", &x)
        } else {
            Buffer::input("x", &x)
        };
        let (cosines, sines) = (
            Buffer::input("cosines", table.cosines()),
            Buffer::input("sines", table.sines()),
        );
        let position_buffer = Buffer::input("positions", &positions.map(|p| p as i32));
        let place_buffer = Buffer::input("out_rows", &places);
        let out_f32 = Buffer::<f32>::output("out_f32", rows * pitch);
        let out_bf16 = Buffer::<bf16>::output("out_bf16", rows * pitch);
        let args = Rotary {
            x: if in_place {
                InOut::Over(write(&input))
            } else {
                InOut::Apart(read(&input), Some(write(&out_f32)))
            },
            angles: Angles {
                cosines: read(&cosines),
                sines: read(&sines),
                positions: table.positions(),
                pairs: table.pairs(),
                interleaved: table.is_interleaved(),
                leading: table.is_leading(),
            },
            positions: read(&position_buffer),
            out_rows: self.moved.then(|| read(&place_buffer)),
            out_bf16: (!in_place).then(|| write(&out_bf16)),
            num_tokens: TOKENS,
            num_heads: self.heads,
            head_dim: self.head_dim,
            x_pitch: pitch,
            num_out_rows: rows,
            out_pitch: pitch,
            clip: self.clip,
        };
        // SAFETY: the places are apart and below 7.
        run(schedule, &unsafe { rotary(args) }.unwrap());

        if in_place {
            self.compare(&want, &input.to_vec(), None, |at| at);
            let got = input.to_vec();
            assert!((0..x.len()).all(|i| i % pitch < cols || got[i] == x[i]));
        } else {
            let place = |t: usize| if self.moved { places[t] as usize } else { t };
            let left_alone =
                self.compare(&want, &out_f32.to_vec(), Some(&out_bf16.to_vec()), place);
            assert_eq!(out_f32.unwritten(), left_alone);
            assert_eq!(out_bf16.unwritten(), left_alone);
        }
    }

    /// Compares every element of every token and returns the indices of all others.
    fn compare(
        &self,
        want: &[f32],
        got: &[f32],
        got_bf16: Option<&[bf16]>,
        place: impl Fn(usize) -> usize,
    ) -> Vec<usize> {
        let cols = self.heads * self.head_dim;
        let mut left_alone = vec![true; got.len()];
        for (t, row) in want.chunks_exact(cols).enumerate() {
            for (c, &want) in row.iter().enumerate() {
                // The executor fuses nothing, so the bits are the CPU's.
                let at = place(t) * (cols + self.pad) + c;
                assert_eq!(got[at], want, "token {t} element {c}");
                if let Some(got) = got_bf16 {
                    assert_eq!(got[at], bf16::from_f32(want));
                }
                left_alone[at] = false;
            }
        }
        (0..got.len()).filter(|&i| left_alone[i]).collect()
    }
}

/// `values` behind `by` others.
fn behind(name: &str, values: &[f32], by: usize) -> Buffer<f32> {
    Buffer::input(name, &[&[f32::NAN; 2][..by], values].concat())
}

#[test]
fn one_base_or_pitch_off_its_alignment() {
    let table = RotaryTable::new(16, 1e4, &RotaryScaling::None, false, POSITIONS).unwrap();
    let x = values(&mut ChaCha8Rng::seed_from_u64(9), TOKENS * 16);
    let positions = [1u32, 2, 3, 4, 5];
    let mut want = x.clone();
    table.rotate(&mut want, 16, &positions).unwrap();
    for which in 0..7 {
        let off = |i: usize| usize::from(i == which);
        let (x_pitch, out_pitch) = (16 + off(5), 16 + off(6));
        let spread: Vec<f32> = x
            .chunks_exact(16)
            .flat_map(|row| [row, &[0.0][..off(5)]].concat())
            .collect();
        let inputs = [
            behind("x", &spread, off(0)),
            behind("cosines", table.cosines(), off(1)),
            behind("sines", table.sines(), off(2)),
        ];
        let part = |i: usize| read(&inputs[i]).slice(off(i)..inputs[i].len()).unwrap();
        let position_buffer = Buffer::input("positions", &positions.map(|p| p as i32));
        let out_f32 = Buffer::<f32>::output("out_f32", TOKENS * out_pitch + off(3));
        let out_bf16 = Buffer::<bf16>::output("out_bf16", TOKENS * out_pitch + off(4));
        let args = Rotary {
            x: InOut::Apart(
                part(0),
                Some(write(&out_f32).slice(off(3)..out_f32.len()).unwrap()),
            ),
            angles: Angles {
                cosines: part(1),
                sines: part(2),
                positions: POSITIONS,
                pairs: 8,
                interleaved: false,
                leading: false,
            },
            positions: read(&position_buffer),
            out_rows: None,
            out_bf16: Some(write(&out_bf16).slice(off(4)..out_bf16.len()).unwrap()),
            num_tokens: TOKENS,
            num_heads: 1,
            head_dim: 16,
            x_pitch,
            num_out_rows: TOKENS,
            out_pitch,
            clip: None,
        };
        // SAFETY: there is no map of rows.
        run(Schedule::Forward, &unsafe { rotary(args) }.unwrap());
        let (got, got_bf16) = (out_f32.to_vec(), out_bf16.to_vec());
        for (i, &want) in want.iter().enumerate() {
            let at = i / 16 * out_pitch + i % 16;
            assert_eq!(got[at + off(3)], want, "{which} {i}");
            assert_eq!(got_bf16[at + off(4)], bf16::from_f32(want), "{which} {i}");
        }
    }
}

#[test]
fn heads_are_rotated_as_on_the_cpu() {
    let scalings = [RotaryScaling::None, RotaryScaling::Linear(4.0), yarn()];
    let shapes = [
        (1, 2, 2),
        (3, 9, 6),
        (4, 16, 16),
        (2, 24, 8),
        (1, 70, 0),
        (8, 128, 128),
        (5, 192, 64),
        (1, 576, 64),
    ];
    for (i, (heads, head_dim, rotary_dim)) in shapes.into_iter().enumerate() {
        for (j, scaling) in scalings.iter().enumerate() {
            for interleaved in [false, true] {
                for (k, pad) in [0, 1, 4].into_iter().enumerate() {
                    let case = Case {
                        heads,
                        head_dim,
                        rotary_dim,
                        interleaved,
                        // Both ends with every size, pitch, schedule and way of pairing.
                        leading: (i + j + k + usize::from(interleaved)) % 2 == 1,
                        pad,
                        clip: (j == 1).then_some(1.5),
                        moved: k == 1 || j == 2,
                    };
                    let schedule = Schedule::UNLIKE[(i + j + k) % 4];
                    case.check(scaling, schedule, false);
                    let still = Case {
                        moved: false,
                        ..case
                    };
                    still.check(scaling, schedule, true);
                }
            }
        }
    }
}

#[test]
fn positions_outside_the_table_give_nan_to_their_own_token() {
    let table = RotaryTable::new(8, 1e4, &RotaryScaling::None, false, 4).unwrap();
    let x = [1.0f32; 50];
    let positions = [3, 4, -1, i32::MAX, i32::MIN];
    let (cosines, sines) = (
        Buffer::input("cosines", table.cosines()),
        Buffer::input("sines", table.sines()),
    );
    let (input, position_buffer) = (
        Buffer::input("x", &x),
        Buffer::input("positions", &positions),
    );
    let out = Buffer::<f32>::output("out_f32", 50);
    let args = Rotary {
        x: InOut::Apart(read(&input), Some(write(&out))),
        angles: Angles {
            cosines: read(&cosines),
            sines: read(&sines),
            positions: 4,
            pairs: 4,
            interleaved: false,
            leading: false,
        },
        positions: read(&position_buffer),
        out_rows: None,
        out_bf16: None,
        num_tokens: 5,
        num_heads: 1,
        head_dim: 10,
        x_pitch: 10,
        num_out_rows: 5,
        out_pitch: 10,
        clip: None,
    };
    // SAFETY: there is no map of rows.
    run(Schedule::Random(4), &unsafe { rotary(args) }.unwrap());
    let got = out.written().unwrap();
    for (t, head) in got.chunks_exact(10).enumerate() {
        assert_eq!(head[..2], [1.0; 2]);
        assert!(head[2..].iter().all(|v| v.is_nan() == (t > 0)), "token {t}");
    }
}

fn check_mla(
    dims: (usize, usize, usize),
    heads: usize,
    rank: usize,
    moved: bool,
    schedule: Schedule,
) {
    let (nope, rope, v_dim) = dims;
    let mut rng = ChaCha8Rng::seed_from_u64((heads * 1000 + nope) as u64);
    let (own, qk, pitch) = (nope + v_dim, nope + rope, rank + rope);
    let mut expanded = values(&mut rng, TOKENS * heads * own);
    let compressed = values(&mut rng, TOKENS * pitch);
    expanded[0] = f32::NAN;
    let places = [2, 5, 0, 6, 3];
    let rows = if moved { 7 } else { TOKENS };
    let (expanded_buffer, compressed_buffer, place_buffer) = (
        Buffer::input("expanded", &expanded),
        Buffer::input("compressed", &compressed),
        Buffer::input("out_rows", &places),
    );
    let keys = Buffer::<bf16>::output("keys", rows * heads * qk);
    let v_buffer = Buffer::<bf16>::output("values", rows * heads * v_dim);
    let args = MlaKeys {
        expanded: read(&expanded_buffer),
        compressed: read(&compressed_buffer),
        out_rows: moved.then(|| read(&place_buffer)),
        keys: write(&keys),
        values: write(&v_buffer),
        num_tokens: TOKENS,
        num_out_rows: rows,
        num_heads: heads,
        nope_dim: nope,
        rope_dim: rope,
        v_dim,
        compressed_pitch: pitch,
    };
    // SAFETY: the places are apart and below 7.
    run(schedule, &unsafe { mla_keys(args) }.unwrap());
    let (got_keys, got_values) = (keys.to_vec(), v_buffer.to_vec());
    let same = |got: bf16, want: f32| {
        let want = bf16::from_f32(want);
        got == want || (got.is_nan() && want.is_nan())
    };
    for (t, &place) in places.iter().enumerate() {
        let row = if moved { place as usize } else { t };
        for head in 0..heads {
            let from = &expanded[(t * heads + head) * own..][..own];
            let key = &got_keys[(row * heads + head) * qk..][..qk];
            let value = &got_values[(row * heads + head) * v_dim..][..v_dim];
            let shared = &compressed[t * pitch + rank..][..rope];
            let want_key = from[..nope].iter().chain(shared);
            assert!(key.iter().zip(want_key).all(|(&k, &w)| same(k, w)));
            assert!(value.iter().zip(&from[nope..]).all(|(&v, &w)| same(v, w)));
        }
    }
    let missing = (rows - TOKENS) * heads;
    assert_eq!(keys.unwritten().len(), missing * qk);
    assert_eq!(v_buffer.unwritten().len(), missing * v_dim);
}

#[test]
fn latent_keys_share_their_rotated_part() {
    let shapes = [
        ((128, 64, 128), 3, 512),
        ((16, 8, 24), 4, 40),
        ((5, 3, 7), 2, 9),
        ((8, 8, 8), 1, 1),
        ((8, 0, 8), 2, 4),
    ];
    for (i, (dims, heads, rank)) in shapes.into_iter().enumerate() {
        for moved in [false, true] {
            check_mla(dims, heads, rank, moved, Schedule::UNLIKE[i % 4]);
        }
    }
}
