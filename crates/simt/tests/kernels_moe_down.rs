//! `tenp_moe_down_*` against the formula in f64, every path and width.

mod support;

use half::bf16;
use simt::{Buffer, Schedule};
use support::moe::Batch;
use support::products::{Outputs, down, gate_up};
use support::{F32_ROUNDING, Sim, assert_close, bytes_of, dot};
use tenp_kernels::device::{Product, Tile};

/// h of the batch as the kernels made it.
fn hidden_states(batch: &Batch) -> Buffer<bf16> {
    gate_up(batch, Product::gate_up(Tile::N64), Sim::unlike(0)).0
}

fn check(batch: &Batch, h: &[bf16], product: Product, outputs: &Outputs) {
    let (hidden, pitch, rows) = (
        batch.layer.hidden,
        batch.layer.hidden_pitch(),
        batch.num_rows(),
    );
    let (y, rounded) = (outputs.y_f32.to_vec(), outputs.y_bf16.to_vec());
    let squares = outputs.squares.to_vec();
    for row in batch.rows().iter().filter(|row| row.width > 0) {
        let h = &h[row.index * pitch..][..row.width];
        let weights = &batch.layer.experts[row.expert].down;
        for i in 0..hidden {
            let (want, tolerance) = dot(&weights[i * row.width..][..row.width], h);
            let at = row.index * hidden + i;
            let what = || format!("{} {row:?} output {i}", product.entry);
            assert_close(f64::from(y[at]), want, tolerance, what);
            assert_eq!(rounded[at], bf16::from_f32(y[at]), "{}", what());
        }
        let tiles = y[row.index * hidden..][..hidden].chunks(product.weight_tile);
        for (tile, y) in tiles.enumerate() {
            let want: f64 = y.iter().map(|&v| f64::from(v).powi(2)).sum();
            let got = f64::from(squares[tile * rows + row.index]);
            let tolerance = (y.len() + 1) as f64 * F32_ROUNDING * want;
            assert_close(got, want, tolerance, || format!("squares of {row:?}"));
        }
    }
    check_clipped(batch, outputs);
}

/// Rows of experts without neurons, and of no expert, are left alone, and nothing else is.
fn check_clipped(batch: &Batch, outputs: &Outputs) {
    let (rows, hidden) = (batch.num_rows(), batch.layer.hidden);
    let mut untouched: Vec<usize> = batch
        .rows()
        .iter()
        .filter(|r| r.width == 0)
        .map(|r| r.index)
        .collect();
    // Those of slots routed nowhere come last.
    untouched.extend(batch.rows().len()..rows);
    let left = |per_row: usize, tables: usize| -> Vec<usize> {
        let of = |table: usize, row: usize| {
            let first = (table * rows + row) * per_row;
            first..first + per_row
        };
        let rows_of = |table| untouched.iter().flat_map(move |&row| of(table, row));
        (0..tables).flat_map(rows_of).collect()
    };
    assert_eq!(outputs.y_f32.unwritten(), left(hidden, 1));
    assert_eq!(outputs.y_bf16.unwritten(), left(hidden, 1));
    assert_eq!(outputs.squares.unwritten(), left(1, outputs.num_partials));
}

#[test]
fn every_path_at_awkward_widths() {
    // The hidden sizes end inside a tile of outputs, behind one, and are smaller than one.
    for (i, (tile, hidden)) in Tile::of(true)
        .zip([72, 136, 264, 24].into_iter().cycle())
        .enumerate()
    {
        let batch = Batch::awkward(10 + i as u64, hidden, 29);
        let h = hidden_states(&batch);
        let product = Product::down(tile);
        let outputs = down(&batch, &h, product, Sim::unlike(i));
        check(&batch, &h.to_vec(), product, &outputs);
    }
}

#[test]
fn experts_as_wide_as_real_ones() {
    let batch = Batch::wide(12, 16, 21);
    let h = hidden_states(&batch);
    for (i, tile) in Tile::of(true).enumerate() {
        let product = Product::down(tile);
        let outputs = down(&batch, &h, product, Sim::unlike(i));
        check(&batch, &h.to_vec(), product, &outputs);
    }
}

