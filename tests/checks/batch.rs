//! A routed batch on a backend: grouping and schedules.

use half::bf16;
use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;
use tenp_kernels::ExpertGroups;
use tenp_kernels::device::moe_combine::Slots;
use tenp_kernels::device::moe_group::{MoeGroup, group_scratch_len, moe_group};
use tenp_kernels::device::moe_schedule::{ExpertTables, Schedule, ScheduleOut, moe_schedule};
use tenp_kernels::device::{Backend, Memory as _, Product};

use super::layer::Layer;
use super::{AWKWARD_WIDTHS, On, Size, bf16_values, rng};

/// Which experts the tokens chose: `[T, k]`.
pub struct Routing {
    pub num_experts: usize,
    pub top_k: usize,
    pub ids: Vec<i32>,
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
                ids.push(left.swap_remove(rng.random_range(0..left.len())) as i32);
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

    pub fn groups(&self) -> ExpertGroups {
        let ids: Vec<u32> = self.ids.iter().map(|&e| e as u32).collect();
        ExpertGroups::new(self.num_experts, self.top_k, &ids, &self.weights)
            .expect("the ids are of these experts")
    }
}

/// A routing as the grouping kernels leave it.
pub struct Grouped<B: Backend> {
    pub expert_ids: B::Buffer<i32>,
    pub slot_weights: B::Buffer<f32>,
    pub group_offsets: B::Buffer<i32>,
    pub token_of_row: B::Buffer<i32>,
    pub row_of_slot: B::Buffer<i32>,
    pub row_weights: B::Buffer<f32>,
}

impl<B: Backend> Grouped<B> {
    pub fn new(on: On<'_, B>, routing: &Routing) -> Self {
        let (slots, experts) = (routing.ids.len(), routing.num_experts);
        let mut grouped = Self {
            expert_ids: on.input(&routing.ids),
            slot_weights: on.input(&routing.weights),
            group_offsets: on.output(experts + 1),
            token_of_row: on.output(slots),
            row_of_slot: on.output(slots),
            row_weights: on.output(slots),
        };
        let mut scratch = on.output(group_scratch_len(slots, experts));
        on.go_all(moe_group(MoeGroup {
            expert_ids: grouped.expert_ids.view(),
            slot_weights: grouped.slot_weights.view(),
            scratch: scratch.view_mut(),
            group_offsets: grouped.group_offsets.view_mut(),
            token_of_row: grouped.token_of_row.view_mut(),
            row_of_slot: grouped.row_of_slot.view_mut(),
            row_weights: grouped.row_weights.view_mut(),
            num_tokens: slots / routing.top_k,
            top_k: routing.top_k,
            num_experts: experts,
        }));
        grouped
    }
}

/// A product's schedule.
pub struct Tiles<B: Backend> {
    pub product: Product,
    pub order: B::Buffer<i32>,
    pub tile_offsets: B::Buffer<i32>,
    pub partial_offsets: B::Buffer<i64>,
}

impl<B: Backend> Tiles<B> {
    pub fn view(&self) -> Schedule<'_> {
        Schedule {
            order: self.order.view(),
            tile_offsets: self.tile_offsets.view(),
        }
    }
}

/// A layer, a batch routed to it, and both on the backend.
pub struct Batch<'b, B: Backend> {
    pub on: On<'b, B>,
    pub layer: Layer,
    pub routing: Routing,
    pub groups: ExpertGroups,
    /// `[T, H]`.
    pub x: Vec<bf16>,
    pub x_there: B::Buffer<bf16>,
    pub neuron_offsets: B::Buffer<i32>,
    pub widths: B::Buffer<i32>,
    pub gate_up: B::Buffer<bf16>,
    pub down_t: B::Buffer<bf16>,
    pub grouped: Grouped<B>,
}

impl<'b, B: Backend> Batch<'b, B> {
    pub fn new(on: On<'b, B>, layer: Layer, routing: Routing, x: Vec<bf16>) -> Self {
        Self {
            on,
            groups: routing.groups(),
            x_there: on.input(&x),
            neuron_offsets: on.input(layer.layout.neuron_offsets()),
            widths: on.input(layer.layout.widths()),
            gate_up: on.input(&layer.gate_up()),
            down_t: on.input(&layer.down_t()),
            grouped: Grouped::new(on, &routing),
            layer,
            routing,
            x,
        }
    }

    /// Experts of all awkward widths, the tokens on three each of the first ten. Two more of width 65 and 128 no token
    /// reaches, and one of 64 a single token.
    pub fn awkward(on: On<'b, B>, seed: u64, hidden: usize, tokens: usize) -> Self {
        let mut rng = rng(seed);
        let widths = [&AWKWARD_WIDTHS[..], &[65, 128, 64]].concat();
        let layer = Layer::random(&mut rng, hidden, &widths);
        let choices: Vec<usize> = (0..AWKWARD_WIDTHS.len()).collect();
        let mut routing = Routing::random(&mut rng, widths.len(), tokens, 3, &choices);
        if tokens > 0 {
            routing.ids[3 * (tokens / 2)] = 12;
        }
        let x = bf16_values(&mut rng, tokens * hidden, 1.0);
        Self::new(on, layer, routing, x)
    }

