//! `tenp_moe_row_norms`, `tenp_moe_contribution_*` and `tenp_accumulate_partials` against the formulas in f64.

mod support;

use half::bf16;
use simt::{Buffer, Schedule, Simulated};
use support::moe::Batch;
use support::products::{Outputs, Partials, contribution, contribution_of, down, gate_up};
use support::{F32_ROUNDING, Sim, assert_close, bytes_of, dot, f32_values, rng, view, view_mut};
use tenp_kernels::device::gram::gram_matrices;
use tenp_kernels::device::moe_accumulate::{AccumulatePartials, accumulate_partials};
use tenp_kernels::device::moe_contribution::Projected;
use tenp_kernels::device::moe_row_norms::{MoeRowNorms, moe_row_norms};
use tenp_kernels::device::{Product, Tile};
use tenp_kernels::params::{TENP_SUM_CONTRIBUTION, TENP_SUM_CONTRIBUTION_ABS};

/// Norms of a batch's rows.
struct Norms {
    inverse: Buffer<f32>,
    values: Buffer<f64>,
    non_finite: Buffer<i32>,
}

fn row_norms(batch: &Batch, outputs: &Outputs, sim: Sim) -> Norms {
    let rows = batch.num_rows();
    let norms = Norms {
        inverse: Buffer::output("row_inverse", rows),
        values: Buffer::output("row_norms", rows),
        non_finite: Buffer::in_out("non_finite", &vec![3; batch.layer.num_experts()]),
    };
    sim.go(moe_row_norms(MoeRowNorms {
        experts: batch.tables.view(),
        square_partials: view(&outputs.squares),
        group_offsets: view(&batch.grouped.group_offsets),
        row_inverse: view_mut(&norms.inverse),
        row_norms: Some(view_mut(&norms.values)),
        non_finite: view_mut(&norms.non_finite),
        num_rows: rows,
        num_partials: outputs.num_partials,
    }));
    norms
}

/// h, y and norms of a batch.
struct Forward {
    h: Buffer<bf16>,
    outputs: Outputs,
    norms: Norms,
}

impl Forward {
    fn new(batch: &Batch, tile: Tile, sim: Sim) -> Self {
        let (h, _) = gate_up(batch, Product::gate_up(tile), sim);
        let outputs = down(batch, &h, Product::down(tile), sim);
        let norms = row_norms(batch, &outputs, sim);
        Self { h, outputs, norms }
    }

    fn contribution(&self, batch: &Batch, tile: Tile, sim: Sim) -> Partials {
        let operands = (&self.h, &self.outputs.y_bf16, &self.norms.inverse);
        contribution(batch, operands, Product::contribution(tile), sim)
    }

    /// The same with Gram matrices; nothing reads y.
    fn gram_contribution(&self, batch: &Batch, tile: Tile, sim: Sim) -> Partials {
        let gram = gram(batch, sim);
        let projected = Projected::Gram { gram: view(&gram) };
        let operands = (&self.h, projected, &self.norms.inverse);
        contribution_of(batch, operands, Product::contribution(tile), sim)
    }

    /// One row's y.
    fn y(&self, batch: &Batch, row: usize) -> Vec<bf16> {
        self.outputs.y_bf16.to_vec()[row * batch.layer.hidden..][..batch.layer.hidden].to_vec()
    }
}

/// Both parts of the experts' Gram matrices.
fn gram(batch: &Batch, sim: Sim) -> Buffer<bf16> {
    let backend = Simulated::new(sim.schedule);
    let (layout, hidden) = (&batch.layer.layout, batch.layer.hidden);
    gram_matrices(&backend, layout, view(&batch.down_t), hidden).expect("made")
}

/// Neuron `j`'s column of the down projection; zeros for padding.
fn column(batch: &Batch, e: usize, j: usize) -> Vec<bf16> {
    if j < batch.layer.widths[e] {
        batch.layer.down_column(e, j)
    } else {
        vec![bf16::ZERO; batch.layer.hidden]
    }
}

