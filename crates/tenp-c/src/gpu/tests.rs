//! What the GPU's function makes of the caller's pointers, on the executor instead of a GPU.

use half::bf16;
use simt::{Buffer, Schedule, Simulated};

use super::*;
use crate::status::{TENP_ERROR_MISALIGNED, TENP_ERROR_NULL, TENP_ERROR_SIZE, TENP_OK};
use crate::types::{TENP_COMPUTE_BF16, TENP_DTYPE_BF16, tenp_batch, tenp_expert, tenp_matrix};
use crate::{
    tenp_moe_create, tenp_moe_destroy, tenp_moe_forward_cpu, tenp_moe_pack, tenp_moe_packed_bytes,
    tenp_moe_workspace_bytes,
};

const HIDDEN: usize = 24;
const WIDTHS: [usize; 4] = [40, 7, 0, 17];
const TOKENS: usize = 20;
const TOP_K: usize = 2;

fn values(len: usize, step: f32) -> Vec<bf16> {
    let value = |i| bf16::from_f32((i as f32 * step).sin() * 0.4);
    (0..len).map(value).collect()
}

fn matrix(values: &[bf16]) -> tenp_matrix {
    tenp_matrix {
        data: values.as_ptr().cast(),
        bytes: size_of_val(values),
        scales: std::ptr::null(),
        scale_bytes: 0,
        dtype: TENP_DTYPE_BF16,
    }
}

/// A layer, its packed weights and a batch, where the executor runs.
struct Case {
    moe: *mut tenp_moe,
    experts: Vec<tenp_expert>,
    packed: (Buffer<bf16>, Buffer<bf16>, Buffer<i32>),
    x: (Vec<f32>, Buffer<bf16>),
    ids: (Vec<i32>, Buffer<i32>),
    gates: (Vec<f32>, Buffer<f32>),
    out: Buffer<f32>,
    workspace: Buffer<u8>,
}

impl Case {
    fn new(stored: &[bf16]) -> Self {
        let mut moe = std::ptr::null_mut();
        let experts: Vec<tenp_expert> = WIDTHS
            .iter()
            .enumerate()
            .map(|(e, width)| {
                let part = |i: usize| matrix(&stored[(3 * e + i) * 5..][..width * HIDDEN]);
                tenp_expert {
                    gate: part(0),
                    up: part(1),
                    down: part(2),
                }
            })
            .collect();
        let (mut bytes, mut workspace) = ([0; 3], 0);
        // SAFETY: all pointers lead to live locals of the sizes that are said.
        let packed = unsafe {
            let made = tenp_moe_create(WIDTHS.as_ptr(), WIDTHS.len(), HIDDEN, &raw mut moe);
            assert_eq!(made, TENP_OK);
            let [gate_up, down, tables] = &mut bytes;
            assert_eq!(tenp_moe_packed_bytes(moe, gate_up, down, tables), TENP_OK);
            let needed = tenp_moe_workspace_bytes(moe, TOKENS, TOP_K, &raw mut workspace);
            assert_eq!(needed, TENP_OK);
            let mut gate_up = vec![bf16::NAN; bytes[0] / 2];
            let mut down = vec![bf16::NAN; bytes[1] / 2];
            let mut tables = vec![-1i32; bytes[2] / 4];
            let packed = tenp_moe_pack(
                moe,
                experts.as_ptr(),
                experts.len(),
                gate_up.as_mut_ptr().cast(),
                bytes[0],
                down.as_mut_ptr().cast(),
                bytes[1],
                tables.as_mut_ptr().cast(),
                bytes[2],
            );
            assert_eq!(packed, TENP_OK);
            (
                Buffer::input("gate_up", &gate_up),
                Buffer::input("down", &down),
                Buffer::input("tables", &tables),
            )
        };
        let x = values(TOKENS * HIDDEN, 0.21);
        let slots = 0..TOKENS * TOP_K;
        // Nobody's slots too.
        let ids: Vec<i32> = slots.clone().map(|s| (s * 7 % 6) as i32 - 2).collect();
        let ids: Vec<i32> = ids.iter().map(|&id| id.max(-1)).collect();
        let gates: Vec<f32> = slots.map(|s| 0.2 + (s % 5) as f32 * 0.1).collect();
        Self {
            moe,
            experts,
            packed,
            x: (
                x.iter().map(|x| x.to_f32()).collect(),
                Buffer::input("x", &x),
            ),
            ids: (ids.clone(), Buffer::input("ids", &ids)),
            gates: (gates.clone(), Buffer::input("gates", &gates)),
            out: Buffer::output("out", TOKENS * HIDDEN),
            workspace: Buffer::output("workspace", workspace),
        }
    }

    fn weights(&self) -> tenp_weights_cuda {
        tenp_weights_cuda {
            gate_up: self.packed.0.ptr().cast(),
            gate_up_bytes: 2 * self.packed.0.len(),
            down: self.packed.1.ptr().cast(),
            down_bytes: 2 * self.packed.1.len(),
            tables: self.packed.2.ptr().cast(),
            tables_bytes: 4 * self.packed.2.len(),
        }
    }

