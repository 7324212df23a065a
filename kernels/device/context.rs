//! The GPU: opened once, it owns the stream that all kernels run on, the loaded kernels and cuBLAS.
//!
//! There is one compute stream, so kernels run in the order they were asked for, and memory freed is reused in that
//! order too: nothing has to be waited for. The one other stream is that of uploads.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::sys::{
    CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute,
};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::blas::Blas;
use super::call::{Call, Runner};
use super::encode_maps::encode_maps;
use super::entries;
use super::fatbins::{FATBINS, TARGETS, WGMMA_STEM, check_driver, check_gpu, runs_wgmma};
use super::libraries::{DRIVER, is_found};
use crate::KernelError;

/// What the GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Its number.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Shared memory a block may have, in bytes.
    pub shared_bytes_per_block: usize,
    /// Size of the second cache level.
    pub l2_bytes: usize,
    /// Memory in all.
    pub memory_bytes: usize,
    /// CUDA version the driver supports, 1000 · major + 10 · minor.
    pub driver: i32,
}

/// An open GPU. Cloning gives another handle to the same one.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("properties", &self.inner.properties)
            .finish_non_exhaustive()
    }
}

struct Inner {
    // Fields are dropped in this order: what was made in the context goes before the context.
    blas: OnceLock<Blas>,
    kernels: Mutex<HashMap<&'static str, Kernel>>,
    modules: Vec<Module>,
    stream: Arc<CudaStream>,
    uploads: Arc<CudaStream>,
    context: Arc<CudaContext>,
    properties: Properties,
    advice: Mutex<String>,
}

/// A loaded fatbin.
struct Module {
    stem: &'static str,
    handle: sys::CUmodule,
}

// SAFETY: a module handle may be used from any thread whose current context is its own; `bind` sees to that.
unsafe impl Send for Module {}
// SAFETY: as above; the driver locks its own structures.
unsafe impl Sync for Module {}

/// A kernel entry of a loaded module.
#[derive(Clone, Copy)]
struct Kernel(sys::CUfunction);

// SAFETY: as for `Module`; the module outlives it, both live in `Inner`.
unsafe impl Send for Kernel {}

/// Turns a driver error into one with its name and its text.
pub(super) fn driver_error(what: &'static str, error: DriverError) -> KernelError {
    let text = |s: Result<&std::ffi::CStr, DriverError>| {
        s.map_or_else(
            |_| format!("error {}", error.0 as u32),
            |s| s.to_string_lossy().into_owned(),
        )
    };
    KernelError::Cuda {
        what,
        code: text(error.error_name()),
        text: text(error.error_string()),
    }
}

/// Number of GPUs this process may use.
///
/// # Errors
/// No driver, or the driver finds no GPU it can run.
pub fn gpu_count() -> Result<usize, KernelError> {
    if !is_found(&DRIVER) {
        return Err(KernelError::NoLibrary {
            library: "libcuda.so.1",
            needed_for: "every CUDA kernel; it comes with the NVIDIA driver",
        });
    }
    let no_gpu = |error: DriverError| KernelError::NoGpu {
        text: match driver_error("", error) {
            KernelError::Cuda { code, text, .. } => format!("{code}: {text}"),
            other => other.to_string(),
        },
    };
    result::init().map_err(no_gpu)?;
    let count = result::device::get_count().map_err(no_gpu)?;
    if count <= 0 {
        return Err(KernelError::NoGpu {
            text: "the driver lists none".into(),
        });
    }
    Ok(count as usize)
}

impl Device {
    /// Opens GPU `ordinal` and loads the kernels; those of a ragged layer's forward pass are found too, so that it can be
    /// captured from the first call on, on any stream.
    ///
    /// # Errors
    /// No driver, no GPU, no such GPU, a driver or a GPU that cannot run the kernels, or the driver's own words.
    pub fn open(ordinal: usize) -> Result<Self, KernelError> {
        let count = gpu_count()?;
        let mut driver = 0;
        // SAFETY: writes one integer to a live local; the library is present, `gpu_count` has called it.
        unsafe { sys::cuDriverGetVersion(&raw mut driver) }
            .result()
            .map_err(|e| driver_error("asking the driver's version", e))?;
        // Before anything else: an older driver lacks functions, and a missing function is a panic.
        check_driver(driver)?;
        if ordinal >= count {
            return Err(KernelError::NoSuchGpu { ordinal, count });
        }
        let opening = |e| driver_error("opening the GPU", e);
        let context = CudaContext::new(ordinal).map_err(opening)?;
        // SAFETY: all work but uploads runs on one stream, and an `Upload` orders itself by events.
        unsafe { context.disable_event_tracking() };
        let properties = read_properties(&context, ordinal, driver).map_err(opening)?;
        check_gpu(&properties.name, properties.capability)?;
        let stream = context.new_stream().map_err(opening)?;
        let uploads = context.new_stream().map_err(opening)?;
        keep_freed_memory(&context).map_err(opening)?;
        let modules = load_modules(&context, properties.capability)?;
        let device = Self {
            inner: Arc::new(Inner {
                blas: OnceLock::new(),
                kernels: Mutex::new(HashMap::new()),
                modules,
                stream,
                uploads,
                context,
                properties,
                advice: Mutex::new(String::new()),
            }),
        };
        for entry in entries::of_ragged_moe(device.has_wgmma()) {
            device.kernel(entry)?;
        }
        Ok(device)
    }

