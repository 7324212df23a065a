//! Plans that rest on measured errors.

use tenp_checkpoint::config::ModelConfig;
use tenp_checkpoint::statistics::Statistics;

use super::{Decision, Planner};
use crate::allocate::{ErrorCurves, Shape, divided, sensitivity_widths};
use crate::calibration::Calibration;
use crate::request::{Choice, PlanRequest};
use crate::score::{best_first, expert_neuron_scores};
use crate::{ErrorScale, PruneError};

/// What the plan says about its errors.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sensitivity {
    pub(crate) scale: &'static str,
    pub(crate) measured: Vec<usize>,
    /// `[layer][measured width]`: the error with all experts of the layer that wide.
    pub(crate) curves: Vec<Vec<f64>>,
    pub(crate) error: f64,
    pub(crate) bound: f64,
}

/// Neurons `[moe layer][expert]` from the one to keep longest to the one to remove first, by the request's neuron score.
///
/// # Errors
/// As [`crate::plan()`].
pub fn neuron_orders(
    config: &ModelConfig,
    fingerprint: &str,
    statistics: &Statistics,
    request: &PlanRequest,
) -> Result<Vec<Vec<Vec<u32>>>, PruneError> {
    let choice = Choice::resolve(request)?;
    let calibration = Calibration::new(
        config,
        fingerprint,
        statistics,
        &request.domain_weights,
        &choice.tables(),
    )?;
    let planner = Planner::new(&calibration, request, choice);
    let shape = calibration.shape();
    let order = |layer, expert| {
        best_first(&expert_neuron_scores(
            &calibration,
            layer,
            expert,
            planner.neuron_scoring(),
        ))
    };
    Ok((0..shape.num_layers)
        .map(|layer| (0..shape.num_experts).map(|e| order(layer, e)).collect())
        .collect())
}

impl Planner<'_> {
    pub(super) fn sensitivity(&self, curves: Option<&ErrorCurves>) -> Result<Decision, PruneError> {
        let shape = self.calibration.shape();
        let (quantum, budget) = self.budget()?;
        let curves = curves.ok_or(PruneError::Curves {
            why: "the errors have not been measured; give calibration text with --data",
        })?;
        check(curves, shape, quantum)?;
        let scale = self.request.error_scale.unwrap_or(ErrorScale::None);
        let values = scaled(curves, scale);
        let solved = sensitivity_widths(
            shape,
            quantum,
            budget,
            &curves.widths,
            &values,
            &self.guarded,
        )?;
        Ok(Decision {
            widths: solved.widths,
            quantum: Some(quantum),
            sensitivity: Some(Sensitivity {
                scale: scale.name(),
                measured: curves.widths.clone(),
                curves: values.iter().map(|experts| summed(experts)).collect(),
                error: solved.error,
                bound: solved.bound,
            }),
            ..Decision::default()
        })
    }
}

fn check(curves: &ErrorCurves, shape: Shape, quantum: usize) -> Result<(), PruneError> {
    let widths = &curves.widths;
    let grid = widths.first() == Some(&0)
        && widths.last() == Some(&shape.expert_width)
        && widths.windows(2).all(|w| w[0] < w[1])
        && widths.iter().all(|w| w.is_multiple_of(quantum));
    let fits = curves.errors.len() == shape.num_layers
        && curves.residuals.len() == shape.num_layers
        && curves.errors.iter().all(|layer| {
            layer.len() == shape.num_experts && layer.iter().all(|e| e.len() == widths.len())
        });
    if !(grid && fits) {
        return Err(PruneError::Curves {
            why: "the errors were measured on another model, or for another width multiple",
        });
    }
    let mut all = curves.errors.iter().flatten().flatten();
    if !all.all(|error| error.is_finite()) || !curves.residuals.iter().all(|r| r.is_finite()) {
        return Err(PruneError::Curves {
            why: "a measured error is not finite; use other text, or a checkpoint whose weights are not scaled this large",
        });
    }
    Ok(())
}

/// Errors that compare over layers.
fn scaled(curves: &ErrorCurves, scale: ErrorScale) -> Vec<Vec<Vec<f64>>> {
    let layers = curves.errors.iter().zip(&curves.residuals);
    layers
        .map(|(experts, &residual)| {
            let by = match scale {
                ErrorScale::Residual => residual,
                ErrorScale::None => 1.0,
            };
            let divide = |errors: &Vec<f64>| errors.iter().map(|&e| divided(e, by)).collect();
            experts.iter().map(divide).collect()
        })
        .collect()
}

fn summed(experts: &[Vec<f64>]) -> Vec<f64> {
    let mut sums = vec![0.0; experts.first().map_or(0, Vec::len)];
    for errors in experts {
        for (sum, error) in sums.iter_mut().zip(errors) {
            *sum += error;
        }
    }
    sums
}
