//! Grouping, gathering and scheduling against `ExpertGroups` and plain loops.

mod support;

use rand::RngExt as _;
use simt::{Buffer, Schedule};
use support::layer::Layer;
use support::moe::{Cut, Grouped, Routing, schedule_tiles};
use support::{AWKWARD_WIDTHS, launch, rng};
use tenp_kernels::params::TenpGatherRowsParams;

fn check(routing: &Routing, large: bool, schedule: Schedule) {
    let groups = routing.groups();
    let got = Grouped::new(routing, large, schedule);
    let offsets: Vec<i32> = (0..=routing.num_experts)
        .map(|e| match e {
            0 => 0,
            _ => groups.rows(e - 1).end as i32,
        })
        .collect();
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
        for (experts, tokens, top_k) in [(1, 1, 1), (5, 3, 2), (64, 17, 6), (300, 40, 8)] {
            let all: Vec<usize> = (0..experts).collect();
            let routing = Routing::random(&mut rng, experts, tokens, top_k, &all);
            check(&routing, false, schedule);
            check(&routing, true, schedule);
        }
        // Several chunks, most experts without a token.
        let routing = Routing::random(&mut rng, 129, 1100, 2, &[3, 4, 128]);
        check(&routing, true, schedule);
        check(&Routing::all_to(7, 1025, 6), true, schedule);
    }
}

#[test]
fn slots_with_impossible_ids_are_in_no_group() {
    let ids = [2, -1, 0, 3, i32::MAX, 1, 2, i32::MIN];
    let weights = [0.5f32; 8];
    let shape = Routing {
        num_experts: 3,
        top_k: 2,
        ids: Vec::new(),
        weights: Vec::new(),
    };
    for large in [false, true] {
        let got = Grouped::of_ids(&ids, &weights, &shape, large, Schedule::Forward);
        assert_eq!(got.group_offsets.written().unwrap(), [0, 1, 2, 4]);
        assert_eq!(
            got.row_of_slot.written().unwrap(),
            [2, -1, 0, -1, -1, 1, 3, -1]
        );
        assert_eq!(
            got.token_of_row.written().unwrap(),
            [1, 2, 0, 3, 0, 1, 2, 3]
        );
    }
}

#[test]
fn rows_are_gathered_and_the_rest_left_alone() {
    let mut rng = rng(2);
    for cols in [8usize, 64, 264] {
        let from: Vec<u16> = (0..5 * cols).map(|_| rng.random()).collect();
        let ids = [4, -1, 0, 0, 3, 2, 1, 4, 2];
        let live = 7;
        let (source, row_ids) = (Buffer::input("in", &from), Buffer::input("row_ids", &ids));
        let num_live = Buffer::input("num_live_rows", &[live as i32]);
        let out = Buffer::<u16>::output("out", ids.len() * cols);
        let params = TenpGatherRowsParams {
            in_: source.ptr(),
            row_ids: row_ids.ptr(),
            out: out.mut_ptr(),
            num_live_rows: num_live.ptr(),
            num_rows: ids.len() as i32,
            cols: cols as i32,
        };
        let blocks = ids.len().div_ceil(8);
        launch(
            Schedule::Reversed,
            "tenp_gather_rows",
            blocks,
            256,
            0,
            &params,
        );
        let got = out.to_vec();
        for (r, &id) in ids[..live].iter().enumerate() {
            let row = &got[r * cols..(r + 1) * cols];
            match usize::try_from(id) {
                Ok(id) => assert_eq!(row, &from[id * cols..(id + 1) * cols]),
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
    let cuts = [
        (128, 64, 0, false),
        (64, 128, 200, true),
        (16, 32, 0, true),
        (2, 64, 8, false),
    ]
    .map(|(token_tile, weight_tile, outputs, longest_first)| Cut {
        token_tile,
        weight_tile,
        outputs,
        longest_first,
        partials: true,
    });
    for schedule in Schedule::UNLIKE {
        let choices = [0usize, 1, 3, 4, 6, 7, 9];
        let routing = Routing::random(&mut rng, experts, 150, 3, &choices);
        let groups = routing.groups();
        let grouped = Grouped::new(&routing, false, schedule);
        for (cut, got) in cuts
            .iter()
            .zip(schedule_tiles(&layer, &grouped, &cuts, schedule))
        {
            let mut order: Vec<usize> = (0..experts).collect();
            if cut.longest_first {
                order.sort_by_key(|&e| (usize::MAX - layer.width_padded(e), e));
            }
            let got_order: Vec<usize> = got
                .order
                .written()
                .unwrap()
                .iter()
                .map(|&e| e as usize)
                .collect();
            assert_eq!(got_order, order);
            let (mut tiles, mut partials) = (vec![0i32], vec![0i64]);
            for &e in &order {
                let (rows, width) = (groups.rows(e).len(), layer.width_padded(e));
                let outputs = if cut.outputs > 0 { cut.outputs } else { width };
                let count = rows.div_ceil(cut.token_tile) * outputs.div_ceil(cut.weight_tile);
                let count = if width == 0 { 0 } else { count };
                tiles.push(tiles.last().unwrap() + count as i32);
            }
            for e in 0..experts {
                let count = groups.rows(e).len().div_ceil(cut.token_tile) * layer.width_padded(e);
                partials.push(partials.last().unwrap() + count as i64);
            }
            assert_eq!(got.tile_offsets.written().unwrap(), tiles);
            assert_eq!(got.partial_offsets.written().unwrap(), partials);
        }
    }
}
