//! Grouping, gathering and scheduling against `ExpertGroups` and plain loops.

mod support;

use half::bf16;
use rand::RngExt as _;
use simt::{Buffer, Schedule};
use support::layer::Layer;
use support::moe::{Grouped, Routing, Tables, Tiles};
use support::{AWKWARD_WIDTHS, Sim, rng, view, view_mut};
use tenp_kernels::device::moe_group::{GatherRows, gather_rows};
use tenp_kernels::device::{Product, Tile};

fn check(routing: &Routing, schedule: Schedule) {
    let groups = routing.groups();
    let got = Grouped::new(routing, Sim::new(schedule));
    let mut offsets = vec![0];
    offsets.extend((0..routing.num_experts).map(|e| groups.rows(e).end as i32));
    assert_eq!(got.group_offsets.written().unwrap(), offsets);
    let tokens: Vec<i32> = groups.token_ids().iter().map(|&t| t as i32).collect();
    assert_eq!(got.token_of_row.written().unwrap(), tokens);
    assert_eq!(got.row_weights.written().unwrap(), groups.weights());
    let rows: Vec<i32> = (0..routing.num_tokens())
        .flat_map(|t| groups.rows_of_token(t))
        .map(|&r| r as i32)
        .collect();
    assert_eq!(got.row_of_slot.written().unwrap(), rows);
}

#[test]
fn slots_are_grouped_as_on_the_cpu() {
    let mut rng = rng(1);
    for schedule in Schedule::UNLIKE {
        // The last two are the most slots of one launch, and one token more.
        for (experts, tokens, top_k) in [
            (1, 1, 1),
            (5, 3, 2),
            (64, 17, 6),
            (300, 40, 8),
            (9, 512, 2),
            (9, 513, 2),
        ] {
            let all: Vec<usize> = (0..experts).collect();
            check(
                &Routing::random(&mut rng, experts, tokens, top_k, &all),
                schedule,
            );
        }
        // Several chunks, most experts without a token.
        let routing = Routing::random(&mut rng, 129, 1100, 2, &[3, 4, 128]);
        check(&routing, schedule);
        check(&Routing::all_to(7, 2049, 6), schedule);
    }
}

#[test]
fn slots_with_impossible_ids_are_in_no_group() {
    let few = [2, -1, 0, 3, i32::MAX, 1, 2, i32::MIN];
    for repeats in [1, 200] {
        let ids = few.repeat(repeats);
        let routing = Routing {
            num_experts: 3,
            top_k: 2,
            weights: vec![0.5; ids.len()],
            ids,
        };
        let got = Grouped::new(&routing, Sim::new(Schedule::Forward));
        let n = repeats as i32;
        assert_eq!(got.group_offsets.written().unwrap(), [0, n, 2 * n, 4 * n]);
        let rows = got.row_of_slot.written().unwrap();
        let tokens = got.token_of_row.written().unwrap();
        for (slot, (&id, &row)) in routing.ids.iter().zip(&rows).enumerate() {
            if (0..3).contains(&id) {
                assert_eq!(tokens[row as usize], slot as i32 / 2);
            } else {
                assert_eq!(row, -1);
            }
        }
        // Every slot has a row of its own, those of no expert too.
        let mut tokens = tokens;
        tokens.sort_unstable();
        let twice: Vec<i32> = (0..4 * n).flat_map(|t| [t, t]).collect();
        assert_eq!(tokens, twice);
    }
}

#[test]
fn rows_are_gathered_and_the_rest_left_alone() {
    let mut rng = rng(2);
    for cols in [8usize, 64, 264] {
        let from: Vec<bf16> = (0..5 * cols)
            .map(|_| bf16::from_bits(rng.random()))
            .collect();
        let ids = [4, -1, 0, 0, 3, 2, 1, 4, 2];
        let live = 7;
        let (source, row_ids) = (Buffer::input("in", &from), Buffer::input("row_ids", &ids));
        let num_live = Buffer::input("num_live_rows", &[live as i32]);
        let out = Buffer::<bf16>::output("out", ids.len() * cols);
        let args = GatherRows {
            input: view(&source),
            row_ids: view(&row_ids),
            out: view_mut(&out),
            num_live_rows: Some(view(&num_live)),
            input_rows: 5,
            rows: ids.len(),
            cols,
        };
        // SAFETY: the ids are below 5.
        Sim::new(Schedule::Reversed).go(unsafe { gather_rows(args) });
        let got = out.to_vec();
        for (r, &id) in ids[..live].iter().enumerate() {
            let row: Vec<u16> = got[r * cols..(r + 1) * cols]
                .iter()
                .map(|v| v.to_bits())
                .collect();
            match usize::try_from(id) {
                Ok(id) => {
                    let want = from[id * cols..(id + 1) * cols].iter().map(|v| v.to_bits());
                    assert!(row.iter().copied().eq(want));
                }
                Err(_) => assert!(row.iter().all(|&v| v == 0)),
            }
        }
        let rest: Vec<usize> = (live * cols..ids.len() * cols).collect();
        assert_eq!(out.unwritten(), rest);
    }
}

#[test]
fn schedules_count_every_tile_once() {
    let mut rng = rng(3);
    let layer = Layer::random(&mut rng, 8, &AWKWARD_WIDTHS);
    let experts = layer.num_experts();
    let products = [
        (Product::gate_up(Tile::N128), None),
        (Product::down(Tile::N64), Some(200)),
        (Product::contribution(Tile::N64), None),
        (Product::down(Tile::R2), Some(8)),
    ];
    for schedule in Schedule::UNLIKE {
        let sim = Sim::new(schedule);
        let choices = [0usize, 1, 3, 4, 6, 7, 9];
        let routing = Routing::random(&mut rng, experts, 150, 3, &choices);
        let groups = routing.groups();
        let offsets = Grouped::new(&routing, sim).group_offsets;
        let made = Tiles::schedule(&Tables::new(&layer.layout), &offsets, &products, sim);
        for (&(product, outputs), got) in products.iter().zip(made) {
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by_key(|&e| (usize::MAX - layer.width_padded(e), e));
            let got_order = got.order.written().unwrap();
            assert!(
                got_order
                    .iter()
                    .map(|&e| e as usize)
                    .eq(order.iter().copied())
            );
            let token_tiles = |e: usize| groups.rows(e).len().div_ceil(product.tile.rows());
            let mut tiles = vec![0i32];
            for &e in &order {
                let width = layer.width_padded(e);
                let outputs = outputs.filter(|_| width > 0).unwrap_or(width);
                let count = token_tiles(e) * outputs.div_ceil(product.weight_tile);
                tiles.push(tiles.last().unwrap() + count as i32);
            }
            assert_eq!(got.tile_offsets.written().unwrap(), tiles);
            if outputs.is_none() {
                let mut partials = vec![0i64];
                for e in 0..experts {
                    let count = token_tiles(e) * layer.width_padded(e);
                    partials.push(partials.last().unwrap() + count as i64);
                }
                assert_eq!(got.partial_offsets.written().unwrap(), partials);
            } else {
                assert_eq!(got.partial_offsets.unwritten().len(), experts + 1);
            }
        }
    }
}