    fn batch(&self) -> tenp_batch_cuda {
        tenp_batch_cuda {
            x: self.x.1.ptr().cast(),
            x_bytes: 2 * self.x.1.len(),
            expert_ids: self.ids.1.ptr(),
            expert_ids_len: self.ids.1.len(),
            weights: self.gates.1.ptr(),
            weights_len: self.gates.1.len(),
            num_tokens: TOKENS,
            top_k: TOP_K,
        }
    }

    fn room(&self) -> Room {
        Room {
            out: self.out.mut_ptr(),
            out_len: self.out.len(),
            workspace: self.workspace.mut_ptr().cast(),
            workspace_bytes: self.workspace.len(),
        }
    }

    fn run(
        &self,
        runner: &Simulated,
        (weights, batch, room): (&tenp_weights_cuda, &tenp_batch_cuda, &Room),
    ) -> Result<(), Failure> {
        // SAFETY: the layer lives until the case is dropped; what is not refused are live buffers, each used once.
        unsafe { forward(&*self.moe, runner, weights, batch, room) }
    }

    fn want(&self) -> Vec<f32> {
        let batch = tenp_batch {
            x: self.x.0.as_ptr(),
            x_len: self.x.0.len(),
            expert_ids: self.ids.0.as_ptr(),
            expert_ids_len: self.ids.0.len(),
            weights: self.gates.0.as_ptr(),
            weights_len: self.gates.0.len(),
            num_tokens: TOKENS,
            top_k: TOP_K,
        };
        let mut out = vec![f32::NAN; TOKENS * HIDDEN];
        // SAFETY: all pointers lead to live memory of the sizes that are said.
        let done = unsafe {
            tenp_moe_forward_cpu(
                self.moe,
                TENP_COMPUTE_BF16,
                self.experts.as_ptr(),
                self.experts.len(),
                &raw const batch,
                out.as_mut_ptr(),
                out.len(),
            )
        };
        assert_eq!(done, TENP_OK);
        out
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        // SAFETY: made by `tenp_moe_create`, given back once.
        assert_eq!(unsafe { tenp_moe_destroy(self.moe) }, TENP_OK);
    }
}

fn stored() -> Vec<bf16> {
    values(40 * HIDDEN + 60, 0.37)
}

#[test]
fn a_layer_is_that_of_the_cpu() {
    let stored = stored();
    let plain = Simulated::new(Schedule::Forward);
    for runner in [plain, plain.with_wgmma()] {
        let case = Case::new(&stored);
        case.run(&runner, (&case.weights(), &case.batch(), &case.room()))
            .unwrap();
        let want = case.want();
        assert!(want.iter().any(|y| y.abs() > 0.1), "{want:?}");
        for (at, (got, want)) in case.out.to_vec().iter().zip(&want).enumerate() {
            // Up to the roundings of h and y.
            assert!((got - want).abs() < 0.02, "{at}: {got}, {want}");
        }
    }
}

#[test]
fn pointers_and_sizes_are_refused_before_anything_runs() {
    let stored = stored();
    let case = Case::new(&stored);
    let check = |spoil: fn(&mut tenp_weights_cuda, &mut tenp_batch_cuda, &mut Room),
                 status: tenp_status,
                 words: &str| {
        let (mut weights, mut batch, mut room) = (case.weights(), case.batch(), case.room());
        spoil(&mut weights, &mut batch, &mut room);
        let failure = case
            .run(
                &Simulated::new(Schedule::Forward),
                (&weights, &batch, &room),
            )
            .unwrap_err();
        assert_eq!(failure.status, status, "{}", failure.text);
        assert!(failure.text.contains(words), "{}", failure.text);
    };
    check(|w, _, _| w.down = std::ptr::null(), TENP_ERROR_NULL, "down");
    check(|_, b, _| b.x = std::ptr::null(), TENP_ERROR_NULL, "x");
    let none = "workspace: the pointer is null";
    check(
        |_, _, r| r.workspace = std::ptr::null_mut(),
        TENP_ERROR_NULL,
        none,
    );
    let odd = |_: &mut _, _: &mut _, r: &mut Room| {
        r.workspace = r.workspace.wrapping_byte_add(64);
    };
    check(odd, TENP_ERROR_MISALIGNED, "is not a multiple of 256 bytes");
    check(
        |_, _, r| r.workspace_bytes -= 256,
        TENP_ERROR_SIZE,
        "workspace: expected",
    );
    check(|w, _, _| w.gate_up_bytes -= 1, TENP_ERROR_SIZE, "gate_up");
    check(
        |w, _, _| w.gate_up_bytes -= 2,
        TENP_ERROR_SIZE,
        "gate and up",
    );
    check(|_, b, _| b.weights_len -= 1, TENP_ERROR_SIZE, "weights");
    check(|_, b, _| b.num_tokens += 1, TENP_ERROR_SIZE, "workspace");
    let many = |_: &mut _, b: &mut tenp_batch_cuda, _: &mut _| b.num_tokens = usize::MAX;
    check(many, TENP_ERROR_SIZE, "more than a GPU takes");
    check(|_, _, r| r.out_len -= 1, TENP_ERROR_SIZE, "output");
    assert!(case.out.unwritten().len() == case.out.len());
}
