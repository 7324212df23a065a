//! What a comparison takes beside calibrating, planning and writing: figures of the full model and of the pruned ones.

use anyhow::Result;
use tenp_model::evaluate::{comparison_passes, task_passes, text_passes};
use tenp_model::memory::{self, Step};
use tenp_model::speed::Speed;
use tenp_model::text::Task;
use tenp_model::{Model, Sequences};

use super::{Forecast, Work};
use crate::models::Domains;

/// What models are measured on, and how fast.
pub(crate) struct Measuring {
    /// Of tasks and texts.
    passes: Vec<Sequences>,
    /// Of a model beside the full one.
    compared: Vec<Sequences>,
    speed: Speed,
}

/// A pruned model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pruned {
    /// Share of the routed neurons.
    pub(crate) kept: f64,
    pub(crate) bytes: u64,
}

impl Measuring {
    /// Of tasks, texts, and the samples that models are compared on.
    ///
    /// # Errors
    /// An expert that cannot be read.
    pub(crate) fn new(
        model: &Model<'_>,
        (tasks, texts): (&[Task], &Domains),
        samples: &[Vec<u32>],
    ) -> Result<Self> {
        let of_tasks = tasks.iter().flat_map(|task| task_passes(model, task));
        let of_texts = texts
            .iter()
            .flat_map(|(_, samples)| text_passes(model, samples));
        let passes: Vec<Sequences> = of_tasks.chain(of_texts).collect();
        let longest = passes.iter().max_by_key(|pass| pass.num_tokens());
        let speed = Speed::measure(model, longest.unwrap_or(&Sequences::default()))?;
        Ok(Self {
            passes,
            compared: comparison_passes(model, samples),
            speed,
        })
    }

    /// Seconds of some passes, with `kept` of the routed neurons.
    fn seconds(&self, model: &Model<'_>, passes: &[Sequences], kept: f64) -> f64 {
        let each = passes.iter().map(|pass| {
            self.speed.pass(model, pass, kept, false) + self.speed.logits(model, pass.num_tokens())
        });
        each.sum()
    }
}

impl Forecast<'_> {
    /// Figures of the full model, before all else. They take no more memory than those of a pruned one with what is beside.
    pub(crate) fn full_figures(&mut self, measuring: &Measuring) {
        let passes = measuring.passes.len();
        let work = Work {
            name: "measure the full model",
            passes,
            computing: measuring.seconds(&self.model, &measuring.passes, 1.0),
            read: passes as u64 * self.checkpoint().size().bytes_total,
            written: 0,
        };
        self.work.insert(0, work);
    }

    /// Figures of a pruned model, and its distance from the full one.
    pub(crate) fn figures(&mut self, measuring: &Measuring, pruned: Pruned) {
        let Measuring {
            passes, compared, ..
        } = measuring;
        self.step(memory::evaluation(&self.model, passes));
        self.work.push(Work {
            name: "measure pruned models",
            passes: passes.len(),
            computing: measuring.seconds(&self.model, passes, pruned.kept),
            read: passes.len() as u64 * pruned.bytes,
            written: 0,
        });
        self.step(memory::comparison(&self.model, compared));
        let both = [1.0, pruned.kept];
        let both = both.map(|kept| measuring.seconds(&self.model, compared, kept));
        let bytes = pruned.bytes + self.checkpoint().size().bytes_total;
        self.work.push(Work {
            name: "compare with the full model",
            passes: compared.len(),
            computing: both.iter().sum(),
            read: compared.len() as u64 * bytes,
            written: 0,
        });
    }

    /// Everything so far is done so many times; steps and passes of one name become one, the largest step and all passes.
    pub(crate) fn repeated(&mut self, times: usize) {
        let mut work: Vec<Work> = Vec::new();
        for mut more in self.work.drain(..) {
            more.passes *= times;
            more.computing *= times as f64;
            more.read *= times as u64;
            more.written *= times as u64;
            match work.iter_mut().find(|work| work.name == more.name) {
                Some(work) => work.add(&more),
                None => work.push(more),
            }
        }
        self.work = work;
        let mut steps: Vec<Step> = Vec::new();
        for step in self.steps.drain(..) {
            match steps.iter_mut().find(|other| other.name == step.name) {
                Some(other) if other.bytes() < step.bytes() => *other = step,
                Some(_) => {}
                None => steps.push(step),
            }
        }
        self.steps = steps;
    }
}

impl Work {
    fn add(&mut self, more: &Self) {
        self.passes += more.passes;
        self.computing += more.computing;
        self.read += more.read;
        self.written += more.written;
    }
}
