//! The feed-forward block of a layer: dense, or routed experts with an optional shared one.

use tenp_checkpoint::config::{GroupScore, RouterScore};
use tenp_checkpoint::{Checkpoint, Part, dense};
use tenp_kernels::cpu::elementwise::{add, add_scaled};
use tenp_kernels::cpu::linear::{PackedRows, linear, linear_packed};
use tenp_kernels::cpu::moe::{ExpertActivations, ExpertWeights, combine, expert_forward};
use tenp_kernels::cpu::router::{GroupLimit, RouterSpec, Routing};
use tenp_kernels::{Compute, ExpertGroups, KernelError, MatrixView, RaggedLayout};

use crate::ModelError;
use crate::error::AtLayer;
use crate::weights::{expert, shared, view};

/// Runs a dense MLP layer on normed rows `x`; `activations` then hold its output.
pub(crate) fn dense_block(
    checkpoint: &Checkpoint,
    compute: Compute,
    layer: usize,
    x: &[f32],
    activations: &mut ExpertActivations,
) -> Result<(), ModelError> {
    let (hidden, width) = (
        checkpoint.config().hidden_size,
        checkpoint.config().dense_width,
    );
    let matrix = |part, rows, cols| checkpoint.matrix(&dense(layer, part), rows, cols);
    let weights = ExpertWeights {
        gate: view(&matrix(Part::Gate, width, hidden)?).at(layer)?,
        up: view(&matrix(Part::Up, width, hidden)?).at(layer)?,
        down: view(&matrix(Part::Down, hidden, width)?).at(layer)?,
    };
    let groups = ExpertGroups::dense(x.len() / hidden);
    expert_forward(compute, &[weights], &groups, x, activations).at(layer)
}

/// A MoE layer's weights, looked up once per layer.
pub(crate) struct MoeWeights<'a> {
    layer: usize,
    hidden: usize,
    pub(crate) experts: Vec<ExpertWeights<'a>>,
    pub(crate) router: MatrixView<'a>,
    pub(crate) spec: RouterSpec,
    /// The expert, and what its gate is made with.
    pub(crate) shared: Option<(ExpertWeights<'a>, Option<MatrixView<'a>>)>,
}

/// What the routed part of a block computed; `activations` still holds the expert outputs.
pub(crate) struct RoutedOutput {
    pub(crate) routing: Routing,
    pub(crate) groups: ExpertGroups,
}

impl<'a> MoeWeights<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, layer: usize) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        let router = checkpoint.router(layer)?;
        let settings = &config.moe.router;
        let spec = RouterSpec {
            num_experts: router.weight.rows,
            top_k: config.moe.top_k,
            sigmoid: settings.score == RouterScore::Sigmoid,
            correction_bias: router.correction_bias,
            groups: settings.groups.map(|g| GroupLimit {
                num_groups: g.num_groups,
                top_groups: g.top_groups,
                top_two_sum: g.score == GroupScore::TopTwoSum,
            }),
            normalise: settings.normalise,
            scaling: settings.scaling as f32,
        };
        spec.check().at(layer)?;
        let experts = (0..spec.num_experts)
            .map(|e| expert(&checkpoint.expert(layer, e)?).at(layer))
            .collect::<Result<_, ModelError>>()?;
        let shared = match checkpoint.shared_expert(layer)? {
            None => None,
            Some(tensors) => {
                let gate = tensors
                    .gate_weight
                    .as_ref()
                    .map(view)
                    .transpose()
                    .at(layer)?;
                Some((shared(&tensors).at(layer)?, gate))
            }
        };
        Ok(Self {
            layer,
            hidden: config.hidden_size,
            experts,
            router: view(&router.weight).at(layer)?,
            spec,
            shared,
        })
    }

    /// Widths of the routed experts.
    pub(crate) fn layout(&self) -> Result<RaggedLayout, KernelError> {
        RaggedLayout::new(self.experts.iter().map(ExpertWeights::width).collect())
    }

    /// Routes normed rows `x` and runs the routed experts on them; `combined` becomes Σ g y, `[tokens, H]`.
    pub(crate) fn routed(
        &self,
        compute: Compute,
        x: &[f32],
        packed: &mut PackedRows,
        activations: &mut ExpertActivations,
        combined: &mut [f32],
    ) -> Result<RoutedOutput, ModelError> {
        let tokens = x.len() / self.hidden;
        let mut logits = vec![0.0; tokens * self.spec.num_experts];
        // Router arithmetic is f32 in every family, whatever the compute type.
        packed
            .pack(Compute::F32, x, self.hidden, self.hidden)
            .at(self.layer)?;
        linear_packed(packed, &self.router, None, &mut logits).at(self.layer)?;
        let routing = self.spec.route(&mut logits).at(self.layer)?;
        let groups = ExpertGroups::new(
            self.spec.num_experts,
            self.spec.top_k,
            &routing.expert_ids,
            &routing.weights,
        )
        .at(self.layer)?;
        expert_forward(compute, &self.experts, &groups, x, activations).at(self.layer)?;
        combine(&groups, activations.outputs(), self.hidden, combined).at(self.layer)?;
        Ok(RoutedOutput { routing, groups })
    }

    /// Adds the shared expert's output to `out`; overwrites `activations`.
    pub(crate) fn add_shared(
        &self,
        compute: Compute,
        x: &[f32],
        activations: &mut ExpertActivations,
        out: &mut [f32],
    ) -> Result<(), ModelError> {
        let Some((weights, gate)) = &self.shared else {
            return Ok(());
        };
        let tokens = x.len() / self.hidden;
        expert_forward(
            compute,
            &[*weights],
            &ExpertGroups::dense(tokens),
            x,
            activations,
        )
        .at(self.layer)?;
        let Some(gate) = gate else {
            add(out, activations.outputs());
            return Ok(());
        };
        let mut gates = vec![0.0; tokens];
        linear(compute, x, gate, None, &mut gates).at(self.layer)?;
        let rows = activations.outputs().chunks_exact(self.hidden);
        for ((out, y), logit) in out.chunks_exact_mut(self.hidden).zip(rows).zip(gates) {
            add_scaled(out, y, 1.0 / (1.0 + (-logit).exp()));
        }
        Ok(())
    }
}
