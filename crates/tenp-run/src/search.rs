//! What is measured on calibration text before a plan is made.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;

use anyhow::Result;
use tenp_checkpoint::{Checkpoint, ModelConfig, Statistics};
use tenp_model::candidates::plan_nlls;
use tenp_model::sensitivity::{Cuts, cut_errors};
use tenp_model::{Sequences, Spill};
use tenp_prune::allocate::{ErrorCurves, measured_widths, quantum};
use tenp_prune::{
    Allocation, AlphaTried, DEFAULT_SLOPE, PlanRequest, alpha_candidates, neuron_orders,
};

use crate::commands::calibrate;
use crate::failure::usage;
use crate::models::{self, Domains};
use crate::place::Place;
use crate::progress::{Progress, Unit};
use crate::{recovery, requests};

/// Calibration text at hand, and what was measured on it so far.
pub(crate) struct Search<'a> {
    checkpoint: &'a Checkpoint,
    domains: &'a Domains,
    place: Place,
    /// Of what should not be in memory.
    spill: Spill,
    /// Names of the tables of statistics that plans are made from.
    tables: Vec<&'static str>,
    /// By what they depend on, as plans of several budgets share them.
    curves: RefCell<BTreeMap<String, ErrorCurves>>,
    /// Of the samples that α is not tried on.
    fitted: OnceCell<Statistics>,
}

/// Whether a plan needs text to measure on.
pub(crate) fn measures(request: &PlanRequest) -> bool {
    measures_errors(request) || request.search_alpha
}

fn measures_errors(request: &PlanRequest) -> bool {
    matches!(request.allocation, Some(Allocation::Sensitivity(_)))
}

/// Refuses text that is too little to hold some out, before any work.
pub(crate) fn check(request: &PlanRequest, domains: &Domains) -> Result<()> {
    let weight = |name: &str| request.domain_weights.get(name).copied().unwrap_or(1.0);
    let short = domains
        .iter()
        .find(|(name, samples)| weight(name) > 0.0 && samples.len() < 2);
    match short.filter(|_| request.search_alpha) {
        None => Ok(()),
        Some((name, _)) => Err(usage(format!(
            "--alpha search: domain {name} has one sample; some are held out to try on, so give at least two"
        ))),
    }
}

/// Samples to plan from, and those to try plans on: every fourth, or the last of fewer.
pub(crate) fn split(domains: &Domains) -> (Domains, Domains) {
    let part = |held: bool| {
        let domain = |(name, samples): &(String, Vec<Vec<u32>>)| {
            let is_held = |i: usize| i % 4 == 3 || (samples.len() < 4 && i + 1 == samples.len());
            let chosen = samples.iter().enumerate();
            let chosen = chosen.filter(|(i, _)| is_held(*i) == held);
            (name.clone(), chosen.map(|(_, s)| s.clone()).collect())
        };
        domains.iter().map(domain).collect()
    };
    (part(false), part(true))
}

/// The request with errors of 0 in place of those that are to be measured.
pub(crate) fn rehearsed(request: &PlanRequest, config: &ModelConfig) -> Result<PlanRequest> {
    let mut request = request.clone();
    if measures_errors(&request) {
        let moe = &config.moe;
        let quantum = quantum(request.width_multiple, moe.expert_width)?;
        let widths = measured_widths(moe.expert_width, quantum);
        let layers = config.moe_layers.len();
        request.allocation = Some(Allocation::Sensitivity(Some(ErrorCurves {
            errors: vec![vec![vec![0.0; widths.len()]; moe.num_experts]; layers],
            residuals: vec![0.0; layers],
            widths,
        })));
    }
    Ok(request)
}

/// What the errors of cuts depend on: the budget and the scale have no part in them.
pub(crate) fn curves_key(config: &ModelConfig, request: &PlanRequest) -> Result<String> {
    let width = config.moe.expert_width;
    let widths = measured_widths(width, quantum(request.width_multiple, width)?);
    Ok(format!(
        "{:?}",
        (
            widths,
            request.method,
            request.neuron_score,
            request.normalise_domains,
            &request.domain_weights,
            request.seed
        )
    ))
}

/// The samples of the domains that count, and the weight of each label.
fn weighted(domains: &Domains, request: &PlanRequest) -> (Sequences, Vec<f64>) {
    let sequences = recovery::sequences(domains, &request.domain_weights);
    let weight = |name: &String| request.domain_weights.get(name).copied().unwrap_or(1.0);
    let weights = domains.iter().map(|(name, _)| weight(name));
    (sequences, weights.filter(|&w| w != 0.0).collect())
}

