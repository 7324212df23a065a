//! `tenp_moe_gate_up_*` against the formula in f64, every path and width.

mod support;

use half::bf16;
use simt::{Buffer, Schedule};
use support::moe::Batch;
use support::products::{Partials, gate_up};
use support::{BF16_ROUNDING, F32_ROUNDING, Sim, assert_close, bytes_of, dot};
use tenp_kernels::device::{Product, Tile};
use tenp_kernels::params::{
    TENP_NUM_ACTIVATION_SUMS, TENP_SUM_ACTIVATION, TENP_SUM_GATED_ENERGY, TENP_SUM_GATED_PEAK,
    TENP_SUM_MEAN, TENP_SUM_SECOND_MOMENT,
};

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
    let sums = 1.1 * dg * u.abs() + silu.abs() * du + 1.1 * dg * du;
    let before = sums + 8.0 * F32_ROUNDING * h.abs();
    (h, before * (1.0 + BF16_ROUNDING) + h.abs() * BF16_ROUNDING)
}

fn check_h(batch: &Batch, h: &Buffer<bf16>, what: &str) {
    let pitch = batch.layer.hidden_pitch();
    let got = h.to_vec();
    for row in batch.rows() {
        let values = &got[row.index * pitch..(row.index + 1) * pitch];
        for (j, value) in values[..row.width].iter().enumerate() {
            let (want, tolerance) = activation(batch, row.expert, j, row.token);
            assert_close(value.to_f64(), want, tolerance, || {
                format!("{what} {row:?} neuron {j}")
            });
        }
        let padded = batch.layer.width_padded(row.expert);
        assert!(
            values[row.width..padded].iter().all(|v| v.to_bits() == 0),
            "{what} {row:?} padding"
        );
    }
    check_clipped(batch, h);
}

/// Written is what belongs to an expert's rows and padded width, and nothing else.
fn check_clipped(batch: &Batch, h: &Buffer<bf16>) {
    let pitch = batch.layer.hidden_pitch();
    let mut left_alone = vec![true; h.len()];
    for row in batch.rows() {
        let padded = batch.layer.width_padded(row.expert);
        left_alone[row.index * pitch..row.index * pitch + padded].fill(false);
    }
    let expected: Vec<usize> = (0..h.len()).filter(|&i| left_alone[i]).collect();
    assert_eq!(h.unwritten(), expected);
}

#[test]
fn every_path_at_awkward_widths() {
    // The hidden sizes end inside a stage, inside a fragment, and at neither.
    for (i, (tile, hidden)) in Tile::of(true)
        .zip([264, 88, 96, 72].into_iter().cycle())
        .enumerate()
    {
        let batch = Batch::awkward(10 + i as u64, hidden, 37);
        let product = Product::gate_up(tile);
        check_h(
            &batch,
            &gate_up(&batch, product, Sim::unlike(i)).0,
            product.entry,
        );
    }
}

#[test]
fn experts_as_wide_as_real_ones() {
    let batch = Batch::wide(12, 16, 21);
    for (i, tile) in Tile::of(true).enumerate() {
        let product = Product::gate_up(tile);
        check_h(
            &batch,
            &gate_up(&batch, product, Sim::unlike(i)).0,
            product.entry,
        );
    }
}

#[test]
fn every_token_on_one_expert() {
    for (i, (tile, tokens)) in Tile::of(true)
        .zip([3, 18, 67, 131, 9, 17, 35, 66, 131, 200, 260])
        .enumerate()
    {
        let batch = Batch::crowded(20, 64, tokens);
        let product = Product::gate_up(tile);
        check_h(
            &batch,
            &gate_up(&batch, product, Sim::unlike(i)).0,
            product.entry,
        );
    }
}

#[test]
fn runs_are_bitwise_equal_whatever_the_order_and_the_grid() {
    let batch = Batch::awkward(30, 40, 20);
    for tile in Tile::of(true) {
        let product = Product::gate_up(tile);
        let first = bytes_of(&gate_up(&batch, product, Sim::unlike(0)).0);
        for i in 1..4 {
            assert!(bytes_of(&gate_up(&batch, product, Sim::unlike(i)).0) == first);
        }
    }
}

