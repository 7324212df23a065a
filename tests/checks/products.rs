//! The grouped products against f64 recomputations of what they read.

use half::bf16;
use tenp_kernels::device::geometry::partial_stride;
use tenp_kernels::device::gram::gram_matrices;
use tenp_kernels::device::moe_accumulate::{AccumulatePartials, accumulate_partials};
use tenp_kernels::device::moe_contribution::{MoeContribution, Projected, moe_contribution};
use tenp_kernels::device::moe_down::{MoeDown, moe_down, square_partials};
use tenp_kernels::device::moe_gate_up::{self as wrapper, MoeGateUp, moe_gate_up};
use tenp_kernels::device::moe_row_norms::{MoeRowNorms, moe_row_norms};
use tenp_kernels::device::{Backend, Memory as _, Product, Tile};
use tenp_kernels::params::{TENP_NUM_ACTIVATION_SUMS, TENP_NUM_CONTRIBUTION_SUMS};

use super::batch::{Batch, Tiles};
use super::{BF16_ROUNDING, F32_ROUNDING, On, Size, assert_close, dot, sampled};

/// What results that no kernel may write are filled with.
const UNTOUCHED: f32 = -123.0;

/// Per-tile sums of a product.
pub struct Partials<B: Backend> {
    pub values: B::Buffer<f32>,
    pub stride: usize,
    pub tiles: Tiles<B>,
}

impl<B: Backend> Partials<B> {
    fn new(batch: &Batch<'_, B>, tiles: Tiles<B>, sums: u32) -> Self {
        let layer = &batch.layer;
        let (pitch, neurons) = (layer.hidden_pitch(), layer.layout.total());
        let stride = partial_stride(batch.num_rows(), tiles.product.tile, pitch, neurons);
        Self {
            values: batch.on.output(sums as usize * stride),
            stride,
            tiles,
        }
    }

    /// Running sums `[count, S]` after this batch, from zeros.
    pub fn accumulated(&self, batch: &Batch<'_, B>, count: u32) -> Vec<f64> {
        let mut sums = batch
            .on
            .filled(0f64, count as usize * batch.layer.layout.total());
        batch.on.go(accumulate_partials(AccumulatePartials {
            product: self.tiles.product,
            experts: batch.tables(),
            partials: self.values.view(),
            offsets: self.tiles.partial_offsets.view(),
            stride: self.stride,
            group_offsets: batch.grouped.group_offsets.view(),
            sums: sums.view_mut(),
        }));
        batch.on.get(sums.view())
    }
}

/// h, filled with [`UNTOUCHED`] before, and where `product` makes them the sums of the neurons.
///
/// The products of sm_90 that take x in the experts' order must give the same bits as those that gather it.
pub fn gate_up<B: Backend>(
    batch: &Batch<'_, B>,
    product: Product,
) -> (B::Buffer<bf16>, Option<Partials<B>>) {
    let (on, hidden) = (batch.on, batch.layer.hidden);
    let gathered = gate_up_of(batch, product, None);
    if product.tile.needs_wgmma() {
        let tokens = on.get(batch.grouped.token_of_row.view());
        let row = |&token: &i32| &batch.x[token as usize * hidden..][..hidden];
        let x: Vec<bf16> = tokens.iter().flat_map(row).copied().collect();
        let ordered = gate_up_of(batch, product, Some(&on.input(&x)));
        let bits = |(h, sums): &(B::Buffer<bf16>, Option<Partials<B>>)| {
            let h: Vec<u16> = on.get(h.view()).iter().map(|v| v.to_bits()).collect();
            let sums = sums
                .as_ref()
                .map(|sums| sums.accumulated(batch, TENP_NUM_ACTIVATION_SUMS));
            let sums: Vec<u64> = sums.iter().flatten().map(|v| v.to_bits()).collect();
            (h, sums)
        };
        assert!(bits(&ordered) == bits(&gathered), "{}", product.entry);
    }
    gathered
}

