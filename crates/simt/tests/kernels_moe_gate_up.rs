//! `tenp_moe_gate_up_*` against the formula in f64, every path and width.

mod support;

use half::bf16;
use simt::{Buffer, Schedule};
use support::moe::{Batch, GATE_UP_PATHS, Partials, Path, Tiles, gate_up, partial_stride};
use support::{BF16_ROUNDING, F32_ROUNDING, assert_close, number};
use tenp_kernels::params::{
    TENP_NUM_ACTIVATION_SUMS, TENP_SUM_ACTIVATION, TENP_SUM_GATED_ENERGY, TENP_SUM_GATED_PEAK,
    TENP_SUM_MEAN, TENP_SUM_SECOND_MOMENT,
};

/// Sum of products, and how far f32 may be from it whatever the order of its additions.
fn dot(a: &[bf16], b: &[bf16]) -> (f64, f64) {
    let terms = || {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32()))
    };
    let size: f64 = terms().map(f64::abs).sum();
    (terms().sum(), (a.len() as f64 + 1.0) * F32_ROUNDING * size)
}

/// h and how far the kernel may be from it: the sums' errors through silu(g) u, |silu'| ≤ 1.1, the exponential's, and
/// the rounding to bf16.
fn activation(batch: &Batch, expert: usize, neuron: usize, token: usize) -> (f64, f64) {
    let hidden = batch.layer.hidden;
    let x = &batch.x[token * hidden..(token + 1) * hidden];
    let weights = &batch.layer.experts[expert];
    let row = neuron * hidden..(neuron + 1) * hidden;
    let (g, dg) = dot(&weights.gate[row.clone()], x);
    let (u, du) = dot(&weights.up[row], x);
    let silu = g / (1.0 + (-g).exp());
    let h = silu * u;
    let before = 1.1 * dg * u.abs() + silu.abs() * du + 1.1 * dg * du + 8.0 * F32_ROUNDING * h.abs();
    (h, before * (1.0 + BF16_ROUNDING) + h.abs() * BF16_ROUNDING)
}

fn check_h(batch: &Batch, h: &Buffer<u16>, what: &str) {
    let pitch = batch.layer.hidden_pitch();
    let got = h.to_vec();
    for row in batch.rows() {
        let values = &got[row.row * pitch..(row.row + 1) * pitch];
        for (j, &bits) in values[..row.width].iter().enumerate() {
            let (want, tolerance) = activation(batch, row.expert, j, row.token);
            assert_close(number(bits), want, tolerance, || format!("{what} {row:?} neuron {j}"));
        }
        let padded = batch.layer.width_padded(row.expert);
        assert!(values[row.width..padded].iter().all(|&v| v == 0), "{what} {row:?} padding");
    }
    check_clipped(batch, h);
}

/// Written is what belongs to an expert's rows and padded width, and nothing else.
fn check_clipped(batch: &Batch, h: &Buffer<u16>) {
    let pitch = batch.layer.hidden_pitch();
    let mut left_alone = vec![true; h.len()];
    for row in batch.rows() {
        let padded = batch.layer.width_padded(row.expert);
        left_alone[row.row * pitch..row.row * pitch + padded].fill(false);
    }
    let expected: Vec<usize> = (0..h.len()).filter(|&i| left_alone[i]).collect();
    assert_eq!(h.unwritten(), expected);
}

fn run(batch: &Batch, path: Path, blocks: usize, schedule: Schedule) -> Buffer<u16> {
    let tiles = batch.tiles(path, 0, false, schedule);
    gate_up(batch, path, &tiles, None, blocks, schedule)
}

fn run_stats(batch: &Batch, path: Path, blocks: usize, schedule: Schedule) -> (Buffer<u16>, Partials, Tiles) {
    let tiles = batch.tiles(path, 0, true, schedule);
    let stride = partial_stride(&batch.layer, &batch.groups, path.token_tile);
    let partials = Partials {
        values: Buffer::output("partials", TENP_NUM_ACTIVATION_SUMS as usize * stride),
        stride,
    };
    let h = gate_up(batch, path, &tiles, Some(&partials), blocks, schedule);
    (h, partials, tiles)
}

#[test]
fn every_path_at_awkward_widths() {
    // The hidden sizes end inside a stage, inside a fragment, and at neither.
    for (i, (path, hidden)) in GATE_UP_PATHS
        .into_iter()
        .zip([72, 96, 88, 264])
        .enumerate()
    {
        let schedule = Schedule::UNLIKE[i];
        let batch = Batch::awkward(10 + i as u64, hidden, 37, schedule);
        check_h(&batch, &run(&batch, path, 3, schedule), path.name);
    }
}

#[test]
fn every_token_on_one_expert() {
    for (path, tokens) in GATE_UP_PATHS.into_iter().zip([131, 67, 18, 3]) {
        let batch = Batch::crowded(20, 64, tokens, Schedule::Random(5));
        check_h(&batch, &run(&batch, path, 2, Schedule::Random(5)), path.name);
    }
}

#[test]
fn runs_are_bitwise_equal_whatever_the_order_and_the_grid() {
    let batch = Batch::awkward(30, 40, 20, Schedule::Forward);
    for path in GATE_UP_PATHS {
        let first = run(&batch, path, 1, Schedule::Forward).to_vec();
        for (blocks, schedule) in [2, 5, 40].into_iter().zip(&Schedule::UNLIKE[1..]) {
            assert!(run(&batch, path, blocks, *schedule).to_vec() == first, "{path:?}");
        }
    }
}

