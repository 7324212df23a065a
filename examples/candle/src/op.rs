//! The custom op: `out_t = Σ g · down(silu(gate x_t) · (up x_t))` over the experts of each token.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, WithDType, bail,
};
use half::bf16;
use tenp_kernels::cpu::moe::{ExpertActivations, ExpertWeights, combine, expert_forward};
use tenp_kernels::{Compute, ExpertGroups, KernelError, MatrixView};

/// Weights of one expert on the host; the width may differ from expert to expert and may be 0.
#[derive(Clone, Debug)]
pub struct Expert {
    width: usize,
    gate: Vec<bf16>,
    up: Vec<bf16>,
    down: Vec<bf16>,
}

impl Expert {
    /// Takes `gate` and `up`, `[width, H]`, and `down`, `[H, width]`, in bf16.
    ///
    /// # Errors
    /// Shapes that do not fit together, another type.
    pub fn new(gate: &Tensor, up: &Tensor, down: &Tensor) -> Result<Self> {
        let (width, hidden) = gate.dims2()?;
        if up.dims() != [width, hidden] || down.dims() != [hidden, width] {
            bail!(
                "expert: gate {:?}, up {:?} and down {:?} do not fit together",
                gate.dims(),
                up.dims(),
                down.dims()
            );
        }
        let values = |matrix: &Tensor| matrix.flatten_all()?.to_vec1::<bf16>();
        Ok(Self {
            width,
            gate: values(gate)?,
            up: values(up)?,
            down: values(down)?,
        })
    }

    /// Number of neurons.
    pub fn width(&self) -> usize {
        self.width
    }

    pub(crate) fn view(
        &self,
        hidden: usize,
    ) -> std::result::Result<ExpertWeights<'_>, KernelError> {
        Ok(ExpertWeights {
            gate: MatrixView::from_bf16(self.width, hidden, &self.gate)?,
            up: MatrixView::from_bf16(self.width, hidden, &self.up)?,
            down: MatrixView::from_bf16(hidden, self.width, &self.down)?,
        })
    }
}

/// The experts of a layer, as an op on `x` `[tokens, H]`, expert ids and their weights, both `[tokens, k]`.
#[derive(Debug)]
pub struct RaggedExperts {
    hidden: usize,
    experts: Vec<Expert>,
    compute: Compute,
    #[cfg(feature = "cuda")]
    on_gpu: Option<crate::cuda::OnGpu>,
}

impl RaggedExperts {
    /// The op for tensors on `device`: on the CPU with products in `compute`, on a GPU in bf16.
    ///
    /// # Errors
    /// No experts, hidden sizes that differ, a device that the kernels do not run on.
    pub fn new(
        hidden: usize,
        experts: Vec<Expert>,
        compute: Compute,
        device: &Device,
    ) -> Result<Self> {
        if experts.is_empty() {
            bail!("ragged experts: there are none");
        }
        for (id, expert) in experts.iter().enumerate() {
            if expert.gate.len() != expert.width * hidden {
                bail!("expert {id}: its rows are not {hidden} long");
            }
        }
        if !(device.is_cpu() || cfg!(feature = "cuda") && device.is_cuda()) {
            bail!(
                "ragged experts: built to run on the CPU, not on {device:?}; an NVIDIA GPU needs the feature cuda"
            );
        }
        Ok(Self {
            hidden,
            compute,
            #[cfg(feature = "cuda")]
            on_gpu: crate::cuda::OnGpu::new(hidden, &experts, device)?,
            experts,
        })
    }

    /// Width of every expert.
    pub fn widths(&self) -> Vec<usize> {
        self.experts.iter().map(Expert::width).collect()
    }

    /// Runs the op: `x` `[tokens, H]` of f32 or bf16, `expert_ids` `[tokens, k]` of u32, `weights` `[tokens, k]` of
    /// f32, to f32 `[tokens, H]`.
    ///
    /// # Errors
    /// Shapes and types that do not fit together, an id that is no expert's.
    pub fn forward(&self, x: &Tensor, expert_ids: &Tensor, weights: &Tensor) -> Result<Tensor> {
        // A GPU's kernels read bf16, to which the CPU's round where they compute in it.
        let x = x.to_dtype(if x.device().is_cuda() {
            DType::BF16
        } else {
            DType::F32
        })?;
        x.contiguous()?
            .apply_op3_no_bwd(&expert_ids.contiguous()?, &weights.contiguous()?, self)
    }

    /// Tokens and experts of a token.
    fn check(&self, x: &Layout, ids: &Layout, weights: &Layout) -> Result<(usize, usize)> {
        let (tokens, hidden) = x.shape().dims2()?;
        let (rows, top_k) = ids.shape().dims2()?;
        if hidden != self.hidden || rows != tokens || weights.dims() != ids.dims() {
            bail!(
                "ragged experts of {} features: x {:?}, expert ids {:?} and weights {:?} do not fit together",
                self.hidden,
                x.dims(),
                ids.dims(),
                weights.dims()
            );
        }
        Ok((tokens, top_k))
    }
}

/// The elements of a contiguous tensor.
fn elements<'a, T: WithDType>(
    what: &str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [T]> {
    let Some((begin, end)) = layout.contiguous_offsets() else {
        bail!("ragged experts: {what} is not contiguous");
    };
    Ok(&storage.as_slice::<T>()?[begin..end])
}

impl CustomOp3 for RaggedExperts {
    fn name(&self) -> &'static str {
        "ragged-experts"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        ids: &CpuStorage,
        ids_layout: &Layout,
        weights: &CpuStorage,
        weights_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, top_k) = self.check(x_layout, ids_layout, weights_layout)?;
        let x: &[f32] = elements("x", x, x_layout)?;
        let ids: &[u32] = elements("expert ids", ids, ids_layout)?;
        let weights: &[f32] = elements("weights", weights, weights_layout)?;
        let run = || -> std::result::Result<Vec<f32>, KernelError> {
            let views = self.experts.iter().map(|expert| expert.view(self.hidden));
            let views: Vec<ExpertWeights<'_>> =
                views.collect::<std::result::Result<_, KernelError>>()?;
            let groups = ExpertGroups::new(views.len(), top_k, ids, weights)?;
            let mut activations = ExpertActivations::default();
            expert_forward(self.compute, &views, &groups, x, &mut activations)?;
            let mut out = vec![0f32; tokens * self.hidden];
            combine(&groups, activations.outputs(), self.hidden, &mut out)?;
            Ok(out)
        };
        let out = run().map_err(candle_core::Error::wrap)?;
        Ok((CpuStorage::F32(out), (tokens, self.hidden).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        ids: &CudaStorage,
        ids_layout: &Layout,
        weights: &CudaStorage,
        weights_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (tokens, top_k) = self.check(x_layout, ids_layout, weights_layout)?;
        let Some(on_gpu) = &self.on_gpu else {
            bail!("ragged experts: made for the CPU, given tensors of a GPU");
        };
        let batch = (tokens, top_k);
        let ids = (ids, ids_layout);
        let out = on_gpu.forward((x, x_layout), ids, (weights, weights_layout), batch)?;
        Ok((out, (tokens, self.hidden).into()))
    }
}