/// With x by token, or by row.
fn gate_up_of<B: Backend>(
    batch: &Batch<'_, B>,
    product: Product,
    x_of_rows: Option<&B::Buffer<bf16>>,
) -> (B::Buffer<bf16>, Option<Partials<B>>) {
    let (on, layer, grouped) = (batch.on, &batch.layer, &batch.grouped);
    let untouched = bf16::from_f32(UNTOUCHED);
    let mut h = on.filled(untouched, batch.num_rows() * layer.hidden_pitch());
    let tiles = batch.tiles(product, None);
    let stats = product == Product::gate_up_stats(product.tile);
    let mut partials = Partials::new(batch, tiles, TENP_NUM_ACTIVATION_SUMS);
    let sums = stats.then(|| {
        let sums = wrapper::Partials {
            partials: partials.values.view_mut(),
            offsets: partials.tiles.partial_offsets.view(),
            stride: partials.stride,
        };
        (grouped.row_weights.view(), sums)
    });
    let args = MoeGateUp {
        product,
        experts: batch.tables(),
        gate_up: batch.gate_up.view(),
        x: x_of_rows.unwrap_or(&batch.x_there).view(),
        token_of_row: x_of_rows.is_none().then(|| grouped.token_of_row.view()),
        h: h.view_mut(),
        group_offsets: grouped.group_offsets.view(),
        schedule: partials.tiles.view(),
        sums,
        x_rows: match x_of_rows {
            Some(_) => batch.num_rows(),
            None => batch.num_tokens(),
        },
        num_rows: batch.num_rows(),
        hidden: layer.hidden,
        hidden_pitch: layer.hidden_pitch(),
    };
    on.go(moe_gate_up(args, on.backend.multiprocessors()));
    (h, stats.then_some(partials))
}

/// What the down product makes.
pub struct Outputs<B: Backend> {
    pub y_f32: B::Buffer<f32>,
    pub y_bf16: B::Buffer<bf16>,
    /// `[num_partials, rows]`.
    pub squares: B::Buffer<f32>,
    pub num_partials: usize,
}

/// y of `h`, in every form.
pub fn down<B: Backend>(batch: &Batch<'_, B>, h: &B::Buffer<bf16>, product: Product) -> Outputs<B> {
    let (on, layer, rows) = (batch.on, &batch.layer, batch.num_rows());
    let tiles = batch.tiles(product, Some(layer.hidden));
    let num_partials = square_partials(&product, layer.hidden);
    let mut made = Outputs::<B> {
        y_f32: on.filled(UNTOUCHED, rows * layer.hidden),
        y_bf16: on.filled(bf16::from_f32(UNTOUCHED), rows * layer.hidden),
        squares: on.filled(UNTOUCHED, num_partials * rows),
        num_partials,
    };
    let args = MoeDown {
        product,
        experts: batch.tables(),
        down_t: batch.down_t.view(),
        h: h.view(),
        y_f32: Some(made.y_f32.view_mut()),
        y_bf16: Some(made.y_bf16.view_mut()),
        square_partials: Some(made.squares.view_mut()),
        group_offsets: batch.grouped.group_offsets.view(),
        schedule: tiles.view(),
        num_rows: rows,
        hidden: layer.hidden,
        hidden_pitch: layer.hidden_pitch(),
    };
    on.go(moe_down(args, on.backend.multiprocessors()));
    made
}

/// 1 / (‖y‖ + 1e-8) and ‖y‖ of every row, and the rows of each expert that are not finite.
pub struct Norms<B: Backend> {
    pub inverse: B::Buffer<f32>,
    pub values: B::Buffer<f64>,
    pub non_finite: B::Buffer<i32>,
}

pub fn row_norms<B: Backend>(batch: &Batch<'_, B>, outputs: &Outputs<B>) -> Norms<B> {
    let (on, rows) = (batch.on, batch.num_rows());
    let mut norms = Norms::<B> {
        inverse: on.output(rows),
        values: on.output(rows),
        non_finite: on.filled(0, batch.layer.num_experts()),
    };
    on.go(moe_row_norms(MoeRowNorms {
        experts: batch.tables(),
        square_partials: outputs.squares.view(),
        group_offsets: batch.grouped.group_offsets.view(),
        row_inverse: norms.inverse.view_mut(),
        row_norms: Some(norms.values.view_mut()),
        non_finite: norms.non_finite.view_mut(),
        num_rows: rows,
        num_partials: outputs.num_partials,
    }));
    norms
}

/// h, what ⟨w, y⟩ is made of, and 1 / (‖y‖ + 1e-8).
pub type Operands<'a, B> = (
    &'a <B as Backend>::Buffer<bf16>,
    Projected<'a>,
    &'a <B as Backend>::Buffer<f32>,
);