#[test]
fn statistics_are_sums_over_the_stored_h() {
    for (i, (tile, batch)) in [
        (Tile::N64, Batch::awkward(40, 16, 150)),
        (Tile::N128, Batch::awkward(41, 16, 300)),
        (Tile::N64, Batch::crowded(42, 16, 130)),
        (Tile::N128, Batch::crowded(43, 16, 258)),
        (Tile::W8, Batch::awkward(48, 16, 40)),
        (Tile::W16, Batch::crowded(49, 72, 37)),
        (Tile::W32, Batch::awkward(50, 72, 90)),
        (Tile::W64, Batch::awkward(44, 16, 150)),
        (Tile::W128, Batch::awkward(45, 72, 300)),
        (Tile::W192, Batch::crowded(51, 16, 200)),
        (Tile::W192, Batch::awkward(52, 16, 400)),
        (Tile::W256, Batch::crowded(46, 16, 258)),
        (Tile::W256, Batch::awkward(47, 16, 400)),
    ]
    .into_iter()
    .enumerate()
    {
        let product = Product::gate_up_stats(tile);
        let (h, partials) = gate_up(&batch, product, Sim::unlike(i));
        check_h(&batch, &h, product.entry);
        check_statistics(&batch, product, &h.to_vec(), &partials.unwrap());
    }
}

/// The sums of one neuron over some rows, and the sizes that bound their rounding.
fn sums(values: &[(f64, f64)]) -> [(f64, f64); TENP_NUM_ACTIVATION_SUMS as usize] {
    let mut sums = [(0f64, 0f64); TENP_NUM_ACTIVATION_SUMS as usize];
    for &(h, gate) in values {
        let gated = (gate * h).powi(2);
        for (sum, term) in [
            (TENP_SUM_ACTIVATION, h.abs()),
            (TENP_SUM_GATED_ENERGY, gated),
            (TENP_SUM_MEAN, h),
            (TENP_SUM_SECOND_MOMENT, h * h),
        ] {
            sums[sum as usize].0 += term;
            sums[sum as usize].1 += term.abs();
        }
        let peak = &mut sums[TENP_SUM_GATED_PEAK as usize];
        *peak = (peak.0.max(gated), peak.0.max(gated));
    }
    sums
}

fn check_statistics(batch: &Batch, product: Product, h: &[bf16], partials: &Partials) {
    let got = partials.table();
    let pitch = batch.layer.hidden_pitch();
    for e in 0..batch.layer.num_experts() {
        let rows: Vec<usize> = batch.groups.rows(e).collect();
        for (tile, rows) in rows.chunks(product.tile.rows()).enumerate() {
            for j in 0..batch.layer.width_padded(e) {
                let values: Vec<(f64, f64)> = rows
                    .iter()
                    .map(|&r| {
                        (
                            h[r * pitch + j].to_f64(),
                            f64::from(batch.groups.weights()[r]),
                        )
                    })
                    .collect();
                for (s, (want, size)) in sums(&values).into_iter().enumerate() {
                    // f32 additions of at most a tile's rows; products round three times.
                    let tolerance = (rows.len() as f64 + 4.0) * F32_ROUNDING * size;
                    let got = got.get(batch, s as u32, e, tile, j);
                    assert_close(got, want, tolerance, || {
                        format!(
                            "{} sum {s} expert {e} tile {tile} neuron {j}",
                            product.entry
                        )
                    });
                }
            }
        }
    }
}

#[test]
fn statistics_do_not_change_h() {
    let batch = Batch::awkward(50, 24, 20);
    for tile in Tile::of(true).filter(|tile| tile.with_sums() == *tile) {
        let (plain, _) = gate_up(&batch, Product::gate_up(tile), Sim::unlike(0));
        let (h, partials) = gate_up(&batch, Product::gate_up_stats(tile), Sim::unlike(1));
        assert!(bytes_of(&h) == bytes_of(&plain));
        let (_, again) = gate_up(&batch, Product::gate_up_stats(tile), Sim::unlike(3));
        let bytes = |p: Option<Partials>| bytes_of(&p.expect("the entry makes them").values);
        assert!(bytes(again) == bytes(partials));
    }
}

