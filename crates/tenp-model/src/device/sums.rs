//! Calibration sums of a layer while its blocks go through, by label.

use std::collections::BTreeMap;

use half::bf16;
use tenp_kernels::KernelError;
use tenp_kernels::cpu::neuron::NeuronSums;
use tenp_kernels::device::expert_sums::to_cpu_sums;
use tenp_kernels::device::segment_norms::{SegmentNorms, segment_norms};
use tenp_kernels::device::{Backend, DeviceSlice, Memory};
use tenp_kernels::params::{
    TENP_NUM_ACTIVATION_SUMS, TENP_NUM_CONTRIBUTION_SUMS, TENP_NUM_EXPERT_SUMS,
    TENP_SUM_ACTIVATION, TENP_SUM_CONTRIBUTION, TENP_SUM_CONTRIBUTION_ABS, TENP_SUM_GATED_ENERGY,
    TENP_SUM_GATED_PEAK, TENP_SUM_MEAN, TENP_SUM_SECOND_MOMENT,
};

use super::layer::Moe;
use super::zeros;
use crate::{BlockSums, WeightNorms};

/// Running sums of the tokens of one label.
pub(super) struct LabelSums<B: Backend> {
    /// `[TENP_NUM_EXPERT_SUMS, experts]`.
    pub(super) experts: B::Buffer<f64>,
    /// `[experts]`.
    pub(super) tokens: B::Buffer<i64>,
    /// `[experts]`.
    pub(super) non_finite: B::Buffer<i64>,
    /// `[TENP_NUM_ACTIVATION_SUMS, S]`.
    pub(super) activations: B::Buffer<f64>,
    /// `[TENP_NUM_CONTRIBUTION_SUMS, S]`.
    pub(super) contributions: B::Buffer<f64>,
    pub(super) num_tokens: usize,
}

/// Running sums of a layer.
pub(super) struct DeviceSums<B: Backend> {
    num_experts: usize,
    num_neurons: usize,
    labels: BTreeMap<usize, LabelSums<B>>,
    /// `[2S, pitch of h]` Gram matrices, where the contributions are made of them.
    gram: Option<B::Buffer<bf16>>,
}

impl<B: Backend> DeviceSums<B> {
    pub(super) fn new(moe: &Moe, gram: Option<B::Buffer<bf16>>) -> Self {
        Self {
            num_experts: moe.layout.num_experts(),
            num_neurons: moe.layout.total(),
            labels: BTreeMap::new(),
            gram,
        }
    }

    /// The sums of `label`, zeros at first, and the Gram matrices.
    #[allow(clippy::type_complexity, reason = "a part and what all parts share")]
    pub(super) fn label(
        &mut self,
        backend: &B,
        label: usize,
    ) -> Result<(&mut LabelSums<B>, Option<DeviceSlice<'_, bf16>>), KernelError> {
        let (experts, neurons) = (self.num_experts, self.num_neurons);
        if let std::collections::btree_map::Entry::Vacant(entry) = self.labels.entry(label) {
            entry.insert(LabelSums {
                experts: zeros(
                    backend,
                    "expert sums",
                    TENP_NUM_EXPERT_SUMS as usize * experts,
                )?,
                tokens: zeros(backend, "expert sums", experts)?,
                non_finite: zeros(backend, "expert sums", experts)?,
                activations: zeros(
                    backend,
                    "neuron sums",
                    TENP_NUM_ACTIVATION_SUMS as usize * neurons,
                )?,
                contributions: zeros(
                    backend,
                    "neuron sums",
                    TENP_NUM_CONTRIBUTION_SUMS as usize * neurons,
                )?,
                num_tokens: 0,
            });
        }
        let sums = self.labels.get_mut(&label).expect("just put there");
        Ok((sums, self.gram.as_ref().map(Memory::view)))
    }

    /// Copies everything back.
    pub(super) fn into_blocks(self, backend: &B, moe: &Moe) -> Result<Vec<BlockSums>, KernelError> {
        let labels = self.labels.into_iter();
        labels
            .map(|(label, sums)| {
                let experts = to_cpu_sums(
                    &downloaded(backend, sums.experts.view())?,
                    &downloaded(backend, sums.tokens.view())?,
                    &downloaded(backend, sums.non_finite.view())?,
                )?;
                let activations = downloaded(backend, sums.activations.view())?;
                let contributions = downloaded(backend, sums.contributions.view())?;
                let table = |all: &[f64], which: u32| {
                    let start = which as usize * self.num_neurons;
                    moe.layout.unpad(&all[start..start + self.num_neurons])
                };
                let mut neurons = NeuronSums::new(moe.widths.clone());
                neurons.contribution = table(&contributions, TENP_SUM_CONTRIBUTION)?;
                neurons.contribution_abs = table(&contributions, TENP_SUM_CONTRIBUTION_ABS)?;
                neurons.activation = table(&activations, TENP_SUM_ACTIVATION)?;
                neurons.gated_energy = table(&activations, TENP_SUM_GATED_ENERGY)?;
                neurons.gated_peak = table(&activations, TENP_SUM_GATED_PEAK)?;
                neurons.mean = table(&activations, TENP_SUM_MEAN)?;
                neurons.second_moment = table(&activations, TENP_SUM_SECOND_MOMENT)?;
                Ok(BlockSums {
                    label,
                    num_tokens: sums.num_tokens,
                    experts,
                    neurons,
                })
            })
            .collect()
    }
}

pub(super) fn downloaded<B: Backend, T: bytemuck::Pod>(
    backend: &B,
    from: DeviceSlice<'_, T>,
) -> Result<Vec<T>, KernelError> {
    let mut out = vec![T::zeroed(); from.len()];
    backend.read(from, &mut out)?;
    Ok(out)
}

impl Moe {
    /// Squared weight norms of the neurons.
    pub(super) fn weight_norms<B: Backend>(
        &self,
        backend: &B,
        arena: DeviceSlice<'_, u8>,
        hidden: usize,
    ) -> Result<WeightNorms, KernelError> {
        let neurons = self.layout.total();
        let mut squares = backend.alloc::<f64>("weight norms", 3 * neurons)?;
        backend.run(&segment_norms(SegmentNorms {
            gate_up: self.gate_up.of(arena)?,
            down_t: self.down_t.of(arena)?,
            squares: Some(squares.view_mut()),
            inverse: None,
            num_neurons: neurons,
            hidden,
        })?)?;
        let squares = downloaded(backend, squares.view())?;
        let part = |i: usize| self.layout.unpad(&squares[i * neurons..(i + 1) * neurons]);
        let (gate, up, down) = (part(0)?, part(1)?, part(2)?);
        let whole = gate.iter().zip(&up).zip(&down);
        Ok(WeightNorms {
            whole: whole.map(|((g, u), d)| g + u + d).collect(),
            down,
        })
    }
}
