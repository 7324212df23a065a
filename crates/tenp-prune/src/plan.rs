//! From statistics and a request to a plan.

mod sensitivity;

use tenp_checkpoint::config::ModelConfig;
use tenp_checkpoint::plan::{
    Dern, ExpertPlan, Initialisation, LayerPlan, MergeWeights, Plan, RouterRule, Scope,
};
use tenp_checkpoint::statistics::Statistics;

use crate::accounting::{ModelSize, accounting};
use crate::allocate::{
    KeptExperts, budget, divided, global_widths, kept_count, kept_experts, quantum,
    trapezoid_widths, uniform_width, whole_experts, whole_experts_per_layer,
};
use crate::calibration::Calibration;
use crate::record;
use crate::request::{Choice, PlanRequest, Target};
use crate::score::{
    NeuronScoring, best_neurons, expert_neuron_scores, expert_scores, global_scores, super_experts,
    uncalibrated,
};
use crate::{ExpertScore, NeuronScore, PruneError};
pub(crate) use sensitivity::Sensitivity;
pub use sensitivity::neuron_orders;

/// Rounds of DERN's k-means, at most.
const DERN_ROUNDS: usize = 30;

/// Decides which experts and neurons of a checkpoint stay.
///
/// `fingerprint` is the checkpoint's own and must be the one the statistics were collected on. Same arguments, same
/// plan.
///
/// # Errors
/// Options out of range or without effect for the method; statistics of another checkpoint, incomplete or not finite;
/// a checkpoint that is already pruned; budgets that leave nothing, or less than the guarded experts need; a router
/// that could no longer choose its top-k.
pub fn plan(
    config: &ModelConfig,
    size: &ModelSize,
    fingerprint: &str,
    statistics: &Statistics,
    request: &PlanRequest,
) -> Result<Plan, PruneError> {
    let choice = Choice::resolve(request)?;
    let calibration = Calibration::new(
        config,
        fingerprint,
        statistics,
        &request.domain_weights,
        &choice.tables(),
    )?;
    let planner = Planner::new(&calibration, request, choice);
    let decision = planner.decide(config)?;
    let layers = planner.layers(&decision.widths);
    Ok(Plan {
        format: "tenp-plan".to_owned(),
        version: 1,
        method: request.method.name().to_owned(),
        options: record::options(&calibration, request, &choice, &decision, &planner.guarded),
        fingerprint: fingerprint.to_owned(),
        accounting: accounting(&calibration, size, &layers),
        dern: choice.merges.map(|scope| planner.dern(scope, &layers)),
        layers,
        uncalibrated: positions(&uncalibrated(&calibration), calibration.layer_ids()),
    })
}

/// What was decided, and the values that decided it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Decision {
    pub(crate) widths: Vec<Vec<usize>>,
    pub(crate) quantum: Option<usize>,
    /// Experts kept whole in each layer before narrow ones that came out at full width.
    pub(crate) whole_experts: Option<Vec<usize>>,
    /// Experts kept in each layer.
    pub(crate) kept: Option<Vec<usize>>,
    pub(crate) sensitivity: Option<Sensitivity>,
}

/// `[model layer, expert]` of every true entry.
pub(crate) fn positions(marked: &[Vec<bool>], layer_ids: &[usize]) -> Vec<(usize, usize)> {
    let mut positions = Vec::new();
    for (experts, &layer) in marked.iter().zip(layer_ids) {
        positions.extend(
            experts
                .iter()
                .enumerate()
                .filter(|(_, marked)| **marked)
                .map(|(expert, _)| (layer, expert)),
        );
    }
    positions
}

struct Planner<'a> {
    calibration: &'a Calibration<'a>,
    request: &'a PlanRequest,
    choice: Choice<'a>,
    guarded: Vec<Vec<bool>>,
}

impl<'a> Planner<'a> {
    fn new(calibration: &'a Calibration<'a>, request: &'a PlanRequest, choice: Choice<'a>) -> Self {
        let shape = calibration.shape();
        let guarded = if request.protect_super {
            super_experts(calibration)
        } else {
            vec![vec![false; shape.num_experts]; shape.num_layers]
        };
        Self {
            calibration,
            request,
            choice,
            guarded,
        }
    }

    fn decide(&self, config: &ModelConfig) -> Result<Decision, PruneError> {
        match self.choice.target {
            Target::Drop => self.drop_experts(config),
            Target::Trapezoid { alpha, slope } => self.trapezoid(alpha, slope),
            Target::UniformExact => self.trapezoid(0.0, 0.0),
            Target::Uniform => self.uniform(),
            Target::Global => self.global(),
            Target::Sensitivity(curves) => self.sensitivity(curves),
            Target::File(widths) => self.widths_given(widths),
        }
    }

