//! A forecast for people and for machines.

use serde_json::{Value, json};
use tenp_model::memory::Step;

use super::disk::read_rate;
use super::{Forecast, Work};
use crate::console;

/// Sizes that a forecast tells beside its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Calibration tokens; none without text.
    pub(crate) tokens: usize,
    /// Of the output: a checkpoint's tensors, or a statistics file.
    pub(crate) output: u64,
    /// Whether that is a checkpoint.
    pub(crate) is_checkpoint: bool,
}

impl Work {
    /// Computing overlaps with reading and writing, which share one disk; writing is taken to be as fast as reading.
    fn seconds(&self, rate: f64) -> f64 {
        let moved = (self.read + self.written) as f64;
        self.computing.max(moved / rate)
    }

    fn json(&self, rate: f64) -> Value {
        json!({
            "name": self.name,
            "passes": self.passes,
            "compute_seconds": self.computing,
            "bytes_read": self.read,
            "bytes_written": self.written,
            "seconds": self.seconds(rate),
        })
    }
}

fn step_json(step: &Step) -> Value {
    let parts = step.parts.iter();
    let parts: serde_json::Map<String, Value> = parts
        .map(|(what, bytes)| ((*what).to_owned(), json!(bytes)))
        .collect();
    json!({"name": step.name, "memory_bytes": step.bytes(), "parts": parts})
}

impl Forecast<'_> {
    fn peak(&self) -> Step {
        let steps = self.steps.iter();
        steps
            .max_by_key(|step| step.bytes())
            .cloned()
            .unwrap_or_default()
    }

    /// Most on the GPU, where one runs the model.
    fn device_bytes(&self) -> Option<usize> {
        self.steps.iter().filter_map(|step| step.device).max()
    }

    /// Prints it.
    pub(crate) fn show(&self, sizes: Sizes, as_json: bool) {
        // A disk that cannot be measured is taken for one that never waits.
        let rate = read_rate(self.checkpoint().dir()).unwrap_or(f64::INFINITY);
        if as_json {
            console::json(&self.json(sizes, rate));
        } else {
            console::data(&self.text(sizes, rate));
        }
    }

    fn disk_bytes(&self, sizes: Sizes) -> u64 {
        sizes.output + (self.spilled_bytes + self.rewritten_bytes) as u64
    }

    fn json(&self, sizes: Sizes, rate: f64) -> Value {
        let work = self.work.iter();
        let sum = |of: &dyn Fn(&Work) -> f64| self.work.iter().map(of).sum::<f64>();
        json!({
            "tokens": sizes.tokens,
            "bytes_before": self.checkpoint().size().bytes_total,
            "bytes_after": sizes.is_checkpoint.then_some(sizes.output),
            "memory_bytes": self.peak().bytes(),
            "device_bytes": self.device_bytes(),
            "disk_bytes": self.disk_bytes(sizes),
            "kept_bytes": self.kept_bytes,
            "compute_seconds": sum(&|work| work.computing),
            "seconds": sum(&|work| work.seconds(rate)),
            "bytes_read": self.work.iter().map(|work| work.read).sum::<u64>(),
            "read_bytes_per_second": rate.is_finite().then_some(rate),
            "steps": self.steps.iter().map(step_json).collect::<Vec<_>>(),
            "passes": work.map(|work| work.json(rate)).collect::<Vec<_>>(),
        })
    }

    fn text(&self, sizes: Sizes, rate: f64) -> String {
        let before = console::bytes(self.checkpoint().size().bytes_total);
        let peak = self.peak();
        let mut rows = Vec::new();
        if sizes.tokens > 0 {
            rows.push(("calibration tokens", sizes.tokens.to_string()));
        }
        if sizes.is_checkpoint {
            let model = format!("{before} → {}", console::bytes(sizes.output));
            rows.push(("model", model));
        } else {
            rows.push(("model", before));
        }
        rows.push(("disk needed", console::bytes(self.disk_bytes(sizes))));
        if self.kept_bytes > 0 {
            let kept = console::bytes(self.kept_bytes as u64);
            rows.push(("and while calibrating, if that is long", kept));
        }
        let memory = format!(
            "{}, in `{}`",
            console::bytes(peak.bytes() as u64),
            peak.name
        );
        rows.push(("peak memory beside the mapped file", memory));
        if let Some(bytes) = self.device_bytes() {
            rows.push(("peak GPU memory", console::bytes(bytes as u64)));
        }
        let seconds: f64 = self.work.iter().map(|work| work.seconds(rate)).sum();
        rows.push(("time, about", duration(seconds)));
        if let Some(first) = self.work.iter().find(|work| work.name == "calibrate") {
            let (layers, all) = (self.model.config().num_layers, first.seconds(rate));
            let each = duration(all / layers as f64);
            let text = format!("{each} each, {} for all {layers}", duration(all));
            rows.push(("  layers to calibrate", text));
        }
        let rows = rows.iter().map(|(name, value)| (*name, value.as_str()));
        format!(
            "{}\n{}\n{}",
            console::pairs(rows, 40),
            memory_table(&peak),
            self.work_table(rate)
        )
    }

    fn work_table(&self, rate: f64) -> String {
        let rows: Vec<Vec<String>> = self
            .work
            .iter()
            .map(|work| {
                vec![
                    work.name.to_owned(),
                    work.passes.to_string(),
                    console::bytes(work.read),
                    duration(work.computing),
                    duration(work.seconds(rate)),
                ]
            })
            .collect();
        let read = if rate.is_finite() {
            format!("read, at {}/s", console::bytes(rate as u64))
        } else {
            "read".to_owned()
        };
        console::table(
            &[
                "passes over the model",
                "number",
                &read,
                "computing",
                "in all",
            ],
            &rows,
        )
    }
}

fn memory_table(peak: &Step) -> String {
    let mut parts = peak.parts.clone();
    parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    let rows: Vec<Vec<String>> = parts
        .iter()
        .map(|(what, bytes)| vec![(*what).to_owned(), console::bytes(*bytes as u64)])
        .collect();
    let title = format!("memory in `{}`", peak.name);
    console::table(&[&title, ""], &rows)
}

fn duration(seconds: f64) -> String {
    match seconds {
        ..10.0 => format!("{seconds:.1} s"),
        10.0..300.0 => format!("{seconds:.0} s"),
        300.0..18000.0 => format!("{:.0} min", seconds / 60.0),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_of_computing_and_moving_counts() {
        let work = |computing, read, written| Work {
            computing,
            read,
            written,
            ..Work::default()
        };
        assert_eq!(work(3.0, 10, 0).seconds(10.0), 3.0);
        assert_eq!(work(0.5, 10, 40).seconds(10.0), 5.0);
        assert_eq!(work(0.5, 10, 40).seconds(f64::INFINITY), 0.5);
    }

    #[test]
    fn durations_have_the_unit_that_fits() {
        let shown = [0.04, 99.0, 3000.0, 90_000.0].map(duration);
        assert_eq!(shown, ["0.0 s", "99 s", "50 min", "25.0 h"]);
    }
}
