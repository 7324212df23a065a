//! A routed batch on the executor: grouping, schedules, and the launches of the grouped products.

use half::bf16;
use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;
use simt::{Buffer, Schedule};
use tenp_kernels::cpu::moe::{ExpertActivations, expert_forward};
use tenp_kernels::{Compute, ExpertGroups};
use tenp_kernels::params::{
    TENP_GROUP_CHUNK, TenpMoeDownParams, TenpMoeGateUpParams, TenpMoeGroupParams,
    TenpMoeScheduleParams, TenpScheduleSpec,
};

use super::{AWKWARD_WIDTHS, bf16_values, bits, launch};
use super::layer::Layer;

/// Which experts the tokens chose.
pub struct Routing {
    pub num_experts: usize,
    pub top_k: usize,
    /// `[T, k]`.
    pub ids: Vec<u32>,
    /// `[T, k]`.
    pub weights: Vec<f32>,
}

impl Routing {
    /// Every token takes `top_k` different experts of `choices`.
    pub fn random(
        rng: &mut ChaCha8Rng,
        num_experts: usize,
        tokens: usize,
        top_k: usize,
        choices: &[usize],
    ) -> Self {
        let mut ids = Vec::new();
        for _ in 0..tokens {
            let mut left = choices.to_vec();
            for _ in 0..top_k {
                ids.push(left.remove(rng.random_range(0..left.len())) as u32);
            }
        }
        let weights = ids.iter().map(|_| rng.random_range(0.05..1.0)).collect();
        Self {
            num_experts,
            top_k,
            ids,
            weights,
        }
    }

    /// Every token goes to `expert`.
    pub fn all_to(num_experts: usize, tokens: usize, expert: usize) -> Self {
        Self {
            num_experts,
            top_k: 1,
            ids: vec![expert as u32; tokens],
            weights: vec![0.75; tokens],
        }
    }

    pub fn num_tokens(&self) -> usize {
        self.ids.len() / self.top_k
    }

    pub fn num_slots(&self) -> usize {
        self.ids.len()
    }

    /// The CPU's grouping.
    pub fn groups(&self) -> ExpertGroups {
        ExpertGroups::new(self.num_experts, self.top_k, &self.ids, &self.weights)
            .expect("the ids are of these experts")
    }
}

/// The same on the device.
pub struct Grouped {
    pub expert_ids: Buffer<i32>,
    pub slot_weights: Buffer<f32>,
    pub group_offsets: Buffer<i32>,
    pub token_of_row: Buffer<i32>,
    pub row_of_slot: Buffer<i32>,
    pub row_weights: Buffer<f32>,
}

impl Grouped {
    /// Runs the grouping kernels: the small one where the batch allows it, unless `large`.
    pub fn new(routing: &Routing, large: bool, schedule: Schedule) -> Self {
        let ids: Vec<i32> = routing.ids.iter().map(|&e| e as i32).collect();
        Self::of_ids(&ids, &routing.weights, routing, large, schedule)
    }

    /// The same with ids that may lie outside the experts.
    pub fn of_ids(
        ids: &[i32],
        weights: &[f32],
        routing: &Routing,
        large: bool,
        schedule: Schedule,
    ) -> Self {
        let (slots, classes) = (ids.len(), routing.num_experts + 1);
        let grouped = Self {
            expert_ids: Buffer::input("expert_ids", ids),
            slot_weights: Buffer::input("slot_weights", weights),
            group_offsets: Buffer::output("group_offsets", classes),
            token_of_row: Buffer::output("token_of_row", slots),
            row_of_slot: Buffer::output("row_of_slot", slots),
            row_weights: Buffer::output("row_weights", slots),
        };
        let chunks = slots.div_ceil(TENP_GROUP_CHUNK as usize);
        let chunk_counts = Buffer::<i32>::output("chunk_counts", chunks * classes);
        let params = TenpMoeGroupParams {
            expert_ids: grouped.expert_ids.ptr(),
            slot_weights: grouped.slot_weights.ptr(),
            chunk_counts: chunk_counts.mut_ptr(),
            group_offsets: grouped.group_offsets.mut_ptr(),
            token_of_row: grouped.token_of_row.mut_ptr(),
            row_of_slot: grouped.row_of_slot.mut_ptr(),
            row_weights: grouped.row_weights.mut_ptr(),
            num_slots: slots as i32,
            top_k: routing.top_k as i32,
            num_experts: routing.num_experts as i32,
            num_chunks: chunks as i32,
        };
        if large || slots > TENP_GROUP_CHUNK as usize {
            launch(schedule, "tenp_moe_count", chunks, 256, 4096, &params);
            let shared = 8320 + 4 * classes;
            launch(schedule, "tenp_moe_offsets", 1, 1024, shared, &params);
            launch(schedule, "tenp_moe_group", chunks, 256, 4096, &params);
        } else {
            let shared = 4224 + 8 * classes;
            launch(schedule, "tenp_moe_group_small", 1, 256, shared, &params);
        }
        grouped
    }
}

