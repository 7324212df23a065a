//! The header's structures, and what they are in Rust.

use std::ffi::c_void;

use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::device::RaggedMoe;
use tenp_kernels::{Compute, Dtype, KernelError, MatrixView, RaggedLayout};

use crate::memory::{slice, unknown};
use crate::status::{Failure, TENP_ERROR_SIZE};

/// Element type of a matrix: one of the constants here.
pub type tenp_dtype = i32;
/// IEEE single precision.
pub const TENP_DTYPE_F32: tenp_dtype = 0;
/// IEEE half precision.
pub const TENP_DTYPE_F16: tenp_dtype = 1;
/// bfloat16.
pub const TENP_DTYPE_BF16: tenp_dtype = 2;
/// OCP FP8 E4M3, with a scale for each block of 128 × 128.
pub const TENP_DTYPE_F8_E4M3: tenp_dtype = 3;

/// Precision of the products on the CPU: one of the constants here.
pub type tenp_compute = i32;
/// Weights widened to f32.
pub const TENP_COMPUTE_F32: tenp_compute = 0;
/// Both factors rounded to bf16.
pub const TENP_COMPUTE_BF16: tenp_compute = 1;

/// `CUstream`, `cudaStream_t`.
pub type tenp_stream = *mut c_void;

/// The shape of a layer.
pub struct tenp_moe {
    pub(crate) layout: RaggedLayout,
    pub(crate) hidden: usize,
    /// The same for a GPU, or why a GPU does not take it.
    pub(crate) device: Result<RaggedMoe, KernelError>,
}

/// An open GPU.
#[cfg(feature = "cuda")]
pub struct tenp_gpu(pub(crate) tenp_kernels::device::Device);

/// An open GPU: there is none without the feature `cuda`.
#[cfg(not(feature = "cuda"))]
pub struct tenp_gpu(());

const _: () = {
    const fn shared_by_threads<T: Send + Sync>() {}
    shared_by_threads::<tenp_moe>();
    shared_by_threads::<tenp_gpu>();
};

/// A row-major matrix as it lies in a checkpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct tenp_matrix {
    /// Its elements.
    pub data: *const c_void,
    /// Bytes of them.
    pub bytes: usize,
    /// Scales of fp8.
    pub scales: *const c_void,
    /// Bytes of them.
    pub scale_bytes: usize,
    /// Element type.
    pub dtype: tenp_dtype,
}

/// Weights of one expert.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct tenp_expert {
    /// `[width, hidden]`.
    pub gate: tenp_matrix,
    /// `[width, hidden]`.
    pub up: tenp_matrix,
    /// `[hidden, width]`.
    pub down: tenp_matrix,
}

/// Routed tokens in the CPU's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct tenp_batch {
    /// `[num_tokens, hidden]`.
    pub x: *const f32,
    /// Elements of `x`.
    pub x_len: usize,
    /// `[num_tokens, top_k]`.
    pub expert_ids: *const i32,
    /// Elements of `expert_ids`.
    pub expert_ids_len: usize,
    /// `[num_tokens, top_k]`.
    pub weights: *const f32,
    /// Elements of `weights`.
    pub weights_len: usize,
    /// Number of tokens.
    pub num_tokens: usize,
    /// Experts of a token.
    pub top_k: usize,
}

/// A layer's weights in GPU memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct tenp_weights_cuda {
    /// Packed gate and up.
    pub gate_up: *const c_void,
    /// Bytes of `gate_up`.
    pub gate_up_bytes: usize,
    /// Packed down.
    pub down: *const c_void,
    /// Bytes of `down`.
    pub down_bytes: usize,
    /// Offsets and widths.
    pub tables: *const c_void,
    /// Bytes of `tables`.
    pub tables_bytes: usize,
}

/// Routed tokens in GPU memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct tenp_batch_cuda {
    /// bf16 `[num_tokens, hidden]`.
    pub x: *const c_void,
    /// Bytes of `x`.
    pub x_bytes: usize,
    /// `[num_tokens, top_k]`.
    pub expert_ids: *const i32,
    /// Elements of `expert_ids`.
    pub expert_ids_len: usize,
    /// `[num_tokens, top_k]`.
    pub weights: *const f32,
    /// Elements of `weights`.
    pub weights_len: usize,
    /// Number of tokens.
    pub num_tokens: usize,
    /// Experts of a token.
    pub top_k: usize,
}

pub(crate) fn compute_of(compute: tenp_compute) -> Result<Compute, Failure> {
    match compute {
        TENP_COMPUTE_F32 => Ok(Compute::F32),
        TENP_COMPUTE_BF16 => Ok(Compute::Bf16),
        other => Err(unknown("tenp_compute", other)),
    }
}

impl tenp_matrix {
    /// # Safety
    /// The pointers lead to as many bytes as are said, which nothing writes during 'a.
    unsafe fn view<'a>(&self, rows: usize, cols: usize) -> Result<MatrixView<'a>, Failure> {
        // SAFETY: the caller's promise.
        let (data, scales) = unsafe {
            (
                slice::<u8>("data", self.data.cast(), self.bytes)?,
                slice::<u8>("scales", self.scales.cast(), self.scale_bytes)?,
            )
        };
        let dtype = match self.dtype {
            TENP_DTYPE_F32 => Dtype::F32,
            TENP_DTYPE_F16 => Dtype::F16,
            TENP_DTYPE_BF16 => Dtype::Bf16,
            TENP_DTYPE_F8_E4M3 => return Ok(MatrixView::from_fp8(rows, cols, data, scales)?),
            other => return Err(unknown("tenp_dtype", other)),
        };
        if !scales.is_empty() {
            return Err(Failure::new(
                TENP_ERROR_SIZE,
                format!(
                    "scales: expected none for {dtype:?}, got {} bytes",
                    scales.len()
                ),
            ));
        }
        Ok(MatrixView::new(dtype, rows, cols, data)?)
    }
}

/// The experts of a layer.
///
/// # Safety
/// `experts` leads to `num_experts` of them, and their pointers to as many bytes as they say, which nothing writes
/// during 'a.
pub(crate) unsafe fn experts_of<'a>(
    moe: &tenp_moe,
    experts: *const tenp_expert,
    num_experts: usize,
) -> Result<Vec<ExpertWeights<'a>>, Failure> {
    let widths = moe.layout.widths();
    if num_experts != widths.len() {
        return Err(Failure::new(
            TENP_ERROR_SIZE,
            format!("experts: expected {}, got {num_experts}", widths.len()),
        ));
    }
    // SAFETY: the caller's promise.
    let experts = unsafe { slice("experts", experts, num_experts) }?;
    experts
        .iter()
        .zip(widths)
        .enumerate()
        .map(|(id, (expert, &width))| {
            let view = |name: &str, matrix: &tenp_matrix, rows, cols| {
                // SAFETY: the caller's promise.
                unsafe { matrix.view(rows, cols) }.map_err(|failure| Failure {
                    text: format!("expert {id}, {name}: {}", failure.text),
                    ..failure
                })
            };
            Ok(ExpertWeights {
                gate: view("gate", &expert.gate, width, moe.hidden)?,
                up: view("up", &expert.up, width, moe.hidden)?,
                down: view("down", &expert.down, moe.hidden, width)?,
            })
        })
        .collect()
}