    /// What the GPU is.
    #[must_use]
    pub fn properties(&self) -> &Properties {
        &self.inner.properties
    }

    /// Architectures the embedded kernels were compiled for.
    #[must_use]
    pub fn built_for() -> &'static [&'static str] {
        TARGETS
    }

    /// What to say when memory runs out, such as the option that lowers the need.
    pub fn set_memory_advice(&self, advice: &str) {
        *self
            .inner
            .advice
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = advice.to_string();
    }

    /// Bytes that can still be allocated: free on the GPU, and freed but kept by this process.
    ///
    /// # Errors
    /// The driver's own words.
    pub fn free_bytes(&self) -> Result<u64, KernelError> {
        let asking = |e| driver_error("asking for free memory", e);
        let (free, _) = self.inner.context.mem_get_info().map_err(asking)?;
        let (reserved, used) = pool_sizes(&self.inner.context).map_err(asking)?;
        Ok(free as u64 + reserved.saturating_sub(used))
    }

    /// Waits until all work asked for so far is done.
    ///
    /// # Errors
    /// What went wrong in that work: the driver reports a kernel's failure at the next wait.
    pub fn synchronize(&self) -> Result<(), KernelError> {
        self.inner
            .stream
            .synchronize()
            .map_err(|e| driver_error("waiting for the GPU", e))
    }

    /// Waits for all work on the GPU, other handles' and other runtimes' in this process included.
    ///
    /// # Errors
    /// As [`Self::synchronize`].
    pub fn synchronize_all(&self) -> Result<(), KernelError> {
        self.inner
            .context
            .synchronize()
            .map_err(|e| driver_error("waiting for the GPU", e))
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.inner.stream
    }

    /// The stream that uploads run on.
    pub(super) fn uploads(&self) -> &Arc<CudaStream> {
        &self.inner.uploads
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.inner.context
    }

    /// cuBLAS, opened at the first dense product.
    pub(super) fn blas(&self) -> Result<&Blas, KernelError> {
        if let Some(blas) = self.inner.blas.get() {
            return Ok(blas);
        }
        let blas = Blas::open(&self.inner.stream)?;
        Ok(self.inner.blas.get_or_init(|| blas))
    }

    /// Makes the GPU's context the calling thread's.
    pub(super) fn bind(&self) -> Result<(), KernelError> {
        self.inner
            .context
            .bind_to_thread()
            .map_err(|e| driver_error("binding the GPU to a thread", e))
    }

    pub(super) fn out_of_memory(&self, what: &'static str, wanted_bytes: u64) -> KernelError {
        KernelError::OutOfMemory {
            what,
            wanted_bytes,
            free_bytes: self.free_bytes().unwrap_or(0),
            advice: self
                .inner
                .advice
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        }
    }

    /// Finds an entry in the loaded modules, once.
    fn kernel(&self, entry: &'static str) -> Result<Kernel, KernelError> {
        let mut kernels = self
            .inner
            .kernels
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(&kernel) = kernels.get(entry) {
            return Ok(kernel);
        }
        let name = CString::new(entry).expect("names of kernels have no zero byte");
        let found = self.inner.modules.iter().find_map(|module| {
            // SAFETY: the module is loaded and lives as long as `self`.
            unsafe { result::module::get_function(module.handle, name.clone()) }.ok()
        });
        let Some(function) = found else {
            let stems: Vec<&str> = self.inner.modules.iter().map(|m| m.stem).collect();
            return Err(KernelError::Cuda {
                what: entry,
                code: "CUDA_ERROR_NOT_FOUND".into(),
                text: format!("no such kernel in {}", stems.join(", ")),
            });
        };
        // Past 48 KiB a kernel must be told how much shared memory it may be launched with; told once, always right.
        let limit = self.inner.properties.shared_bytes_per_block as i32;
        let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function was just found in a loaded module.
        unsafe { result::function::set_function_attribute(function, attribute, limit) }
            .map_err(|e| driver_error(entry, e))?;
        kernels.insert(entry, Kernel(function));
        Ok(Kernel(function))
    }

    /// Finds the call's kernel, which takes longer the first time.
    pub(super) fn prepare(&self, call: &Call<'_>) -> Result<(), KernelError> {
        self.bind()?;
        self.kernel(call.entry()).map(|_| ())
    }

    /// Asks for the kernel on `stream` and does not wait; an empty grid is no launch.
    pub(super) fn launch(&self, call: &Call<'_>, stream: sys::CUstream) -> Result<(), KernelError> {
        let launch = call.launch();
        if launch.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let kernel = self.kernel(call.entry())?;
        let [x, y, z] = launch.grid;
        let mut maps = call.tensor_maps().map(encode_maps).transpose()?;
        let mut arguments = vec![call.params().as_ptr().cast_mut().cast()];
        arguments.extend(maps.as_mut().map(|maps| std::ptr::from_mut(maps).cast()));
        // SAFETY: the entry takes one structure by value, and the tensor maps if the call has them, which the driver
        // copies during the call. Whoever made the call checked what they point to; owned memory is freed in stream
        // order, behind this launch.
        unsafe {
            result::launch_kernel(
                kernel.0,
                (x, y, z),
                (launch.threads, 1, 1),
                launch.shared_bytes,
                stream,
                &mut arguments,
            )
        }
        .map_err(|e| driver_error(call.entry(), e))
    }
}