/// How a product is cut.
#[derive(Clone, Copy)]
pub struct Cut {
    pub token_tile: usize,
    pub weight_tile: usize,
    /// 0: the padded width.
    pub outputs: usize,
    pub longest_first: bool,
    pub partials: bool,
}

/// A product's schedule on the device.
pub struct Tiles {
    pub order: Buffer<i32>,
    pub tile_offsets: Buffer<i32>,
    pub partial_offsets: Buffer<i64>,
}

/// Makes the schedules of up to four products in one launch.
pub fn schedule_tiles(
    layer: &Layer,
    grouped: &Grouped,
    cuts: &[Cut],
    schedule: Schedule,
) -> Vec<Tiles> {
    let experts = layer.num_experts();
    let offsets = Buffer::input("neuron_offsets", &layer.neuron_offsets());
    let tiles: Vec<Tiles> = cuts
        .iter()
        .map(|_| Tiles {
            order: Buffer::output("order", experts),
            tile_offsets: Buffer::output("tile_offsets", experts + 1),
            partial_offsets: Buffer::output("partial_offsets", experts + 1),
        })
        .collect();
    let spec = |i: usize| {
        let (cut, tiles) = (cuts.get(i)?, tiles.get(i)?);
        Some(TenpScheduleSpec {
            order: tiles.order.mut_ptr(),
            tile_offsets: tiles.tile_offsets.mut_ptr(),
            partial_offsets: if cut.partials {
                tiles.partial_offsets.mut_ptr()
            } else {
                std::ptr::null_mut()
            },
            token_tile: cut.token_tile as i32,
            weight_tile: cut.weight_tile as i32,
            outputs: cut.outputs as i32,
            longest_first: i32::from(cut.longest_first),
        })
    };
    let none = TenpScheduleSpec {
        order: std::ptr::null_mut(),
        tile_offsets: std::ptr::null_mut(),
        partial_offsets: std::ptr::null_mut(),
        token_tile: 0,
        weight_tile: 0,
        outputs: 0,
        longest_first: 0,
    };
    let params = TenpMoeScheduleParams {
        group_offsets: grouped.group_offsets.ptr(),
        neuron_offsets: offsets.ptr(),
        specs: std::array::from_fn(|i| spec(i).unwrap_or(none)),
        num_experts: experts as i32,
        num_specs: cuts.len() as i32,
    };
    let shared = 256 + 16 * experts;
    launch(
        schedule,
        "tenp_moe_schedule",
        cuts.len(),
        256,
        shared,
        &params,
    );
    tiles
}

/// An entry of a grouped product: its name's end, its tiles and its shared memory without the offsets.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    pub name: &'static str,
    pub weight_tile: usize,
    pub token_tile: usize,
    pub shared: usize,
}

/// Paths of gate/up; weight tiles in neurons.
pub const GATE_UP_PATHS: [Path; 4] = [
    path("n128", 64, 128, 65_536),
    path("n64", 64, 64, 49_152),
    path("n16", 64, 16, 73_728),
    path("r2", 32, 2, 0),
];

/// Paths of down; weight tiles in outputs.
pub const DOWN_PATHS: [Path; 4] = [
    path("n128", 128, 128, 65_536),
    path("n64", 128, 64, 49_152),
    path("n16", 128, 16, 73_728),
    path("r2", 64, 2, 4096),
];

/// Paths of the contribution; weight tiles in neurons.
pub const CONTRIBUTION_PATHS: [Path; 2] =
    [path("n128", 128, 128, 65_536), path("n64", 128, 64, 49_152)];

