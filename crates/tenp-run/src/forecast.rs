//! What a run would take, without running it: memory step by step, passes over the model, disk and time.

mod disk;
mod measuring;
mod show;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use tenp_checkpoint::{ApplyOptions, Checkpoint, OutputDtype, Plan, writing_memory};
use tenp_model::calibrate::{FoldOptions, Keep};
use tenp_model::memory::{self, StatisticsMemory, Step};
use tenp_model::speed::{Speed, passes_for_moments};
use tenp_model::{Model, Sequences};
use tenp_prune::{Allocation, PlanRequest, alpha_candidates};

use crate::models::Domains;
use crate::{recovery, search};

pub(crate) use measuring::{Measuring, Pruned};
pub(crate) use show::Sizes;

/// Passes over the model, or over its output.
#[derive(Clone, Debug, Default)]
struct Work {
    name: &'static str,
    /// How often all layers are run or copied.
    passes: usize,
    /// Seconds of computing.
    computing: f64,
    read: u64,
    written: u64,
}

/// What is known of a run so far.
pub(crate) struct Forecast<'m> {
    model: Model<'m>,
    /// Anonymous memory of this process before the first step: the program, what was read of checkpoint, tokenizer and text.
    held: usize,
    /// What the steps so far leave behind.
    statistics: usize,
    /// Of that, sums of groups of samples.
    groups: usize,
    speed: Option<(Speed, Sequences)>,
    steps: Vec<Step>,
    work: Vec<Work>,
    /// What is measured once, whatever is planned from it.
    measured: BTreeSet<String>,
    kept_bytes: usize,
    /// Most that lies in files without names at once.
    spilled_bytes: usize,
    /// New weights, which lie beside the output until it is written.
    rewritten_bytes: usize,
}

impl<'m> Forecast<'m> {
    /// Begins with what the process holds now, everything having been read that the run reads before it computes.
    pub(crate) fn new(model: Model<'m>) -> Self {
        Self {
            model,
            held: anonymous_bytes(),
            statistics: 0,
            groups: 0,
            speed: None,
            steps: Vec::new(),
            work: Vec::new(),
            measured: BTreeSet::new(),
            kept_bytes: 0,
            spilled_bytes: 0,
            rewritten_bytes: 0,
        }
    }

