//! Least squares (`docs/methods.md`, "Recovery"): the down projection of a narrowed expert is fitted so that its output
//! stays close to the whole expert's, one layer at a time, on the calibration text.

mod held_out;
mod solve;

use std::error::Error;
use std::fmt::Write as _;

use rayon::prelude::*;
use serde_json::{Map, Value, json};
use tenp_checkpoint::{
    Checkpoint, ExpertPlan, ExpertTensors, LayerPlan, LayerRewriter, ModelConfig, Notes,
    OutputDtype, RewrittenExpert, RewrittenLayer, Room, StoredMatrix,
};

use super::encode::encode;
use crate::calibrate::tokens_fingerprint;
use crate::engine::Pass;
use crate::moments::{self, ExpertMoments, MomentsWanted};
use crate::narrow::Narrow;
use crate::{Model, ModelError, Sequences};
use held_out::held_out;
use solve::{Problem, held_bytes, solve};
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

/// Second moments that are held at once. A layer of DeepSeek-V3 has 17 GB of them: it is run once more for each further part.
const MOMENT_BYTES: usize = 2 << 30;

/// Fits that are made at once may take this much memory.
const FIT_BYTES: usize = 1 << 30;

/// Fits the down projections of narrowed experts.
pub struct LeastSquares<'c> {
    checkpoint: &'c Checkpoint,
    options: RecoverOptions,
    settings: String,
    pass: Box<dyn Pass + 'c>,
    /// By token: whether it only serves to choose the ridge.
    held: Vec<bool>,
    progress: Box<dyn Fn(usize) + Sync + 'c>,
    moment_bytes: usize,
}

/// What became of an expert.
struct Fitted {
    id: usize,
    /// Absent where cutting alone is best.
    down: Option<StoredMatrix>,
    ridge: Option<f64>,
    raised: bool,
    cut: [f64; 2],
    recovered: [f64; 2],
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
            moment_bytes: MOMENT_BYTES,
        })
    }

    /// Holds this many bytes of second moments at once, or those of one expert; a layer runs the more often the fewer. The
    /// fit does not depend on it.
    #[must_use]
    pub fn holding(self, moment_bytes: usize) -> Self {
        Self {
            moment_bytes,
            ..self
        }
    }

    fn rewrite(
        &mut self,
        plan: &LayerPlan,
        dtype: OutputDtype,
        room: &Room,
    ) -> Result<RewrittenLayer, ModelError> {
        let layer = plan.layer;
        self.reach(layer)?;
        let width = self.checkpoint.config().moe.expert_width;
        let narrow = |e: &ExpertPlan| e.width > 0 && e.width < width;
        let narrow: Vec<bool> = plan.experts.iter().map(narrow).collect();
        let (outputs, fitted) = self.fit_in_parts(plan, &narrow, (dtype, room))?;
        let mut outcome = LayerOutcome {
            layer,
            outputs,
            ..LayerOutcome::default()
        };
        let mut new = RewrittenLayer::default();
        for fitted in fitted {
            for k in 0..2 {
                outcome.cut[k] += fitted.cut[k];
                outcome.recovered[k] += fitted.recovered[k];
            }
            let id = fitted.id;
            outcome.experts.push((id, fitted.ridge, fitted.raised));
            if fitted.down.is_some() {
                new.experts.push(RewrittenExpert {
                    id,
                    down: fitted.down,
                    ..RewrittenExpert::default()
                });
            }
        }
        new.outcome = outcome.json();
        self.pass_rewritten(plan, &new, (dtype, room))?;
        Ok(new)
    }

    /// Fits the narrow experts of the next layer, as many at a time as their moments allow. Σ g²‖y‖² of all experts, over all
    /// tokens and over those held out, and the fits by id.
    fn fit_in_parts(
        &mut self,
        plan: &LayerPlan,
        narrow: &[bool],
        new: (OutputDtype, &Room),
    ) -> Result<([f64; 2], Vec<Fitted>), ModelError> {
        let checkpoint = self.checkpoint;
        let width = checkpoint.config().moe.expert_width;
        let (at_once, _) = fits_at_once(checkpoint.config(), plan);
        // Threads that take the next expert when they are free need no groups.
        let group = if at_once < rayon::current_num_threads() {
            at_once
        } else {
            usize::MAX
        };
        let (mut outputs, mut fitted) = ([0.0; 2], Vec::new());
        for (part, experts) in parts(narrow, moments::bytes(width), self.moment_bytes)
            .iter()
            .enumerate()
        {
            // The tokens pass the layer once, as far as anybody is told.
            let silent: &(dyn Fn(usize) + Sync) = &|_| ();
            let moments = self.pass.moments(&MomentsWanted {
                experts,
                width,
                held: &self.held,
                gated: self.options.gated,
                progress: if part == 0 { &*self.progress } else { silent },
            })?;
            if part == 0 {
                for expert in &moments {
                    outputs[0] += expert.outputs[0] + expert.outputs[1];
                    outputs[1] += expert.outputs[1];
                }
            }
            let mut wanted =
                (plan.experts.iter().zip(moments)).filter(|(plan, _)| experts[plan.id]);
            loop {
                let group: Vec<_> = wanted.by_ref().take(group).collect();
                if group.is_empty() {
                    break;
                }
                let fits = group
                    .into_par_iter()
                    .map(|(expert, moments)| fit(checkpoint, (plan.layer, expert), &moments, new));
                fitted.extend(fits.collect::<Result<Vec<_>, ModelError>>()?);
            }
        }
        Ok((outputs, fitted))
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
        stored: (OutputDtype, &Room),
    ) -> Result<(), ModelError> {
        if self.options.on_pruned {
            self.step_pruned(plan, new, stored)
        } else {
            self.pass.step(&()).map(drop)
        }
    }

    /// Runs the layer with its experts as they will be written.
    fn step_pruned(
        &mut self,
        plan: &LayerPlan,
        new: &RewrittenLayer,
        stored: (OutputDtype, &Room),
    ) -> Result<(), ModelError> {
        let down = |id| {
            let new = new.experts.iter().find(|n| n.id == id);
            new.and_then(|n| n.down.as_ref())
        };
        let narrow = Narrow::all(self.checkpoint, plan, stored, &down)?;
        let experts: Vec<(usize, ExpertTensors<'_>)> = narrow
            .iter()
            .map(|(id, expert)| (*id, expert.tensors()))
            .collect();
        self.pass.step_with(&experts)?;
        self.checkpoint.release_layer(plan.layer);
        Ok(())
    }
}

