//! Grids and blocks, and launches that are refused.

use simt::{Buffer, Executor, FaultKind, Schedule, entries, launch};

#[repr(C)]
#[derive(Clone, Copy)]
struct PlaceParams {
    out: *mut u32,
}

#[test]
fn every_thread_knows_its_place() {
    let (grid, block) = ([3, 2, 2], [5, 4, 3]);
    for schedule in Schedule::UNLIKE {
        let out = Buffer::<u32>::output("out", 12 * 60 * 2);
        let params = PlaceParams { out: out.mut_ptr() };
        Executor::new(schedule)
            .launch("test_places", grid, block, 0, &params)
            .unwrap();
        let pack = |b: [u32; 3], t: [u32; 3]| {
            b[0] | b[1] << 4 | b[2] << 8 | t[0] << 12 | t[1] << 18 | t[2] << 24
        };
        for (i, pair) in out.written().unwrap().chunks(2).enumerate() {
            let (b, t) = (i as u32 / 60, i as u32 % 60);
            let place = pack([b % 3, b / 3 % 2, b / 6], [t % 5, t / 5 % 4, t / 20]);
            assert_eq!(pair, [place, pack(grid, block)]);
        }
    }
}

#[test]
fn limits() {
    let out = Buffer::<u32>::output("out", 1024);
    let params = PlaceParams { out: out.mut_ptr() };
    let refused = |entry: &str, grid, block, shared| {
        let fault = launch(entry, grid, block, shared, &params).expect_err("refused");
        assert_eq!(fault.kind, FaultKind::Launch, "{fault}");
        fault.to_string()
    };
    let one = [1; 3];
    assert!(refused("test_nothing", one, one, 0).contains("no such entry"));
    assert!(refused("test_places", [0, 1, 1], one, 0).contains("empty"));
    assert!(refused("test_places", [1, 65536, 1], one, 0).contains("grid (1, 65536, 1)"));
    assert!(refused("test_places", one, [1025, 1, 1], 0).contains("1024 threads"));
    assert!(refused("test_places", one, [1, 1, 65], 0).contains("block (1, 1, 65)"));
    assert!(refused("test_places", one, one, 232_449).contains("at most 232448"));
    assert!(refused("test_bounded", one, [65, 1, 1], 0).contains("launch bounds of 64"));
    launch("test_bounded", one, [64, 1, 1], 232_448, &params).expect("within the limits");

    let fault = launch("test_places", one, one, 0, &(params, 0u64)).expect_err("16 bytes");
    assert!(fault.detail.contains("16 bytes, expected 8"), "{fault}");
}

#[test]
fn product_entries_are_there() {
    let entries = entries();
    assert!(entries.contains(&"tenp_rms_norm".to_string()));
    assert!(entries.is_sorted());
}

#[test]
fn a_buffer_of_another_thread_is_unknown() {
    let out = Buffer::<u32>::output("out", 64);
    let address = out.mut_ptr() as usize;
    let result = std::thread::spawn(move || {
        let params = PlaceParams {
            out: address as *mut u32,
        };
        launch("test_bounded", [1; 3], [64, 1, 1], 0, &params)
    });
    let fault = result
        .join()
        .unwrap()
        .expect_err("no buffer of that thread");
    assert_eq!(fault.kind, FaultKind::OutOfBounds);
    assert!(fault.detail.contains("memory of no buffer"), "{fault}");
    assert_eq!(out.unwritten().len(), 64);
}