#[test]
fn statistics_are_sums_over_the_stored_h() {
    for (i, (path, tokens)) in GATE_UP_PATHS.into_iter().take(2).zip([300, 150]).enumerate() {
        let schedule = Schedule::UNLIKE[i + 1];
        let mut batch = Batch::awkward(40, 16, tokens, schedule);
        if i == 1 {
            batch = Batch::crowded(41, 16, 130, schedule);
        }
        let (h, partials, tiles) = run_stats(&batch, path, 3, schedule);
        check_h(&batch, &h, path.name);
        check_statistics(&batch, path, &h.to_vec(), &partials, &tiles);
    }
}

fn check_statistics(batch: &Batch, path: Path, h: &[u16], partials: &Partials, tiles: &Tiles) {
    let got = partials.values.written().unwrap();
    let offsets = tiles.partial_offsets.written().unwrap();
    let pitch = batch.layer.hidden_pitch();
    for e in 0..batch.layer.num_experts() {
        let rows: Vec<usize> = batch.groups.rows(e).collect();
        let padded = batch.layer.width_padded(e);
        for (tile, rows) in rows.chunks(path.token_tile).enumerate() {
            for j in 0..padded {
                let mut want = [0f64; TENP_NUM_ACTIVATION_SUMS as usize];
                for &row in rows {
                    let value = number(h[row * pitch + j]);
                    let gate = f64::from(batch.groups.weights()[row]);
                    let gated = (gate * value).powi(2);
                    want[TENP_SUM_ACTIVATION as usize] += value.abs();
                    want[TENP_SUM_GATED_ENERGY as usize] += gated;
                    want[TENP_SUM_GATED_PEAK as usize] = want[TENP_SUM_GATED_PEAK as usize].max(gated);
                    want[TENP_SUM_MEAN as usize] += value;
                    want[TENP_SUM_SECOND_MOMENT as usize] += value * value;
                }
                for (s, want) in want.into_iter().enumerate() {
                    let at = s * partials.stride + offsets[e] as usize + tile * padded + j;
                    // f32 additions of at most a tile's rows; products round three times.
                    let size = match s as u32 {
                        TENP_SUM_MEAN => rows.iter().map(|&r| number(h[r * pitch + j]).abs()).sum(),
                        _ => want,
                    };
                    let tolerance = (rows.len() as f64 + 4.0) * F32_ROUNDING * size;
                    assert_close(f64::from(got[at]), want, tolerance, || {
                        format!("{} sum {s} expert {e} tile {tile} neuron {j}", path.name)
                    });
                }
            }
        }
    }
}

#[test]
fn statistics_do_not_change_h() {
    let batch = Batch::awkward(50, 24, 20, Schedule::Forward);
    for path in &GATE_UP_PATHS[..2] {
        let plain = run(&batch, *path, 2, Schedule::Forward).to_vec();
        let (h, partials, _) = run_stats(&batch, *path, 2, Schedule::Reversed);
        assert!(h.to_vec() == plain);
        let (_, again, _) = run_stats(&batch, *path, 7, Schedule::Random(3));
        assert_eq!(again.values.to_vec(), partials.values.to_vec());
    }
}

#[test]
fn bad_tokens_and_weights_stay_where_they_are() {
    let schedule = Schedule::Forward;
    let clean = Batch::awkward(60, 32, 24, schedule);
    let hidden = clean.layer.hidden;
    let mut dirty = Batch::awkward(60, 32, 24, schedule);
    // A token of NaN, one with an infinity, and a weight that is NaN in one neuron of expert 9.
    dirty.x[5 * hidden..6 * hidden].fill(bf16::NAN);
    dirty.x[8 * hidden + 3] = bf16::INFINITY;
    dirty.layer.experts[9].up[100 * hidden] = bf16::NAN;
    let dirty = Batch::new(dirty.layer, dirty.routing, dirty.x, schedule);
    let pitch = clean.layer.hidden_pitch();
    for path in GATE_UP_PATHS {
        let (want, got) = (
            run(&clean, path, 3, schedule).to_vec(),
            run(&dirty, path, 3, schedule),
        );
        check_clipped(&dirty, &got);
        let got = got.to_vec();
        for row in clean.rows() {
            for j in 0..row.width {
                let at = row.row * pitch + j;
                if row.token == 5 || (row.expert, j) == (9, 100) {
                    assert!(bf16::from_bits(got[at]).is_nan(), "{path:?} {row:?} {j}");
                } else if row.token != 8 {
                    assert_eq!(got[at], want[at], "{path:?} {row:?} {j}");
                }
            }
            // Padding is zero even behind a token of NaN.
            let padding = row.row * pitch + row.width..row.row * pitch + clean.layer.width_padded(row.expert);
            assert!(got[padding].iter().all(|&v| v == 0));
        }
    }
}

#[test]
fn no_tokens_at_all() {
    let batch = Batch::awkward(70, 16, 0, Schedule::Forward);
    for path in GATE_UP_PATHS {
        assert!(run(&batch, path, 2, Schedule::Forward).is_empty());
    }
}
