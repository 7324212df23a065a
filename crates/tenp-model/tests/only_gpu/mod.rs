//! What only a GPU can show of a whole layer: captured into a graph, on two streams at once, on a stream of someone else.

use half::bf16;
use tenp_kernels::KernelError;
use tenp_kernels::device::{
    Backend as _, Call, Device, DeviceBuffer, MoeBatch, MoeWeights, RaggedMoe, Runner,
};

use crate::checks::layer::Layer;
use crate::checks::{bf16_values, rng};

const HIDDEN: usize = 2048;
const TOP_K: usize = 6;

/// A layer of ragged experts, and tokens, on a device.
pub(crate) struct Case {
    device: Device,
    moe: RaggedMoe,
    gate_up: DeviceBuffer<bf16>,
    down_t: DeviceBuffer<bf16>,
    tables: DeviceBuffer<i32>,
    x: DeviceBuffer<bf16>,
    ids: DeviceBuffer<i32>,
    weights: DeviceBuffer<f32>,
    out: DeviceBuffer<f32>,
    workspace: DeviceBuffer<u8>,
    tokens: usize,
}

impl Case {
    pub(crate) fn new(device: &Device, seed: u64, tokens: usize) -> Self {
        let mut rng = rng(seed);
        let widths: Vec<usize> = (0..64).map(|e| e * 37 % 900).collect();
        let layer = Layer::random(&mut rng, HIDDEN, &widths);
        let moe = RaggedMoe::new(&widths, HIDDEN).expect("a shape the kernels take");
        let upload = |values: &[i32]| device.upload("table", values).expect("room");
        let room = moe.workspace_bytes(tokens, TOP_K);
        let mut case = Self {
            gate_up: device
                .upload("gate and up", &layer.gate_up())
                .expect("room"),
            down_t: device.upload("down", &layer.down_t()).expect("room"),
            tables: upload(&moe.tables()),
            x: device.alloc("x", tokens * HIDDEN).expect("room"),
            ids: device.alloc("ids", tokens * TOP_K).expect("room"),
            weights: device.alloc("weights", tokens * TOP_K).expect("room"),
            out: device.alloc("out", tokens * HIDDEN).expect("room"),
            workspace: device.alloc("workspace", room).expect("room"),
            device: device.clone(),
            moe,
            tokens,
        };
        case.route(seed);
        case
    }

    /// Other tokens with another routing, at the same places.
    pub(crate) fn route(&mut self, seed: u64) {
        let mut rng = rng(seed + 1000);
        let x = bf16_values(&mut rng, self.tokens * HIDDEN, 1.0);
        let slots = self.tokens * TOP_K;
        let at = |slot: usize| (slot / TOP_K * (7 + seed as usize) + slot % TOP_K * 11) % 64;
        let ids: Vec<i32> = (0..slots).map(|slot| at(slot) as i32).collect();
        let weights: Vec<f32> = (0..slots).map(|s| 0.1 + (s % 7) as f32 / 10.0).collect();
        let device = &self.device;
        device.write(self.x.view_mut(), &x).expect("written");
        device.write(self.ids.view_mut(), &ids).expect("written");
        device
            .write(self.weights.view_mut(), &weights)
            .expect("written");
    }

    /// The layer's kernels, and what they are run by.
    fn calls(&mut self) -> Vec<Call<'_>> {
        let weights = MoeWeights {
            gate_up: self.gate_up.view(),
            down_t: self.down_t.view(),
            tables: self.tables.view(),
        };
        let batch = MoeBatch {
            x: self.x.view(),
            expert_ids: self.ids.view(),
            weights: self.weights.view(),
            num_tokens: self.tokens,
            top_k: TOP_K,
        };
        let on = (self.device.multiprocessors(), self.device.has_wgmma());
        let (out, room) = (self.out.view_mut(), self.workspace.view_mut());
        self.moe
            .calls(on, weights, batch, out, room)
            .unwrap_or_else(|e| panic!("{e}"))
    }

    fn run(&mut self, runner: &impl Runner<Error = KernelError>) {
        for call in self.calls() {
            runner.run(&call).unwrap_or_else(|e| panic!("{e}"));
        }
    }

    fn result(&self) -> Vec<u32> {
        let out = self.out.to_vec().unwrap_or_else(|e| panic!("{e}"));
        out.into_iter().map(f32::to_bits).collect()
    }
}

/// A decode step captured once gives the same bits as its launches, whatever tokens and routing it meets later.
pub(crate) fn a_decode_step_is_captured(device: &Device) {
    for tokens in [1, 8, 64, 512] {
        let mut case = Case::new(device, 1, tokens);
        let calls = case.calls();
        // SAFETY: `case` outlives the graph and is used by nothing else while a launch is under way.
        let graph = unsafe { device.capture(&calls) }.unwrap_or_else(|e| panic!("{e}"));
        for seed in 1..6 {
            case.route(seed);
            case.run(device);
            let want = case.result();
            device.clear(case.out.view_mut()).expect("cleared");
            graph.launch().unwrap_or_else(|e| panic!("{e}"));
            assert!(case.result() == want, "{tokens} tokens, routing {seed}");
        }
    }
}

/// Two streams at once, each with a workspace of its own, do not disturb each other.
pub(crate) fn streams_do_not_disturb_each_other(device: &Device, repeats: usize) {
    let other = Device::open(device.properties().ordinal).expect("a second handle");
    let (mut a, mut b) = (Case::new(device, 1, 300), Case::new(&other, 2, 300));
    a.run(device);
    b.run(&other);
    let want = (a.result(), b.result());
    for repeat in 0..repeats {
        for _ in 0..8 {
            a.run(device);
            b.run(&other);
        }
        assert!((a.result(), b.result()) == want, "repeat {repeat}");
    }
}

/// The default stream, as a runtime that knows nothing of ours would name it.
pub(crate) fn a_foreign_stream_is_launched_on(device: &Device) {
    let mut case = Case::new(device, 3, 40);
    case.run(device);
    let want = case.result();
    device.clear(case.out.view_mut()).expect("cleared");
    device.synchronize().expect("done");
    // SAFETY: the default stream of the GPU's primary context, which outlives everything here.
    let stream = unsafe { device.on_stream(std::ptr::null_mut()) };
    case.run(&stream);
    device.synchronize_all().unwrap_or_else(|e| panic!("{e}"));
    assert!(case.result() == want);
}
