//! `tenp_rms_norm` and `tenp_rms_norm_heads` against the CPU.

use half::bf16;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use simt::{Buffer, Executor, Schedule};
use tenp_kernels::cpu::norm::rms_norm;
use tenp_kernels::params::TenpRmsNormParams;

const EPS: f64 = 1e-6;

struct Case {
    rows: usize,
    width: usize,
    x_pitch: usize,
    out_pitch: usize,
}

impl Case {
    /// Launches `entry` with everything it can do, and compares.
    fn check(&self, entry: &str, rows_per_block: usize, shared_bytes: u32, schedule: Schedule) {
        let mut rng = ChaCha8Rng::seed_from_u64((self.rows * 10_000 + self.width) as u64);
        let mut values = |count: usize| -> Vec<f32> {
            (0..count).map(|_| rng.random_range(-2.0..2.0)).collect()
        };
        let (x, addend, weight) = (
            values(self.rows * self.x_pitch),
            values(self.rows * self.x_pitch),
            values(self.width),
        );
        let inputs = [
            Buffer::input("x", &x),
            Buffer::input("addend", &addend),
            Buffer::input("weight", &weight),
        ];
        let sum_out = Buffer::<f32>::output("sum_out", x.len());
        let out_f32 = Buffer::<f32>::output("out_f32", self.rows * self.out_pitch);
        let out_bf16 = Buffer::<u16>::output("out_bf16", self.rows * self.out_pitch);
        let params = TenpRmsNormParams {
            x: inputs[0].ptr(),
            addend: inputs[1].ptr(),
            weight: inputs[2].ptr(),
            sum_out: sum_out.mut_ptr(),
            out_f32: out_f32.mut_ptr(),
            out_bf16: out_bf16.mut_ptr(),
            eps: EPS,
            x_pitch: self.x_pitch as i64,
            out_pitch: self.out_pitch as i64,
            num_rows: self.rows as i32,
            width: self.width as i32,
        };
        let blocks = self.rows.div_ceil(rows_per_block) as u32;
        Executor::new(schedule)
            .launch(entry, [blocks, 1, 1], [256, 1, 1], shared_bytes, &params)
            .unwrap_or_else(|fault| panic!("{fault}"));

        let sums: Vec<f32> = x.iter().zip(&addend).map(|(a, b)| a + b).collect();
        let (got_sum, got, got_bf16) = (sum_out.to_vec(), out_f32.to_vec(), out_bf16.to_vec());
        let mut want = vec![0.0; self.width];
        for r in 0..self.rows {
            let (from, to) = (r * self.x_pitch, r * self.out_pitch);
            let row = &sums[from..from + self.width];
            rms_norm(row, &weight, EPS, &mut want).unwrap();
            assert_eq!(&got_sum[from..from + self.width], row);
            for i in 0..self.width {
                let got = got[to + i];
                assert!(
                    (got - want[i]).abs() <= 4e-7 * want[i].abs(),
                    "{entry} {r} {i}: {got} {}",
                    want[i]
                );
                assert_eq!(got_bf16[to + i], bf16::from_f32(got).to_bits());
            }
        }
        // The padding of each row and nothing else is left alone.
        let padding = |pitch: usize| -> Vec<usize> {
            (0..self.rows * pitch)
                .filter(|i| i % pitch >= self.width)
                .collect()
        };
        assert_eq!(sum_out.unwritten(), padding(self.x_pitch));
        assert_eq!(out_f32.unwritten(), padding(self.out_pitch));
        assert_eq!(out_bf16.unwritten(), padding(self.out_pitch));
    }
}

#[test]
fn rows_of_awkward_widths() {
    for (i, width) in [1, 7, 31, 32, 33, 128, 255, 256, 257, 1408]
        .into_iter()
        .enumerate()
    {
        for rows in [1, 7, 8, 9] {
            let case = Case {
                rows,
                width,
                x_pitch: width + 3,
                out_pitch: width + rows,
            };
            let schedule = Schedule::UNLIKE[(i + rows) % 4];
            case.check("tenp_rms_norm", 1, 64, schedule);
            case.check("tenp_rms_norm_heads", 8, 0, schedule);
        }
    }
}