const fn path(name: &'static str, weight_tile: usize, token_tile: usize, shared: usize) -> Path {
    Path {
        name,
        weight_tile,
        token_tile,
        shared,
    }
}

/// A layer's weights and tables on the device.
pub struct DeviceLayer {
    pub gate_up: Buffer<u16>,
    pub down_t: Buffer<u16>,
    pub neuron_offsets: Buffer<i32>,
    pub widths: Buffer<i32>,
}

impl DeviceLayer {
    pub fn new(layer: &Layer) -> Self {
        Self {
            gate_up: Buffer::input("gate_up", &layer.gate_up()),
            down_t: Buffer::input("down_t", &layer.down_t()),
            neuron_offsets: Buffer::input("neuron_offsets", &layer.neuron_offsets()),
            widths: Buffer::input("widths", &layer.device_widths()),
        }
    }
}

/// Per-tile partials of the statistics.
pub struct Partials {
    pub values: Buffer<f32>,
    pub stride: usize,
}

/// Elements of partials in one table.
pub fn partial_stride(layer: &Layer, groups: &ExpertGroups, token_tile: usize) -> usize {
    (0..layer.num_experts())
        .map(|e| groups.rows(e).len().div_ceil(token_tile) * layer.width_padded(e))
        .sum()
}

/// Runs `tenp_moe_gate_up_*` on `blocks` blocks; with `partials` the entry that makes statistics.
pub fn gate_up(
    batch: &Batch,
    path: Path,
    tiles: &Tiles,
    partials: Option<&Partials>,
    blocks: usize,
    schedule: Schedule,
) -> Buffer<u16> {
    let (layer, device, grouped) = (&batch.layer, &batch.device, &batch.grouped);
    let rows = grouped.token_of_row.len();
    let h = Buffer::output("h", rows * layer.hidden_pitch());
    let params = TenpMoeGateUpParams {
        gate_up: device.gate_up.ptr(),
        x: batch.x_buffer.ptr(),
        token_of_row: grouped.token_of_row.ptr(),
        h: h.mut_ptr(),
        group_offsets: grouped.group_offsets.ptr(),
        neuron_offsets: device.neuron_offsets.ptr(),
        widths: device.widths.ptr(),
        order: tiles.order.ptr(),
        tile_offsets: tiles.tile_offsets.ptr(),
        row_weights: grouped.row_weights.ptr(),
        partials: partials.map_or(std::ptr::null_mut(), |p| p.values.mut_ptr()),
        partial_offsets: tiles.partial_offsets.ptr(),
        partial_stride: partials.map_or(0, |p| p.stride as i64),
        num_experts: layer.num_experts() as i32,
        hidden: layer.hidden as i32,
        hidden_pitch: layer.hidden_pitch() as i32,
        padding: 0,
    };
    let stats = if partials.is_some() { "stats_" } else { "" };
    let entry = format!("tenp_moe_gate_up_{stats}{}", path.name);
    let shared = path.shared + 4 * (layer.num_experts() + 1);
    launch(schedule, &entry, blocks, 256, shared, &params);
    h
}

/// Outputs of `tenp_moe_down_*`.
pub struct Outputs {
    pub y_f32: Buffer<f32>,
    pub y_bf16: Buffer<u16>,
    pub square_partials: Buffer<f32>,
    pub num_partials: usize,
}

/// Runs `tenp_moe_down_*` with every output.
pub fn down(
    batch: &Batch,
    h: &Buffer<u16>,
    path: Path,
    tiles: &Tiles,
    blocks: usize,
    schedule: Schedule,
) -> Outputs {
    let (layer, device, grouped) = (&batch.layer, &batch.device, &batch.grouped);
    let rows = grouped.token_of_row.len();
    let num_partials = layer.hidden.div_ceil(path.weight_tile);
    let outputs = Outputs {
        y_f32: Buffer::output("y_f32", rows * layer.hidden),
        y_bf16: Buffer::output("y_bf16", rows * layer.hidden),
        square_partials: Buffer::output("square_partials", num_partials * rows),
        num_partials,
    };
    let params = TenpMoeDownParams {
        down_t: device.down_t.ptr(),
        h: h.ptr(),
        y_f32: outputs.y_f32.mut_ptr(),
        y_bf16: outputs.y_bf16.mut_ptr(),
        square_partials: outputs.square_partials.mut_ptr(),
        group_offsets: grouped.group_offsets.ptr(),
        neuron_offsets: device.neuron_offsets.ptr(),
        widths: device.widths.ptr(),
        order: tiles.order.ptr(),
        tile_offsets: tiles.tile_offsets.ptr(),
        num_rows: rows as i64,
        num_experts: layer.num_experts() as i32,
        hidden: layer.hidden as i32,
        hidden_pitch: layer.hidden_pitch() as i32,
        padding: 0,
    };
    let entry = format!("tenp_moe_down_{}", path.name);
    let shared = path.shared + 4 * (layer.num_experts() + 1);
    launch(schedule, &entry, blocks, 256, shared, &params);
    outputs
}