impl<'a> Search<'a> {
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        domains: &'a Domains,
        place: &Place,
        (spill, tables): (Spill, Vec<&'static str>),
    ) -> Self {
        Self {
            checkpoint,
            domains,
            place: place.clone(),
            spill,
            tables,
            curves: RefCell::default(),
            fitted: OnceCell::new(),
        }
    }

    /// The request with everything measured that it asks for.
    pub(crate) fn settle(
        &self,
        statistics: &Statistics,
        request: &PlanRequest,
    ) -> Result<PlanRequest> {
        let mut request = request.clone();
        if request.search_alpha {
            self.choose_alpha(&mut request)?;
        }
        if measures_errors(&request) {
            let curves = self.curves(statistics, &request)?;
            request.allocation = Some(Allocation::Sensitivity(Some(curves)));
        }
        Ok(request)
    }

    /// Takes α and slope of the plan that predicts the held-out samples best; of equals, the first tried.
    fn choose_alpha(&self, request: &mut PlanRequest) -> Result<()> {
        check(request, self.domains)?;
        let (fit, held) = split(self.domains);
        let statistics = if let Some(fitted) = self.fitted.get() {
            fitted
        } else {
            let mut fitted = calibrate::run_domains(self.checkpoint, &fit, &self.place)?;
            fitted.keep_tables(&self.tables);
            self.fitted.get_or_init(|| fitted)
        };
        request.search_alpha = false;
        let slope = (request.slope != DEFAULT_SLOPE).then_some(request.slope);
        let candidates = alpha_candidates(request.keep, slope);
        let plans = candidates
            .iter()
            .map(|&(alpha, slope)| {
                let tried = PlanRequest {
                    alpha: Some(alpha),
                    slope,
                    ..request.clone()
                };
                requests::plan(self.checkpoint, statistics, &tried)
            })
            .collect::<Result<Vec<_>>>()?;
        let (sequences, weights) = weighted(&held, request);
        let layers = self.checkpoint.config().num_layers;
        let total = (plans.len() * layers) as u64;
        let progress = Progress::new("try α", Unit::Layers, total, 1);
        let nlls = plan_nlls(
            self.checkpoint,
            (self.place.cpu_compute(), &self.spill),
            &plans,
            (&sequences, &weights),
            &|| progress.advance(1),
        )?;
        progress.finish();
        let tried = candidates.iter().zip(nlls);
        request.alphas_tried = tried
            .map(|(&(alpha, slope), nll)| AlphaTried { alpha, slope, nll })
            .collect();
        let best = request.alphas_tried.iter();
        if let Some(best) = best.min_by(|a, b| a.nll.total_cmp(&b.nll)).copied() {
            (request.alpha, request.slope) = (Some(best.alpha), best.slope);
        }
        Ok(())
    }

    fn curves(&self, statistics: &Statistics, request: &PlanRequest) -> Result<ErrorCurves> {
        let config = self.checkpoint.config();
        let width = config.moe.expert_width;
        let widths = measured_widths(width, quantum(request.width_multiple, width)?);
        let key = curves_key(config, request)?;
        if let Some(curves) = self.curves.borrow().get(&key) {
            return Ok(curves.clone());
        }
        let fingerprint = self.checkpoint.fingerprint();
        let orders = neuron_orders(config, fingerprint, statistics, request)?;
        let (sequences, weights) = weighted(self.domains, request);
        let total = models::num_tokens(self.domains) * config.num_layers;
        let label = "measure errors";
        let progress = Progress::new(label, Unit::Tokens, total as u64, config.num_layers);
        let cuts = Cuts {
            widths: &widths,
            orders: &orders,
            weights: &weights,
        };
        let measured = cut_errors(
            self.checkpoint,
            (self.place.cpu_compute(), &self.spill),
            &sequences,
            cuts,
            &|tokens| progress.advance(tokens as u64),
        )?;
        progress.finish();
        let curves = ErrorCurves {
            widths,
            errors: measured.errors,
            residuals: measured.residuals,
        };
        self.curves.borrow_mut().insert(key, curves.clone());
        Ok(curves)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_the_samples_is_held_out() {
        let ids = |samples: &Domains| -> Vec<Vec<u32>> {
            let ids = |s: &Vec<Vec<u32>>| s.iter().map(|s| s[0]).collect();
            samples.iter().map(|(_, s)| ids(s)).collect()
        };
        let domain = |n: u32| (n.to_string(), (0..n).map(|i| vec![i]).collect());
        let (fit, held) = split(&vec![domain(9), domain(2), domain(3)]);
        assert_eq!(ids(&held), [vec![3, 7], vec![1], vec![2]]);
        assert_eq!(ids(&fit), [vec![0, 1, 2, 4, 5, 6, 8], vec![0], vec![0, 1]]);
    }
}
