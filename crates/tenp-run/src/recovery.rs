//! What the options about recovery ask for.

use std::collections::BTreeMap;

use anyhow::Result;
use tenp_checkpoint::{Checkpoint, Plan, Statistics};
use tenp_model::Sequences;
use tenp_model::rewrite::RecoverOptions;
use tenp_prune::{NeuronScore, PlanRequest, rescale_factors};

use crate::cli::{GatesArg, InputsArg, RecoverArg, RecoverArgs};
use crate::failure::usage;

/// Recovery of a run, with what it needs.
pub(crate) enum Recovery<'a> {
    None,
    /// Factors by MoE layer and expert.
    Rescale(Vec<Vec<f64>>),
    LeastSquares {
        sequences: &'a Sequences,
        options: RecoverOptions,
    },
}

/// Refuses options that do not go together.
pub(crate) fn check(args: RecoverArgs) -> Result<()> {
    let fits = args.recover == RecoverArg::LeastSquares;
    for (option, given) in [
        ("--recover-gates", args.recover_gates.is_some()),
        ("--recover-inputs", args.recover_inputs.is_some()),
    ] {
        if given && !fits {
            return Err(usage(format!(
                "{option} has no effect without --recover least-squares"
            )));
        }
    }
    Ok(())
}

/// Refuses recovery of a plan that narrows no expert. One that keeps everything passes: its output is a copy.
pub(crate) fn check_plan(args: RecoverArgs, checkpoint: &Checkpoint, plan: &Plan) -> Result<()> {
    let config = checkpoint.config();
    if args.recover == RecoverArg::None || plan.keeps_everything(config) {
        return Ok(());
    }
    if !plan.narrows_nothing(config) {
        if plan.dern.is_none() {
            return Ok(());
        }
        return Err(usage(format!(
            "--recover does not go with --method {}: both say what the kept neurons become, and recovery takes them to \
             compute what they did; use --method tenp with --recover, or leave --recover out",
            plan.method
        )));
    }
    Err(usage(format!(
        "--recover has no effect with --method {}, which narrows no expert; it needs a method such as tenp or enp",
        plan.method
    )))
}

/// Least squares, as the options ask for.
pub(crate) fn least_squares(args: RecoverArgs, sequences: &Sequences) -> Recovery<'_> {
    Recovery::LeastSquares {
        sequences,
        options: RecoverOptions {
            gated: args.recover_gates != Some(GatesArg::Ungated),
            on_pruned: args.recover_inputs != Some(InputsArg::Original),
        },
    }
}

/// Names of the tables of statistics that a plan and its recovery are made from.
pub(crate) fn tables(request: &PlanRequest, args: RecoverArgs) -> Result<Vec<&'static str>> {
    let mut tables = request.tables()?;
    if args.recover == RecoverArg::Rescale {
        tables.extend(NeuronScore::Contribution.tables());
    }
    tables.sort_unstable();
    tables.dedup();
    Ok(tables)
}

/// Projection rescale from statistics.
pub(crate) fn rescale(
    checkpoint: &Checkpoint,
    plan: &Plan,
    statistics: &Statistics,
    weights: &BTreeMap<String, f64>,
) -> Result<Recovery<'static>> {
    let factors = rescale_factors(
        checkpoint.config(),
        checkpoint.fingerprint(),
        statistics,
        weights,
        plan,
    )?;
    Ok(Recovery::Rescale(factors))
}

/// The domain weights that a plan was made with, of the domains at hand.
pub(crate) fn plan_weights(
    plan: &Plan,
    domains: &[(String, Vec<Vec<u32>>)],
) -> BTreeMap<String, f64> {
    let recorded = plan.options.get("domain_weights");
    let weight = |name: &str| recorded?.get(name)?.as_f64();
    domains
        .iter()
        .filter_map(|(name, _)| Some((name.clone(), weight(name)?)))
        .collect()
}

/// The samples of the domains that count, one after another, a domain each label.
pub(crate) fn sequences(
    domains: &[(String, Vec<Vec<u32>>)],
    weights: &BTreeMap<String, f64>,
) -> Sequences {
    let mut sequences = Sequences::default();
    let counting = domains
        .iter()
        .filter(|(name, _)| weights.get(name) != Some(&0.0));
    for (label, (_, samples)) in counting.enumerate() {
        for sample in samples {
            sequences.push(sample, label);
        }
    }
    sequences
}
