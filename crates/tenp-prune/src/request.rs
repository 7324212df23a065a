//! What a caller may ask for, and what a method makes of it.

use std::collections::BTreeMap;

use serde::Serialize;
use tenp_checkpoint::plan::{Initialisation, MergeWeights, RouterRule, Scope};

use crate::allocate::{ErrorCurves, default_alpha};
use crate::{ErrorScale, ExpertScore, Method, NeuronScore, PruneError};

/// Slope s of the trapezoid when none is given (a choice of this project: the paper lists no layers).
pub const DEFAULT_SLOPE: f64 = 1.0 / 3.0;

/// λ of gate, up and down when none is given (arXiv 2509.10377).
pub const DEFAULT_LAMBDA: [f64; 3] = [0.0, 0.5, 0.5];
/// Threshold of DERN's similarity when none is given (arXiv 2509.10377).
pub const DEFAULT_THRESHOLD: f64 = 0.4;
/// The same within experts: whatever is alike at all is merged (a choice of this project, `docs/methods.md`).
pub const DEFAULT_THRESHOLD_WITHIN: f64 = 0.0;

/// How the budget is spread over layers and experts when experts become narrower.
#[derive(Clone, Debug, PartialEq)]
pub enum Allocation {
    /// Some experts stay whole, more of them in deeper layers; the others share the rest evenly (TENP).
    Trapezoid,
    /// One width for every expert.
    Uniform,
    /// The best neurons of the whole model, wherever they are.
    Global,
    /// The least measured error in all; the errors are there once they are measured.
    Sensitivity(Option<ErrorCurves>),
    /// Widths from a file, `[moe layer in depth order][expert]`.
    File(Vec<Vec<usize>>),
}

impl Allocation {
    /// The name on the command line (without the path of `file:`) and in `plan.json`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Trapezoid => "trapezoid",
            Self::Uniform => "uniform",
            Self::Global => "global",
            Self::Sensitivity(_) => "sensitivity",
            Self::File(_) => "file",
        }
    }
}

/// Everything that decides a plan, apart from the checkpoint and its statistics.
///
/// A method is a preset; `allocation`, `expert_score` and `neuron_score` override it where the method uses them.
#[derive(Clone, Debug, PartialEq)]
// Each is one flag of the command line, independent of the others.
#[allow(clippy::struct_excessive_bools)]
pub struct PlanRequest {
    /// The method.
    pub method: Method,
    /// Share ρ of the routed-expert neurons to keep (of the experts, for dropping methods), in (0, 1]. Not looked at
    /// with [`Allocation::File`].
    pub keep: f64,
    /// Share α of the experts that stay whole; default 5/9·ρ².
    pub alpha: Option<f64>,
    /// α (and the slope, where none is given) is chosen by trying; [`plan`](crate::plan()) takes the default until it is.
    pub search_alpha: bool,
    /// What was tried, for the record.
    pub alphas_tried: Vec<AlphaTried>,
    /// Slope s of the trapezoid in [−1, 1].
    pub slope: f64,
    /// Widths are multiples of this; default [`crate::allocate::default_quantum`].
    pub width_multiple: Option<usize>,
    /// Allocation other than the method's own.
    pub allocation: Option<Allocation>,
    /// Expert score other than the method's own.
    pub expert_score: Option<ExpertScore>,
    /// Neuron score other than the method's own.
    pub neuron_score: Option<NeuronScore>,
    /// Super experts (very large outputs) stay whole.
    pub protect_super: bool,
    /// Uniform allocation: meet the budget exactly, with widths that differ by one quantum.
    pub exact: bool,
    /// Global allocation: divide the scores by their layer's L2 norm first.
    pub normalise_layer: bool,
    /// Sensitivity allocation: what errors are relative to; default [`ErrorScale::None`].
    pub error_scale: Option<ErrorScale>,
    /// Divide each domain's vector of neuron scores of an expert by its L2 norm before adding the domains up.
    pub normalise_domains: bool,
    /// Weight of each domain; 1 where missing, and a domain of weight 0 is left out altogether.
    pub domain_weights: BTreeMap<String, f64>,
    /// Seed of the random scores, and of DERN's random start.
    pub seed: u64,
    /// Experts to keep in every layer, instead of round(ρN), for methods that drop experts.
    pub experts: Option<Vec<usize>>,
    /// How dropped experts are merged.
    pub dern: DernRequest,
}

