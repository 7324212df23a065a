//! Whether an output is what its plan makes of the input: the recipes of writing, run again into comparisons.

mod compare;
mod folder;

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::ahead::{Ahead, EndOf};
use super::form::{self, Kind, Output};
use super::layout::{self, OutputTensor};
use super::{ApplyOptions, Mtp, OutputDtype, OutputForm, gather, mtp, mtp_plans};
use crate::plan::{LayerPlan, Plan};
use crate::{Checkpoint, CheckpointError};
use compare::{Computed, Tensor};
use folder::Written;

/// What [`verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verification {
    /// Tensors that the output should have.
    pub tensors: usize,
    /// Of these, such as hold computed weights, which were checked for shape, type and finite values only.
    pub computed: usize,
    /// Tensor bytes that were compared with what they should be.
    pub bytes_compared: u64,
    /// What is not as it should be.
    pub differences: Vec<Difference>,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Name of the tensor, or of the file.
    pub place: String,
    /// What is wrong with it.
    pub problem: String,
}

/// What `report.json` of an output says about the way it was made.
#[derive(Deserialize)]
struct Report {
    form: String,
    dtype: OutputDtype,
    mtp: Option<MtpReport>,
    recovery: Option<Value>,
}

#[derive(Deserialize)]
struct MtpReport {
    mode: Mtp,
}

impl Report {
    fn read(out: &Path) -> Result<Self, CheckpointError> {
        let path = out.join("report.json");
        let text = std::fs::read(&path).map_err(CheckpointError::io("read", &path))?;
        serde_json::from_slice(&text).map_err(|source| CheckpointError::Json { path, source })
    }

    fn options(&self) -> ApplyOptions {
        ApplyOptions {
            form: match self.form.as_str() {
                "padded" => OutputForm::Padded,
                "uniform" => OutputForm::Uniform,
                // Stock and identical outputs are so in every form.
                _ => OutputForm::Ragged,
            },
            dtype: self.dtype,
            mtp: self.mtp.as_ref().map_or(Mtp::Prune, |mtp| mtp.mode),
            ..ApplyOptions::default()
        }
    }
}

/// Compares the output folder `out` with what `plan` makes of `checkpoint`, in the form and types that its `report.json`
/// records. Weights that were computed (merged experts, recovered down projections) are only checked for shape, type and
/// finite values.
///
/// `progress` is called with tensor bytes that are checked and the total.
///
/// # Errors
/// An unsound plan or another checkpoint's, a form that cannot hold it, files of the output that cannot be read.
pub fn verify(
    checkpoint: &Checkpoint,
    plan: &Plan,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Verification, CheckpointError> {
    plan.validate(checkpoint)?;
    let report = Report::read(out)?;
    let options = report.options();
    let output = form::decide(checkpoint, plan, &options)?;
    let mut differences = Vec::new();
    let written = Written::open(out, &mut differences)?;
    let norms = |layer| mtp::weight_norms(checkpoint, layer);
    let mtp_plans = mtp_plans(checkpoint, plan, &output, &norms)?;
    let tensors = layout::tensors(checkpoint, plan, &mtp_plans, &output);
    let mut verifying = Verifying {
        source: gather::Source::new(checkpoint, None, options.dtype),
        computed: Computed {
            checkpoint,
            plan,
            recovered: report.recovery.is_some(),
        },
        written: &written,
        found: Verification {
            tensors: tensors.len(),
            differences,
            ..Verification::default()
        },
    };
    verifying.files(plan, &mtp_plans, &output)?;
    verifying.names(&tensors);
    verifying.tensors(&tensors, progress)?;
    Ok(verifying.found)
}

struct Verifying<'a> {
    source: gather::Source<'a>,
    computed: Computed<'a>,
    written: &'a Written,
    found: Verification,
}

impl<'a> Verifying<'a> {
    fn differs(&mut self, place: impl Into<String>, problem: impl Into<String>) {
        self.found.differences.push(Difference {
            place: place.into(),
            problem: problem.into(),
        });
    }