impl Runner for Device {
    type Error = KernelError;

    fn multiprocessors(&self) -> usize {
        self.inner.properties.multiprocessors
    }

    fn has_wgmma(&self) -> bool {
        runs_wgmma(self.inner.properties.capability)
    }

    /// Asks for the kernel on the compute stream and does not wait; an empty grid is no launch.
    fn run(&self, call: &Call<'_>) -> Result<(), KernelError> {
        self.launch(call, self.inner.stream.cu_stream())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Modules go while their context is alive and nothing runs any more; errors cannot be reported from here.
        if self.context.bind_to_thread().is_ok() && self.stream.synchronize().is_ok() {
            for module in &self.modules {
                // SAFETY: loaded by `load_modules`, and no kernel of it is running or can be asked for any more.
                let _ = unsafe { result::module::unload(module.handle) };
            }
        }
    }
}

fn read_properties(
    context: &Arc<CudaContext>,
    ordinal: usize,
    driver: i32,
) -> Result<Properties, DriverError> {
    let attribute = |a| context.attribute(a).map(|v| v.max(0) as usize);
    let (major, minor) = context.compute_capability()?;
    Ok(Properties {
        ordinal,
        name: context.name()?,
        capability: (major.unsigned_abs(), minor.unsigned_abs()),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_per_block: attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        memory_bytes: context.total_mem()?,
        driver,
    })
}

fn load_modules(
    context: &Arc<CudaContext>,
    capability: (u32, u32),
) -> Result<Vec<Module>, KernelError> {
    context
        .bind_to_thread()
        .map_err(|e| driver_error("loading the kernels", e))?;
    let mut modules = Vec::with_capacity(FATBINS.len());
    for &(stem, fatbin) in FATBINS {
        if stem.ends_with(WGMMA_STEM) && !runs_wgmma(capability) {
            continue;
        }
        // SAFETY: a whole fatbin as nvcc wrote it, static, which the driver reads during the call.
        let handle = unsafe { result::module::load_data(fatbin.as_ptr().cast()) }
            .map_err(|e| driver_error("loading the kernels", e))?;
        modules.push(Module { stem, handle });
    }
    Ok(modules)
}

fn default_pool(context: &Arc<CudaContext>) -> Result<sys::CUmemoryPool, DriverError> {
    context.bind_to_thread()?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: writes one handle to a live local.
    unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()) }.result()?;
    Ok(pool)
}

/// Freed memory stays with the process: layers and batches come again in the same sizes.
fn keep_freed_memory(context: &Arc<CudaContext>) -> Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut threshold = u64::MAX;
    // SAFETY: the pool is the context's own; the attribute's type is cuuint64_t.
    unsafe {
        sys::cuMemPoolSetAttribute(
            default_pool(context)?,
            sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            (&raw mut threshold).cast(),
        )
    }
    .result()
}

/// Bytes the pool holds, and bytes of them in use.
fn pool_sizes(context: &Arc<CudaContext>) -> Result<(u64, u64), DriverError> {
    if !context.has_async_alloc() {
        return Ok((0, 0));
    }
    let pool = default_pool(context)?;
    let get = |attribute| {
        let mut value = 0u64;
        // SAFETY: the pool is the context's own; these attributes are cuuint64_t.
        unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut value).cast()) }.result()?;
        Ok(value)
    };
    Ok((
        get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
        get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
    ))
}
