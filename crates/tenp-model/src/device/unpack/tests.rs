//! Unpacked layers have the bits of the host's own conversion.

use std::path::Path;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use simt::{Schedule, Simulated};
use tenp_checkpoint::Checkpoint;
use tenp_kernels::device::PaddedLayout;
use tenp_kernels::{Dtype, FP8_BLOCK, RaggedLayout};

use super::super::fp8_folders as fp8;
use super::super::layer::LayerWeights;
use super::*;

/// Where every part is, and its bytes as the host converts them.
fn on_the_host(contents: &Contents<'_>) -> Vec<(Range<usize>, Vec<u8>)> {
    // Aligned as staging memory is.
    let mut bytes = vec![0f64; contents.bytes().div_ceil(8)];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut bytes);
    contents.write(bytes).expect("written");
    let parts = contents.parts();
    parts.map(|to| (to.clone(), bytes[to].to_vec())).collect()
}

/// Sends contents with fp8 weights, unpacks them, and compares. Returns the bytes sent and those of the arena.
fn check(make: impl Fn() -> Contents<'static>, schedule: Schedule) -> (usize, usize) {
    let backend = Simulated::new(schedule);
    let want = on_the_host(&make());
    let (sent, unpacking) = make().sent();
    let unpacking = unpacking.expect("there are fp8 weights");
    let mut bytes = vec![0f64; sent.bytes().div_ceil(8)];
    let bytes = &mut bytemuck::cast_slice_mut(&mut bytes)[..sent.bytes()];
    sent.write(bytes).expect("written");
    let mut there = backend.alloc::<u8>("sent", bytes.len()).expect("memory");
    let mut arena = backend
        .alloc("arena", unpacking.arena_bytes())
        .expect("memory");
    backend.write(there.view_mut(), bytes).expect("copied");
    unpacking
        .run(&backend, there.view(), arena.view_mut())
        .expect("unpacked");
    for (part, want) in want {
        let mut got = vec![0; part.len()];
        let from = arena.view().slice(part.clone()).expect("a part");
        backend.read(from, &mut got).expect("every byte is written");
        assert!(got == want, "bytes {part:?}");
    }
    (sent.bytes(), unpacking.arena_bytes())
}

struct Random(ChaCha8Rng);

impl Random {
    fn bytes(&mut self, count: usize, make: impl Fn(&mut ChaCha8Rng) -> Vec<u8>) -> &'static [u8] {
        let bytes: Vec<u8> = (0..count).flat_map(|_| make(&mut self.0)).collect();
        bytes.leak()
    }

    fn values(&mut self, count: usize) -> &'static [u8] {
        self.bytes(count, |rng| {
            rng.random_range(-9f32..9.0).to_le_bytes().to_vec()
        })
    }

    /// Any code that is a number, and scales from far below to far above one.
    fn fp8(&mut self, rows: usize, cols: usize) -> MatrixView<'static> {
        let code =
            |rng: &mut ChaCha8Rng| vec![rng.random_range(0..0x7f) | rng.random_range(0..2) << 7];
        let scale = |rng: &mut ChaCha8Rng| {
            let exponent = rng.random_range(-100..20);
            (rng.random_range(1f32..2.0) * 2f32.powi(exponent))
                .to_le_bytes()
                .to_vec()
        };
        let codes = self.bytes(rows * cols, code);
        let scales = self.bytes(rows.div_ceil(FP8_BLOCK) * cols.div_ceil(FP8_BLOCK), scale);
        MatrixView::from_fp8(rows, cols, codes, scales).expect("a matrix")
    }

    /// Of the type that is next in turn.
    fn matrix(&mut self, turn: usize, rows: usize, cols: usize) -> MatrixView<'static> {
        match turn % 3 {
            0 => self.fp8(rows, cols),
            1 => {
                MatrixView::new(Dtype::F32, rows, cols, self.values(rows * cols)).expect("a matrix")
            }
            _ => MatrixView::new(Dtype::F16, rows, cols, self.values(rows * cols / 2))
                .expect("a matrix"),
        }
    }
}

#[test]
fn awkward_shapes_and_types_beside_one_another() {
    const WIDTHS: [usize; 9] = [130, 0, 1, 7, 16, 129, 128, 200, 2];
    let widths = RaggedLayout::new(WIDTHS.to_vec()).expect("a layout");
    for (hidden, schedule) in [
        (264, Schedule::UNLIKE[0]),
        (128, Schedule::UNLIKE[1]),
        (8, Schedule::UNLIKE[2]),
    ] {
        let make = || {
            let mut random = Random(ChaCha8Rng::seed_from_u64(hidden as u64));
            let mut contents = Contents::default();
            contents.floats(vec![1.5; 3]);
            contents.bf16(random.fp8(300, hidden));
            contents.bf16(random.matrix(1, 4, hidden));
            contents.f32(random.matrix(1, WIDTHS.len(), hidden));
            // By expert, every choice of types.
            let weights = WIDTHS.iter().enumerate().map(|(e, &width)| ExpertWeights {
                gate: random.matrix(e, width, hidden),
                up: random.matrix(e / 3, width, hidden),
                down: random.matrix(e + 1, hidden, width),
            });
            let weights = weights.collect();
            let layout = PaddedLayout::new(&widths).expect("a layout");
            contents.experts(Experts {
                hidden,
                layout,
                weights,
            });
            contents.integers(vec![3, 1]);
            contents.bf16(random.fp8(129, 128));
            contents
        };
        check(make, schedule);
    }
}

#[test]
fn every_layer_of_a_checkpoint() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/deepseek_v3");
    let folder = tempfile::tempdir().expect("a folder");
    fp8::quantise(&golden, &folder.path().join("fp8"));
    fp8::dequantise(&folder.path().join("fp8"), &folder.path().join("wide"));
    let open = |name: &str| -> &'static Checkpoint {
        Box::leak(Box::new(
            Checkpoint::open(&folder.path().join(name)).expect("opens"),
        ))
    };
    let (narrow, wide) = (open("fp8"), open("wide"));
    for layer in 0..narrow.config().num_layers {
        let find = |checkpoint| LayerWeights::find(checkpoint, layer, &[]).expect("there").1;
        assert_eq!(
            on_the_host(&find(narrow)),
            on_the_host(&find(wide)),
            "layer {layer}"
        );
        assert!(find(wide).sent().1.is_none());
        check(|| find(narrow), Schedule::UNLIKE[layer % 4]);
    }
}

/// In DeepSeek-V3's shapes norms and scales are next to nothing.
#[test]
fn half_the_bytes_of_bf16_are_sent() {
    let make = || {
        let mut random = Random(ChaCha8Rng::seed_from_u64(1));
        let mut contents = Contents::default();
        contents.bf16(random.fp8(256, 512));
        contents
    };
    let (sent, arena) = check(make, Schedule::UNLIKE[3]);
    assert!(sent <= arena / 2 + 256, "{sent} bytes for {arena}");
}
