//! `RaggedMoe`: a whole layer over memory that the caller owns, and two of them side by side.

mod support;

use std::collections::BTreeSet;

use half::bf16;
use simt::{Buffer, Schedule, Simulated};
use support::layer::Layer;
use support::{
    AWKWARD_WIDTHS, Sim, assert_close, bf16_values, bytes_of, f32_values, rng, view, view_mut,
    widened,
};
use tenp_kernels::cpu::moe::{ExpertActivations, combine, expert_forward};
use tenp_kernels::device::{Backend as _, Call, MoeBatch, MoeWeights, RaggedMoe, Runner as _};
use tenp_kernels::{Compute, ExpertGroups};

const HIDDEN: usize = 72;
const TOP_K: usize = 3;

/// A layer and tokens of its own, on the executor.
struct Case {
    moe: RaggedMoe,
    layer: Layer,
    x: Vec<bf16>,
    ids: Vec<i32>,
    weights: Vec<f32>,
    gate_up: Buffer<bf16>,
    down_t: Buffer<bf16>,
    tables: Buffer<i32>,
    x_there: Buffer<bf16>,
    ids_there: Buffer<i32>,
    weights_there: Buffer<f32>,
    out: Buffer<f32>,
}

impl Case {
    fn new(seed: u64, tokens: usize) -> Self {
        let mut rng = rng(seed);
        let layer = Layer::random(&mut rng, HIDDEN, &AWKWARD_WIDTHS);
        let moe = RaggedMoe::new(&AWKWARD_WIDTHS, HIDDEN).unwrap();
        let [gate_up, down] = moe.weight_lens();
        let (mut gate_up, mut down) = (vec![bf16::NAN; gate_up], vec![bf16::NAN; down]);
        moe.pack(&layer.views(), &mut gate_up, &mut down).unwrap();
        let x = bf16_values(&mut rng, tokens * HIDDEN, 1.0);
        let weights = f32_values(&mut rng, tokens * TOP_K, 1.0);
        let ids: Vec<i32> = (0..tokens * TOP_K)
            .map(|slot| ((slot / TOP_K * 7 + slot % TOP_K * 3) % AWKWARD_WIDTHS.len()) as i32)
            .collect();
        Self {
            gate_up: Buffer::input("gate_up", &gate_up),
            down_t: Buffer::input("down_t", &down),
            tables: Buffer::input("tables", &moe.tables()),
            x_there: Buffer::input("x", &x),
            ids_there: Buffer::input("expert_ids", &ids),
            weights_there: Buffer::input("slot_weights", &weights),
            out: Buffer::output("out", tokens * HIDDEN),
            moe,
            layer,
            x,
            ids,
            weights,
        }
    }

    fn tokens(&self) -> usize {
        self.x.len() / HIDDEN
    }

    fn workspace(&self) -> Buffer<u8> {
        Buffer::output("workspace", self.moe.workspace_bytes(self.tokens(), TOP_K))
    }

    fn weights(&self) -> MoeWeights<'_> {
        MoeWeights {
            gate_up: view(&self.gate_up),
            down_t: view(&self.down_t),
            tables: view(&self.tables),
        }
    }

    fn batch(&self) -> MoeBatch<'_> {
        MoeBatch {
            x: view(&self.x_there),
            expert_ids: view(&self.ids_there),
            weights: view(&self.weights_there),
            num_tokens: self.tokens(),
            top_k: TOP_K,
        }
    }

    fn calls<'a>(&'a self, workspace: &'a Buffer<u8>, wgmma: bool) -> Vec<Call<'a>> {
        self.calls_into(&self.out, workspace, wgmma)
    }

    fn calls_into<'a>(
        &'a self,
        out: &'a Buffer<f32>,
        workspace: &'a Buffer<u8>,
        wgmma: bool,
    ) -> Vec<Call<'a>> {
        let (out, workspace) = (view_mut(out), view_mut(workspace));
        self.moe
            .calls((2, wgmma), self.weights(), self.batch(), out, workspace)
            .unwrap()
    }

    /// Other tokens where these are, on the experts that `expert_of` gives their slots.
    fn route(&self, seed: u64, expert_of: impl Fn(usize) -> i32) {
        let mut rng = rng(seed);
        let ids: Vec<i32> = (0..self.ids.len()).map(expert_of).collect();
        let x = bf16_values(&mut rng, self.x.len(), 1.0);
        let weights = f32_values(&mut rng, ids.len(), 1.0);
        let memory = Simulated::new(Schedule::Forward);
        memory.write(view_mut(&self.x_there), &x).unwrap();
        memory.write(view_mut(&self.ids_there), &ids).unwrap();
        memory
            .write(view_mut(&self.weights_there), &weights)
            .unwrap();
    }

    /// The CPU's output.
    fn want(&self) -> Vec<f32> {
        let ids: Vec<u32> = self.ids.iter().map(|&id| id as u32).collect();
        let groups = ExpertGroups::new(AWKWARD_WIDTHS.len(), TOP_K, &ids, &self.weights).unwrap();
        let mut activations = ExpertActivations::default();
        let x = widened(&self.x);
        expert_forward(
            Compute::Bf16,
            &self.layer.views(),
            &groups,
            &x,
            &mut activations,
        )
        .unwrap();
        let mut out = vec![0.0; x.len()];
        combine(&groups, activations.outputs(), HIDDEN, &mut out).unwrap();
        out
    }

    /// Whether the output is the CPU's, up to the roundings of h and y.
    fn is_right(&self) -> bool {
        let Ok(got) = self.out.written() else {
            return false;
        };
        got.iter()
            .zip(self.want())
            .all(|(got, want)| (got - want).abs() < 0.02)
    }
}

