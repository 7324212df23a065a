//! Dense products through cuBLAS: row-major operands, sums in f32.
//!
//! cuBLAS is column-major, so a row-major `out = x · Wᵀ` is asked for as `outᵀ = W · xᵀ`: the operands change places
//! and nothing is moved.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublas::result::CublasError;
use cudarc::cublas::{result, sys};
use cudarc::driver::CudaStream;
use half::bf16;

use super::check::to_i32;
use super::context::Device;
use super::dense::{DenseElement, DenseShape, InputLayout, WeightLayout};
use super::libraries::{CUBLAS, is_found};
use super::view::{DeviceSlice, DeviceSliceMut};
use crate::{Dtype, KernelError};

/// An open cuBLAS, tied to the compute stream.
#[derive(Debug)]
pub(super) struct Blas {
    handle: Mutex<Handle>,
}

#[derive(Debug)]
struct Handle(sys::cublasHandle_t);

// SAFETY: a handle may be used from any thread, one at a time, which the mutex around it sees to.
unsafe impl Send for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `open`, destroyed once. There is nobody to report a failure to.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

fn blas_error(what: &'static str, error: CublasError) -> KernelError {
    // SAFETY: takes any status and returns a static string.
    let text = unsafe { std::ffi::CStr::from_ptr(sys::cublasGetStatusString(error.0)) };
    KernelError::Cuda {
        what,
        code: format!("{:?}", error.0),
        text: text.to_string_lossy().into_owned(),
    }
}

/// Whether cuBLAS can be found; without it there are no dense products.
#[must_use]
pub fn cublas_found() -> bool {
    is_found(&CUBLAS)
}

impl Blas {
    pub(super) fn open(stream: &Arc<CudaStream>) -> Result<Self, KernelError> {
        if !cublas_found() {
            return Err(KernelError::NoLibrary {
                library: "libcublas.so.13",
                needed_for: "dense products; it comes with the CUDA toolkit and with the Python wheel nvidia-cublas",
            });
        }
        let handle = Handle(result::create_handle().map_err(|e| blas_error("opening cuBLAS", e))?);
        // SAFETY: both are live, the stream for as long as the device that holds both.
        unsafe { result::set_stream(handle.0, stream.cu_stream().cast()) }
            .map_err(|e| blas_error("giving cuBLAS its stream", e))?;
        Ok(Self {
            handle: Mutex::new(handle),
        })
    }
}

/// cuBLAS's name of an element type.
fn blas_type<T: DenseElement>() -> sys::cudaDataType {
    match T::DTYPE {
        Dtype::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Dtype::F16 => sys::cudaDataType_t::CUDA_R_16F,
        Dtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        Dtype::F8E4m3 => sys::cudaDataType_t::CUDA_R_8F_E4M3,
    }
}

