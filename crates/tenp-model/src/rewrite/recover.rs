//! Least squares (`docs/methods.md`, "Recovery"): the down projection of a narrowed expert is fitted so that its output
//! stays close to the whole expert's, one layer at a time, on the calibration text.

mod held_out;
mod solve;

use std::error::Error;
use std::fmt::Write as _;

use rayon::prelude::*;
use serde_json::{Map, Value, json};
use tenp_checkpoint::{
    Checkpoint, ExpertPlan, ExpertTensors, LayerPlan, LayerRewriter, Notes, OutputDtype,
    RewrittenExpert, RewrittenLayer,
};

use super::encode::encode;
use crate::calibrate::tokens_fingerprint;
use crate::engine::Pass;
use crate::moments::{ExpertMoments, MomentsWanted};
use crate::narrow::Narrow;
use crate::{Model, ModelError, Sequences};
use held_out::held_out;
use solve::{Problem, Solution, solve};
pub(crate) use solve::{operations, rate};

/// How the fit is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoverOptions {
    /// A token counts by the square of its gate weight; otherwise all count the same.
    pub gated: bool,
    /// A layer is fitted on what it gets from the layers already pruned; otherwise on what the original gets.
    pub on_pruned: bool,
}

impl Default for RecoverOptions {
    fn default() -> Self {
        Self {
            gated: true,
            on_pruned: true,
        }
    }
}

/// Fits the down projections of narrowed experts.
pub struct LeastSquares<'c> {
    checkpoint: &'c Checkpoint,
    options: RecoverOptions,
    settings: String,
    pass: Box<dyn Pass + 'c>,
    /// By token: whether it only serves to choose the ridge.
    held: Vec<bool>,
    progress: Box<dyn Fn(usize) + Sync + 'c>,
}

/// How far the outputs of a layer's experts are from those of the whole experts.
#[derive(Clone, Debug, Default)]
struct LayerOutcome {
    layer: usize,
    /// Σ g²‖y‖² over all tokens and over those held out.
    outputs: [f64; 2],
    /// The same of the difference, cut and recovered.
    cut: [f64; 2],
    recovered: [f64; 2],
    experts: Vec<(usize, Option<f64>, bool)>,
}

impl<'c> LeastSquares<'c> {
    /// `progress` is told the tokens that have passed a layer, from any thread.
    ///
    /// # Errors
    /// Token ids or lengths that the model does not have, an unreadable embedding.
    pub fn new(
        model: &Model<'c>,
        sequences: &'c Sequences,
        options: RecoverOptions,
        progress: Box<dyn Fn(usize) + Sync + 'c>,
    ) -> Result<Self, ModelError> {
        let samples: Vec<Vec<u32>> = sequences
            .spans()
            .iter()
            .map(|span| sequences.ids()[span.rows.clone()].to_vec())
            .collect();
        let labels: Vec<usize> = sequences.spans().iter().map(|span| span.label).collect();
        Ok(Self {
            checkpoint: model.checkpoint(),
            options,
            settings: format!(
                "least-squares 1 {} {options:?} {labels:?} {}",
                model.arithmetic(),
                tokens_fingerprint(&samples)
            ),
            pass: model.pass(sequences, None)?,
            held: held_out(sequences),
            progress,
        })
    }

    fn rewrite(
        &mut self,
        plan: &LayerPlan,
        dtype: OutputDtype,
    ) -> Result<RewrittenLayer, ModelError> {
        let layer = plan.layer;
        self.reach(layer)?;
        let width = self.checkpoint.config().moe.expert_width;
        let narrow = |e: &ExpertPlan| e.width > 0 && e.width < width;
        let narrow: Vec<bool> = plan.experts.iter().map(narrow).collect();
        let moments = self.pass.moments(&MomentsWanted {
            experts: &narrow,
            width,
            held: &self.held,
            gated: self.options.gated,
            progress: &*self.progress,
        })?;
        let mut outputs = [0.0; 2];
        for expert in &moments {
            outputs[0] += expert.outputs[0] + expert.outputs[1];
            outputs[1] += expert.outputs[1];
        }
        let checkpoint = self.checkpoint;
        let solved: Vec<(usize, Solution)> = moments
            .into_par_iter()
            .enumerate()
            .filter(|(expert, _)| narrow[*expert])
            .map(|(expert, moments)| {
                let plan = &plan.experts[expert];
                Ok((expert, fit(checkpoint, layer, plan, &moments)?))
            })
            .collect::<Result<_, ModelError>>()?;
        let mut outcome = LayerOutcome {
            layer,
            outputs,
            ..LayerOutcome::default()
        };
        let mut new = RewrittenLayer::default();
        for (id, solution) in solved {
            for k in 0..2 {
                outcome.cut[k] += solution.cut[k];
                outcome.recovered[k] += solution.recovered[k];
            }
            outcome.experts.push((id, solution.ridge, solution.raised));
            let Some(down) = solution.down else {
                continue;
            };
            let old = self.checkpoint.expert(layer, id)?.down;
            let shape = (old.rows, plan.experts[id].width);
            new.experts.push(RewrittenExpert {
                id,
                down: Some(encode((layer, id), dtype.of(old.dtype), shape, &down)?),
                ..RewrittenExpert::default()
            });
        }
        new.outcome = outcome.json();
        self.pass_rewritten(plan, &new, dtype)?;
        Ok(new)
    }

