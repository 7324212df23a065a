//! The cells of a comparison: methods, budgets, draws.

use anyhow::Result;
use clap::Parser;
use serde::{Deserialize, Serialize};
use tenp_checkpoint::Checkpoint;
use tenp_prune::PlanRequest;

use crate::cli::{Compare, PlanArgs, RecoverArgs};
use crate::failure::usage;
use crate::{recovery, requests};

/// One run: a method at a budget on a calibration draw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Key {
    /// As given: a method, and options behind colons.
    pub(super) method: String,
    pub(super) keep: f64,
    pub(super) seed: usize,
}

impl Key {
    /// For people.
    pub(super) fn label(&self) -> String {
        format!("{}, keep {}, draw {}", self.method, self.keep, self.seed)
    }

    /// The stem of the cell's file.
    pub(super) fn stem(&self) -> String {
        let method = self
            .method
            .replace(|c: char| !c.is_ascii_alphanumeric() && c != '-', "_");
        format!("{method}-{}-{}", self.keep, self.seed)
    }

    /// What the method asks for at this budget: `tenp:neuron-score=energy` has the options of
    /// `prune --method tenp --neuron-score energy`.
    ///
    /// # Errors
    /// A method or an option that there is not.
    pub(super) fn request(&self) -> Result<(PlanRequest, RecoverArgs)> {
        #[derive(Parser)]
        #[command(no_binary_name = true, disable_help_flag = true)]
        struct Options {
            #[command(flatten)]
            plan: PlanArgs,
            #[command(flatten)]
            recover: RecoverArgs,
        }
        let mut parts = self.method.split(':');
        let method = parts.next().unwrap_or_default();
        let mut words = vec![
            format!("--method={method}"),
            format!("--keep={}", self.keep),
        ];
        let mut seeded = false;
        for option in parts {
            seeded |= option.starts_with("seed=");
            words.push(format!("--{option}"));
        }
        if !seeded {
            words.push(format!("--seed={}", self.seed));
        }
        let parsed = Options::try_parse_from(&words).map_err(|error| {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            let first = first.trim_start_matches("error: ");
            usage(format!(
                "--methods {}: {first}; a method is a name of `plan --method`, with options behind colons, such as \
                 tenp:neuron-score=energy",
                self.method
            ))
        })?;
        recovery::check(parsed.recover)?;
        Ok((requests::request(&parsed.plan)?, parsed.recover))
    }
}

/// Every cell, draw by draw.
pub(super) struct Grid {
    pub(super) methods: Vec<String>,
    pub(super) keeps: Vec<f64>,
}

impl Grid {
    /// Refuses, before any work, what some cell could not do.
    pub(super) fn new(args: &Compare, checkpoint: &Checkpoint) -> Result<Self> {
        let grid = Self {
            methods: args.methods.clone(),
            keeps: args.keep.clone(),
        };
        for (what, repeated) in [
            ("--methods", first_repeated(&grid.methods)),
            ("--keep", first_repeated(&grid.keeps)),
        ] {
            if let Some(value) = repeated {
                return Err(usage(format!("{what}: {value} is there twice")));
            }
        }
        let domains: Vec<&str> = args.data.data.iter().map(|d| d.domain.as_str()).collect();
        for key in grid.cells(0) {
            let (request, recover) = key.request()?;
            let plan = requests::rehearse(checkpoint, domains.iter().copied(), &request)?;
            recovery::check_plan(recover, checkpoint, &plan)?;
        }
        Ok(grid)
    }

    /// Names of the tables of statistics that the cells of a draw are made from.
    pub(super) fn tables(&self) -> Result<Vec<&'static str>> {
        let tables = self.cells(0).map(|key| {
            let (request, recover) = key.request()?;
            recovery::tables(&request, recover)
        });
        let mut tables = tables.collect::<Result<Vec<_>>>()?.concat();
        tables.sort_unstable();
        tables.dedup();
        Ok(tables)
    }

    pub(super) fn cells(&self, seed: usize) -> impl Iterator<Item = Key> + '_ {
        self.methods.iter().flat_map(move |method| {
            self.keeps.iter().map(move |&keep| Key {
                method: method.clone(),
                keep,
                seed,
            })
        })
    }
}

fn first_repeated<T: PartialEq + std::fmt::Display>(values: &[T]) -> Option<String> {
    let repeated = |(i, value): &(usize, &T)| values[..*i].contains(value);
    let found = values.iter().enumerate().find(repeated);
    found.map(|(_, value)| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::RecoverArg;

    fn key(method: &str) -> Key {
        Key {
            method: method.to_owned(),
            keep: 0.6,
            seed: 2,
        }
    }

    #[test]
    fn options_go_behind_colons() {
        let (request, _) = key("tenp:neuron-score=energy:alpha=0.1").request().unwrap();
        assert_eq!(request.neuron_score.unwrap().name(), "energy");
        assert_eq!(
            (request.alpha, request.keep, request.seed),
            (Some(0.1), 0.6, 2)
        );
        assert_eq!(key("random-neurons:seed=7").request().unwrap().0.seed, 7);
        let (_, recover) = key("enp:recover=least-squares").request().unwrap();
        assert_eq!(recover.recover, RecoverArg::LeastSquares);
        assert!(key("enp:exact").request().unwrap().0.exact);
        assert_eq!(
            key("tenp:neuron-score=energy").stem(),
            "tenp_neuron-score_energy-0.6-2"
        );
    }

    #[test]
    fn what_is_no_method_is_named() {
        for method in ["tenpp", "tenp:no-such=1", "tenp:alpha=x", ""] {
            let error = key(method).request().unwrap_err().to_string();
            assert!(error.starts_with("--methods"), "{error}");
        }
    }

    #[test]
    fn repeated_values_are_found() {
        assert_eq!(first_repeated(&[0.6, 0.5, 0.6]), Some("0.6".to_owned()));
        assert_eq!(first_repeated(&["a", "b"]), None);
    }
}