    /// DeepSeek-V2-Lite's hidden size and widths, whole and pruned, among them one of no neuron; an expert gets no token.
    pub fn real(on: On<'b, B>, seed: u64, tokens: usize) -> Self {
        let mut rng = rng(seed);
        let widths = [1408, 1056, 704, 1408, 1407, 0, 65, 1408];
        let layer = Layer::random(&mut rng, 2048, &widths);
        let routing = Routing::random(&mut rng, 8, tokens, 3, &[0, 1, 2, 4, 5, 6, 7]);
        let x = bf16_values(&mut rng, tokens * 2048, 1.0);
        Self::new(on, layer, routing, x)
    }

    /// Some batches for a check: their seeds start at `seed`.
    pub fn of(on: On<'b, B>, size: Size, seed: u64) -> Vec<Self> {
        match size {
            Size::Small => vec![
                Self::awkward(on, seed, 72, 37),
                Self::awkward(on, seed + 1, 40, 1),
            ],
            Size::Real => vec![
                Self::real(on, seed, 700),
                Self::real(on, seed + 1, 2),
                Self::awkward(on, seed + 2, 2048, 1000),
            ],
        }
    }

    pub fn num_tokens(&self) -> usize {
        self.routing.ids.len() / self.routing.top_k
    }

    pub fn num_rows(&self) -> usize {
        self.routing.ids.len()
    }

    pub fn tables(&self) -> ExpertTables<'_> {
        ExpertTables {
            layout: &self.layer.layout,
            neuron_offsets: self.neuron_offsets.view(),
            widths: self.widths.view(),
        }
    }

    pub fn slots(&self) -> Slots<'_> {
        Slots {
            row_of_slot: self.grouped.row_of_slot.view(),
            expert_ids: self.grouped.expert_ids.view(),
            weights: self.grouped.slot_weights.view(),
            num_tokens: self.num_tokens(),
            top_k: self.routing.top_k,
        }
    }

    /// One product's schedule; `outputs` for the down product.
    pub fn tiles(&self, product: Product, outputs: Option<usize>) -> Tiles<B> {
        let (on, experts) = (self.on, self.layer.num_experts());
        let mut tiles = Tiles::<B> {
            product,
            order: on.output(experts),
            tile_offsets: on.output(experts + 1),
            partial_offsets: on.output(experts + 1),
        };
        let partial_offsets = match outputs {
            None => Some(tiles.partial_offsets.view_mut()),
            Some(_) => None,
        };
        let out = ScheduleOut {
            product,
            outputs,
            order: tiles.order.view_mut(),
            tile_offsets: tiles.tile_offsets.view_mut(),
            partial_offsets,
        };
        on.go(moe_schedule(
            &self.tables(),
            self.grouped.group_offsets.view(),
            vec![out],
        ));
        tiles
    }

    /// Expert, row and token of every row.
    pub fn rows(&self) -> Vec<(usize, usize, usize)> {
        (0..self.layer.num_experts())
            .flat_map(|e| {
                let token = |r: usize| self.groups.token_ids()[r] as usize;
                self.groups.rows(e).map(move |r| (e, r, token(r)))
            })
            .collect()
    }
}

/// Offsets, tokens, rows and weights, up to many chunks of slots; slots that are routed nowhere.
pub fn grouping_is_that_of_the_cpu<B: Backend>(on: On<'_, B>, size: Size) {
    let cases: &[(usize, usize, usize)] = match size {
        Size::Small => &[(5, 0, 2), (7, 1, 3), (64, 100, 6), (13, 700, 3)],
        Size::Real => &[
            (64, 8192, 6),
            (256, 65_536, 8),
            (128, 1, 8),
            (1023, 3000, 4),
        ],
    };
    for (i, &(experts, tokens, top_k)) in cases.iter().enumerate() {
        let choices: Vec<usize> = (0..experts).filter(|e| e % 5 != 4).collect();
        let mut routing = Routing::random(&mut rng(i as u64), experts, tokens, top_k, &choices);
        let want = routing.groups();
        let got = Grouped::new(on, &routing);
        let offsets = on.get(got.group_offsets.view());
        for e in 0..experts {
            assert_eq!(offsets[e] as usize..offsets[e + 1] as usize, want.rows(e));
        }
        let tokens_of_rows = on.get(got.token_of_row.view());
        assert!(
            tokens_of_rows
                .iter()
                .map(|&t| t as u32)
                .eq(want.token_ids().iter().copied())
        );
        assert_eq!(on.get(got.row_weights.view()), want.weights());
        let rows: Vec<u32> = (0..tokens)
            .flat_map(|t| want.rows_of_token(t).to_vec())
            .collect();
        assert!(
            on.get(got.row_of_slot.view())
                .iter()
                .map(|&r| r as u32)
                .eq(rows)
        );
        if tokens == 0 {
            continue;
        }
        // Ids that are no expert's leave the others where they would be without them.
        routing.ids[0] = -1;
        routing.ids[tokens * top_k - 1] = experts as i32;
        let got = Grouped::new(on, &routing);
        let rows = on.get(got.row_of_slot.view());
        assert_eq!((rows[0], rows[tokens * top_k - 1]), (-1, -1));
        let live = routing.ids.len() - rows.iter().filter(|&&r| r < 0).count();
        assert_eq!(on.get(got.group_offsets.view())[experts] as usize, live);
    }
}
