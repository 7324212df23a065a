//! Progress: a bar with rate and time left on a terminal, a plain line now and then elsewhere.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::console;

/// Lines elsewhere than on a terminal come at most this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Tokens,
    Bytes,
    Layers,
}

/// Progress of one stage.
pub(crate) struct Progress {
    label: String,
    unit: Unit,
    total: u64,
    done: AtomicU64,
    /// What was done before it started, in no time.
    before: u64,
    /// Tokens pass every layer: the rate is in tokens through the whole model.
    per_item: f64,
    started: Instant,
    last_line: Mutex<Instant>,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// `total` counts every layer's tokens when `layers` is more than 1.
    pub(crate) fn new(label: &str, unit: Unit, total: u64, layers: usize) -> Self {
        let bar = console::user_attended_stderr().then(|| {
            let bar = ProgressBar::new(total);
            let template = "{msg:24} {wide_bar:.cyan/dim} {percent:>3} %  {rate}  ETA {eta}";
            let style = ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let per_item = layers.max(1) as f64;
            let style = style.with_key(
                "rate",
                move |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
                    let _ = out.write_str(&rate(unit, state.per_sec() / per_item));
                },
            );
            bar.set_style(style.progress_chars("━╸━"));
            bar.set_message(label.to_owned());
            bar
        });
        let now = Instant::now();
        Self {
            label: label.to_owned(),
            unit,
            total,
            done: AtomicU64::new(0),
            before: 0,
            per_item: layers.max(1) as f64,
            started: now,
            last_line: Mutex::new(now),
            bar,
        }
    }

    /// The same, where some of it was done before.
    pub(crate) fn going_on(mut self, before: u64) -> Self {
        self.before = before;
        self.done = AtomicU64::new(before);
        self.bar = self.bar.map(|bar| bar.with_position(before));
        self
    }

    /// Counts `by` more; from any thread.
    pub(crate) fn advance(&self, by: u64) {
        self.show(self.done.fetch_add(by, Ordering::Relaxed) + by);
    }

    pub(crate) fn set(&self, done: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.show(done);
    }

    fn show(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            return;
        }
        // Whoever finds the lock taken leaves the line to its holder.
        let Ok(mut last_line) = self.last_line.try_lock() else {
            return;
        };
        if last_line.elapsed() >= LINE_EVERY && done < self.total {
            *last_line = Instant::now();
            let share = done as f64 / self.total.max(1) as f64;
            let passed = (done - self.before).max(1) as f64;
            let left = self
                .started
                .elapsed()
                .mul_f64((self.total - done) as f64 / passed);
            console::note(&format!(
                "{}: {:.0} %, {}, about {} left",
                self.label,
                share * 100.0,
                self.rate(),
                HumanDuration(left)
            ));
        }
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn rate(&self) -> String {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-9);
        let done = self.done() - self.before;
        rate(self.unit, done as f64 / self.per_item / seconds)
    }

    /// Clears the bar and leaves one line.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        let amount = match self.unit {
            Unit::Tokens => format!("{} tokens", (self.done() as f64 / self.per_item).round()),
            Unit::Bytes => console::bytes(self.done()),
            Unit::Layers => format!("{} layers", self.done()),
        };
        console::note(&format!(
            "{}: {amount} in {seconds:.1} s ({})",
            self.label,
            self.rate()
        ));
    }
}

fn rate(unit: Unit, per_second: f64) -> String {
    match unit {
        Unit::Tokens => format!("{per_second:.0} tokens/s"),
        Unit::Bytes => format!("{}/s", console::bytes(per_second as u64)),
        Unit::Layers => format!("{per_second:.2} layers/s"),
    }
}