fn check_norms(batch: &Batch, forward: &Forward) {
    let hidden = batch.layer.hidden;
    let lost: Vec<usize> = (batch.rows().len()..batch.num_rows()).collect();
    assert_eq!(forward.norms.values.unwritten(), lost);
    assert_eq!(forward.norms.inverse.unwritten(), lost);
    let (norms, inverse) = (
        forward.norms.values.to_vec(),
        forward.norms.inverse.to_vec(),
    );
    let y = forward.outputs.y_f32.to_vec();
    for row in batch.rows() {
        let y = &y[row.index * hidden..][..hidden];
        let squares: f64 = y.iter().map(|&v| f64::from(v).powi(2)).sum();
        let want = if row.width == 0 { 0.0 } else { squares.sqrt() };
        let what = || format!("norm of {row:?}");
        let tolerance = 130.0 * F32_ROUNDING * want;
        assert_close(norms[row.index], want, tolerance, what);
        let want = if norms[row.index] > 0.0 {
            1.0 / (norms[row.index] + 1e-8)
        } else {
            0.0
        };
        let tolerance = F32_ROUNDING * want;
        assert_close(f64::from(inverse[row.index]), want, tolerance, what);
    }
    let clean = vec![3; batch.layer.num_experts()];
    assert_eq!(forward.norms.non_finite.to_vec(), clean);
}

/// Both sums of a neuron over a tile's rows.
#[derive(Default)]
struct Sums {
    sum: f64,
    /// Of magnitudes.
    size: f64,
    /// What the terms may be off.
    error: f64,
    rows: usize,
}

impl Sums {
    fn add(&mut self, term: f64, error: f64) {
        self.sum += term;
        self.size += term.abs();
        self.error += error;
        self.rows += 1;
    }

    fn check(&self, got: impl Fn(u32) -> f64, place: impl Fn() -> String) {
        let tolerance = self.error + (self.rows as f64 + 4.0) * F32_ROUNDING * self.size;
        for (which, want) in [
            (TENP_SUM_CONTRIBUTION, self.sum),
            (TENP_SUM_CONTRIBUTION_ABS, self.size),
        ] {
            assert_close(got(which), want, tolerance * 1.01, || {
                format!("sum {which}, {}", place())
            });
        }
    }
}

/// The partials of every neuron and tile, against h, y and 1/|y| as the kernel read them.
fn check_contribution(batch: &Batch, forward: &Forward, tile: Tile, partials: &Partials) {
    let (h, inverse) = (forward.h.to_vec(), forward.norms.inverse.to_vec());
    let pitch = batch.layer.hidden_pitch();
    let got = partials.table();
    for e in 0..batch.layer.num_experts() {
        let rows: Vec<usize> = batch.groups.rows(e).collect();
        let y: Vec<Vec<bf16>> = rows.iter().map(|&r| forward.y(batch, r)).collect();
        for j in 0..batch.layer.width_padded(e) {
            let column = column(batch, e, j);
            let tiles = rows.chunks(tile.rows()).zip(y.chunks(tile.rows()));
            for (t, (rows, y)) in tiles.enumerate() {
                let mut want = Sums::default();
                for (&row, y) in rows.iter().zip(y) {
                    let (product, off) = dot(&column, y);
                    let scale = h[row * pitch + j].to_f64() * f64::from(inverse[row]);
                    want.add(scale * product, scale.abs() * off);
                }
                want.check(
                    |which| got.get(batch, which, e, t, j),
                    || format!("{tile:?}, expert {e} tile {t} neuron {j}"),
                );
            }
        }
    }
}

/// What a bf16 number and the bf16 of its remainder leave of a number: half a unit of 2^-8 twice, but for the sum's own rounding.
const TWICE_ROUNDED: f64 = 1.0 / (1 << 18) as f64 + F32_ROUNDING;

