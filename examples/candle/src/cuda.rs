//! The op on a GPU: candle's memory and stream, the kernels of `tenp-kernels`.

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::{
    CudaDevice, CudaStorage, Device, DeviceLocation, Error, Layout, Result, WithDType, bail,
};
use half::bf16;
use tenp_kernels::device::{
    Device as Gpu, DeviceSlice, DeviceSliceMut, MoeBatch, MoeWeights, RaggedMoe,
};

use crate::op::Expert;

/// The experts, packed, in candle's memory.
#[derive(Debug)]
pub(crate) struct OnGpu {
    gpu: Gpu,
    device: CudaDevice,
    moe: RaggedMoe,
    gate_up: CudaSlice<bf16>,
    down: CudaSlice<bf16>,
    tables: CudaSlice<i32>,
}

/// A tensor's elements, with its layout.
pub(crate) type Given<'a> = (&'a CudaStorage, &'a Layout);

/// The elements of a contiguous tensor: all that are in memory, and which of them are the tensor's.
fn elements<'a, T: CudaDType + DeviceRepr + WithDType>(
    what: &str,
    (storage, layout): Given<'a>,
) -> Result<(&'a CudaSlice<T>, usize, usize)> {
    let Some((begin, end)) = layout.contiguous_offsets() else {
        bail!("ragged experts: {what} is not contiguous");
    };
    Ok((storage.as_cuda_slice::<T>()?, begin, end - begin))
}

impl OnGpu {
    /// Packs the experts and copies them to the GPU; nothing on the CPU.
    pub(crate) fn new(hidden: usize, experts: &[Expert], device: &Device) -> Result<Option<Self>> {
        let (Device::Cuda(candle), DeviceLocation::Cuda { gpu_id }) = (device, device.location())
        else {
            return Ok(None);
        };
        let widths: Vec<usize> = experts.iter().map(Expert::width).collect();
        let moe = RaggedMoe::new(&widths, hidden).map_err(Error::wrap)?;
        let views = experts.iter().map(|expert| expert.view(hidden));
        let views = views
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(Error::wrap)?;
        let [gate_up, down] = moe.weight_lens();
        let (mut gate_up, mut down) = (vec![bf16::ZERO; gate_up], vec![bf16::ZERO; down]);
        moe.pack(&views, &mut gate_up, &mut down)
            .map_err(Error::wrap)?;
        Ok(Some(Self {
            gpu: Gpu::open(gpu_id).map_err(Error::wrap)?,
            gate_up: candle.clone_htod(&gate_up)?,
            down: candle.clone_htod(&down)?,
            tables: candle.clone_htod(&moe.tables())?,
            device: candle.clone(),
            moe,
        }))
    }

    /// The op, behind all work of candle's stream so far.
    pub(crate) fn forward(
        &self,
        x: Given<'_>,
        ids: Given<'_>,
        weights: Given<'_>,
        (num_tokens, top_k): (usize, usize),
    ) -> Result<CudaStorage> {
        let stream = self.device.cuda_stream();
        let (x, x_begin, x_len) = elements::<bf16>("x", x)?;
        let (ids, ids_begin, ids_len) = elements::<u32>("expert ids", ids)?;
        let (gates, gates_begin, gates_len) = elements::<f32>("weights", weights)?;
        let bytes = self.moe.workspace_bytes(num_tokens, top_k);
        // SAFETY: the kernels write every element before anything reads it.
        let (mut out, mut workspace) = unsafe {
            (
                self.device.alloc::<f32>(x_len)?,
                self.device.alloc::<u8>(bytes)?,
            )
        };
        {
            // The guards tell cudarc of the use when they are dropped, behind the launches.
            let (x, _x) = x.device_ptr(&stream);
            let (ids, _ids) = ids.device_ptr(&stream);
            let (gates, _gates) = gates.device_ptr(&stream);
            let (gate_up, _gate_up) = self.gate_up.device_ptr(&stream);
            let (down, _down) = self.down.device_ptr(&stream);
            let (tables, _tables) = self.tables.device_ptr(&stream);
            let (out, _out) = out.device_ptr_mut(&stream);
            let (room, _room) = workspace.device_ptr_mut(&stream);
            // SAFETY: addresses and lengths are those of live tensors of this GPU, whose context is the primary one;
            // `out` and `workspace` are nobody else's; freed memory is freed in the order of the same stream. Ids
            // below 2^31 are the same bits in i32, and others are no expert's in either.
            unsafe {
                let runner = self.gpu.on_stream(stream.cu_stream());
                let layer = MoeWeights {
                    gate_up: DeviceSlice::from_raw(gate_up, self.gate_up.len()),
                    down_t: DeviceSlice::from_raw(down, self.down.len()),
                    tables: DeviceSlice::from_raw(tables, self.tables.len()),
                };
                let batch = MoeBatch {
                    x: DeviceSlice::from_raw(x + 2 * x_begin as u64, x_len),
                    expert_ids: DeviceSlice::from_raw(ids + 4 * ids_begin as u64, ids_len),
                    weights: DeviceSlice::from_raw(gates + 4 * gates_begin as u64, gates_len),
                    num_tokens,
                    top_k,
                };
                let out = DeviceSliceMut::from_raw(out, x_len);
                let room = DeviceSliceMut::from_raw(room, bytes);
                self.moe
                    .forward(&runner, layer, batch, out, room)
                    .map_err(Error::wrap)?;
            }
        }
        Ok(CudaStorage::wrap_cuda_slice(out, self.device.clone()))
    }
}