impl Device {
    /// `out = x · Wᵀ` (or `x · W`), sums in f32. In and out may be (bf16, bf16), (bf16, f32) or (f32, f32).
    ///
    /// # Errors
    /// Lengths and pitches that do not fit, a missing cuBLAS, or its own words.
    pub fn dense<I: DenseElement, O: DenseElement>(
        &self,
        shape: &DenseShape,
        x: DeviceSlice<'_, I>,
        weight: DeviceSlice<'_, I>,
        mut out: DeviceSliceMut<'_, O>,
    ) -> Result<(), KernelError> {
        let [x_len, weight_len, out_len] = shape.extents()?;
        let x = x.checked("dense input", x_len, size_of::<I>() as u64)?;
        let weight = weight.checked("dense weight", weight_len, size_of::<I>() as u64)?;
        let out = out.checked("dense output", out_len, size_of::<O>() as u64)?;
        let size = |what, value| to_i32(what, value);
        let (m, n, k) = (
            size("dense outputs", shape.outputs)?,
            size("dense rows", shape.rows)?,
            size("dense inner dimension", shape.inner)?,
        );
        let pitches = [
            size("dense weight pitch", shape.weight_pitch.max(1))?,
            size("dense input pitch", shape.x_pitch.max(1))?,
            size("dense output pitch", shape.out_pitch.max(1))?,
        ];
        if m == 0 || n == 0 {
            return Ok(());
        }
        self.bind()?;
        let (alpha, beta) = (1f32, if shape.accumulate { 1f32 } else { 0f32 });
        let transposed = match shape.layout {
            WeightLayout::OutputRows => sys::cublasOperation_t::CUBLAS_OP_T,
            WeightLayout::InnerRows => sys::cublasOperation_t::CUBLAS_OP_N,
        };
        let x_transposed = match shape.x_layout {
            InputLayout::Rows => sys::cublasOperation_t::CUBLAS_OP_N,
            InputLayout::InnerRows => sys::cublasOperation_t::CUBLAS_OP_T,
        };
        let handle = self
            .blas()?
            .handle
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // SAFETY: extents were checked against the views, which outlive the call; later work is behind it on the stream.
        unsafe {
            result::gemm_ex(
                handle.0,
                transposed,
                x_transposed,
                m,
                n,
                k,
                (&raw const alpha).cast(),
                weight,
                blas_type::<I>(),
                pitches[0],
                x,
                blas_type::<I>(),
                pitches[1],
                (&raw const beta).cast(),
                out,
                blas_type::<O>(),
                pitches[2],
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(|e| blas_error("dense product", e))
    }
}

/// One product of a grouped call: sizes, and the first element of each operand in its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupedProduct {
    /// Sizes and pitches; `accumulate` must be off.
    pub shape: DenseShape,
    /// First element of `x`.
    pub x: usize,
    /// First element of the weight.
    pub weight: usize,
    /// First element of `out`.
    pub out: usize,
}

/// A prepared `cublasGemmGroupedBatchedEx`: the baseline that the grouped kernels are compared with.
#[derive(Debug)]
pub struct GroupedDense {
    transposed: Vec<sys::cublasOperation_t>,
    plain: Vec<sys::cublasOperation_t>,
    sizes: [Vec<i32>; 3],
    pitches: [Vec<i32>; 3],
    ones: Vec<f32>,
    zeros: Vec<f32>,
    problems: Vec<i32>,
    /// Pointers of weights, inputs and outputs, one after another, as the library wants them on the GPU.
    pointers: super::DeviceBuffer<u64>,
}

impl GroupedDense {
    /// Prepares products over three buffers; those with nothing to do are left out.
    ///
    /// # Errors
    /// A product that reaches past a buffer or is to be added to it, or memory for the pointers.
    pub fn new(
        device: &Device,
        products: &[GroupedProduct],
        x: DeviceSlice<'_, bf16>,
        weight: DeviceSlice<'_, bf16>,
        out: &mut DeviceSliceMut<'_, bf16>,
    ) -> Result<Self, KernelError> {
        let live: Vec<&GroupedProduct> = products
            .iter()
            .filter(|p| p.shape.rows > 0 && p.shape.outputs > 0 && p.shape.inner > 0)
            .collect();
        let mut pointers = vec![0u64; 3 * live.len()];
        let (mut sizes, mut pitches): ([Vec<i32>; 3], [Vec<i32>; 3]) = Default::default();
        for (i, p) in live.iter().enumerate() {
            if p.shape.accumulate {
                return Err(KernelError::Invalid {
                    what: "grouped product",
                    why: "it cannot be added to what the output holds".into(),
                });
            }
            let [x_len, weight_len, out_len] = p.shape.extents()?;
            let addresses = [
                weight
                    .slice(p.weight..p.weight + weight_len)?
                    .checked::<u8>("grouped weight", weight_len, 16)? as u64,
                x.slice(p.x..p.x + x_len)?
                    .checked::<u8>("grouped input", x_len, 16)? as u64,
                out.as_slice()
                    .slice(p.out..p.out + out_len)?
                    .checked::<u8>("grouped output", out_len, 16)? as u64,
            ];
            for (table, address) in addresses.into_iter().enumerate() {
                pointers[table * live.len() + i] = address;
            }
            for (to, value) in sizes
                .iter_mut()
                .zip([p.shape.outputs, p.shape.rows, p.shape.inner])
            {
                to.push(to_i32("grouped product", value)?);
            }
            for (to, value) in
                pitches
                    .iter_mut()
                    .zip([p.shape.weight_pitch, p.shape.x_pitch, p.shape.out_pitch])
            {
                to.push(to_i32("grouped pitch", value)?);
            }
        }
        Ok(Self {
            transposed: live
                .iter()
                .map(|p| match p.shape.layout {
                    WeightLayout::OutputRows => sys::cublasOperation_t::CUBLAS_OP_T,
                    WeightLayout::InnerRows => sys::cublasOperation_t::CUBLAS_OP_N,
                })
                .collect(),
            plain: vec![sys::cublasOperation_t::CUBLAS_OP_N; live.len()],
            sizes,
            pitches,
            ones: vec![1.0; live.len()],
            zeros: vec![0.0; live.len()],
            problems: vec![1; live.len()],
            pointers: device.upload("pointers of a grouped product", &pointers)?,
        })
    }

    /// Runs all products.
    ///
    /// # Safety
    /// The buffers given to [`GroupedDense::new`] are still there, and `out` is not read or written elsewhere.
    ///
    /// # Errors
    /// A missing cuBLAS, or its own words.
    pub unsafe fn run(&self, device: &Device) -> Result<(), KernelError> {
        let groups = self.problems.len();
        if groups == 0 {
            return Ok(());
        }
        device.bind()?;
        let first: *const *const c_void =
            self.pointers
                .view()
                .checked("pointers of a grouped product", 3 * groups, 8)?;
        let table = |i: usize| first.wrapping_add(i * groups);
        let handle = device
            .blas()?
            .handle
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // SAFETY: every array has `groups` entries, the pointers were checked by `new` and the caller keeps the buffers.
        unsafe {
            sys::cublasGemmGroupedBatchedEx(
                handle.0,
                self.transposed.as_ptr(),
                self.plain.as_ptr(),
                self.sizes[0].as_ptr(),
                self.sizes[1].as_ptr(),
                self.sizes[2].as_ptr(),
                self.ones.as_ptr().cast(),
                table(0),
                sys::cudaDataType_t::CUDA_R_16BF,
                self.pitches[0].as_ptr(),
                table(1),
                sys::cudaDataType_t::CUDA_R_16BF,
                self.pitches[1].as_ptr(),
                self.zeros.as_ptr().cast(),
                table(2).cast::<*mut c_void>(),
                sys::cudaDataType_t::CUDA_R_16BF,
                self.pitches[2].as_ptr(),
                groups as i32,
                self.problems.as_ptr(),
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            )
        }
        .result()
        .map_err(|e| blas_error("grouped product", e))
    }
}
