//! DERN (arXiv 2509.10377, `docs/methods.md`): neurons of dropped experts are reassigned to the kept experts that they are
//! most alike, and each kept expert's neurons are merged back to its width. Or the same within each narrow expert.

mod clusters;
mod compare;
mod merge;
mod start;
mod within;

use std::error::Error;

use serde_json::{Map, Value, json};
use tenp_checkpoint::plan::{self, MergeWeights, RouterRule, Scope};
use tenp_checkpoint::{
    Checkpoint, Dtype, LayerPlan, LayerRewriter, Matrix, Notes, OutputDtype, Plan, RewrittenExpert,
    RewrittenLayer, Room,
};
use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::cpu::segments::{Match, Segments, Similarity};
use tenp_kernels::device::Backend;
use tenp_kernels::{Compute, KernelError, MatrixView};

use super::encode::encode;
use crate::ModelError;
use crate::error::AtLayer;
use crate::weights::expert;
use compare::{Comparing, OnCpu, OnDevice};
use merge::{Points, merge};
use start::Start;

/// Merges what a plan drops.
pub struct Dern<'c> {
    checkpoint: &'c Checkpoint,
    settings: &'c plan::Dern,
    comparing: Box<dyn Comparing + 'c>,
    progress: Box<dyn Fn(usize) + 'c>,
}

/// What happened to a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct LayerOutcome {
    layer: usize,
    moved: usize,
    discarded: usize,
    /// Experts with new neurons.
    merged: usize,
    /// Rounds of the longest k-means.
    rounds: usize,
}

impl LayerOutcome {
    fn json(&self) -> Value {
        json!({
            "layer": self.layer,
            "moved": self.moved,
            "discarded": self.discarded,
            "merged_experts": self.merged,
            "rounds": self.rounds,
        })
    }
}

/// A dropped expert's neuron at a kept expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Received {
    expert: usize,
    neuron: usize,
    flipped: bool,
}

/// Where the dropped experts' neurons go.
struct Reassigned {
    /// By kept expert, in order.
    received: Vec<Vec<Received>>,
    discarded: usize,
}

impl<'c> Dern<'c> {
    /// The rewriter of a plan that merges, on the CPU; `None` for one that does not.
    ///
    /// `progress` is told each layer when it is done.
    pub fn new(
        checkpoint: &'c Checkpoint,
        plan: &'c Plan,
        compute: Compute,
        progress: Box<dyn Fn(usize) + 'c>,
    ) -> Option<Self> {
        Self::comparing(checkpoint, plan, Box::new(OnCpu(compute)), progress)
    }

