//! The grouped products of a batch, through their wrappers.

use bytemuck::Pod;
use half::bf16;
use simt::Buffer;
use tenp_kernels::device::Product;
use tenp_kernels::device::geometry::partial_stride;
use tenp_kernels::device::moe_contribution::{MoeContribution, Projected, moe_contribution};
use tenp_kernels::device::moe_down::{MoeDown, moe_down, square_partials};
use tenp_kernels::device::moe_gate_up::{self as wrapper, MoeGateUp, moe_gate_up};
use tenp_kernels::params::{TENP_NUM_ACTIVATION_SUMS, TENP_NUM_CONTRIBUTION_SUMS};

use super::moe::{Batch, Tiles};
use super::{Sim, bytes_of, view, view_mut};

/// Per-tile sums of a product. What lies behind the tiles there are is never written.
pub struct Partials {
    pub values: Buffer<f32>,
    pub stride: usize,
    pub tiles: Tiles,
}

impl Partials {
    fn new(batch: &Batch, tiles: Tiles, sums: u32) -> Self {
        let layer = &batch.layer;
        let (pitch, neurons) = (layer.hidden_pitch(), layer.layout.total());
        let stride = partial_stride(batch.num_rows(), tiles.product.tile, pitch, neurons);
        Self {
            values: Buffer::output("partials", sums as usize * stride),
            stride,
            tiles,
        }
    }

    fn view(&self) -> wrapper::Partials<'_> {
        wrapper::Partials {
            partials: view_mut(&self.values),
            offsets: view(&self.tiles.partial_offsets),
            stride: self.stride,
        }
    }

    pub fn table(&self) -> PartialTable {
        PartialTable {
            values: self.values.to_vec(),
            offsets: self.tiles.partial_offsets.to_vec(),
            stride: self.stride,
        }
    }
}

/// What a product left in its partial sums.
pub struct PartialTable {
    values: Vec<f32>,
    offsets: Vec<i64>,
    stride: usize,
}

impl PartialTable {
    /// Sum `sum` of `neuron` over the rows of the expert's tile `tile`.
    pub fn get(&self, batch: &Batch, sum: u32, expert: usize, tile: usize, neuron: usize) -> f64 {
        let tile = self.offsets[expert] as usize + tile * batch.layer.width_padded(expert);
        f64::from(self.values[sum as usize * self.stride + tile + neuron])
    }
}

/// h, and where `product` makes them the sums of the neurons.
///
/// The products for sm_90 have two ways of getting their rows, which must give the same bits.
pub fn gate_up(batch: &Batch, product: Product, sim: Sim) -> (Buffer<bf16>, Option<Partials>) {
    let gathered = gate_up_of(batch, product, sim, None);
    if product.tile.needs_wgmma() {
        let hidden = batch.layer.hidden;
        let rows: Vec<bf16> = batch
            .grouped
            .token_of_row
            .to_vec()
            .iter()
            .flat_map(|&token| &batch.x[token as usize * hidden..][..hidden])
            .copied()
            .collect();
        let ordered = gate_up_of(
            batch,
            product,
            sim,
            Some(&Buffer::input("x of rows", &rows)),
        );
        assert!(
            written(&ordered.0) == written(&gathered.0),
            "{}",
            product.entry
        );
        let sums = |made: &Option<Partials>| made.as_ref().map(|made| written(&made.values));
        assert!(sums(&ordered.1) == sums(&gathered.1), "{}", product.entry);
    }
    gathered
}

/// The bytes that were written.
fn written<T: Pod>(buffer: &Buffer<T>) -> (Vec<usize>, Vec<u8>) {
    (buffer.unwritten(), bytes_of(buffer))
}

