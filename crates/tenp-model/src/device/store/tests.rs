use std::path::Path;

use simt::{Schedule, Simulated};
use tenp_checkpoint::{Checkpoint, Matrix};

use super::super::fp8_folders;
use super::*;

/// Golden `deepseek_v3` in fp8, and the same numbers in f32.
fn folders() -> (tempfile::TempDir, [Checkpoint; 2]) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/deepseek_v3");
    let root = tempfile::tempdir().expect("a folder");
    let (fp8, wide) = (root.path().join("fp8"), root.path().join("wide"));
    fp8_folders::quantise(&golden, &fp8);
    fp8_folders::dequantise(&fp8, &wide);
    let both = [fp8, wide].map(|folder| Checkpoint::open(&folder).expect("opens"));
    (root, both)
}

fn experts(checkpoint: &Checkpoint, layer: usize) -> Vec<(usize, ExpertTensors<'_>)> {
    let ids = 0..checkpoint.config().moe.num_experts;
    ids.map(|id| (id, checkpoint.expert(layer, id).expect("there")))
        .collect()
}

/// Packed weights of the layer's experts, which is given back.
fn packed(store: &mut Store<Simulated>, loaded: Rc<Loaded<Simulated>>) -> [Vec<u8>; 2] {
    let Feed::Moe(moe) = &loaded.weights.feed else {
        panic!("a MoE layer");
    };
    let arena = loaded.arena.view();
    let backend = Simulated::new(Schedule::UNLIKE[0]);
    let parts = [&moe.gate_up, &moe.down_t].map(|slot| {
        let part = slot.of(arena).expect("there").cast::<u8>().expect("bytes");
        let mut bytes = vec![0; part.len()];
        backend.read(part, &mut bytes).expect("written");
        bytes
    });
    store.release(loaded);
    parts
}

#[test]
fn replaced_experts_may_be_larger_or_smaller_than_their_own() {
    let (_root, [fp8, wide]) = folders();
    let backend = Simulated::new(Schedule::UNLIKE[0]);
    let hidden = fp8.config().hidden_size;
    let zeros = vec![0; 4 * hidden];
    for resident_bytes in [0, u64::MAX] {
        let mut store = Store::<Simulated>::new(&fp8, resident_bytes).expect("found");
        for &layer in &fp8.config().moe_layers {
            let own = store.load(&backend, &fp8, layer).expect("uploaded");
            let own = packed(&mut store, own);
            let mut with = |replaced: &[(usize, ExpertTensors<'_>)]| {
                let loaded = store.load_with(&backend, &fp8, layer, replaced);
                packed(&mut store, loaded.expect("uploaded"))
            };
            let of_one_neuron = |(id, _)| {
                let row = |rows, cols| Matrix {
                    dtype: tenp_checkpoint::Dtype::F32,
                    rows,
                    cols,
                    bytes: &zeros,
                    scales: &[],
                };
                let tensors = ExpertTensors {
                    gate: row(1, hidden),
                    up: row(1, hidden),
                    down: row(hidden, 1),
                };
                (id, tensors)
            };
            let narrow: Vec<_> = experts(&fp8, layer)
                .into_iter()
                .map(of_one_neuron)
                .collect();
            let narrow = with(&narrow);
            assert!(narrow.iter().flatten().all(|&byte| byte == 0));
            assert!(narrow[0].len() < own[0].len());
            // The same numbers take four times the bytes in the file, and twice as many on the way.
            assert!(with(&experts(&wide, layer)) == own, "layer {layer}");
            assert!(with(&experts(&fp8, layer)[..1]) == own, "layer {layer}");
        }
    }
}

#[test]
fn the_bytes_foreseen_are_those_of_the_buffers() {
    let (_root, [fp8, wide]) = folders();
    let store =
        |checkpoint, resident| Store::<Simulated>::new(checkpoint, resident).expect("found");
    let (packed, plain) = (store(&fp8, 0), store(&wide, 0));
    // An arena, what is sent, and room for two of an expert's matrices; two arenas.
    let moe = (fp8.config().moe.expert_width, fp8.config().hidden_size);
    let sizes = packed.sizes;
    assert_eq!(sizes.arena, plain.sizes.arena);
    assert_eq!(
        packed.device_bytes(),
        sizes.arena + sizes.packed + 2 * 2 * moe.0 * moe.1
    );
    assert_eq!(plain.device_bytes(), 2 * sizes.arena);
    assert!(packed.device_bytes() < plain.device_bytes());
    // What there is when layers came and went, but for the room, which is there while one is unpacked.
    let backend = Simulated::new(Schedule::UNLIKE[0]);
    let buffers = |store: &Store<Simulated>| {
        let arenas = store.arenas.iter().map(|arena| arena.view().len());
        let sent = store.packed.as_ref().map_or(0, |sent| sent.view().len());
        arenas.sum::<usize>() + sent
    };
    let mut packed = packed;
    for layer in 0..fp8.config().num_layers {
        let loaded = packed.load(&backend, &fp8, layer).expect("uploaded");
        packed.release(loaded);
    }
    assert_eq!(packed.device_bytes(), buffers(&packed) + packed.sizes.room);
    let mut plain = plain;
    let both = [0, 1].map(|layer| plain.load(&backend, &wide, layer).expect("uploaded"));
    for loaded in both {
        plain.release(loaded);
    }
    assert_eq!(plain.device_bytes(), buffers(&plain));
    assert_eq!(packed.host_bytes(), 2 * sizes.packed);
    let kept = store(&fp8, u64::MAX);
    assert!(kept.device_bytes() > kept.total_bytes as usize);
}
