//! A routed batch on the executor: grouping and schedules.

use half::bf16;
use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;
use simt::Buffer;
use tenp_kernels::ExpertGroups;
use tenp_kernels::device::moe_group::{MoeGroup, group_scratch_len, moe_group};
use tenp_kernels::device::moe_schedule::{ExpertTables, Schedule, ScheduleOut, moe_schedule};
use tenp_kernels::device::{PaddedLayout, Product};

use super::layer::Layer;
use super::{AWKWARD_WIDTHS, Sim, bf16_values, view, view_mut};

/// Which experts the tokens chose.
pub struct Routing {
    pub num_experts: usize,
    pub top_k: usize,
    /// `[T, k]`; an id that is no expert's is routed nowhere.
    pub ids: Vec<i32>,
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
                ids.push(left.remove(rng.random_range(0..left.len())) as i32);
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
            ids: vec![expert as i32; tokens],
            weights: vec![0.75; tokens],
        }
    }

    pub fn num_tokens(&self) -> usize {
        self.ids.len() / self.top_k
    }

    /// The CPU's grouping. Slots that are routed nowhere, if any, are those of one expert more.
    pub fn groups(&self) -> ExpertGroups {
        let experts = self.num_experts as u32;
        let id = |&e: &i32| u32::try_from(e).map_or(experts, |e| e.min(experts));
        let ids: Vec<u32> = self.ids.iter().map(id).collect();
        let lost = usize::from(ids.contains(&experts));
        ExpertGroups::new(self.num_experts + lost, self.top_k, &ids, &self.weights)
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
    /// Runs the grouping kernels.
    pub fn new(routing: &Routing, sim: Sim) -> Self {
        let (slots, experts) = (routing.ids.len(), routing.num_experts);
        let grouped = Self {
            expert_ids: Buffer::input("expert_ids", &routing.ids),
            slot_weights: Buffer::input("slot_weights", &routing.weights),
            group_offsets: Buffer::output("group_offsets", experts + 1),
            token_of_row: Buffer::output("token_of_row", slots),
            row_of_slot: Buffer::output("row_of_slot", slots),
            row_weights: Buffer::output("row_weights", slots),
        };
        let scratch = Buffer::output("scratch", group_scratch_len(slots, experts));
        let calls = moe_group(MoeGroup {
            expert_ids: view(&grouped.expert_ids),
            slot_weights: view(&grouped.slot_weights),
            scratch: view_mut(&scratch),
            group_offsets: view_mut(&grouped.group_offsets),
            token_of_row: view_mut(&grouped.token_of_row),
            row_of_slot: view_mut(&grouped.row_of_slot),
            row_weights: view_mut(&grouped.row_weights),
            num_tokens: routing.num_tokens(),
            top_k: routing.top_k,
            num_experts: experts,
        });
        for call in calls.expect("the arguments fit") {
            sim.go(Ok(call));
        }
        grouped
    }
}

/// Widths and places of the experts on the device.
pub struct Tables {
    pub layout: PaddedLayout,
    pub neuron_offsets: Buffer<i32>,
    pub widths: Buffer<i32>,
}

impl Tables {
    pub fn new(layout: &PaddedLayout) -> Self {
        Self {
            layout: layout.clone(),
            neuron_offsets: Buffer::input("neuron_offsets", layout.neuron_offsets()),
            widths: Buffer::input("widths", layout.widths()),
        }
    }

    pub fn view(&self) -> ExpertTables<'_> {
        ExpertTables {
            layout: &self.layout,
            neuron_offsets: view(&self.neuron_offsets),
            widths: view(&self.widths),
        }
    }
}

/// A product's schedule on the device.
pub struct Tiles {
    pub product: Product,
    pub order: Buffer<i32>,
    pub tile_offsets: Buffer<i32>,
    pub partial_offsets: Buffer<i64>,
}

impl Tiles {
    pub fn view(&self) -> Schedule<'_> {
        Schedule {
            order: view(&self.order),
            tile_offsets: view(&self.tile_offsets),
        }
    }

    /// Makes the schedules of up to four products, given with their outputs, in one launch.
    pub fn schedule(
        tables: &Tables,
        group_offsets: &Buffer<i32>,
        products: &[(Product, Option<usize>)],
        sim: Sim,
    ) -> Vec<Self> {
        let experts = tables.layout.num_experts();
        let made: Vec<Self> = products
            .iter()
            .map(|&(product, _)| Self {
                product,
                order: Buffer::output("order", experts),
                tile_offsets: Buffer::output("tile_offsets", experts + 1),
                partial_offsets: Buffer::output("partial_offsets", experts + 1),
            })
            .collect();
        let outs = made.iter().zip(products).map(|(tiles, &(_, outputs))| {
            let partials = outputs.is_none().then(|| view_mut(&tiles.partial_offsets));
            ScheduleOut {
                product: tiles.product,
                outputs,
                order: view_mut(&tiles.order),
                tile_offsets: view_mut(&tiles.tile_offsets),
                partial_offsets: partials,
            }
        });
        let outs = outs.collect();
        sim.go(moe_schedule(&tables.view(), view(group_offsets), outs));
        made
    }
}

