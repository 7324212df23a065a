//! Narrowed experts beside the checkpoint, to run a plan that is not written yet.

use tenp_checkpoint::{
    Checkpoint, ExpertPlan, ExpertTensors, LayerPlan, OutputDtype, Part, Room, StoredMatrix,
};

use crate::ModelError;

/// A narrowed expert, as it will be written.
pub(crate) struct Narrow<'d> {
    gate: StoredMatrix,
    up: StoredMatrix,
    down: Down<'d>,
}

enum Down<'d> {
    Cut(StoredMatrix),
    New(&'d StoredMatrix),
}

impl<'d> Narrow<'d> {
    /// The narrowed experts of a layer by id, made one after another and put into `room`; `down` has new down projections of
    /// some.
    pub(crate) fn all(
        checkpoint: &Checkpoint,
        plan: &LayerPlan,
        (dtype, room): (OutputDtype, &Room),
        down: &dyn Fn(usize) -> Option<&'d StoredMatrix>,
    ) -> Result<Vec<(usize, Self)>, ModelError> {
        let narrow = plan
            .experts
            .iter()
            .filter(|e| e.neurons.is_some() || e.width == 0);
        narrow
            .map(|expert| {
                let narrowed = |part| narrowed(checkpoint, (plan.layer, expert, part), dtype, room);
                let new = Self {
                    gate: narrowed(Part::Gate)?,
                    up: narrowed(Part::Up)?,
                    down: match down(expert.id) {
                        Some(new) => Down::New(new),
                        None => Down::Cut(narrowed(Part::Down)?),
                    },
                };
                Ok((expert.id, new))
            })
            .collect()
    }

    pub(crate) fn tensors(&self) -> ExpertTensors<'_> {
        ExpertTensors {
            gate: self.gate.view(),
            up: self.up.view(),
            down: match &self.down {
                Down::Cut(down) => down.view(),
                Down::New(down) => down.view(),
            },
        }
    }
}

fn narrowed(
    checkpoint: &Checkpoint,
    (layer, plan, part): (usize, &ExpertPlan, Part),
    dtype: OutputDtype,
    room: &Room,
) -> Result<StoredMatrix, ModelError> {
    let narrowed = checkpoint.narrowed(layer, plan, part, plan.width, dtype)?;
    Ok(room.keep(narrowed)?)
}