/// A pair of α and slope, and what a plan made with it came to on held-out calibration text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AlphaTried {
    /// Share of whole experts.
    pub alpha: f64,
    /// Slope of the trapezoid.
    pub slope: f64,
    /// Negative log-likelihood, nats per token.
    pub nll: f64,
}

/// The pairs (α, slope) to try for a budget: multiples of the default α up to ρ, each with several slopes, or with the one
/// that is given. The default comes first.
pub fn alpha_candidates(keep: f64, slope: Option<f64>) -> Vec<(f64, f64)> {
    let slopes = slope.map_or_else(
        || vec![DEFAULT_SLOPE, 0.0, 2.0 / 3.0, 1.0, -DEFAULT_SLOPE],
        |slope| vec![slope],
    );
    let default = default_alpha(keep);
    let mut candidates = Vec::new();
    for factor in [1.0, 0.5, 1.5, 2.0, 2.5] {
        let alpha = factor * default;
        if alpha <= keep {
            candidates.extend(slopes.iter().map(|&slope| (alpha, slope)));
        }
    }
    // Without whole experts the slope decides nothing.
    candidates.push((0.0, slopes[0]));
    candidates
}

/// How [`Method::Dern`] merges dropped experts into the others, and [`Method::TenpDern`] dropped neurons into the others
/// of their expert; `None` everywhere is the method's own way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DernRequest {
    /// Weights of the cosines of gate row, up row and down column; default [`DEFAULT_LAMBDA`].
    pub lambda: Option<[f64; 3]>,
    /// Similarity above which a neuron moves; default [`DEFAULT_THRESHOLD`], or [`DEFAULT_THRESHOLD_WITHIN`].
    pub threshold: Option<f64>,
    /// What becomes of the kept router rows.
    pub router: Option<RouterRule>,
    /// Start of the k-means.
    pub initialisation: Option<Initialisation>,
    /// Weights of the means.
    pub merge_weights: Option<MergeWeights>,
    /// (up, w) and (−up, −w) count as the same neuron.
    pub sign_canonical: bool,
}

impl DernRequest {
    /// λ, the given one or the default.
    pub(crate) fn lambda(&self) -> [f64; 3] {
        self.lambda.unwrap_or(DEFAULT_LAMBDA)
    }

    /// The threshold, the given one or the method's.
    pub(crate) fn threshold(&self, method: Method) -> f64 {
        self.threshold.unwrap_or(match method {
            Method::TenpDern => DEFAULT_THRESHOLD_WITHIN,
            _ => DEFAULT_THRESHOLD,
        })
    }

    /// The start is by lot, so the seed decides something.
    pub(crate) fn starts_at_random(&self) -> bool {
        self.initialisation == Some(Initialisation::Random)
    }
}

impl Default for PlanRequest {
    fn default() -> Self {
        Self {
            method: Method::Tenp,
            keep: 0.6,
            alpha: None,
            search_alpha: false,
            alphas_tried: Vec::new(),
            slope: DEFAULT_SLOPE,
            width_multiple: None,
            allocation: None,
            expert_score: None,
            neuron_score: None,
            protect_super: false,
            exact: false,
            normalise_layer: false,
            error_scale: None,
            normalise_domains: false,
            domain_weights: BTreeMap::new(),
            seed: 0,
            experts: None,
            dern: DernRequest::default(),
        }
    }
}

/// How the budget is met, every option filled in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Target<'a> {
    Drop,
    Trapezoid {
        alpha: f64,
        slope: f64,
    },
    Uniform,
    /// The trapezoid's arithmetic with no whole expert.
    UniformExact,
    Global,
    Sensitivity(Option<&'a ErrorCurves>),
    File(&'a [Vec<usize>]),
}

/// A request after its checks: what the method and the options come to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice<'a> {
    pub(crate) target: Target<'a>,
    pub(crate) expert_score: ExpertScore,
    pub(crate) neuron_score: NeuronScore,
    /// What is dropped is merged into what stays.
    pub(crate) merges: Option<Scope>,
}