/// A layer, a batch routed to it, and both on the device.
pub struct Batch {
    pub layer: Layer,
    pub routing: Routing,
    pub groups: ExpertGroups,
    /// `[T, H]`.
    pub x: Vec<bf16>,
    pub tables: Tables,
    pub gate_up: Buffer<bf16>,
    pub down_t: Buffer<bf16>,
    pub grouped: Grouped,
    pub x_buffer: Buffer<bf16>,
}

impl Batch {
    pub fn new(layer: Layer, routing: Routing, x: Vec<bf16>) -> Self {
        Self {
            groups: routing.groups(),
            tables: Tables::new(&layer.layout),
            gate_up: Buffer::input("gate_up", &layer.gate_up()),
            down_t: Buffer::input("down_t", &layer.down_t()),
            grouped: Grouped::new(&routing, Sim::unlike(0)),
            x_buffer: Buffer::input("x", &x),
            layer,
            routing,
            x,
        }
    }

    /// Experts of all awkward widths, the tokens on three each of the first ten. Two more of width 65 and 128 no token
    /// reaches, and one of 64 a single token.
    pub fn awkward(seed: u64, hidden: usize, tokens: usize) -> Self {
        let mut rng = super::rng(seed);
        let widths = [&AWKWARD_WIDTHS[..], &[65, 128, 64]].concat();
        let layer = Layer::random(&mut rng, hidden, &widths);
        let choices: Vec<usize> = (0..AWKWARD_WIDTHS.len()).collect();
        let mut routing = Routing::random(&mut rng, widths.len(), tokens, 3, &choices);
        if tokens > 0 {
            routing.ids[3 * (tokens / 2)] = 12;
        }
        let x = bf16_values(&mut rng, tokens * hidden, 1.0);
        Self::new(layer, routing, x)
    }

    /// The same, with every fifth slot routed nowhere.
    pub fn with_lost_slots(seed: u64, hidden: usize, tokens: usize) -> Self {
        let Self {
            layer,
            mut routing,
            x,
            ..
        } = Self::awkward(seed, hidden, tokens);
        for (i, id) in routing.ids.iter_mut().step_by(5).enumerate() {
            *id = if i % 2 == 0 { -1 } else { 13 };
        }
        Self::new(layer, routing, x)
    }

    /// Every token on one expert of width 72, among others.
    pub fn crowded(seed: u64, hidden: usize, tokens: usize) -> Self {
        let mut rng = super::rng(seed);
        let layer = Layer::random(&mut rng, hidden, &[16, 72, 40]);
        let x = bf16_values(&mut rng, tokens * hidden, 1.0);
        Self::new(layer, Routing::all_to(3, tokens, 1), x)
    }

    /// Experts of a real model's width, and narrow ones beside them.
    pub fn wide(seed: u64, hidden: usize, tokens: usize) -> Self {
        let mut rng = super::rng(seed);
        let layer = Layer::random(&mut rng, hidden, &[1408, 40, 1408]);
        let routing = Routing::random(&mut rng, 3, tokens, 2, &[0, 1, 2]);
        let x = bf16_values(&mut rng, tokens * hidden, 1.0);
        Self::new(layer, routing, x)
    }

    pub fn num_rows(&self) -> usize {
        self.grouped.token_of_row.len()
    }

    /// Expert, width and token of each row.
    pub fn rows(&self) -> Vec<Row> {
        (0..self.layer.num_experts())
            .flat_map(|expert| {
                self.groups.rows(expert).map(move |index| Row {
                    index,
                    expert,
                    width: self.layer.widths[expert],
                    token: self.groups.token_ids()[index] as usize,
                })
            })
            .collect()
    }

    /// One product's schedule.
    pub fn tiles(&self, product: Product, outputs: Option<usize>, sim: Sim) -> Tiles {
        let offsets = &self.grouped.group_offsets;
        Tiles::schedule(&self.tables, offsets, &[(product, outputs)], sim)
            .pop()
            .expect("one schedule was asked for")
    }
}

/// Where a row belongs.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub index: usize,
    pub expert: usize,
    pub width: usize,
    pub token: usize,
}