    fn expert_scores(&self) -> Vec<Vec<f64>> {
        expert_scores(
            self.calibration,
            self.choice.expert_score,
            self.request.seed,
        )
    }

    /// What the merging needs to know.
    fn dern(&self, scope: Scope, layers: &[LayerPlan]) -> Dern {
        let asked = &self.request.dern;
        let within = scope == Scope::Neurons;
        let (router, weights, start) = if within {
            (RouterRule::Keep, MergeWeights::Energy, Initialisation::Kept)
        } else {
            Default::default()
        };
        let merge_weights = asked.merge_weights.unwrap_or(weights);
        Dern {
            scope,
            lambda: asked.lambda(),
            threshold: asked.threshold(self.request.method),
            sign_canonical: asked.sign_canonical,
            router: asked.router.unwrap_or(router),
            initialisation: asked.initialisation.unwrap_or(start),
            seed: asked.starts_at_random().then_some(self.request.seed),
            merge_weights,
            rounds: DERN_ROUNDS,
            scores: if within {
                Vec::new()
            } else {
                self.router_shares()
            },
            weights: if merge_weights == MergeWeights::Energy {
                self.energies(layers)
            } else {
                Vec::new()
            },
        }
    }

    /// What the neurons of narrow experts weigh where those are merged.
    fn energies(&self, layers: &[LayerPlan]) -> Vec<Vec<Vec<f32>>> {
        let scoring = NeuronScoring {
            score: NeuronScore::Energy,
            ..self.neuron_scoring()
        };
        let of = |layer: usize, expert: &ExpertPlan| {
            if expert.neurons.is_none() {
                return Vec::new();
            }
            let energies = expert_neuron_scores(self.calibration, layer, expert.id, scoring);
            let largest = energies.iter().copied().fold(0.0, f64::max);
            let share = |&energy: &f64| divided(energy, largest) as f32;
            energies.iter().map(share).collect()
        };
        let layers = layers.iter().enumerate();
        layers
            .map(|(index, layer)| layer.experts.iter().map(|e| of(index, e)).collect())
            .collect()
    }

    /// S of every expert.
    fn router_shares(&self) -> Vec<Vec<f64>> {
        // One domain's scores add up to 1 as they are; merged ones are scaled to, so that they read the same.
        let share = |scores: Vec<f64>| {
            let sum: f64 = scores.iter().sum();
            scores.iter().map(|&score| divided(score, sum)).collect()
        };
        let scores = expert_scores(self.calibration, ExpertScore::GatingShare, 0);
        scores.into_iter().map(share).collect()
    }

    fn neuron_scoring(&self) -> NeuronScoring {
        NeuronScoring {
            score: self.choice.neuron_score,
            normalise_domains: self.request.normalise_domains,
            seed: self.request.seed,
        }
    }

    fn drop_experts(&self, config: &ModelConfig) -> Result<Decision, PruneError> {
        let kept = self.kept_experts(config)?;
        let width = self.calibration.shape().expert_width;
        let mut widths = Vec::new();
        let layers = self
            .expert_scores()
            .into_iter()
            .zip(&self.guarded)
            .zip(self.calibration.layer_ids())
            .zip(&kept);
        for (((scores, guarded), &layer), kept) in layers {
            let selected = kept.select(&scores, guarded);
            if let Some(expert) =
                (0..selected.len()).find(|&expert| guarded[expert] && !selected[expert])
            {
                return Err(PruneError::GuardedDropped {
                    layer,
                    expert,
                    kept: kept.per_layer(),
                });
            }
            widths.push(
                selected
                    .into_iter()
                    .map(|kept| if kept { width } else { 0 })
                    .collect(),
            );
        }
        Ok(Decision {
            widths,
            kept: Some(kept.iter().map(KeptExperts::per_layer).collect()),
            ..Decision::default()
        })
    }

    /// Of every layer.
    fn kept_experts(&self, config: &ModelConfig) -> Result<Vec<KeptExperts>, PruneError> {
        let layers = self.calibration.layer_ids();
        let counts = match self.request.experts.as_deref() {
            None => {
                let kept = kept_experts(&config.moe, self.request.keep)?;
                return Ok(vec![kept; layers.len()]);
            }
            Some(&[count]) => return Ok(vec![kept_count(&config.moe, count)?; layers.len()]),
            Some(counts) => counts,
        };
        if counts.len() != layers.len() {
            return Err(PruneError::ExpertLayers {
                expected: layers.len(),
                got: counts.len(),
            });
        }
        let of = |(&count, &layer): (&usize, &usize)| {
            kept_count(&config.moe, count).map_err(|error| match error {
                PruneError::Experts {
                    got,
                    problem,
                    possible,
                } => PruneError::Experts {
                    got,
                    problem: format!("for layer {layer}: {problem}"),
                    possible,
                },
                other => other,
            })
        };
        counts.iter().zip(layers).map(of).collect()
    }

