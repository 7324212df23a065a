//! The same layer on a GPU, over memory and a stream of cudarc. `cargo run --features cuda --example cudarc`

#![allow(clippy::print_stdout, reason = "an example shows its result")]
use std::error::Error;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr as _, DevicePtrMut as _};
use half::bf16;
use tenp_kernels::MatrixView;
use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::device::{Device, DeviceSlice, DeviceSliceMut, MoeBatch, MoeWeights, RaggedMoe};

const HIDDEN: usize = 8;

/// A layer's experts in cudarc's memory.
struct Layer {
    moe: RaggedMoe,
    gate_up: CudaSlice<bf16>,
    down: CudaSlice<bf16>,
    tables: CudaSlice<i32>,
}

impl Layer {
    /// Packs the experts on the host, and copies them and their tables to the GPU.
    fn new(
        stream: &Arc<CudaStream>,
        widths: &[usize],
        experts: &[ExpertWeights<'_>],
    ) -> Result<Self, Box<dyn Error>> {
        let moe = RaggedMoe::new(widths, HIDDEN)?;
        let [gate_up, down] = moe.weight_lens();
        let (mut gate_up, mut down) = (vec![bf16::ZERO; gate_up], vec![bf16::ZERO; down]);
        moe.pack(experts, &mut gate_up, &mut down)?;
        Ok(Self {
            gate_up: stream.clone_htod(&gate_up)?,
            down: stream.clone_htod(&down)?,
            tables: stream.clone_htod(&moe.tables())?,
            moe,
        })
    }

    /// Asks for the kernels on cudarc's stream, and does not wait.
    fn forward(
        &self,
        device: &Device,
        stream: &Arc<CudaStream>,
        (x, ids, gates): (&CudaSlice<bf16>, &CudaSlice<i32>, &CudaSlice<f32>),
    ) -> Result<CudaSlice<f32>, Box<dyn Error>> {
        let (num_tokens, top_k) = (x.len() / HIDDEN, ids.len() * HIDDEN / x.len());
        let room = self.moe.workspace_bytes(num_tokens, top_k);
        let mut workspace = stream.alloc_zeros::<u8>(room)?;
        let mut out = stream.alloc_zeros::<f32>(x.len())?;
        // The guards, dropped behind the launches, keep cudarc's record of who uses the memory.
        let (gate_up, _gate_up) = self.gate_up.device_ptr(stream);
        let (down, _down) = self.down.device_ptr(stream);
        let (tables, _tables) = self.tables.device_ptr(stream);
        let (x_there, _x) = x.device_ptr(stream);
        let (ids_there, _ids) = ids.device_ptr(stream);
        let (gates_there, _gates) = gates.device_ptr(stream);
        let (out_there, written) = out.device_ptr_mut(stream);
        let (workspace, _workspace) = workspace.device_ptr_mut(stream);
        // SAFETY: addresses and lengths of live memory of this GPU, whose stream outlives the runner; `out` and
        // `workspace` are nobody else's, and freed memory is freed in the order of the same stream.
        unsafe {
            let runner = device.on_stream(stream.cu_stream());
            let weights = MoeWeights {
                gate_up: DeviceSlice::from_raw(gate_up, self.gate_up.len()),
                down_t: DeviceSlice::from_raw(down, self.down.len()),
                tables: DeviceSlice::from_raw(tables, self.tables.len()),
            };
            let batch = MoeBatch {
                x: DeviceSlice::from_raw(x_there, x.len()),
                expert_ids: DeviceSlice::from_raw(ids_there, ids.len()),
                weights: DeviceSlice::from_raw(gates_there, gates.len()),
                num_tokens,
                top_k,
            };
            let into = DeviceSliceMut::from_raw(out_there, x.len());
            let workspace = DeviceSliceMut::from_raw(workspace, room);
            self.moe.forward(&runner, weights, batch, into, workspace)?;
        }
        drop(written);
        Ok(out)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // Before cudarc's own context: without a driver this is an error, and that a panic. Both share the primary context.
    let device = match Device::open(0) {
        Err(error) if error.is_environment() => {
            println!("skipped: no GPU: {error}");
            return Ok(());
        }
        device => device?,
    };
    let stream = CudaContext::new(0)?.new_stream()?;
    let values: Vec<f32> = (0..HIDDEN * 6).map(|i| (i as f32 * 0.37).sin()).collect();
    let widths = [6, 3, 0];
    let layer = Layer::new(&stream, &widths, &widths.map(|w| expert(w, &values)))?;
    // Two tokens, two experts each, with their routing weights.
    let x: Vec<bf16> = (0..HIDDEN * 2)
        .map(|i| bf16::from_f32((i as f32 * 0.11).cos()))
        .collect();
    let x = stream.clone_htod(&x)?;
    let ids = stream.clone_htod(&[0, 1, 2, 0])?;
    let gates = stream.clone_htod(&[0.7, 0.3, 0.4, 0.6])?;
    let out = layer.forward(&device, &stream, (&x, &ids, &gates))?;
    for (token, out) in stream.clone_dtoh(&out)?.chunks(HIDDEN).enumerate() {
        println!("token {token}: {out:.3?}");
    }
    Ok(())
}

/// As examples/ragged_moe.rs makes one.
fn expert(width: usize, values: &[f32]) -> ExpertWeights<'_> {
    let view = |rows, columns| MatrixView::from_f32(rows, columns, &values[..width * HIDDEN]);
    let rows = view(width, HIDDEN).expect("as many values");
    ExpertWeights {
        gate: rows,
        up: rows,
        down: view(HIDDEN, width).expect("as many values"),
    }
}