/// ⟨w, y⟩ of outputs.
pub fn with_outputs<'a, B: Backend>(
    batch: &'a Batch<'_, B>,
    y: &'a B::Buffer<bf16>,
) -> Projected<'a> {
    Projected::Outputs {
        down_t: batch.down_t.view(),
        y: y.view(),
    }
}

/// The Gram matrices of the batch's experts.
pub fn gram<B: Backend>(batch: &Batch<'_, B>) -> B::Buffer<bf16> {
    let (layer, backend) = (&batch.layer, batch.on.backend);
    gram_matrices(backend, &layer.layout, batch.down_t.view(), layer.hidden).expect("made")
}

pub fn contribution<B: Backend>(
    batch: &Batch<'_, B>,
    (h, projected, row_inverse): Operands<'_, B>,
    product: Product,
) -> Partials<B> {
    let (on, layer) = (batch.on, &batch.layer);
    let mut partials = Partials::new(
        batch,
        batch.tiles(product, None),
        TENP_NUM_CONTRIBUTION_SUMS,
    );
    let args = MoeContribution {
        product,
        experts: batch.tables(),
        projected,
        h: h.view(),
        row_inverse: row_inverse.view(),
        sums: wrapper::Partials {
            partials: partials.values.view_mut(),
            offsets: partials.tiles.partial_offsets.view(),
            stride: partials.stride,
        },
        group_offsets: batch.grouped.group_offsets.view(),
        schedule: partials.tiles.view(),
        num_rows: batch.num_rows(),
        hidden: layer.hidden,
        hidden_pitch: layer.hidden_pitch(),
    };
    on.go(moe_contribution(args, on.backend.multiprocessors()));
    partials
}

fn numbers(values: &[bf16]) -> impl Iterator<Item = f64> {
    values.iter().map(|v| v.to_f64())
}

/// h of sampled neurons of every row, and that nothing was written past a row's padded width.
fn check_h<B: Backend>(batch: &Batch<'_, B>, h: &[bf16], tile: Tile) {
    let (layer, pitch, hidden) = (&batch.layer, batch.layer.hidden_pitch(), batch.layer.hidden);
    for (expert, row, token) in batch.rows() {
        let got = &h[row * pitch..][..pitch];
        let (width, padded) = (layer.widths[expert], layer.width_padded(expert));
        let weights = &layer.experts[expert];
        let x = &batch.x[token * hidden..][..hidden];
        for j in sampled(width, 33) {
            let of = |m: &[bf16]| dot(numbers(&m[j * hidden..][..hidden]), numbers(x));
            let ((gate, gate_off), (up, up_off)) = (of(&weights.gate), of(&weights.up));
            let silu = gate / (1.0 + (-gate).exp());
            let want = silu * up;
            // silu' is below 1.1; the exponential of a GPU is good to about 1e-6.
            let off = 1.1 * gate_off * (up.abs() + up_off) + silu.abs() * up_off;
            let tolerance = off + (BF16_ROUNDING + 1e-5) * want.abs() + 1e-30;
            assert_close(got[j].to_f64(), want, tolerance, || {
                format!("{tile:?}: h of row {row}, expert {expert} of width {width}, neuron {j}")
            });
        }
        assert!(
            got[width..padded].iter().all(|v| v.to_f32() == 0.0),
            "{tile:?}: row {row}"
        );
        let beyond = &got[padded..];
        assert!(
            beyond.iter().all(|v| v.to_f32() == UNTOUCHED),
            "{tile:?}: row {row}"
        );
    }
}

/// y of sampled outputs of every row, of the h that was read.
fn check_y<B: Backend>(batch: &Batch<'_, B>, h: &[bf16], outputs: &Outputs<B>, tile: Tile) {
    let (on, layer, hidden) = (batch.on, &batch.layer, batch.layer.hidden);
    let (y, rounded) = (on.get(outputs.y_f32.view()), on.get(outputs.y_bf16.view()));
    let squares = on.get(outputs.squares.view());
    let step = Product::down(tile).weight_tile;
    for (expert, row, _) in batch.rows() {
        let y = &y[row * hidden..][..hidden];
        let width = layer.widths[expert];
        if width == 0 {
            assert!(y.iter().all(|&v| v == UNTOUCHED), "{tile:?}: row {row}");
            continue;
        }
        let h = &h[row * layer.hidden_pitch()..][..width];
        for o in sampled(hidden, 33) {
            let weights = &layer.experts[expert].down[o * width..][..width];
            let (want, off) = dot(numbers(h), numbers(weights));
            let what = || format!("{tile:?}: y of row {row}, expert {expert}, output {o}");
            assert_close(f64::from(y[o]), want, off, what);
        }
        for (o, (y, rounded)) in y.iter().zip(&rounded[row * hidden..]).enumerate() {
            let same = bf16::from_f32(*y).to_bits() == rounded.to_bits();
            assert!(
                same,
                "{tile:?}: {y} became {rounded} in row {row}, output {o}"
            );
        }
        for (part, y) in y.chunks(step).enumerate() {
            let (want, off) = dot(
                y.iter().map(|&v| f64::from(v)),
                y.iter().map(|&v| f64::from(v)),
            );
            let got = f64::from(squares[part * batch.num_rows() + row]);
            assert_close(got, want, off, || format!("{tile:?}: squares of row {row}"));
        }
    }
}