impl<'a> Choice<'a> {
    /// Fills in the method's defaults and refuses what is out of range or without effect.
    pub(crate) fn resolve(request: &'a PlanRequest) -> Result<Self, PruneError> {
        check_ranges(request)?;
        let preset = preset(request.method);
        let allocation = request.allocation.as_ref().or(preset.allocation);
        let target = match allocation {
            _ if preset.allocation.is_none() => Target::Drop,
            None | Some(Allocation::Trapezoid) => Target::Trapezoid {
                alpha: request.alpha.unwrap_or_else(|| default_alpha(request.keep)),
                slope: request.slope,
            },
            Some(Allocation::Uniform) if request.exact => Target::UniformExact,
            Some(Allocation::Uniform) => Target::Uniform,
            Some(Allocation::Global) => Target::Global,
            Some(Allocation::Sensitivity(curves)) => Target::Sensitivity(curves.as_ref()),
            Some(Allocation::File(widths)) => Target::File(widths),
        };
        let choice = Self {
            target,
            expert_score: request.expert_score.unwrap_or(preset.expert_score),
            neuron_score: request.neuron_score.unwrap_or(preset.neuron_score),
            merges: match request.method {
                Method::Dern => Some(Scope::Experts),
                Method::TenpDern => Some(Scope::Neurons),
                _ => None,
            },
        };
        choice.refuse_idle_options(request)?;
        Ok(choice)
    }

    /// The expert score decides something.
    pub(crate) fn uses_expert_score(&self) -> bool {
        matches!(
            self.target,
            Target::Drop | Target::Trapezoid { .. } | Target::UniformExact
        )
    }

    /// The neuron score decides something.
    pub(crate) fn uses_neuron_score(&self) -> bool {
        self.target != Target::Drop
    }

    /// A random score decides something, so the seed does too.
    pub(crate) fn uses_seed(&self) -> bool {
        self.uses_expert_score() && self.expert_score == ExpertScore::Random
            || self.uses_neuron_score() && self.neuron_score == NeuronScore::Random
    }

    fn refuse_idle_options(&self, request: &PlanRequest) -> Result<(), PruneError> {
        for (option, given) in given_options(request) {
            let (effective, needs) = self.effect(option);
            if given && !effective {
                return Err(PruneError::NoEffect {
                    option,
                    with: self.description(request),
                    needs,
                });
            }
        }
        Ok(())
    }

    /// Whether an option decides something here, and what it needs to do so.
    fn effect(&self, option: &str) -> (bool, &'static str) {
        let trapezoid = matches!(self.target, Target::Trapezoid { .. });
        let uniform = matches!(self.target, Target::Uniform | Target::UniformExact);
        let global = self.target == Target::Global;
        let sensitivity = matches!(self.target, Target::Sensitivity(_));
        let narrows = self.uses_neuron_score();
        match option {
            "--experts" => (!narrows, "a method that drops experts"),
            "--lambda" | "--threshold" | "--init" | "--merge-weights" | "--sign-canonical" => {
                (self.merges.is_some(), "--method dern or tenp+dern")
            }
            "--router" | "--merge-weights router" => {
                (self.merges == Some(Scope::Experts), "--method dern")
            }
            "--merge-weights energy" => (self.merges == Some(Scope::Neurons), "--method tenp+dern"),
            "--alpha" | "--slope" => (trapezoid, "--allocation trapezoid"),
            "--width-multiple" => (
                trapezoid || uniform || global || sensitivity,
                "--allocation trapezoid, uniform, global or sensitivity",
            ),
            "--exact" => (uniform, "--allocation uniform"),
            "--error-scale" => (sensitivity, "--allocation sensitivity"),
            "--normalise layer" => (global, "--allocation global"),
            "--normalise domains" => (
                narrows && !global && self.neuron_score.measured_on_text(),
                "a neuron score measured on the calibration text, and an allocation other than global",
            ),
            "--expert-score" => (
                self.uses_expert_score(),
                "--allocation trapezoid, uniform with --exact, or a method that drops experts",
            ),
            "--protect-super" => (
                self.uses_expert_score() || global || sensitivity,
                "widths that may differ: --allocation trapezoid, global or sensitivity, --exact, \
                 or a method that drops experts",
            ),
            _ => (narrows, "a method that narrows experts"),
        }
    }

    fn description(&self, request: &PlanRequest) -> String {
        match self.target.allocation_name() {
            None => format!("--method {}", request.method),
            Some(allocation) => format!("--method {} (allocation {allocation})", request.method),
        }
    }
}