#[test]
fn bad_tokens_and_weights_stay_where_they_are() {
    let clean = Batch::awkward(60, 32, 24);
    let hidden = clean.layer.hidden;
    let mut dirty = Batch::awkward(60, 32, 24);
    // A token of NaN, one with an infinity, and a weight that is NaN in one neuron of expert 9.
    dirty.x[5 * hidden..6 * hidden].fill(bf16::NAN);
    dirty.x[8 * hidden + 3] = bf16::INFINITY;
    dirty.layer.experts[9].up[100 * hidden] = bf16::NAN;
    let dirty = Batch::new(dirty.layer, dirty.routing, dirty.x);
    let pitch = clean.layer.hidden_pitch();
    for tile in Tile::of(true) {
        let product = Product::gate_up(tile);
        let want = gate_up(&clean, product, Sim::new(Schedule::Forward))
            .0
            .to_vec();
        let (got, _) = gate_up(&dirty, product, Sim::new(Schedule::Reversed));
        check_clipped(&dirty, &got);
        let got = got.to_vec();
        for row in clean.rows() {
            let first = row.index * pitch;
            for j in 0..row.width {
                let at = first + j;
                if row.token == 5 || (row.expert, j) == (9, 100) {
                    assert!(got[at].is_nan(), "{product:?} {row:?} {j}");
                } else if row.token != 8 {
                    assert_eq!(got[at], want[at], "{product:?} {row:?} {j}");
                }
            }
            // Padding is zero even behind a token of NaN.
            let padding = first + row.width..first + clean.layer.width_padded(row.expert);
            assert!(got[padding].iter().all(|v| v.to_bits() == 0));
        }
    }
}

/// Sums over numbers that are not finite are not finite, but for the largest, which passes over NaN. They stay with the neurons
/// and tiles of rows they belong to.
#[test]
fn statistics_of_bad_tokens() {
    let mut batch = Batch::awkward(61, 16, 150);
    let hidden = batch.layer.hidden;
    batch.x[5 * hidden..6 * hidden].fill(bf16::NAN);
    batch.x[8 * hidden + 3] = bf16::INFINITY;
    let batch = Batch::new(batch.layer, batch.routing, batch.x);
    for (i, tile) in Tile::of(true)
        .filter(|tile| tile.with_sums() == *tile)
        .enumerate()
    {
        let product = Product::gate_up_stats(tile);
        let (h, partials) = gate_up(&batch, product, Sim::unlike(i));
        let (h, partials) = (h.to_vec(), partials.expect("the entry makes them"));
        for bad in [|v: &bf16| v.is_infinite(), |v: &bf16| v.is_nan()] {
            let written = batch.rows().into_iter().filter(|row| row.width > 0);
            let pitch = batch.layer.hidden_pitch();
            let mut firsts = written.map(|row| &h[row.index * pitch]);
            assert!(firsts.any(bad), "{tile:?}");
        }
        check_statistics(&batch, product, &h, &partials);
    }
}

#[test]
fn rows_of_slots_routed_nowhere_are_left_alone() {
    let batch = Batch::with_lost_slots(80, 40, 31);
    for (i, tile) in Tile::of(true).enumerate() {
        let product = Product::gate_up(tile);
        check_h(
            &batch,
            &gate_up(&batch, product, Sim::unlike(i)).0,
            product.entry,
        );
    }
}

#[test]
fn no_tokens_at_all() {
    let batch = Batch::awkward(70, 16, 0);
    for tile in Tile::of(true) {
        let sim = Sim::new(Schedule::Forward);
        assert!(gate_up(&batch, Product::gate_up(tile), sim).0.is_empty());
    }
}