/// The partials in Gram form, against ⟨w, W h⟩ in f64 with h and 1/|y| as the kernel read them: y is never rounded.
fn check_gram_contribution(batch: &Batch, forward: &Forward, tile: Tile, partials: &Partials) {
    let (h, inverse) = (forward.h.to_vec(), forward.norms.inverse.to_vec());
    let pitch = batch.layer.hidden_pitch();
    let got = partials.table();
    for e in 0..batch.layer.num_experts() {
        let rows: Vec<usize> = batch.groups.rows(e).collect();
        if rows.is_empty() {
            continue;
        }
        let width = batch.layer.width_padded(e);
        let columns: Vec<Vec<bf16>> = (0..width).map(|j| column(batch, e, j)).collect();
        for j in 0..width {
            // What G's row is, and how far the kernels' may be from it.
            let row_of_g: Vec<(f64, f64)> = columns
                .iter()
                .map(|other| dot(&columns[j], other))
                .map(|(g, off)| (g, off + TWICE_ROUNDED * (g.abs() + off)))
                .collect();
            for (t, rows) in rows.chunks(tile.rows()).enumerate() {
                let mut want = Sums::default();
                for &row in rows {
                    let h = &h[row * pitch..][..width];
                    let terms = || {
                        h.iter()
                            .zip(&row_of_g)
                            .map(|(h, &(g, off))| (h.to_f64(), g, off))
                    };
                    let product: f64 = terms().map(|(h, g, _)| h * g).sum();
                    let sizes: f64 = terms().map(|(h, g, _)| (h * g).abs()).sum();
                    let off: f64 = terms().map(|(h, _, off)| h.abs() * off).sum();
                    let scale = h[j].to_f64() * f64::from(inverse[row]);
                    let added = (2.0 * width as f64 + 1.0) * F32_ROUNDING * sizes * 1.01;
                    want.add(scale * product, scale.abs() * (off + added));
                }
                want.check(
                    |which| got.get(batch, which, e, t, j),
                    || format!("Gram {tile:?}, expert {e} tile {t} neuron {j}"),
                );
            }
        }
    }
}

/// Those that the entries are made for.
fn tiles() -> impl Iterator<Item = Tile> {
    Tile::of(true).filter(|tile| tile.with_sums() == *tile)
}

fn check(batch: &Batch, tile: Tile, sim: Sim) {
    let forward = Forward::new(batch, Tile::N64, sim);
    check_norms(batch, &forward);
    let partials = forward.contribution(batch, tile, sim);
    check_contribution(batch, &forward, tile, &partials);
    let partials = forward.gram_contribution(batch, tile, sim);
    check_gram_contribution(batch, &forward, tile, &partials);
}

#[test]
fn gram_matrices_are_kept_in_two_parts() {
    let batch = Batch::awkward(60, 72, 5);
    let parts = gram(&batch, Sim::unlike(2));
    let (parts, unwritten) = (parts.to_vec(), parts.unwritten());
    let (neurons, pitch) = (batch.layer.layout.total(), batch.layer.hidden_pitch());
    let mut left_alone = Vec::new();
    for e in 0..batch.layer.num_experts() {
        let range = batch.layer.layout.range(e);
        for (j, neuron) in range.clone().enumerate() {
            left_alone.extend(neuron * pitch + range.len()..(neuron + 1) * pitch);
            for k in 0..range.len() {
                let (want, off) = dot(&column(&batch, e, j), &column(&batch, e, k));
                let at = neuron * pitch + k;
                let (high, low) = (parts[at].to_f64(), parts[neurons * pitch + at].to_f64());
                let tolerance = off + TWICE_ROUNDED * (want.abs() + off);
                let what = || format!("expert {e}, neurons {j} and {k}");
                assert_close(high + low, want, tolerance, what);
                let tolerance = off + (want.abs() + off) / 256.0;
                assert_close(high, want, tolerance, what);
            }
        }
    }
    let low = left_alone.iter().map(|at| neurons * pitch + at);
    let left_alone: Vec<usize> = left_alone.iter().copied().chain(low).collect();
    assert_eq!(unwritten, left_alone);
}