impl Target<'_> {
    /// Name of the allocation, none where experts are dropped.
    pub(crate) const fn allocation_name(&self) -> Option<&'static str> {
        match self {
            Self::Drop => None,
            Self::Trapezoid { .. } => Some(Allocation::Trapezoid.name()),
            Self::Uniform | Self::UniformExact => Some(Allocation::Uniform.name()),
            Self::Global => Some(Allocation::Global.name()),
            Self::Sensitivity(_) => Some("sensitivity"),
            Self::File(_) => Some("file"),
        }
    }
}

/// Every option that some methods do not look at, and whether the request has it.
fn given_options(request: &PlanRequest) -> [(&'static str, bool); 20] {
    let dern = &request.dern;
    [
        ("--allocation", request.allocation.is_some()),
        ("--alpha", request.alpha.is_some() || request.search_alpha),
        ("--slope", request.slope != DEFAULT_SLOPE),
        ("--width-multiple", request.width_multiple.is_some()),
        ("--exact", request.exact),
        ("--error-scale", request.error_scale.is_some()),
        ("--normalise layer", request.normalise_layer),
        ("--normalise domains", request.normalise_domains),
        ("--expert-score", request.expert_score.is_some()),
        ("--neuron-score", request.neuron_score.is_some()),
        ("--protect-super", request.protect_super),
        ("--experts", request.experts.is_some()),
        ("--lambda", dern.lambda.is_some()),
        ("--threshold", dern.threshold.is_some()),
        ("--router", dern.router.is_some()),
        ("--init", dern.initialisation.is_some()),
        ("--merge-weights", dern.merge_weights.is_some()),
        (
            "--merge-weights router",
            dern.merge_weights == Some(MergeWeights::Router),
        ),
        (
            "--merge-weights energy",
            dern.merge_weights == Some(MergeWeights::Energy),
        ),
        ("--sign-canonical", dern.sign_canonical),
    ]
}

struct Preset {
    /// None: the method drops experts.
    allocation: Option<&'static Allocation>,
    expert_score: ExpertScore,
    neuron_score: NeuronScore,
}

fn preset(method: Method) -> Preset {
    let narrow = |allocation, neuron_score| Preset {
        allocation: Some(allocation),
        expert_score: ExpertScore::Direction,
        neuron_score,
    };
    let drop = |expert_score| Preset {
        allocation: None,
        expert_score,
        neuron_score: NeuronScore::Contribution,
    };
    match method {
        Method::Tenp | Method::TenpDern => {
            narrow(&Allocation::Trapezoid, NeuronScore::Contribution)
        }
        Method::Enp => narrow(&Allocation::Uniform, NeuronScore::Contribution),
        Method::RandomNeurons => narrow(&Allocation::Uniform, NeuronScore::Random),
        Method::Frequency => drop(ExpertScore::Frequency),
        Method::Gating => drop(ExpertScore::Gating),
        Method::Ean => drop(ExpertScore::Ean),
        Method::Reap => drop(ExpertScore::Reap),
        Method::Man => drop(ExpertScore::Man),
        Method::Msan => drop(ExpertScore::Msan),
        Method::EasyEp => drop(ExpertScore::EasyEp),
        Method::Dern => drop(ExpertScore::GatingShare),
        Method::RandomExperts => drop(ExpertScore::Random),
    }
}

fn check_ranges(request: &PlanRequest) -> Result<(), PruneError> {
    let keep = request.keep;
    if !(keep > 0.0 && keep <= 1.0) {
        return Err(PruneError::Keep { got: keep });
    }
    if let Some(alpha) = request.alpha
        && !(0.0..=keep).contains(&alpha)
    {
        return Err(PruneError::Alpha { got: alpha, keep });
    }
    if !(-1.0..=1.0).contains(&request.slope) {
        return Err(PruneError::Slope { got: request.slope });
    }
    check_dern(&request.dern, request.method)
}

/// The similarity lies in [−Σλ, Σλ]: a threshold outside [0, Σλ) would move everything, even what is opposite, or nothing.
fn check_dern(dern: &DernRequest, method: Method) -> Result<(), PruneError> {
    let lambda = dern.lambda();
    let largest: f64 = lambda.iter().sum();
    if lambda
        .iter()
        .any(|value| !value.is_finite() || *value < 0.0)
        || largest <= 0.0
    {
        return Err(PruneError::Lambda { got: lambda });
    }
    let got = dern.threshold(method);
    if !(got >= 0.0 && got < largest) {
        return Err(PruneError::Threshold { got, largest });
    }
    Ok(())
}