    fn trapezoid(&self, alpha: f64, slope: f64) -> Result<Decision, PruneError> {
        let shape = self.calibration.shape();
        let (quantum, budget) = self.budget()?;
        let whole = whole_experts(shape, budget, alpha);
        let per_layer: Vec<usize> = whole_experts_per_layer(shape, whole, alpha, slope)
            .into_iter()
            .zip(&self.guarded)
            .map(|(whole, guarded)| whole.max(guarded.iter().filter(|&&guarded| guarded).count()))
            .collect();
        let widths = trapezoid_widths(
            shape,
            quantum,
            budget,
            &per_layer,
            &self.expert_scores(),
            &self.guarded,
        )?;
        Ok(Decision {
            widths,
            quantum: Some(quantum),
            whole_experts: Some(per_layer),
            ..Decision::default()
        })
    }

    fn uniform(&self) -> Result<Decision, PruneError> {
        let shape = self.calibration.shape();
        let quantum = quantum(self.request.width_multiple, shape.expert_width)?;
        let width = uniform_width(shape.expert_width, quantum, self.request.keep);
        if width == 0 {
            return Err(PruneError::EmptyBudget {
                keep: self.request.keep,
                quantum,
            });
        }
        let widths = vec![vec![width; shape.num_experts]; shape.num_layers];
        Ok(Decision {
            widths,
            quantum: Some(quantum),
            ..Decision::default()
        })
    }

    fn global(&self) -> Result<Decision, PruneError> {
        let (quantum, budget) = self.budget()?;
        let scores = global_scores(
            self.calibration,
            self.neuron_scoring(),
            self.request.normalise_layer,
        );
        let widths = global_widths(
            self.calibration.shape(),
            quantum,
            budget,
            &scores,
            &self.guarded,
        )?;
        Ok(Decision {
            widths,
            quantum: Some(quantum),
            ..Decision::default()
        })
    }

    fn widths_given(&self, widths: &[Vec<usize>]) -> Result<Decision, PruneError> {
        let shape = self.calibration.shape();
        if widths.len() != shape.num_layers {
            return Err(PruneError::WidthLayers {
                expected: shape.num_layers,
                got: widths.len(),
            });
        }
        for (experts, &layer) in widths.iter().zip(self.calibration.layer_ids()) {
            if experts.len() != shape.num_experts {
                return Err(PruneError::WidthExperts {
                    layer,
                    expected: shape.num_experts,
                    got: experts.len(),
                });
            }
            if let Some(expert) = experts.iter().position(|&width| width > shape.expert_width) {
                let (expected, got) = (shape.expert_width, experts[expert]);
                return Err(PruneError::WidthTooLarge {
                    layer,
                    expert,
                    expected,
                    got,
                });
            }
        }
        Ok(Decision {
            widths: widths.to_vec(),
            ..Decision::default()
        })
    }

    fn budget(&self) -> Result<(usize, usize), PruneError> {
        let shape = self.calibration.shape();
        let quantum = quantum(self.request.width_multiple, shape.expert_width)?;
        match budget(shape, quantum, self.request.keep) {
            0 => Err(PruneError::EmptyBudget {
                keep: self.request.keep,
                quantum,
            }),
            budget => Ok((quantum, budget)),
        }
    }

    fn layers(&self, widths: &[Vec<usize>]) -> Vec<LayerPlan> {
        let expert = |layer, id, width| self.expert(layer, id, width);
        widths
            .iter()
            .zip(self.calibration.layer_ids())
            .enumerate()
            .map(|(position, (widths, &layer))| LayerPlan {
                layer,
                experts: widths
                    .iter()
                    .enumerate()
                    .map(|(id, &width)| expert(position, id, width))
                    .collect(),
            })
            .collect()
    }

    fn expert(&self, layer: usize, id: usize, width: usize) -> ExpertPlan {
        let whole = width == self.calibration.shape().expert_width;
        let drops = self.choice.target == Target::Drop;
        let neurons = (!whole && !drops).then(|| {
            let scores = expert_neuron_scores(self.calibration, layer, id, self.neuron_scoring());
            best_neurons(&scores, width)
        });
        ExpertPlan {
            id,
            width,
            neurons,
            dropped: drops && !whole,
        }
    }
}
