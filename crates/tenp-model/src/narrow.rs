//! Narrowed experts in memory, to run a plan that is not written yet.

use tenp_checkpoint::{
    Checkpoint, ExpertPlan, ExpertTensors, LayerPlan, OutputDtype, OwnedMatrix, Part,
};

use crate::ModelError;

/// A narrowed expert in memory, as it will be written.
pub(crate) struct Narrow {
    gate: OwnedMatrix,
    up: OwnedMatrix,
    down: OwnedMatrix,
}

impl Narrow {
    /// The narrowed experts of a layer by id; `down` has new down projections of some.
    pub(crate) fn all<'d>(
        checkpoint: &Checkpoint,
        plan: &LayerPlan,
        dtype: OutputDtype,
        down: &dyn Fn(usize) -> Option<&'d OwnedMatrix>,
    ) -> Result<Vec<(usize, Self)>, ModelError> {
        let narrow = plan
            .experts
            .iter()
            .filter(|e| e.neurons.is_some() || e.width == 0);
        narrow
            .map(|expert| {
                let new = Self::new(checkpoint, plan.layer, expert, dtype, down(expert.id))?;
                Ok((expert.id, new))
            })
            .collect()
    }

    fn new(
        checkpoint: &Checkpoint,
        layer: usize,
        plan: &ExpertPlan,
        dtype: OutputDtype,
        down: Option<&OwnedMatrix>,
    ) -> Result<Self, ModelError> {
        let narrowed = |part| checkpoint.narrowed(layer, plan, part, plan.width, dtype);
        Ok(Self {
            gate: narrowed(Part::Gate)?,
            up: narrowed(Part::Up)?,
            down: match down {
                Some(down) => down.clone(),
                None => narrowed(Part::Down)?,
            },
        })
    }

    pub(crate) fn tensors(&self) -> ExpertTensors<'_> {
        ExpertTensors {
            gate: self.gate.view(),
            up: self.up.view(),
            down: self.down.view(),
        }
    }
}