/// The marked experts in parts of at most `most` bytes of moments, or of one expert; one part where none is marked, as the
/// outputs of the layer are wanted in any case.
fn parts(marked: &[bool], bytes: usize, most: usize) -> Vec<Vec<bool>> {
    let ids: Vec<usize> = (0..marked.len()).filter(|&id| marked[id]).collect();
    let per_part = (most / bytes.max(1)).max(1);
    let part = |ids: &[usize]| (0..marked.len()).map(|id| ids.contains(&id)).collect();
    if ids.is_empty() {
        return vec![part(&[])];
    }
    ids.chunks(per_part).map(part).collect()
}

/// Bytes of the moments of `experts` experts that are held at once.
pub(crate) fn held_moments(experts: usize, width: usize) -> usize {
    let bytes = moments::bytes(width);
    bytes * experts.min((MOMENT_BYTES / bytes.max(1)).max(1))
}

/// How often a layer with `experts` experts to fit is run for its moments.
pub(crate) fn runs_for_moments(experts: usize, width: usize) -> usize {
    let bytes = moments::bytes(width);
    experts
        .div_ceil((MOMENT_BYTES / bytes.max(1)).max(1))
        .max(1)
}

/// Fits of a layer that are made at once, as many as there are threads where their memory allows it, and their bytes.
pub(crate) fn fits_at_once(config: &ModelConfig, plan: &LayerPlan) -> (usize, usize) {
    let (hidden, width) = (config.hidden_size, config.moe.expert_width);
    let narrow = plan.experts.iter().map(|expert| expert.width);
    let each = narrow.filter(|kept| (1..width).contains(kept));
    let each = each.map(|kept| held_bytes(hidden, width, kept)).max();
    let each = each.unwrap_or(0);
    let fits = (FIT_BYTES / each.max(1)).clamp(1, rayon::current_num_threads());
    (fits, fits * each)
}

fn fit(
    checkpoint: &Checkpoint,
    (layer, plan): (usize, &ExpertPlan),
    moments: &ExpertMoments,
    (dtype, room): (OutputDtype, &Room),
) -> Result<Fitted, ModelError> {
    checkpoint.check_stop()?;
    let old = checkpoint.expert(layer, plan.id)?.down;
    let solution = solve(&Problem {
        moments,
        kept: plan.neurons.as_deref().unwrap_or_default(),
        down: &old.to_f32(),
        hidden: old.rows,
    });
    let (place, shape) = ((layer, plan.id), (old.rows, plan.width));
    let encoded = |down: Vec<f32>| encode(room, place, dtype.of(old.dtype), shape, &down);
    Ok(Fitted {
        id: plan.id,
        down: solution.down.map(encoded).transpose()?,
        ridge: solution.ridge,
        raised: solution.raised,
        cut: solution.cut,
        recovered: solution.recovered,
    })
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
        room: &Room,
    ) -> Result<RewrittenLayer, Box<dyn Error + Send + Sync>> {
        Ok(self.rewrite(layer, dtype, room)?)
    }

    /// Only the fit is spared: what the layers behind get is run again.
    fn made_before(
        &mut self,
        layer: &LayerPlan,
        made: &RewrittenLayer,
        dtype: OutputDtype,
        room: &Room,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.reach(layer.layer)?;
        self.pass_rewritten(layer, made, (dtype, room))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_come_in_parts_that_fit() {
        let marked = [true, false, true, true];
        assert_eq!(parts(&marked, 10, 100), [marked]);
        let two = [[true, false, true, false], [false, false, false, true]];
        assert_eq!(parts(&marked, 10, 29), two);
        assert_eq!(parts(&marked, 10, 1).len(), 3);
        assert_eq!(parts(&[false; 2], 10, 100), [[false; 2]]);
        // DeepSeek-V3: 2 · 8 · 2048² bytes an expert.
        assert_eq!(runs_for_moments(256, 2048), 8);
        assert_eq!(held_moments(256, 2048), 32 * 16 * 2048 * 2048);
        assert_eq!((runs_for_moments(0, 96), held_moments(3, 1)), (1, 48));
    }
}