    /// The same where `backend`'s kernels compare the neurons and assign them to the centres, in bf16 with sums in f32.
    /// The centres themselves are means of the weights as they are stored, as on the CPU.
    pub fn on<B: Backend + 'c>(
        checkpoint: &'c Checkpoint,
        plan: &'c Plan,
        backend: B,
        progress: Box<dyn Fn(usize) + 'c>,
    ) -> Option<Self> {
        Self::comparing(checkpoint, plan, Box::new(OnDevice(backend)), progress)
    }

    fn comparing(
        checkpoint: &'c Checkpoint,
        plan: &'c Plan,
        comparing: Box<dyn Comparing + 'c>,
        progress: Box<dyn Fn(usize) + 'c>,
    ) -> Option<Self> {
        Some(Self {
            checkpoint,
            settings: plan.dern.as_ref()?,
            comparing,
            progress,
        })
    }

    fn rewrite(
        &self,
        plan: &LayerPlan,
        dtype: OutputDtype,
        room: &Room,
    ) -> Result<RewrittenLayer, ModelError> {
        let (mut new, outcome) = match self.settings.scope {
            Scope::Experts => self.merge_dropped(plan, dtype, room)?,
            Scope::Neurons => self.fold(plan, dtype, room)?,
        };
        new.outcome = outcome.json();
        (self.progress)(plan.layer);
        Ok(new)
    }

    fn merge_dropped(
        &self,
        plan: &LayerPlan,
        dtype: OutputDtype,
        room: &Room,
    ) -> Result<(RewrittenLayer, LayerOutcome), ModelError> {
        let layer = plan.layer;
        let config = self.checkpoint.config();
        let experts = (0..config.moe.num_experts)
            .map(|e| expert(&self.checkpoint.expert(layer, e)?).at(layer))
            .collect::<Result<Vec<_>, ModelError>>()?;
        let kept: Vec<usize> = plan.kept().map(|expert| expert.id).collect();
        let reassigned = self.reassign(layer, &experts, &kept)?;
        let index = config.moe_index(layer).unwrap_or_default();
        let mut outcome = LayerOutcome {
            layer,
            moved: reassigned.received.iter().map(Vec::len).sum(),
            discarded: reassigned.discarded,
            ..LayerOutcome::default()
        };
        let mut new = RewrittenLayer::default();
        for (&id, received) in kept.iter().zip(&reassigned.received) {
            let start = Start::new(self.settings, index * config.moe.num_experts + id);
            let points = self.points((index, id), &experts, received).at(layer)?;
            let Some(merged) =
                merge(&*self.comparing, &points, self.settings.rounds, start).at(layer)?
            else {
                continue;
            };
            outcome.merged += 1;
            outcome.rounds = outcome.rounds.max(merged.rounds);
            let place = (layer, id);
            new.experts
                .push(self.encode(room, place, (&merged.centres, dtype))?);
        }
        if self.settings.router == RouterRule::Transfer && outcome.moved > 0 {
            new.router = Some(self.router(layer, &kept, &reassigned)?);
        }
        Ok((new, outcome))
    }

    fn similarity(&self) -> Similarity {
        let [lambda_gate, lambda_up, lambda_down] = self.settings.lambda.map(|l| l as f32);
        Similarity {
            lambda_gate,
            lambda_up,
            lambda_down,
            sign_canonical: self.settings.sign_canonical,
        }
    }

    /// The match that a neuron moves to, if it moves.
    fn above_threshold(&self, found: Option<Match>) -> Option<Match> {
        found.filter(|m| f64::from(m.value) > self.settings.threshold)
    }

    /// All segments of dropped experts are compared with all kept ones.
    fn reassign(
        &self,
        layer: usize,
        experts: &[ExpertWeights<'_>],
        kept: &[usize],
    ) -> Result<Reassigned, ModelError> {
        let kept_weights: Vec<_> = kept.iter().map(|&e| experts[e]).collect();
        let dropped: Vec<usize> = (0..experts.len()).filter(|e| !kept.contains(e)).collect();
        let rows: Vec<_> = dropped.iter().map(|&e| experts[e]).collect();
        let matches = self
            .comparing
            .best_matches(&rows, &kept_weights, self.similarity());
        let mut reassigned = Reassigned {
            received: vec![Vec::new(); kept.len()],
            discarded: 0,
        };
        for (expert, matches) in dropped.into_iter().zip(matches.at(layer)?) {
            for (neuron, found) in matches.into_iter().enumerate() {
                match self.above_threshold(found) {
                    Some(found) => reassigned.received[found.expert].push(Received {
                        expert,
                        neuron,
                        flipped: found.flipped,
                    }),
                    None => reassigned.discarded += 1,
                }
            }
        }
        Ok(reassigned)
    }

    /// A kept expert's own neurons, then those it received.
    fn points(
        &self,
        (index, id): (usize, usize),
        experts: &[ExpertWeights<'_>],
        received: &[Received],
    ) -> Result<Points, tenp_kernels::KernelError> {
        let weight = |expert: usize| match self.settings.merge_weights {
            MergeWeights::Router => self.settings.scores[index][expert] as f32,
            MergeWeights::Uniform | MergeWeights::Energy => 1.0,
        };
        let own = experts[id].width();
        if received.is_empty() {
            return Ok(Points::default());
        }
        let mut points = Points {
            segments: Segments::of_expert(&experts[id])?,
            weights: vec![weight(id); own],
            flipped: vec![false; own],
            own,
        };
        for run in received.chunk_by(|a, b| a.expert == b.expert) {
            let neurons: Vec<usize> = run.iter().map(|r| r.neuron).collect();
            points.segments.extend(&experts[run[0].expert], &neurons)?;
            for received in run {
                points.weights.push(weight(received.expert));
                points.flipped.push(received.flipped);
            }
        }
        Ok(points)
    }

    fn encode(
        &self,
        room: &Room,
        (layer, id): (usize, usize),
        (neurons, dtype): (&Segments, OutputDtype),
    ) -> Result<RewrittenExpert, ModelError> {
        let old = self.checkpoint.expert(layer, id)?;
        let [gate, up, down] = tables(neurons);
        let (width, hidden) = (neurons.len(), neurons.hidden());
        let new = |old: Dtype, shape, values: &[f32]| {
            encode(room, (layer, id), dtype.of(old), shape, values).map(Some)
        };
        Ok(RewrittenExpert {
            id,
            gate: new(old.gate.dtype, (width, hidden), &gate)?,
            up: new(old.up.dtype, (width, hidden), &up)?,
            down: new(old.down.dtype, (hidden, width), &down)?,
        })
    }

    /// `row_r += Σ_e (moved_{e→r} / K) · row_e`, dropped rows gone. Rows that gain nothing keep their bytes.
    fn router(
        &self,
        layer: usize,
        kept: &[usize],
        reassigned: &Reassigned,
    ) -> Result<Vec<u8>, ModelError> {
        let router: Matrix<'_> = self.checkpoint.router(layer)?.weight;
        let (values, hidden) = (router.to_f32(), router.cols);
        let width = self.checkpoint.config().moe.expert_width as f64;
        let mut bytes = Vec::with_capacity(kept.len() * router.row(0).len());
        for (&id, received) in kept.iter().zip(&reassigned.received) {
            if received.is_empty() {
                bytes.extend_from_slice(router.row(id));
                continue;
            }
            let own = &values[id * hidden..(id + 1) * hidden];
            let mut sums: Vec<f64> = own.iter().map(|v| f64::from(*v)).collect();
            for run in received.chunk_by(|a, b| a.expert == b.expert) {
                let share = run.len() as f64 / width;
                let row = &values[run[0].expert * hidden..][..hidden];
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += share * f64::from(*value);
                }
            }
            let sums: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
            // A router is never fp8, so rounding cannot fail.
            bytes.extend(router.dtype.narrow(&sums).unwrap_or_default());
        }
        Ok(bytes)
    }
}