#[test]
fn every_tile_at_awkward_widths() {
    check(&Batch::awkward(10, 72, 37), Tile::N64, Sim::unlike(1));
    check(&Batch::awkward(11, 40, 150), Tile::N128, Sim::unlike(2));
    check(&Batch::awkward(12, 8, 0), Tile::N128, Sim::unlike(0));
    check(&Batch::awkward(13, 24, 1), Tile::N64, Sim::unlike(0));
    check(&Batch::awkward(14, 72, 37), Tile::W64, Sim::unlike(1));
    check(&Batch::awkward(14, 40, 37), Tile::W8, Sim::unlike(2));
    check(&Batch::awkward(15, 72, 60), Tile::W16, Sim::unlike(3));
    check(&Batch::awkward(16, 24, 60), Tile::W32, Sim::unlike(0));
    check(&Batch::awkward(17, 40, 200), Tile::W192, Sim::unlike(1));
    check(&Batch::awkward(15, 40, 150), Tile::W128, Sim::unlike(2));
    check(&Batch::awkward(16, 136, 270), Tile::W256, Sim::unlike(0));
    check(&Batch::awkward(17, 8, 0), Tile::W256, Sim::unlike(0));
    check(&Batch::awkward(18, 24, 1), Tile::W64, Sim::unlike(3));
}

#[test]
fn experts_as_wide_as_real_ones() {
    let batch = Batch::wide(12, 16, 9);
    for (i, tile) in tiles().enumerate() {
        check(&batch, tile, Sim::unlike(3 + i));
    }
}

#[test]
fn rows_of_slots_routed_nowhere_are_left_alone() {
    let batch = Batch::with_lost_slots(14, 40, 40);
    for (i, tile) in tiles().enumerate() {
        check(&batch, tile, Sim::unlike(1 + i));
    }
}

#[test]
fn every_token_on_one_expert() {
    check(&Batch::crowded(20, 16, 67), Tile::N64, Sim::unlike(0));
    check(&Batch::crowded(20, 16, 131), Tile::N128, Sim::unlike(1));
    check(&Batch::crowded(20, 16, 67), Tile::W64, Sim::unlike(2));
    check(&Batch::crowded(20, 16, 131), Tile::W128, Sim::unlike(3));
    check(&Batch::crowded(20, 16, 259), Tile::W256, Sim::unlike(0));
    check(&Batch::crowded(20, 16, 13), Tile::W8, Sim::unlike(1));
    check(&Batch::crowded(20, 16, 17), Tile::W16, Sim::unlike(2));
    check(&Batch::crowded(20, 16, 35), Tile::W32, Sim::unlike(3));
    check(&Batch::crowded(20, 16, 203), Tile::W192, Sim::unlike(0));
}

/// Running sums of a product over `before`.
fn accumulated(batch: &Batch, partials: &Partials, before: &[f64], sim: Sim) -> Vec<f64> {
    let sums = Buffer::in_out("sums", before);
    sim.go(accumulate_partials(AccumulatePartials {
        product: partials.tiles.product,
        experts: batch.tables.view(),
        partials: view(&partials.values),
        offsets: view(&partials.tiles.partial_offsets),
        stride: partials.stride,
        group_offsets: view(&batch.grouped.group_offsets),
        sums: view_mut(&sums),
    }));
    sums.to_vec()
}

#[test]
fn partials_are_added_in_tile_order() {
    let mut rng = rng(30);
    for (i, batch) in [Batch::awkward(31, 16, 200), Batch::crowded(32, 16, 200)]
        .iter()
        .enumerate()
    {
        let sim = Sim::unlike(i + 1);
        let (_, partials) = gate_up(batch, Product::gate_up_stats(Tile::N64), sim);
        let partials = partials.expect("the entry makes them");
        let neurons = batch.layer.layout.total();
        let before: Vec<f64> = f32_values(&mut rng, 5 * neurons, 1.0)
            .into_iter()
            .map(f64::from)
            .collect();
        let got = accumulated(batch, &partials, &before, sim);
        let table = partials.table();
        for e in 0..batch.layer.num_experts() {
            let tiles = batch.groups.rows(e).len().div_ceil(64);
            for (j, neuron) in batch.layer.layout.range(e).enumerate() {
                for sum in 0..5u32 {
                    let at = sum as usize * neurons + neuron;
                    let want = (0..tiles).fold(before[at], |total, tile| {
                        let value = table.get(batch, sum, e, tile, j);
                        if sum == 2 {
                            total.max(value)
                        } else {
                            total + value
                        }
                    });
                    assert_eq!(got[at].to_bits(), want.to_bits(), "{e} {j} {sum}");
                }
            }
        }
    }
}

