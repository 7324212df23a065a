//! Merging within experts: the neurons that a narrow expert loses, into those it keeps.

use tenp_checkpoint::{LayerPlan, OutputDtype, RewrittenLayer, Room};
use tenp_kernels::KernelError;
use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::cpu::segments::Segments;

use super::merge::{Merged, Points, merge};
use super::start::Start;
use super::{Dern, LayerOutcome, with_expert};
use crate::ModelError;
use crate::error::AtLayer;
use crate::weights::expert;

/// What became of an expert's lost neurons.
struct Folded {
    merged: Option<Merged>,
    moved: usize,
    discarded: usize,
}

impl Dern<'_> {
    /// Whole experts keep their bytes, and experts without a neuron have nothing to merge into.
    pub(super) fn fold(
        &self,
        plan: &LayerPlan,
        dtype: OutputDtype,
        room: &Room,
    ) -> Result<(RewrittenLayer, LayerOutcome), ModelError> {
        let layer = plan.layer;
        let config = self.checkpoint.config();
        let index = config.moe_index(layer).unwrap_or_default();
        let narrow = plan.experts.iter();
        let narrow = narrow.filter_map(|plan| Some((plan.id, plan.neurons.as_deref()?)));
        let mut outcome = LayerOutcome {
            layer,
            ..LayerOutcome::default()
        };
        let mut new = RewrittenLayer::default();
        for (id, kept) in narrow {
            let weights = expert(&self.checkpoint.expert(layer, id)?).at(layer)?;
            let start = Start::new(self.settings, index * config.moe.num_experts + id);
            let energies = self.settings.weights.get(index).map(|layer| &layer[id]);
            let weigh = |neuron: usize| energies.map_or(1.0, |energies| energies[neuron]);
            let folded = self.fold_expert(&weights, kept, &weigh, start).at(layer)?;
            outcome.moved += folded.moved;
            outcome.discarded += folded.discarded;
            if let Some(merged) = folded.merged {
                outcome.merged += 1;
                outcome.rounds = outcome.rounds.max(merged.rounds);
                let place = (layer, id);
                new.experts
                    .push(self.encode(room, place, (&merged.centres, dtype))?);
            }
        }
        Ok((new, outcome))
    }

    fn fold_expert(
        &self,
        weights: &ExpertWeights<'_>,
        kept: &[u32],
        weigh: &dyn Fn(usize) -> f32,
        start: Start,
    ) -> Result<Folded, KernelError> {
        let hidden = weights.gate.cols();
        let (stay, go): (Vec<usize>, Vec<usize>) =
            (0..weights.width()).partition(|&neuron| kept.binary_search(&(neuron as u32)).is_ok());
        let mut segments = Segments::new(hidden);
        segments.extend(weights, &stay)?;
        let mut lost = Segments::new(hidden);
        lost.extend(weights, &go)?;
        let matches = with_expert(&lost, |lost| {
            with_expert(&segments, |kept| {
                let (lost, kept) = ([*lost], [*kept]);
                self.comparing.best_matches(&lost, &kept, self.similarity())
            })
        })?;
        let mut points = Points {
            segments,
            weights: stay.iter().map(|&neuron| weigh(neuron)).collect(),
            flipped: vec![false; stay.len()],
            own: stay.len(),
        };
        for (neuron, found) in matches.iter().flatten().enumerate() {
            if let Some(found) = self.above_threshold(*found) {
                points.segments.push(lost.parts(neuron))?;
                points.weights.push(weigh(go[neuron]));
                points.flipped.push(found.flipped);
            }
        }
        let moved = points.weights.len() - stay.len();
        Ok(Folded {
            merged: merge(&*self.comparing, &points, self.settings.rounds, start)?,
            moved,
            discarded: go.len() - moved,
        })
    }
}