/// Gate, up and down as an expert of these neurons has them.
fn tables(neurons: &Segments) -> [Vec<f32>; 3] {
    let (width, hidden) = (neurons.len(), neurons.hidden());
    let mut tables = [0; 3].map(|_| Vec::with_capacity(width * hidden));
    for neuron in 0..width {
        for (table, part) in tables.iter_mut().zip(neurons.parts(neuron)) {
            table.extend_from_slice(part);
        }
    }
    let [gate, up, columns] = tables;
    let mut down = vec![0f32; width * hidden];
    for (neuron, column) in columns.chunks_exact(hidden).enumerate() {
        for (row, value) in column.iter().enumerate() {
            down[row * width + neuron] = *value;
        }
    }
    [gate, up, down]
}

/// Hands `work` an expert of these neurons.
fn with_expert<R>(
    neurons: &Segments,
    work: impl FnOnce(&ExpertWeights<'_>) -> Result<R, KernelError>,
) -> Result<R, KernelError> {
    let (width, hidden) = (neurons.len(), neurons.hidden());
    let [gate, up, down] = tables(neurons);
    work(&ExpertWeights {
        gate: MatrixView::from_f32(width, hidden, &gate)?,
        up: MatrixView::from_f32(width, hidden, &up)?,
        down: MatrixView::from_f32(hidden, width, &down)?,
    })
}

impl LayerRewriter for Dern<'_> {
    fn settings(&self) -> String {
        format!("dern 1 {}", self.comparing.name())
    }

    fn layer(
        &mut self,
        layer: &LayerPlan,
        dtype: OutputDtype,
        room: &Room,
    ) -> Result<RewrittenLayer, Box<dyn Error + Send + Sync>> {
        Ok(self.rewrite(layer, dtype, room)?)
    }

    fn made_before(
        &mut self,
        layer: &LayerPlan,
        _made: &RewrittenLayer,
        _dtype: OutputDtype,
        _room: &Room,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        (self.progress)(layer.layer);
        Ok(())
    }

    fn notes(&self, outcomes: &[Value]) -> Notes {
        let sum = |of: &str| outcomes.iter().filter_map(|l| l[of].as_u64()).sum::<u64>();
        let (moved, discarded) = (sum("moved"), sum("discarded"));
        let mut report = Map::new();
        let value = json!({"moved": moved, "discarded": discarded, "layers": outcomes});
        report.insert("dern".to_owned(), value);
        let (of, into) = match self.settings.scope {
            Scope::Experts => ("neurons of dropped experts", "kept experts"),
            Scope::Neurons => ("dropped neurons", "kept neurons of their experts"),
        };
        let card = format!(
            "\nOf {} {of}, {moved} were merged into {into} and {discarded} were discarded.\n",
            moved + discarded
        );
        Notes { report, card }
    }
}