#[test]
fn contributions_of_an_expert_add_up_to_its_norms() {
    for (tile, batch) in [
        (Tile::N64, Batch::awkward(40, 72, 60)),
        (Tile::N128, Batch::wide(41, 16, 12)),
        (Tile::W8, Batch::awkward(46, 72, 60)),
        (Tile::W16, Batch::awkward(47, 72, 60)),
        (Tile::W32, Batch::awkward(48, 72, 60)),
        (Tile::W64, Batch::awkward(42, 72, 60)),
        (Tile::W128, Batch::wide(43, 16, 12)),
        (Tile::W192, Batch::awkward(49, 72, 60)),
        (Tile::W256, Batch::awkward(44, 72, 60)),
        (Tile::W256, Batch::crowded(45, 40, 300)),
    ] {
        let sim = Sim::unlike(3);
        let forward = Forward::new(&batch, Tile::N64, sim);
        let neurons = batch.layer.layout.total();
        let norms = forward.norms.values.to_vec();
        for (partials, off) in [
            // y is rounded to bf16 on one side of the dot product only.
            (forward.contribution(&batch, tile, sim), 1.0 / 256.0),
            (forward.gram_contribution(&batch, tile, sim), 1e-5),
        ] {
            let sums = accumulated(&batch, &partials, &vec![0.0; 2 * neurons], sim);
            for e in 0..batch.layer.num_experts() {
                let got: f64 = sums[batch.layer.layout.range(e)].iter().sum();
                let want: f64 = batch.groups.rows(e).map(|r| norms[r]).sum();
                assert_close(got, want, want * off, || format!("{tile:?} expert {e}"));
            }
        }
    }
}

#[test]
fn outputs_that_are_not_finite_count_and_contribute_nothing() {
    let clean = Batch::awkward(50, 24, 40);
    let hidden = clean.layer.hidden;
    let mut dirty = Batch::awkward(50, 24, 40);
    dirty.x[3 * hidden..4 * hidden].fill(bf16::NAN);
    let dirty = Batch::new(dirty.layer, dirty.routing, dirty.x);
    let sim = Sim::new(Schedule::Random(4));
    let forward = Forward::new(&dirty, Tile::N64, sim);
    let (inverse, norms) = (
        forward.norms.inverse.written().unwrap(),
        forward.norms.values.written().unwrap(),
    );
    let mut expected = vec![3; dirty.layer.num_experts()];
    for row in dirty.rows() {
        let bad = row.token == 3 && row.width > 0;
        expected[row.expert] += i32::from(bad);
        let zero = bad || row.width == 0;
        assert_eq!(inverse[row.index] == 0.0, zero, "{row:?}");
        assert_eq!(norms[row.index] == 0.0, zero, "{row:?}");
    }
    assert_eq!(forward.norms.non_finite.to_vec(), expected);
    // The same as if those rows had been zero.
    let mut h = forward.h.to_vec();
    let mut y = forward.outputs.y_bf16.to_vec();
    let pitch = dirty.layer.hidden_pitch();
    for row in dirty.rows().iter().filter(|r| r.token == 3) {
        let padded = dirty.layer.width_padded(row.expert);
        h[row.index * pitch..][..padded].fill(bf16::ZERO);
        y[row.index * hidden..][..hidden].fill(bf16::ZERO);
    }
    let (h, y) = (Buffer::input("h", &h), Buffer::input("y", &y));
    for tile in tiles() {
        let product = Product::contribution(tile);
        let want = contribution(&dirty, (&h, &y, &forward.norms.inverse), product, sim);
        let got = forward.contribution(&dirty, tile, sim);
        assert!(bytes_of(&got.values) == bytes_of(&want.values), "{tile:?}");
    }
    let matrices = gram(&dirty, sim);
    for tile in tiles() {
        let of = |h| {
            let projected = Projected::Gram {
                gram: view(&matrices),
            };
            let operands = (h, projected, &forward.norms.inverse);
            bytes_of(&contribution_of(&dirty, operands, Product::contribution(tile), sim).values)
        };
        assert!(of(&forward.h) == of(&h), "Gram {tile:?}");
    }
}