    fn checkpoint(&self) -> &'m Checkpoint {
        self.model.checkpoint()
    }

    fn step(&mut self, step: Step) {
        let step = step.beside("statistics", self.statistics);
        self.steps
            .push(step.beside("before the first step", self.held));
    }

    fn spills(&mut self, bytes: usize) {
        self.spilled_bytes = self.spilled_bytes.max(bytes);
    }

    /// `tokens` go through all layers in all passes together: hidden states in a file are read and written by every layer.
    fn pass(&mut self, name: &'static str, passes: usize, computing: f64, tokens: &[usize]) {
        let size = self.checkpoint().size().bytes_total;
        let spilled: usize = tokens
            .iter()
            .map(|tokens| self.model.spilled_bytes(*tokens))
            .sum();
        let spilled = (self.model.config().num_layers * spilled) as u64;
        self.work.push(Work {
            name,
            passes,
            computing,
            read: passes as u64 * size + spilled,
            written: spilled,
        });
    }

    /// The speed on the text of the run.
    fn speed(&mut self, domains: &Domains) -> Result<(Speed, Sequences)> {
        if self.speed.is_none() {
            let sequences = recovery::sequences(domains, &BTreeMap::new());
            self.spills(self.model.spilled_bytes(sequences.num_tokens()));
            self.speed = Some((Speed::measure(&self.model, &sequences)?, sequences));
        }
        Ok(self.speed.clone().expect("just measured"))
    }

    /// Answers of at most `new_tokens` tokens behind the prompts.
    pub(crate) fn generation(&mut self, prompts: &Domains, new_tokens: usize) -> Result<()> {
        let (speed, sequences) = {
            let sequences = recovery::sequences(prompts, &BTreeMap::new());
            (Speed::measure(&self.model, &sequences)?, sequences)
        };
        // A token of each sample at a time.
        let mut one = Sequences::default();
        for span in sequences.spans() {
            one.push_at(&[0], span.rows.len());
        }
        let token = Speed::measure(&self.model, &one)?;
        let computing = speed.pass(&self.model, &sequences, 1.0, false)
            + new_tokens as f64 * token.pass(&self.model, &one, 1.0, false);
        self.step(memory::generation(&self.model, &sequences, new_tokens));
        let tokens = [sequences.num_tokens()];
        self.pass("generate answers", 1 + new_tokens, computing, &tokens);
        Ok(())
    }

    /// Statistics of the text, which stay.
    pub(crate) fn calibration(&mut self, domains: &Domains, folds: &FoldOptions) -> Result<()> {
        let (speed, sequences) = self.speed(domains)?;
        self.step(memory::calibration(&self.model, domains, folds));
        let computing = speed.pass(&self.model, &sequences, 1.0, true);
        self.pass("calibrate", 1, computing, &[sequences.num_tokens()]);
        let groups = folds.num_folds.unwrap_or(1) * domains.len();
        let memory = StatisticsMemory::new(self.model.config(), domains.len());
        let memory = memory.kept_by(folds, groups);
        (self.statistics, self.groups) = (memory.all(), memory.groups());
        let tokens = sequences.num_tokens();
        self.kept_bytes = Keep::most_bytes(&self.model, tokens, domains.len(), folds);
        Ok(())
    }

    /// Only `tables` tables are left of the statistics, beside the groups'.
    pub(crate) fn keep_tables(&mut self, domains: &Domains, tables: usize) {
        let memory = StatisticsMemory::new(self.model.config(), domains.len());
        self.statistics = self.groups + memory.drawn(tables);
    }

    /// The plan is made, and nothing else needs statistics.
    pub(crate) fn drop_statistics(&mut self) {
        (self.statistics, self.groups) = (0, 0);
    }

    /// What is tried and measured before planning, and the planning; `plan` is one of the size that comes out.
    pub(crate) fn planning(
        &mut self,
        domains: &Domains,
        request: &PlanRequest,
        plan: &Plan,
    ) -> Result<()> {
        let (speed, sequences) = self.speed(domains)?;
        if request.search_alpha {
            let (fit, held) = search::split(domains);
            let [fit_text, held_text] =
                [&fit, &held].map(|part| recovery::sequences(part, &BTreeMap::new()));
            let plans = alpha_candidates(request.keep, None).len();
            self.step(memory::calibration(
                &self.model,
                &fit,
                &FoldOptions::default(),
            ));
            if self.measured.insert("three quarters".to_owned()) {
                let computing = speed.pass(&self.model, &fit_text, 1.0, true);
                let tokens = [fit_text.num_tokens()];
                self.pass("calibrate on three quarters", 1, computing, &tokens);
            }
            let memory = StatisticsMemory::new(self.model.config(), domains.len());
            let memory = memory.drawn(request.tables()?.len());
            let trials = memory::plan_trials(&self.model, &held_text, plan, plans);
            self.step(trials.beside("statistics of three quarters", memory));
            let [_, in_files] = memory::narrowed(self.checkpoint(), plan, OutputDtype::Same);
            self.spills(self.model.spilled_bytes(held_text.num_tokens()) + in_files);
            let each = speed.pass(&self.model, &held_text, plan.accounting.E, false);
            // Side by side, so that the model is read once.
            let tokens = vec![held_text.num_tokens(); plans];
            self.pass("try α", 1, plans as f64 * each, &tokens);
        }
        if matches!(request.allocation, Some(Allocation::Sensitivity(_))) {
            self.step(memory::cut_errors(&self.model, &sequences));
            if self
                .measured
                .insert(search::curves_key(self.model.config(), request)?)
            {
                let computing = speed.cuts(&self.model, &sequences);
                self.pass("measure errors", 1, computing, &[sequences.num_tokens()]);
            }
        }
        let config = self.model.config();
        let plans = memory::plan_bytes(plan);
        let mut parts = vec![("kept neurons", plans)];
        if request.allocation == Some(Allocation::Global) {
            let quantum =
                tenp_prune::allocate::quantum(request.width_multiple, config.moe.expert_width)?;
            let neurons =
                config.moe_layers.len() * config.moe.num_experts * config.moe.expert_width;
            parts.push(("scores of all neurons", global_bytes(neurons, quantum)));
        }
        let memory = StatisticsMemory::new(config, domains.len());
        let drawn = memory.drawn(request.tables()?.len());
        if self.groups > 0 {
            parts.push(("statistics drawn anew, and their plan", drawn + plans));
        }
        self.step(Step::new("plan", parts));
        Ok(())
    }

    /// New weights by least squares.
    pub(crate) fn fits(
        &mut self,
        sequences: &Sequences,
        plan: &Plan,
        dtype: OutputDtype,
    ) -> Result<()> {
        let speed = match &self.speed {
            Some((speed, _)) => *speed,
            None => Speed::measure(&self.model, sequences)?,
        };
        for step in memory::fit(&self.model, sequences, plan, dtype) {
            self.step(step);
        }
        let computing = speed.fits(&self.model, sequences, plan);
        let width = self.model.config().moe.expert_width;
        let passes = 1 + passes_for_moments(plan, width);
        let tokens = vec![sequences.num_tokens(); passes];
        self.pass("fit, and run what was fitted", passes, computing, &tokens);
        let [_, in_files] = memory::narrowed(self.checkpoint(), plan, dtype);
        self.spills(2 * self.model.spilled_bytes(sequences.num_tokens()) + in_files);
        Ok(())
    }

    /// Merging of dropped neurons, if the plan merges.
    pub(crate) fn merging(&mut self, plan: &Plan, dtype: OutputDtype) -> Result<()> {
        if plan.dern.is_none() {
            return Ok(());
        }
        let mut one = Sequences::default();
        one.push(&[0], 0);
        let speed = match &self.speed {
            Some((speed, _)) => *speed,
            None => Speed::measure(&self.model, &one)?,
        };
        let (step, in_files) = memory::merging(self.checkpoint(), plan, dtype);
        self.step(step);
        self.spills(in_files);
        self.pass("merge", 1, speed.comparisons(&self.model, plan), &[]);
        Ok(())
    }

    /// Writing the output of `bytes`, of new weights in part where there are `new` ones.
    pub(crate) fn writing(
        &mut self,
        plan: &Plan,
        options: &ApplyOptions,
        bytes: u64,
        new: bool,
    ) -> Result<()> {
        if new || plan.dern.is_some() {
            let rewritten = memory::rewritten(self.checkpoint(), plan, options.dtype);
            self.rewritten_bytes = self.rewritten_bytes.max(rewritten);
        }
        let parts = writing_memory(self.checkpoint(), plan, options)?;
        self.step(Step::new("write", parts).beside("kept neurons", memory::plan_bytes(plan)));
        self.work.push(Work {
            name: "write",
            passes: 1,
            computing: 0.0,
            read: self.checkpoint().size().bytes_total,
            written: bytes,
        });
        Ok(())
    }
}

/// The scores of a global allocation, and its blocks of `quantum` neurons with the half that sorting takes.
fn global_bytes(neurons: usize, quantum: usize) -> usize {
    let block = size_of::<(f64, usize, usize, usize)>();
    size_of::<f64>() * neurons + block * neurons / quantum.max(1) * 3 / 2
}

/// Anonymous memory of this process; 0 where the system does not tell.
fn anonymous_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    anonymous(&status).unwrap_or(0)
}

/// From the text of `/proc/self/status`.
fn anonymous(status: &str) -> Option<usize> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kilobytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kilobytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anonymous_memory_is_read_from_the_status() {
        let status = "VmHWM:\t   9000 kB\nRssAnon:\t    1234 kB\nRssFile:\t 77 kB\n";
        assert_eq!(anonymous(status), Some(1234 * 1024));
        assert_eq!(anonymous("VmHWM:\t 9000 kB\n"), None);
    }

    #[test]
    fn a_global_allocation_sorts_blocks() {
        assert_eq!(global_bytes(1000, 10), 8000 + 100 * 32 * 3 / 2);
    }
}