#[test]
fn a_layer_is_that_of_the_cpu() {
    for (tokens, i) in [(1, 0), (2, 1), (13, 2), (60, 3), (150, 0)] {
        let case = Case::new(i as u64, tokens);
        let workspace = case.workspace();
        let (out, room) = (view_mut(&case.out), view_mut(&workspace));
        case.moe
            .forward(&Sim::unlike(i), case.weights(), case.batch(), out, room)
            .unwrap();
        for (at, (got, want)) in case.out.to_vec().iter().zip(case.want()).enumerate() {
            assert_close(f64::from(*got), f64::from(want), 0.02, || {
                format!("{tokens} tokens: {at}")
            });
        }
    }
}

/// What a captured graph does: calls made for one routing are run again when the memory holds another. No launch depends on
/// the routing, and what the last run left in the workspace changes nothing.
fn check_replayed(tokens: usize, wgmma: bool) {
    let case = Case::new(9, tokens);
    let room = case.workspace();
    let prepared = case.calls(&room, wgmma);
    let experts = AWKWARD_WIDTHS.len();
    let routings: [&dyn Fn(usize) -> i32; 6] = [
        &|slot| ((slot / TOP_K * 5 + slot % TOP_K) % experts) as i32,
        // All on the widest, all on one without neurons, all nowhere; every other slot nowhere.
        &|_| 9,
        &|_| 0,
        &|_| -1,
        &|slot| if slot % 2 == 0 { 5 } else { experts as i32 },
        &|slot| ((slot / TOP_K + slot % TOP_K * 4) % experts) as i32,
    ];
    let mut outputs = BTreeSet::new();
    for (i, routing) in routings.into_iter().enumerate() {
        case.route(i as u64, routing);
        let (want, room) = (Buffer::output("out", case.x.len()), case.workspace());
        let fresh = case.calls_into(&want, &room, wgmma);
        let memory = Simulated::new(Schedule::Forward);
        let poison = vec![f32::NAN; case.x.len()];
        memory.write(view_mut(&case.out), &poison).unwrap();
        assert_eq!(fresh.len(), prepared.len());
        for (fresh, prepared) in fresh.iter().zip(&prepared) {
            let same = fresh.entry() == prepared.entry() && fresh.launch() == prepared.launch();
            assert!(same, "{} {}", fresh.entry(), prepared.entry());
            Sim::unlike(i).run(fresh).unwrap();
            Sim::unlike(i + 1).run(prepared).unwrap();
        }
        want.written().unwrap();
        let same = bytes_of(&case.out) == bytes_of(&want);
        assert!(same, "{tokens} tokens, wgmma {wgmma}, routing {i}");
        outputs.insert(bytes_of(&want));
    }
    // Both routings to no neuron at all give zeros.
    assert_eq!(outputs.len(), 5);
}

#[test]
fn calls_made_once_follow_the_routing() {
    for tokens in [1, 2, 8, 64] {
        check_replayed(tokens, false);
    }
    for tokens in [40, 90] {
        check_replayed(tokens, true);
    }
}

/// Two streams: their kernels in turn. With one workspace for both, the second has overwritten what the first needs.
#[test]
fn streams_with_workspaces_of_their_own_do_not_disturb_each_other() {
    for wgmma in [false, true] {
        for shared in [false, true] {
            let (a, b) = (Case::new(5, 90), Case::new(6, 90));
            let (room_a, room_b) = (a.workspace(), b.workspace());
            let calls_a = a.calls(&room_a, wgmma);
            let calls_b = b.calls(if shared { &room_a } else { &room_b }, wgmma);
            let sim = Sim::unlike(0);
            let ran = calls_a
                .iter()
                .zip(&calls_b)
                .all(|(call_a, call_b)| sim.run(call_a).is_ok() && sim.run(call_b).is_ok());
            assert_eq!(
                ran && a.is_right() && b.is_right(),
                !shared,
                "wgmma {wgmma}"
            );
        }
    }
}

#[test]
fn workspaces_that_do_not_do() {
    let case = Case::new(1, 4);
    let bytes = case.moe.workspace_bytes(4, TOP_K);
    let room = Buffer::<u8>::output("workspace", bytes + 8);
    let calls = |range: std::ops::Range<usize>| {
        let room = view_mut(&room).slice(range).unwrap();
        let (weights, batch) = (case.weights(), case.batch());
        case.moe
            .calls((2, false), weights, batch, view_mut(&case.out), room)
            .map(|calls| calls.len())
            .map_err(|e| e.to_string())
    };
    assert!(calls(0..bytes).is_ok());
    assert!(calls(0..bytes - 1).unwrap_err().contains("workspace"));
    assert!(calls(8..bytes + 8).unwrap_err().contains("workspace"));
}
