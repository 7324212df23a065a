//! Narrowed experts in memory, to run a plan that is not written yet.

use tenp_checkpoint::{Checkpoint, ExpertPlan, ExpertTensors, LayerPlan, Matrix};

use crate::ModelError;

/// A narrowed expert in memory.
pub(crate) struct Narrow<'a> {
    old: ExpertTensors<'a>,
    width: usize,
    gate: Vec<u8>,
    up: Vec<u8>,
    down: Vec<u8>,
}

impl<'a> Narrow<'a> {
    /// The narrowed experts of a layer by id; `down` has new down projections of some.
    pub(crate) fn all<'d>(
        checkpoint: &'a Checkpoint,
        plan: &LayerPlan,
        down: &dyn Fn(usize) -> Option<&'d [u8]>,
    ) -> Result<Vec<(usize, Self)>, ModelError> {
        let narrow = plan
            .experts
            .iter()
            .filter(|e| e.neurons.is_some() || e.width == 0);
        narrow
            .map(|expert| {
                let old = checkpoint.expert(plan.layer, expert.id)?;
                Ok((expert.id, Self::new(&old, expert, down(expert.id))))
            })
            .collect()
    }

    fn new(old: &ExpertTensors<'a>, plan: &ExpertPlan, down: Option<&[u8]>) -> Self {
        let kept = plan.neurons.as_deref().unwrap_or_default();
        let rows = |matrix: &Matrix<'_>| -> Vec<u8> {
            kept.iter()
                .flat_map(|&id| matrix.row(id as usize))
                .copied()
                .collect()
        };
        let cut = |matrix: &Matrix<'_>| -> Vec<u8> {
            let size = matrix.dtype.size();
            let row = |r: usize| {
                let row = matrix.row(r);
                kept.iter()
                    .flat_map(move |&id| &row[id as usize * size..][..size])
            };
            (0..matrix.rows).flat_map(row).copied().collect()
        };
        Self {
            old: *old,
            width: kept.len(),
            gate: rows(&old.gate),
            up: rows(&old.up),
            down: down.map_or_else(|| cut(&old.down), <[u8]>::to_vec),
        }
    }

    pub(crate) fn tensors(&self) -> ExpertTensors<'_> {
        let (width, hidden) = (self.width, self.old.down.rows);
        let matrix = |old: &Matrix<'_>, rows, cols, bytes| Matrix {
            dtype: old.dtype,
            rows,
            cols,
            bytes,
        };
        ExpertTensors {
            gate: matrix(&self.old.gate, width, hidden, &self.gate),
            up: matrix(&self.old.up, width, hidden, &self.up),
            down: matrix(&self.old.down, hidden, width, &self.down),
        }
    }
}
