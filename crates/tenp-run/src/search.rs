//! What is measured on calibration text before a plan is made.

use std::cell::RefCell;
use std::collections::BTreeMap;

use anyhow::Result;
use tenp_checkpoint::{Checkpoint, ModelConfig, Statistics};
use tenp_model::sensitivity::{Cuts, cut_errors};
use tenp_prune::allocate::{ErrorCurves, measured_widths, quantum};
use tenp_prune::{Allocation, PlanRequest, neuron_orders};

use crate::models::{self, Domains};
use crate::place::Place;
use crate::progress::{Progress, Unit};
use crate::recovery;

/// Calibration text at hand, and what was measured on it so far.
pub(crate) struct Search<'a> {
    checkpoint: &'a Checkpoint,
    domains: &'a Domains,
    place: Place,
    /// By what they depend on, as plans of several budgets share them.
    curves: RefCell<BTreeMap<String, ErrorCurves>>,
}

/// Whether a plan needs text to measure on.
pub(crate) fn measures(request: &PlanRequest) -> bool {
    matches!(request.allocation, Some(Allocation::Sensitivity(_)))
}

/// The request with errors of 0 in place of those that are to be measured.
pub(crate) fn rehearsed(request: &PlanRequest, config: &ModelConfig) -> Result<PlanRequest> {
    let mut request = request.clone();
    if measures(&request) {
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

impl<'a> Search<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, domains: &'a Domains, place: &Place) -> Self {
        Self {
            checkpoint,
            domains,
            place: place.clone(),
            curves: RefCell::default(),
        }
    }

    /// The request with everything measured that it asks for.
    pub(crate) fn settle(
        &self,
        statistics: &Statistics,
        request: &PlanRequest,
    ) -> Result<PlanRequest> {
        let mut request = request.clone();
        if measures(&request) {
            let curves = self.curves(statistics, &request)?;
            request.allocation = Some(Allocation::Sensitivity(Some(curves)));
        }
        Ok(request)
    }

    fn curves(&self, statistics: &Statistics, request: &PlanRequest) -> Result<ErrorCurves> {
        let config = self.checkpoint.config();
        let width = config.moe.expert_width;
        let widths = measured_widths(width, quantum(request.width_multiple, width)?);
        // The budget and the scale have no part in the errors.
        let key = format!(
            "{:?}",
            (
                &widths,
                request.method,
                request.neuron_score,
                request.normalise_domains,
                &request.domain_weights,
                request.seed
            )
        );
        if let Some(curves) = self.curves.borrow().get(&key) {
            return Ok(curves.clone());
        }
        let fingerprint = self.checkpoint.fingerprint();
        let orders = neuron_orders(config, fingerprint, statistics, request)?;
        let sequences = recovery::sequences(self.domains, &request.domain_weights);
        let weight = |name: &String| request.domain_weights.get(name).copied().unwrap_or(1.0);
        let weights: Vec<f64> = self.domains.iter().map(|(name, _)| weight(name)).collect();
        let weights: Vec<f64> = weights.into_iter().filter(|&w| w != 0.0).collect();
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
            self.place.cpu_compute(),
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
