//! Times by the GPU's own clock, sampled by criterion.

use std::cell::RefCell;
use std::time::Duration;

use criterion::{Criterion, SamplingMode, Throughput};
use tenp_kernels::KernelError;
use tenp_kernels::device::{Device, Timer};

/// Work that is asked for, not waited for.
pub(super) type Work<'a> = dyn FnMut(usize) -> Result<(), KernelError> + 'a;

/// Seconds of work of this name and so many FLOPs.
pub(super) type Measure<'a> = dyn Fn(&str, f64, &mut Work<'_>) -> Result<f64, KernelError> + 'a;

/// Samples of a benchmark.
const SAMPLES: usize = 10;

pub(super) struct Bench<'a> {
    pub(super) device: &'a Device,
    pub(super) timer: Timer,
    pub(super) criterion: RefCell<Criterion>,
}

impl Bench<'_> {
    /// Seconds of `iterations` runs over the sets in turn.
    fn time(&self, iterations: u64, sets: usize, work: &mut Work<'_>) -> Result<f64, KernelError> {
        self.timer.start(self.device)?;
        for i in 0..iterations {
            work((i % sets as u64) as usize)?;
        }
        self.timer.stop(self.device)?;
        Ok(self.timer.elapsed()?.as_secs_f64())
    }

    /// Median of criterion's samples, in seconds an iteration.
    pub(super) fn measure(
        &self,
        name: (&str, &str),
        flops: f64,
        sets: usize,
        work: &mut Work<'_>,
    ) -> Result<f64, KernelError> {
        self.time(sets as u64, sets, work)?;
        let (mut samples, mut failure) = (Vec::new(), None);
        let mut criterion = self.criterion.borrow_mut();
        let mut group = criterion.benchmark_group(name.0);
        group
            .sample_size(SAMPLES)
            .sampling_mode(SamplingMode::Flat)
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_millis(500))
            .throughput(Throughput::Elements(flops as u64));
        group.bench_function(name.1, |b| {
            b.iter_custom(|iterations| match self.time(iterations, sets, work) {
                Ok(seconds) => {
                    samples.push(seconds / iterations as f64);
                    Duration::from_secs_f64(seconds)
                }
                Err(error) => {
                    failure = Some(error);
                    Duration::from_nanos(1)
                }
            });
        });
        group.finish();
        match failure {
            Some(error) => Err(error),
            // Those before are criterion's warming up, of few iterations at first.
            None => Ok(median(
                &mut samples.split_off(samples.len().saturating_sub(SAMPLES)),
            )),
        }
    }
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}