    /// Plan, config and index.
    fn files(
        &mut self,
        plan: &Plan,
        mtp: &[LayerPlan],
        output: &Output,
    ) -> Result<(), CheckpointError> {
        let found = &mut self.found.differences;
        let (own, config) = (self.written.plan(found)?, self.written.config(found)?);
        if own.is_some_and(|own| own != *plan) {
            self.differs("tenp_plan.json", "is another plan");
        }
        for (tensor, problem) in self.written.index_problems() {
            self.differs(tensor, problem);
        }
        let Some(config) = config else {
            return Ok(());
        };
        let checkpoint = self.source.checkpoint();
        let expected = match output.kind {
            Kind::Identical => Value::Object(checkpoint.config_json().clone()),
            _ => form::config(checkpoint, plan, mtp, output),
        };
        let fields = |value: &Value| value.as_object().cloned().unwrap_or_default();
        let (expected, config) = (fields(&expected), fields(&config));
        let mut names: Vec<&String> = expected.keys().chain(config.keys()).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            // The widths are beside other things in `tenp`.
            let (own, other) = (expected.get(name), config.get(name));
            if own != other {
                let what = match (own, other) {
                    (Some(Value::Object(own)), Some(other)) => own
                        .iter()
                        .find(|(key, value)| other.get(key) != Some(*value))
                        .map(|(key, _)| format!("{name}.{key}")),
                    _ => None,
                };
                let what = what.as_ref().unwrap_or(name);
                self.differs(
                    "config.json",
                    format!("`{what}` is not what the plan makes of it"),
                );
            }
        }
        Ok(())
    }

    /// Tensors that should not be there.
    fn names(&mut self, tensors: &[OutputTensor<'_>]) {
        let expected: HashSet<&str> = tensors.iter().map(|t| t.tensor.name.as_str()).collect();
        for name in self.written.names() {
            if !expected.contains(name) {
                self.differs(name, "should not be there");
            }
        }
    }

    fn tensors(
        &mut self,
        tensors: &[OutputTensor<'a>],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), CheckpointError> {
        let checkpoint = self.source.checkpoint();
        let total = tensors.iter().map(|t| t.tensor.num_bytes()).sum();
        let ahead = Ahead::new(checkpoint, tensors)?;
        let mut done = 0;
        progress(done, total);
        std::thread::scope(|scope| {
            let _end = EndOf(&ahead);
            scope.spawn(|| ahead.read());
            for (index, tensor) in tensors.iter().enumerate() {
                checkpoint.check_stop()?;
                if let Some(next) = tensors.get(index + 1) {
                    self.written.prefetch(&next.tensor.name);
                }
                self.tensor(tensor)?;
                ahead.passed(index);
                // Pages would otherwise pile up in this process.
                self.written.release(&tensor.tensor.name);
                done += tensor.tensor.num_bytes();
                progress(done, total);
            }
            Ok(())
        })
    }

    fn tensor(&mut self, expected: &OutputTensor<'a>) -> Result<(), CheckpointError> {
        let planned = &expected.tensor;
        let Some(view) = self.written.find(&planned.name) else {
            self.differs(&planned.name, "is missing");
            return Ok(());
        };
        if view.dtype != planned.dtype || view.shape != planned.shape {
            let problem = format!(
                "is {} {:?}, but should be {} {:?}",
                view.dtype, view.shape, planned.dtype, planned.shape
            );
            self.differs(&planned.name, problem);
            return Ok(());
        }
        let tensor = Tensor::of(view.dtype, view.bytes);
        let checked = tensor.check(&expected.recipe, &mut self.source, &self.computed)?;
        self.found.bytes_compared += checked.bytes_compared;
        self.found.computed += usize::from(checked.computed);
        if let Some(problem) = checked.problem {
            self.differs(&planned.name, problem);
        }
        Ok(())
    }
}