#[test]
fn rows_of_slots_routed_nowhere_are_left_alone() {
    let batch = Batch::with_lost_slots(15, 72, 31);
    let h = hidden_states(&batch);
    for (i, tile) in Tile::of(true).enumerate() {
        let product = Product::down(tile);
        let outputs = down(&batch, &h, product, Sim::unlike(i));
        check(&batch, &h.to_vec(), product, &outputs);
    }
}

#[test]
fn every_token_on_one_expert() {
    for (i, (tile, tokens)) in Tile::of(true)
        .zip([3, 18, 67, 131, 9, 17, 35, 66, 131, 200, 260])
        .enumerate()
    {
        let batch = Batch::crowded(20, 64, tokens);
        let h = hidden_states(&batch);
        let product = Product::down(tile);
        let outputs = down(&batch, &h, product, Sim::unlike(i));
        check(&batch, &h.to_vec(), product, &outputs);
    }
}

#[test]
fn runs_are_bitwise_equal_whatever_the_order_and_the_grid() {
    let batch = Batch::awkward(30, 40, 20);
    let h = hidden_states(&batch);
    let bytes = |o: &Outputs| {
        (
            bytes_of(&o.y_f32),
            bytes_of(&o.y_bf16),
            bytes_of(&o.squares),
        )
    };
    for tile in Tile::of(true) {
        let product = Product::down(tile);
        let first = bytes(&down(&batch, &h, product, Sim::unlike(0)));
        for i in 1..4 {
            assert!(bytes(&down(&batch, &h, product, Sim::unlike(i))) == first);
        }
    }
}

#[test]
fn bad_hidden_states_and_weights_stay_where_they_are() {
    let (hidden, bad_row) = (40, 7);
    let clean = Batch::awkward(60, hidden, 24);
    let h = hidden_states(&clean);
    let pitch = clean.layer.hidden_pitch();
    let mut values = h.to_vec();
    values[bad_row * pitch..][..pitch].fill(bf16::INFINITY);
    let dirty_h = Buffer::input("h", &values);
    let mut dirty = Batch::awkward(60, hidden, 24);
    // Output 17 of expert 4 is NaN whatever its token.
    dirty.layer.experts[4].down[17 * 63 + 5] = bf16::NAN;
    let dirty = Batch::new(dirty.layer, dirty.routing, dirty.x);
    for tile in Tile::of(true) {
        let product = Product::down(tile);
        let want = down(&clean, &h, product, Sim::new(Schedule::Forward));
        let got = down(&dirty, &dirty_h, product, Sim::new(Schedule::Reversed));
        check_clipped(&dirty, &got);
        let (want, got) = (want.y_f32.to_vec(), got.y_f32.to_vec());
        for row in clean
            .rows()
            .iter()
            .filter(|r| r.width > 0 && r.index != bad_row)
        {
            for i in 0..hidden {
                let at = row.index * hidden + i;
                if (row.expert, i) == (4, 17) {
                    assert!(got[at].is_nan(), "{product:?} {row:?}");
                } else {
                    assert_eq!(got[at], want[at], "{product:?} {row:?} {i}");
                }
            }
        }
    }
}

#[test]
fn what_is_behind_the_width_is_not_read() {
    // Zeros up to the padded width are promised; behind it there may be anything.
    let batch = Batch::awkward(70, 24, 20);
    let pitch = batch.layer.hidden_pitch();
    let mut values = hidden_states(&batch).to_vec();
    for row in batch.rows() {
        let padded = batch.layer.width_padded(row.expert);
        values[row.index * pitch + padded..(row.index + 1) * pitch].fill(bf16::NAN);
    }
    let h = Buffer::input("h", &values);
    for (i, tile) in Tile::of(true).enumerate() {
        let product = Product::down(tile);
        let outputs = down(&batch, &h, product, Sim::unlike(i));
        check(&batch, &values, product, &outputs);
    }
}