/// With x by token, or by row.
fn gate_up_of(
    batch: &Batch,
    product: Product,
    sim: Sim,
    x_of_rows: Option<&Buffer<bf16>>,
) -> (Buffer<bf16>, Option<Partials>) {
    let (layer, grouped) = (&batch.layer, &batch.grouped);
    let tiles = batch.tiles(product, None, sim);
    let h = Buffer::output("h", batch.num_rows() * layer.hidden_pitch());
    let partials = Partials::new(batch, tiles, TENP_NUM_ACTIVATION_SUMS);
    let stats = product == Product::gate_up_stats(product.tile);
    let sums = stats.then(|| (view(&grouped.row_weights), partials.view()));
    let args = MoeGateUp {
        product,
        experts: batch.tables.view(),
        gate_up: view(&batch.gate_up),
        x: view(x_of_rows.unwrap_or(&batch.x_buffer)),
        token_of_row: x_of_rows.is_none().then(|| view(&grouped.token_of_row)),
        h: view_mut(&h),
        group_offsets: view(&grouped.group_offsets),
        schedule: partials.tiles.view(),
        sums,
        x_rows: match x_of_rows {
            Some(_) => batch.num_rows(),
            None => batch.routing.num_tokens(),
        },
        num_rows: batch.num_rows(),
        hidden: layer.hidden,
        hidden_pitch: layer.hidden_pitch(),
    };
    sim.go(moe_gate_up(args, sim.multiprocessors));
    (h, stats.then_some(partials))
}

/// What the down product makes.
pub struct Outputs {
    pub y_f32: Buffer<f32>,
    pub y_bf16: Buffer<bf16>,
    /// `[num_partials, rows]`.
    pub squares: Buffer<f32>,
    pub num_partials: usize,
}

/// y of `h`, in every form.
pub fn down(batch: &Batch, h: &Buffer<bf16>, product: Product, sim: Sim) -> Outputs {
    let (layer, rows) = (&batch.layer, batch.num_rows());
    let tiles = batch.tiles(product, Some(layer.hidden), sim);
    let num_partials = square_partials(&product, layer.hidden);
    let outputs = Outputs {
        y_f32: Buffer::output("y_f32", rows * layer.hidden),
        y_bf16: Buffer::output("y_bf16", rows * layer.hidden),
        squares: Buffer::output("square_partials", num_partials * rows),
        num_partials,
    };
    let args = MoeDown {
        product,
        experts: batch.tables.view(),
        down_t: view(&batch.down_t),
        h: view(h),
        y_f32: Some(view_mut(&outputs.y_f32)),
        y_bf16: Some(view_mut(&outputs.y_bf16)),
        square_partials: Some(view_mut(&outputs.squares)),
        group_offsets: view(&batch.grouped.group_offsets),
        schedule: tiles.view(),
        num_rows: rows,
        hidden: layer.hidden,
        hidden_pitch: layer.hidden_pitch(),
    };
    sim.go(moe_down(args, sim.multiprocessors));
    outputs
}

/// Contributions of the neurons, with their outputs.
pub fn contribution(
    batch: &Batch,
    (h, y, row_inverse): (&Buffer<bf16>, &Buffer<bf16>, &Buffer<f32>),
    product: Product,
    sim: Sim,
) -> Partials {
    let projected = Projected::Outputs {
        down_t: view(&batch.down_t),
        y: view(y),
    };
    contribution_of(batch, (h, projected, row_inverse), product, sim)
}

/// Contributions of the neurons.
pub fn contribution_of(
    batch: &Batch,
    (h, projected, row_inverse): (&Buffer<bf16>, Projected<'_>, &Buffer<f32>),
    product: Product,
    sim: Sim,
) -> Partials {
    let layer = &batch.layer;
    let tiles = batch.tiles(product, None, sim);
    let partials = Partials::new(batch, tiles, TENP_NUM_CONTRIBUTION_SUMS);
    let args = MoeContribution {
        product,
        experts: batch.tables.view(),
        projected,
        h: view(h),
        row_inverse: view(row_inverse),
        sums: partials.view(),
        group_offsets: view(&batch.grouped.group_offsets),
        schedule: partials.tiles.view(),
        num_rows: batch.num_rows(),
        hidden: layer.hidden,
        hidden_pitch: layer.hidden_pitch(),
    };
    sim.go(moe_contribution(args, sim.multiprocessors));
    partials
}