/// A layer, a batch routed to it, and both on the device.
pub struct Batch {
    pub layer: Layer,
    pub routing: Routing,
    pub groups: ExpertGroups,
    /// `[T, H]`.
    pub x: Vec<bf16>,
    pub device: DeviceLayer,
    pub grouped: Grouped,
    pub x_buffer: Buffer<u16>,
}

impl Batch {
    pub fn new(layer: Layer, routing: Routing, x: Vec<bf16>, schedule: Schedule) -> Self {
        Self {
            groups: routing.groups(),
            device: DeviceLayer::new(&layer),
            grouped: Grouped::new(&routing, false, schedule),
            x_buffer: Buffer::input("x", &bits(&x)),
            layer,
            routing,
            x,
        }
    }

    /// Experts of all awkward widths; some without a token, one with a single token, the others with a share of the rest.
    pub fn awkward(seed: u64, hidden: usize, tokens: usize, schedule: Schedule) -> Self {
        let mut rng = super::rng(seed);
        // Two more of width 65 and 128 that no token reaches, and one of 64 that one token reaches.
        let widths = [&AWKWARD_WIDTHS[..], &[65, 128, 64]].concat();
        let layer = Layer::random(&mut rng, hidden, &widths);
        let choices: Vec<usize> = (0..AWKWARD_WIDTHS.len()).collect();
        let mut routing = Routing::random(&mut rng, widths.len(), tokens, 3, &choices);
        if tokens > 0 {
            routing.ids[3 * (tokens / 2)] = 12;
        }
        let x = bf16_values(&mut rng, tokens * hidden, 1.0);
        Self::new(layer, routing, x, schedule)
    }

    /// Every token on one expert, among others.
    pub fn crowded(seed: u64, hidden: usize, tokens: usize, schedule: Schedule) -> Self {
        let mut rng = super::rng(seed);
        let layer = Layer::random(&mut rng, hidden, &[16, 72, 40]);
        let routing = Routing::all_to(3, tokens, 1);
        let x = bf16_values(&mut rng, tokens * hidden, 1.0);
        Self::new(layer, routing, x, schedule)
    }

    /// The CPU's outputs y, `[rows, H]`, from bf16 factors.
    pub fn cpu_outputs(&self) -> Vec<f32> {
        let mut activations = ExpertActivations::default();
        expert_forward(
            Compute::Bf16,
            &self.layer.views(),
            &self.groups,
            &super::widened(&self.x),
            &mut activations,
        )
        .expect("shapes fit");
        activations.outputs().to_vec()
    }

    /// Expert and width of each row.
    pub fn rows(&self) -> Vec<Row> {
        (0..self.layer.num_experts())
            .flat_map(|expert| {
                self.groups.rows(expert).map(move |row| Row {
                    row,
                    expert,
                    width: self.layer.widths[expert],
                    token: self.groups.token_ids()[row] as usize,
                })
            })
            .collect()
    }

    /// One product's schedule.
    pub fn tiles(&self, path: Path, outputs: usize, partials: bool, schedule: Schedule) -> Tiles {
        let cut = Cut {
            token_tile: path.token_tile,
            weight_tile: path.weight_tile,
            outputs,
            longest_first: outputs > 0,
            partials,
        };
        schedule_tiles(&self.layer, &self.grouped, &[cut], schedule)
            .pop()
            .expect("one schedule was asked for")
    }
}

/// Where a row belongs.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub row: usize,
    pub expert: usize,
    pub width: usize,
    pub token: usize,
}
