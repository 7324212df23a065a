//! The layer on a GPU, over the caller's memory and stream.

use std::ffi::c_void;

#[cfg(any(feature = "cuda", test))]
use tenp_kernels::device::{DeviceSlice, DeviceSliceMut, MoeBatch, MoeWeights, Runner};

#[cfg(feature = "cuda")]
use crate::memory::{get, write};
#[cfg(not(feature = "cuda"))]
use crate::status::TENP_ERROR_NOT_BUILT;
use crate::status::{Failure, status, tenp_status};
use crate::types::{tenp_batch_cuda, tenp_gpu, tenp_moe, tenp_stream, tenp_weights_cuda};

#[cfg(not(feature = "cuda"))]
fn not_built() -> Failure {
    Failure::new(
        TENP_ERROR_NOT_BUILT,
        "this library was built without CUDA; build it with --features cuda",
    )
}

/// A view of GPU memory, refused where it is null.
///
/// # Safety
/// As [`DeviceSlice::from_raw`].
#[cfg(any(feature = "cuda", test))]
unsafe fn view<'a, T: bytemuck::Pod>(
    what: &str,
    pointer: *const T,
    len: usize,
) -> Result<DeviceSlice<'a, T>, Failure> {
    check_there(what, pointer, len)?;
    // SAFETY: the caller's promise.
    Ok(unsafe { DeviceSlice::from_raw(pointer as u64, len) })
}

/// The same to write.
///
/// # Safety
/// As [`DeviceSliceMut::from_raw`].
#[cfg(any(feature = "cuda", test))]
unsafe fn view_mut<'a, T: bytemuck::Pod>(
    what: &str,
    pointer: *mut T,
    len: usize,
) -> Result<DeviceSliceMut<'a, T>, Failure> {
    check_there(what, pointer, len)?;
    // SAFETY: the caller's promise.
    Ok(unsafe { DeviceSliceMut::from_raw(pointer as u64, len) })
}

#[cfg(any(feature = "cuda", test))]
fn check_there<T>(what: &str, pointer: *const T, len: usize) -> Result<(), Failure> {
    if pointer.is_null() && len > 0 {
        return Err(Failure::new(
            crate::status::TENP_ERROR_NULL,
            format!("{what}: the pointer is null"),
        ));
    }
    Ok(())
}

/// What the caller gave for the output and the workspace.
#[cfg(any(feature = "cuda", test))]
struct Room {
    out: *mut f32,
    out_len: usize,
    workspace: *mut c_void,
    workspace_bytes: usize,
}

/// # Safety
/// The pointers lead to as much memory, where `runner` runs, as is said; what is written overlaps nothing else, and
/// all of it stays until the work is done.
#[cfg(any(feature = "cuda", test))]
unsafe fn forward<R: Runner>(
    moe: &tenp_moe,
    runner: &R,
    weights: &tenp_weights_cuda,
    batch: &tenp_batch_cuda,
    room: &Room,
) -> Result<(), Failure>
where
    Failure: From<R::Error>,
{
    use crate::memory::elements;
    moe.rows_on_device(batch.num_tokens, batch.top_k)?;
    // SAFETY: the caller's promise.
    let (given, routed, out, workspace) = unsafe {
        (
            MoeWeights {
                gate_up: view(
                    "gate_up",
                    weights.gate_up.cast(),
                    elements::<half::bf16>("gate_up", weights.gate_up_bytes)?,
                )?,
                down_t: view(
                    "down",
                    weights.down.cast(),
                    elements::<half::bf16>("down", weights.down_bytes)?,
                )?,
                tables: view(
                    "tables",
                    weights.tables.cast(),
                    elements::<i32>("tables", weights.tables_bytes)?,
                )?,
            },
            MoeBatch {
                x: view(
                    "x",
                    batch.x.cast(),
                    elements::<half::bf16>("x", batch.x_bytes)?,
                )?,
                expert_ids: view("expert_ids", batch.expert_ids, batch.expert_ids_len)?,
                weights: view("weights", batch.weights, batch.weights_len)?,
                num_tokens: batch.num_tokens,
                top_k: batch.top_k,
            },
            view_mut("out", room.out, room.out_len)?,
            view_mut("workspace", room.workspace.cast(), room.workspace_bytes)?,
        )
    };
    Ok(moe
        .on_device()?
        .forward(runner, given, routed, out, workspace)?)
}

/// Number of GPUs this process may use.
///
/// # Safety
/// `count` leads to room for a number.
#[unsafe(no_mangle)]
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
pub unsafe extern "C" fn tenp_gpu_count(count: *mut usize) -> tenp_status {
    status(|| {
        #[cfg(not(feature = "cuda"))]
        return Err(not_built());
        #[cfg(feature = "cuda")]
        {
            let found = tenp_kernels::device::gpu_count()?;
            // SAFETY: the caller's promise.
            unsafe { write([("count", count, found)]) }
        }
    })
}

/// Opens a GPU and loads the kernels there, all that a forward pass may ask for.
///
/// # Safety
/// `gpu` leads to room for a pointer.
#[unsafe(no_mangle)]
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
pub unsafe extern "C" fn tenp_gpu_open(ordinal: usize, gpu: *mut *mut tenp_gpu) -> tenp_status {
    status(|| {
        #[cfg(not(feature = "cuda"))]
        return Err(not_built());
        #[cfg(feature = "cuda")]
        {
            // Before the box, or a null pointer here would leak it.
            // SAFETY: the caller's promise.
            unsafe { write([("gpu", gpu, std::ptr::null_mut())]) }?;
            let opened = Box::new(tenp_gpu(tenp_kernels::device::Device::open(ordinal)?));
            // SAFETY: as above.
            unsafe { write([("gpu", gpu, Box::into_raw(opened))]) }
        }
    })
}

/// Gives a GPU back; null is nothing.
///
/// # Safety
/// The GPU comes from [`tenp_gpu_open`], no work of it is running, and it is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tenp_gpu_close(gpu: *mut tenp_gpu) -> tenp_status {
    status(|| {
        if !gpu.is_null() {
            // SAFETY: made by `Box::into_raw`, and given back once, by the caller's promise.
            drop(unsafe { Box::from_raw(gpu) });
        }
        Ok(())
    })
}

/// The layer's output, on a GPU.
///
/// # Safety
/// `moe` and `gpu` are live, the stream is one of this GPU's primary context; the pointers in the structures, `out`
/// and `workspace` lead to as much memory of this GPU as is said; what is written overlaps nothing else, and all of it
/// stays until the stream has come past this call.
#[unsafe(no_mangle)]
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
pub unsafe extern "C" fn tenp_moe_forward_cuda(
    moe: *const tenp_moe,
    gpu: *const tenp_gpu,
    weights: *const tenp_weights_cuda,
    batch: *const tenp_batch_cuda,
    out: *mut f32,
    out_len: usize,
    workspace: *mut c_void,
    workspace_bytes: usize,
    stream: tenp_stream,
) -> tenp_status {
    status(|| {
        #[cfg(not(feature = "cuda"))]
        return Err(not_built());
        #[cfg(feature = "cuda")]
        {
            let room = Room {
                out,
                out_len,
                workspace,
                workspace_bytes,
            };
            // SAFETY: the caller's promise.
            unsafe {
                let runner = get("gpu", gpu)?.0.on_stream(stream.cast());
                let (weights, batch) = (get("weights", weights)?, get("batch", batch)?);
                forward(get("moe", moe)?, &runner, weights, batch, &room)
            }
        }
    })
}

#[cfg(test)]
mod tests;