pub fn gate_up_and_down_of_every_tile<B: Backend>(on: On<'_, B>, size: Size) {
    for batch in Batch::of(on, size, 1) {
        for tile in Tile::of(on.backend.has_wgmma()) {
            let (h, _) = gate_up(&batch, Product::gate_up(tile));
            let values = on.get(h.view());
            check_h(&batch, &values, tile);
            let outputs = down(&batch, &h, Product::down(tile));
            check_y(&batch, &values, &outputs, tile);
        }
    }
}

/// Sums over h as it was stored: that may be half a unit of bf16 off, squares twice that.
fn check_activation_sums<B: Backend>(batch: &Batch<'_, B>, h: &[bf16], sums: &[f64], tile: Tile) {
    let (layer, total) = (&batch.layer, batch.layer.layout.total());
    for e in 0..layer.num_experts() {
        for j in sampled(layer.widths[e], 33) {
            let mut want = [0f64; 5];
            for row in batch.groups.rows(e) {
                let h = h[row * layer.hidden_pitch() + j].to_f64();
                let gated = (f64::from(batch.groups.weights()[row]) * h).powi(2);
                want[0] += h.abs();
                want[1] += gated;
                want[2] = want[2].max(gated);
                want[3] += h;
                want[4] += h * h;
            }
            for (s, want_s) in want.into_iter().enumerate() {
                let size = if s == 3 { want[0] } else { want_s };
                let got = sums[s * total + layer.layout.range(e).start + j];
                assert_close(got, want_s, 2.1 * BF16_ROUNDING * size, || {
                    format!("{tile:?}: sum {s} of expert {e}, neuron {j}")
                });
            }
        }
    }
}

fn check_norms<B: Backend>(batch: &Batch<'_, B>, outputs: &Outputs<B>, norms: &Norms<B>) {
    let (on, hidden) = (batch.on, batch.layer.hidden);
    let (inverse, values) = (on.get(norms.inverse.view()), on.get(norms.values.view()));
    let y = on.get(outputs.y_f32.view());
    for (expert, row, _) in batch.rows() {
        let square: f64 = y[row * hidden..][..hidden]
            .iter()
            .map(|&v| f64::from(v).powi(2))
            .sum();
        let want = if batch.layer.widths[expert] == 0 {
            0.0
        } else {
            square.sqrt()
        };
        let tolerance = 300.0 * F32_ROUNDING * want;
        assert_close(values[row], want, tolerance, || {
            format!("norm of row {row}")
        });
        let want = if values[row] > 0.0 {
            1.0 / (values[row] + 1e-8)
        } else {
            0.0
        };
        let tolerance = 2.0 * F32_ROUNDING * want;
        assert_close(f64::from(inverse[row]), want, tolerance, || {
            format!("1/norm of row {row}")
        });
    }
    assert!(on.get(norms.non_finite.view()).iter().all(|&n| n == 0));
}

fn check_contribution<B: Backend>(
    batch: &Batch<'_, B>,
    (h, y, inverse): (&[bf16], &[f64], &[f32]),
    (sums, slack): (&[f64], f64),
    tile: Tile,
) {
    let (layer, total, hidden) = (&batch.layer, batch.layer.layout.total(), batch.layer.hidden);
    for e in 0..layer.num_experts() {
        for j in sampled(layer.widths[e], 9) {
            let column = layer.down_column(e, j);
            let (mut sum, mut size, mut off) = (0.0, 0.0, 0.0);
            for row in batch.groups.rows(e) {
                let y = &y[row * hidden..][..hidden];
                let (product, product_off) = dot(numbers(&column), y.iter().copied());
                let scale = h[row * layer.hidden_pitch() + j].to_f64() * f64::from(inverse[row]);
                sum += scale * product;
                size += (scale * product).abs();
                off += scale.abs() * product_off;
            }
            let tolerance = slack * off + 300.0 * F32_ROUNDING * size;
            for (s, want) in [sum, size].into_iter().enumerate() {
                let got = sums[s * total + layer.layout.range(e).start + j];
                assert_close(got, want, tolerance, || {
                    format!("{tile:?}: contribution {s} of expert {e}, neuron {j}")
                });
            }
        }
    }
}