    /// Runs all layers before this one.
    fn reach(&mut self, layer: usize) -> Result<(), ModelError> {
        while self.pass.layer() < layer {
            self.pass.step(&Passing(&*self.progress))?;
        }
        Ok(())
    }

    /// Runs the layer that was fitted, as the layers behind it are to see it.
    fn pass_rewritten(
        &mut self,
        plan: &LayerPlan,
        new: &RewrittenLayer,
        dtype: OutputDtype,
    ) -> Result<(), ModelError> {
        if self.options.on_pruned {
            self.step_pruned(plan, new, dtype)
        } else {
            self.pass.step(&()).map(drop)
        }
    }

    /// Runs the layer with its experts as they will be written.
    fn step_pruned(
        &mut self,
        plan: &LayerPlan,
        new: &RewrittenLayer,
        dtype: OutputDtype,
    ) -> Result<(), ModelError> {
        let down = |id| {
            let new = new.experts.iter().find(|n| n.id == id);
            new.and_then(|n| n.down.as_ref())
        };
        let narrow = Narrow::all(self.checkpoint, plan, dtype, &down)?;
        let experts: Vec<(usize, ExpertTensors<'_>)> = narrow
            .iter()
            .map(|(id, expert)| (*id, expert.tensors()))
            .collect();
        self.pass.step_with(&experts)?;
        self.checkpoint.release_layer(plan.layer);
        Ok(())
    }
}

fn fit(
    checkpoint: &Checkpoint,
    layer: usize,
    plan: &ExpertPlan,
    moments: &ExpertMoments,
) -> Result<Solution, ModelError> {
    let down = checkpoint.expert(layer, plan.id)?.down;
    Ok(solve(&Problem {
        moments,
        kept: plan.neurons.as_deref().unwrap_or_default(),
        down: &down.to_f32(),
        hidden: down.rows,
    }))
}

/// Tells only how far the pass is.
struct Passing<'a>(&'a (dyn Fn(usize) + Sync));

impl crate::Observer for Passing<'_> {
    fn progress(&self, _layer: usize, tokens: usize) {
        (self.0)(tokens);
    }
}

impl LayerOutcome {
    /// Relative errors cut and recovered: over all tokens, then over those held out.
    fn errors(&self) -> [[f64; 2]; 2] {
        let relative = |error: f64, k: usize| {
            if self.outputs[k] > 0.0 {
                (error.max(0.0) / self.outputs[k]).sqrt()
            } else {
                0.0
            }
        };
        [0, 1].map(|k| [relative(self.cut[k], k), relative(self.recovered[k], k)])
    }

    fn json(&self) -> Value {
        let [all, held] = self.errors();
        let experts = || self.experts.iter();
        json!({
            "layer": self.layer,
            "error_cut": all[0],
            "error_recovered": all[1],
            "held_out_error_cut": held[0],
            "held_out_error_recovered": held[1],
            "fitted": experts().filter(|e| e.1.is_some()).count(),
            "left_cut": experts().filter(|e| e.1.is_none()).map(|e| e.0).collect::<Vec<_>>(),
            "ridge_raised": experts().filter(|e| e.2).map(|e| e.0).collect::<Vec<_>>(),
            "ridges": experts().map(|e| json!([e.0, e.1])).collect::<Vec<_>>(),
        })
    }
}

impl LayerRewriter for LeastSquares<'_> {
    fn settings(&self) -> String {
        self.settings.clone()
    }

    fn layer(
        &mut self,
        layer: &LayerPlan,
        dtype: OutputDtype,
    ) -> Result<RewrittenLayer, Box<dyn Error + Send + Sync>> {
        Ok(self.rewrite(layer, dtype)?)
    }

    /// Only the fit is spared: what the layers behind get is run again.
    fn made_before(
        &mut self,
        layer: &LayerPlan,
        made: &RewrittenLayer,
        dtype: OutputDtype,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.reach(layer.layer)?;
        self.pass_rewritten(layer, made, dtype)?;
        (self.progress)(self.held.len());
        Ok(())
    }

    fn notes(&self, outcomes: &[Value]) -> Notes {
        let mut report = Map::new();
        report.insert(
            "recovery".to_owned(),
            json!({
                "method": "least-squares",
                "gates": if self.options.gated { "gated" } else { "ungated" },
                "inputs": if self.options.on_pruned { "pruned" } else { "original" },
                "layers": outcomes,
            }),
        );
        let mut card = "\n## Recovery\n\nThe down projections were fitted by least squares on the calibration text. Error of the \
             experts' outputs, relative to their size:\n\n| layer | cut | recovered | held-out text: cut | recovered |\n\
             |---:|---:|---:|---:|---:|\n"
            .to_owned();
        for outcome in outcomes {
            let error = |name: &str| outcome[name].as_f64().unwrap_or_default();
            // Writing to a String cannot fail.
            let _ = writeln!(
                card,
                "| {} | {:.3} | {:.3} | {:.3} | {:.3} |",
                outcome["layer"],
                error("error_cut"),
                error("error_recovered"),
                error("held_out_error_cut"),
                error("held_out_error_recovered")
            );
        }
        Notes { report, card }
    }
}
