//! A layer as another runtime captures it: the calls of `RaggedMoe`, for all sets of weights and tokens in turn.

use half::bf16;
use tenp_kernels::KernelError;
use tenp_kernels::device::{Backend, Call, Memory as _, MoeBatch, MoeWeights, RaggedMoe};

use super::cases::Case;
use super::inputs::Weights;

/// What of a layer is captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Of grouped tokens: the schedule and the three products. To be run behind the whole layer, which groups them.
    Experts,
    /// From routed tokens to their combined outputs.
    Layer,
}

impl Part {
    pub const ALL: [Self; 2] = [Self::Experts, Self::Layer];

    pub fn name(self) -> &'static str {
        match self {
            Self::Experts => "experts",
            Self::Layer => "layer",
        }
    }

    fn has(self, call: &Call<'_>) -> bool {
        let products = ["tenp_moe_schedule", "tenp_moe_gate_up", "tenp_moe_down"];
        self == Self::Layer || products.iter().any(|p| call.entry().starts_with(p))
    }
}

/// What a case's calls read and write; each set has an output and a workspace of its own.
pub struct Step<'a, B: Backend> {
    backend: &'a B,
    case: Case,
    moe: RaggedMoe,
    weights: &'a Weights<B>,
    x: &'a [B::Buffer<bf16>],
    tables: B::Buffer<i32>,
    expert_ids: B::Buffer<i32>,
    slot_weights: B::Buffer<f32>,
    rooms: Vec<(B::Buffer<f32>, B::Buffer<u8>)>,
}

impl<'a, B: Backend> Step<'a, B> {
    pub fn new(
        backend: &'a B,
        weights: &'a Weights<B>,
        x: &'a [B::Buffer<bf16>],
        case: Case,
        ids: &[i32],
    ) -> Result<Self, KernelError> {
        let shape = case.shape;
        let moe = RaggedMoe::new(&case.widths.of(&shape), shape.hidden)?;
        let ints = |values: &[i32]| {
            let mut buffer = backend.alloc("table", values.len())?;
            backend.write(buffer.view_mut(), values)?;
            Ok::<_, KernelError>(buffer)
        };
        let mut slot_weights = backend.alloc("routing weights", ids.len())?;
        let even = vec![1.0 / shape.top_k as f32; ids.len()];
        backend.write(slot_weights.view_mut(), &even)?;
        let bytes = moe.workspace_bytes(case.tokens, shape.top_k);
        let room = |_: &B::Buffer<bf16>| {
            let out = backend.alloc("out", case.tokens * shape.hidden)?;
            Ok::<_, KernelError>((out, backend.alloc("workspace", bytes)?))
        };
        Ok(Self {
            backend,
            case,
            weights,
            x,
            tables: ints(&moe.tables())?,
            expert_ids: ints(ids)?,
            slot_weights,
            rooms: x.iter().map(room).collect::<Result<_, _>>()?,
            moe,
        })
    }

    /// The calls of a part for every set, to be run one behind the other.
    pub fn calls(&mut self, part: Part) -> Result<Vec<Call<'_>>, KernelError> {
        let on = (self.backend.multiprocessors(), self.backend.has_wgmma());
        let mut calls = Vec::new();
        for (set, (out, room)) in self.rooms.iter_mut().enumerate() {
            let weights = MoeWeights {
                gate_up: self.weights.gate_up[set].view(),
                down_t: self.weights.down_t[set].view(),
                tables: self.tables.view(),
            };
            let batch = MoeBatch {
                x: self.x[set].view(),
                expert_ids: self.expert_ids.view(),
                weights: self.slot_weights.view(),
                num_tokens: self.case.tokens,
                top_k: self.case.shape.top_k,
            };
            let of_set = self
                .moe
                .calls(on, weights, batch, out.view_mut(), room.view_mut())?;
            calls.extend(of_set.into_iter().filter(|call| part.has(call)));
        }
        Ok(calls)
    }
}