/// The tiles of the entries with statistics.
pub fn scoring_tiles<B: Backend>(on: On<'_, B>) -> impl Iterator<Item = Tile> {
    Tile::of(on.backend.has_wgmma()).filter(|tile| tile.with_sums() == *tile)
}

pub fn statistics_and_contributions<B: Backend>(on: On<'_, B>, size: Size) {
    for batch in Batch::of(on, size, 11) {
        let gram = gram(&batch);
        for tile in scoring_tiles(on) {
            let (h, partials) = gate_up(&batch, Product::gate_up_stats(tile));
            let values = on.get(h.view());
            check_h(&batch, &values, tile);
            let sums = partials.expect("the entry makes them");
            let sums = sums.accumulated(&batch, TENP_NUM_ACTIVATION_SUMS);
            check_activation_sums(&batch, &values, &sums, tile);
            let outputs = down(&batch, &h, Product::down(tile));
            let norms = row_norms(&batch, &outputs);
            check_norms(&batch, &outputs, &norms);
            let inverse = on.get(norms.inverse.view());
            let sums_of = |projected| {
                let operands = (&h, projected, &norms.inverse);
                let sums = contribution(&batch, operands, Product::contribution(tile));
                sums.accumulated(&batch, TENP_NUM_CONTRIBUTION_SUMS)
            };
            let sums = sums_of(with_outputs(&batch, &outputs.y_bf16));
            let y: Vec<f64> = numbers(&on.get(outputs.y_bf16.view())).collect();
            check_contribution(&batch, (&values, &y, &inverse), (&sums, 1.0), tile);
            // Here y is not rounded to bf16. G is, twice, and there are two sums, over H and over the neurons.
            let sums = sums_of(Projected::Gram { gram: gram.view() });
            let y = on.get(outputs.y_f32.view()).into_iter().map(f64::from);
            let y: Vec<f64> = y.collect();
            check_contribution(&batch, (&values, &y, &inverse), (&sums, 8.0), tile);
        }
    }
}

/// A token of NaN and one with an infinity change no other token's rows by a bit, and count as damaged.
pub fn numbers_that_are_not_finite_stay_in_their_rows<B: Backend>(on: On<'_, B>, size: Size) {
    let (hidden, tokens) = match size {
        Size::Small => (72, 21),
        Size::Real => (2048, 300),
    };
    let clean = Batch::awkward(on, 21, hidden, tokens);
    let mut dirty = Batch::awkward(on, 21, hidden, tokens);
    dirty.x[3 * hidden..4 * hidden].fill(bf16::NAN);
    dirty.x[5 * hidden + 7] = bf16::INFINITY;
    dirty.x_there = on.input(&dirty.x);
    let damaged = [3, 5];
    for tile in Tile::of(on.backend.has_wgmma()) {
        let run = |batch: &Batch<'_, B>| {
            let (h, _) = gate_up(batch, Product::gate_up(tile));
            let outputs = down(batch, &h, Product::down(tile));
            let y = on.get(outputs.y_f32.view());
            (on.get(h.view()), y, row_norms(batch, &outputs))
        };
        let ((clean_h, clean_y, _), (h, y, norms)) = (run(&clean), run(&dirty));
        let pitch = clean.layer.hidden_pitch();
        let mut expected = vec![0; clean.layer.num_experts()];
        for (expert, row, token) in clean.rows() {
            if damaged.contains(&token) {
                expected[expert] += i32::from(clean.layer.widths[expert] > 0);
                continue;
            }
            let same = h[row * pitch..][..pitch] == clean_h[row * pitch..][..pitch]
                && y[row * hidden..][..hidden] == clean_y[row * hidden..][..hidden];
            assert!(same, "{tile:?}: row {row} of token {token}");
        }
        assert_eq!(on.get(norms.non_finite.view()), expected, "{tile:?}");
    }
}
