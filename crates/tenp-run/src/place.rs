//! Where models run: the CPU, or a GPU.

#[cfg(feature = "cuda")]
use anyhow::Context as _;
use anyhow::Result;
use tenp_checkpoint::Checkpoint;
use tenp_kernels::Compute;
#[cfg(feature = "cuda")]
use tenp_kernels::device::{Device, gpu_count};
use tenp_model::Model;
#[cfg(feature = "cuda")]
use tenp_model::device::DeviceModel;

use crate::cli::{ComputeArg, DeviceArg, HiddenArgs, RunArgs};
use crate::failure::usage;

/// Where models run.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// On the CPU, with this precision.
    Cpu(Compute),
    /// On a GPU, in bf16.
    #[cfg(feature = "cuda")]
    Gpu(Device),
}

impl Place {
    /// What the options ask for.
    ///
    /// # Errors
    /// A GPU that is not there, or a precision that it does not have.
    pub(crate) fn new(args: RunArgs) -> Result<Self> {
        let cpu = Self::Cpu(match args.compute {
            None | Some(ComputeArg::F32) => Compute::F32,
            Some(ComputeArg::Bf16) => Compute::Bf16,
        });
        match (args.device, args.compute) {
            (DeviceArg::Cpu, _) | (DeviceArg::Auto, Some(ComputeArg::F32)) => Ok(cpu),
            (DeviceArg::Cuda(_), Some(ComputeArg::F32)) => Err(usage(
                "--compute f32: a GPU computes in bf16; use --compute bf16, or --device cpu",
            )),
            (DeviceArg::Cuda(ordinal), _) => Self::gpu(ordinal),
            (DeviceArg::Auto, _) => Ok(Self::first_gpu().unwrap_or(cpu)),
        }
    }

    /// The GPU asked for.
    #[cfg(feature = "cuda")]
    fn gpu(ordinal: usize) -> Result<Self> {
        let device = Device::open(ordinal).with_context(|| {
            format!("--device cuda:{ordinal} cannot be used (--device cpu runs without a GPU)")
        })?;
        device.set_memory_advice(
            "a lower --samples or --seq-len takes less; --device cpu takes none",
        );
        crate::console::note(&format!("on {} (cuda:{ordinal})", device.properties().name));
        Ok(Self::Gpu(device))
    }

    #[cfg(not(feature = "cuda"))]
    fn gpu(_ordinal: usize) -> Result<Self> {
        Err(anyhow::Error::new(crate::failure::EnvironmentError(
            "--device cuda: this program was built without CUDA; build it with --features cuda, or use --device cpu"
                .to_owned(),
        )))
    }

    /// The first GPU, if there is one that works; one that does not is said so.
    #[cfg(feature = "cuda")]
    fn first_gpu() -> Option<Self> {
        gpu_count().ok()?;
        match Self::gpu(0) {
            Ok(place) => Some(place),
            Err(error) => {
                crate::console::note(&format!("the GPU is not used: {error:#}"));
                None
            }
        }
    }

    #[cfg(not(feature = "cuda"))]
    fn first_gpu() -> Option<Self> {
        None
    }

    /// What decides the last bits of results: the kind of machine, and the precision.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Cpu(Compute::F32) => "cpu, f32".to_owned(),
            Self::Cpu(Compute::Bf16) => "cpu, bf16".to_owned(),
            #[cfg(feature = "cuda")]
            Self::Gpu(device) => format!("{}, bf16", device.properties().name),
        }
    }

    /// Refuses an option about hidden states in host memory where they are in a GPU's.
    pub(crate) fn check_hidden(&self, args: HiddenArgs) -> Result<()> {
        if args.hidden_memory.is_none() || matches!(self, Self::Cpu(_)) {
            return Ok(());
        }
        Err(usage(
            "--hidden-memory has no effect on a GPU, whose own memory holds the hidden states; a lower --samples or \
             --seq-len takes less of it",
        ))
    }

    /// Precision of what is done on the CPU even where models run elsewhere.
    pub(crate) fn cpu_compute(&self) -> Compute {
        match self {
            Self::Cpu(compute) => *compute,
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => Compute::F32,
        }
    }

    /// Gives `work` a model of the checkpoint.
    ///
    /// # Errors
    /// Those of `work`; a model that the GPU's kernels cannot run.
    pub(crate) fn with_model<R>(
        &self,
        checkpoint: &Checkpoint,
        work: impl FnOnce(Model<'_>) -> Result<R>,
    ) -> Result<R> {
        match self {
            Self::Cpu(compute) => work(Model::new(checkpoint, *compute)),
            #[cfg(feature = "cuda")]
            Self::Gpu(device) => work(Model::on(&DeviceModel::new(checkpoint, device.clone())?)),
        }
    }
}
