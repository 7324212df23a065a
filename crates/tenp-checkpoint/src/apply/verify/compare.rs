//! One tensor of an output against its recipe.

use crate::apply::gather::{Receiver, Source};
use crate::apply::layout::Recipe;
use crate::names::Part;
use crate::plan::{LayerPlan, Plan, RouterRule, Scope};
use crate::{Checkpoint, CheckpointError, Dtype, TensorView, holds_nan};

/// Values that are looked at at once.
const CHUNK_VALUES: usize = 1 << 16;

/// Which weights of an output were computed, and so cannot be made again from the input.
pub(super) struct Computed<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) plan: &'a Plan,
    /// Down projections of narrowed experts were.
    pub(super) recovered: bool,
}

impl Computed<'_> {
    fn holds(&self, recipe: &Recipe<'_>) -> bool {
        match recipe {
            Recipe::Scales(of, _) => self.holds(of),
            Recipe::Expert {
                layer, plan, part, ..
            } => {
                // Layers for multi-token prediction are copied whatever becomes of the others.
                let own = self.plan.layers.iter().find(|own| own.layer == *layer);
                own.is_some_and(|layer| {
                    let narrow = plan.neurons.is_some();
                    match self.plan.dern.as_ref().map(|dern| dern.scope) {
                        Some(Scope::Experts) if drops(layer) => true,
                        Some(Scope::Neurons) if narrow => true,
                        _ => self.recovered && narrow && *part == Part::Down,
                    }
                })
            }
            Recipe::KeptExperts(tensor, layer) => {
                let router = self.checkpoint.spelling().router(layer.layer);
                let dern = self.plan.dern.as_ref();
                let merged = dern.is_some_and(|dern| dern.router == RouterRule::Transfer);
                let own = self.plan.layers.iter().any(|own| own.layer == layer.layer);
                merged && own && drops(layer) && tensor.name == router
            }
            _ => false,
        }
    }
}

fn drops(layer: &LayerPlan) -> bool {
    layer.kept().count() < layer.experts.len()
}

/// What came of the check of a tensor.
#[derive(Default)]
pub(super) struct Checked {
    pub(super) bytes_compared: u64,
    /// Some of it could not be compared.
    pub(super) computed: bool,
    pub(super) problem: Option<String>,
}

/// A tensor of the right type and shape.
pub(super) struct Tensor<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
    position: usize,
    checked: Checked,
}

impl<'a> Tensor<'a> {
    pub(super) fn of(dtype: Dtype, bytes: &'a [u8]) -> Self {
        Self {
            dtype,
            bytes,
            position: 0,
            checked: Checked::default(),
        }
    }

    /// Checks the tensor up to its first difference.
    pub(super) fn check<'c>(
        mut self,
        recipe: &Recipe<'c>,
        source: &mut Source<'c>,
        computed: &Computed<'_>,
    ) -> Result<Checked, CheckpointError> {
        let experts = recipe.experts().count();
        if experts == 0 {
            self.part(recipe, self.bytes.len(), source, computed)?;
        }
        for expert in recipe.experts() {
            self.part(&expert, self.bytes.len() / experts, source, computed)?;
        }
        Ok(self.checked)
    }

    fn part<'c>(
        &mut self,
        recipe: &Recipe<'c>,
        length: usize,
        source: &mut Source<'c>,
        computed: &Computed<'_>,
    ) -> Result<(), CheckpointError> {
        if self.checked.problem.is_some() {
            return Ok(());
        }
        if !computed.holds(recipe) {
            return source.make(recipe, self);
        }
        self.checked.computed = true;
        let part = &self.bytes[self.position..self.position + length];
        if !is_finite(self.dtype, part) {
            let problem = "holds a value that is not finite among its computed weights";
            self.checked.problem = Some(problem.to_owned());
        }
        self.position += length;
        Ok(())
    }

    fn compare(&mut self, expected: &[u8]) {
        if self.checked.problem.is_some() {
            return;
        }
        let own = self.bytes[self.position..].get(..expected.len());
        if own != Some(expected) {
            let own = own.unwrap_or_default().iter();
            let same = own.zip(expected).take_while(|(a, b)| a == b).count();
            self.checked.problem =
                Some(format!("differs from its byte {} on", self.position + same));
        }
        self.position += expected.len();
        self.checked.bytes_compared += expected.len() as u64;
    }
}

impl<'c> Receiver<'c> for Tensor<'_> {
    fn take(&mut self, bytes: Vec<u8>) -> Result<(), CheckpointError> {
        self.compare(&bytes);
        Ok(())
    }

    fn take_tensor(&mut self, tensor: TensorView<'c>) -> Result<(), CheckpointError> {
        self.compare(tensor.bytes);
        Ok(())
    }
}

fn is_finite(dtype: Dtype, bytes: &[u8]) -> bool {
    if dtype == Dtype::F8E4M3 {
        return !holds_nan(bytes);
    }
    let mut values = vec![0.0; CHUNK_VALUES];
    bytes.chunks(CHUNK_VALUES * dtype.size()).all(|chunk| {
        let values = &mut values[..chunk.len() / dtype.size()];
        dtype.widen(chunk, values) && values.iter().all(|value| value.is_finite())
    })
}
