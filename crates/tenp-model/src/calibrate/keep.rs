//! Keeping what a calibration has done, so that the same calibration goes on there after its process died: a file of
//! statistics for each layer, and the hidden states behind the last one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tenp_checkpoint::statistics::{read_parts, write_parts};
use tenp_checkpoint::{Folds, LayerStatistics, ModelConfig, Statistics, Work, sync_folder};

use super::{FoldOptions, MAX_FOLDS};
use crate::memory::StatisticsMemory;
use crate::{Model, ModelError, Run, Sequences};

/// Keeping takes at most about one part in this many of the time.
const TIME_SHARE: u32 = 20;

/// Bytes of hidden states that go to and from the disk at once.
const CHUNK_BYTES: usize = 8 << 20;

/// Where a calibration keeps what it has done.
#[derive(Debug)]
pub struct Keep {
    work: Work,
    /// Time that is worth keeping.
    every: Duration,
    started: Instant,
    last: Instant,
    /// What keeping took the last time.
    cost: Duration,
    /// Layers below this have their statistics in the folder.
    saved: usize,
    /// Bytes of `[N,K]` tables that wait until it is time to keep a layer; `None`: none is let go of.
    held_bytes: Option<usize>,
    trouble: Option<String>,
}

/// What a calibration knows so far.
#[derive(Debug, Default)]
pub(super) struct Collected {
    pub(super) statistics: Statistics,
    pub(super) folds: Folds,
}

impl Collected {
    /// Bytes of the domains' `[N,K]` tables.
    fn table_bytes(&self) -> usize {
        let layers = self.statistics.domains.values().flat_map(BTreeMap::values);
        layers.map(LayerStatistics::table_bytes).sum()
    }

    /// Lets go of these.
    fn let_go(&mut self) {
        let domains = self.statistics.domains.values_mut();
        for layer in domains.flat_map(BTreeMap::values_mut) {
            layer.let_go();
        }
    }
}

impl Keep {
    /// Bytes that a calibration of `tokens` tokens in `domains` domains keeps at most: every statistic, and hidden states
    /// twice while they are replaced.
    pub fn most_bytes(
        model: &Model<'_>,
        tokens: usize,
        domains: usize,
        options: &FoldOptions,
    ) -> usize {
        let groups = domains * options.num_folds.unwrap_or(MAX_FOLDS);
        let statistics = StatisticsMemory::new(model.config(), domains);
        statistics.kept_by(options, groups).all() + 2 * tokens * model.hidden_bytes_per_token()
    }

    /// Bytes of the hidden states of `tokens` tokens that are in memory on their way to the disk.
    pub(crate) fn chunk_bytes(model: &Model<'_>, tokens: usize) -> usize {
        let row = model.hidden_bytes_per_token();
        row * tokens.min(chunk_rows(row))
    }

    /// Keeps in a folder that the caller has resumed, no more often than `every`.
    pub fn new(work: Work, every: Duration) -> Self {
        let now = Instant::now();
        Self {
            work,
            every,
            started: now,
            last: now,
            cost: Duration::ZERO,
            saved: 0,
            held_bytes: None,
            trouble: None,
        }
    }

    /// The folder.
    pub fn work(&mut self) -> &mut Work {
        &mut self.work
    }

    /// Whether something that took `time` is worth keeping.
    pub fn is_worth(&self, time: Duration) -> bool {
        time >= self.every
    }

    /// Why the calibration could not be kept, if it could not. It went on all the same.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Removes everything: the result is where it belongs.
    pub fn finish(self) {
        self.work.finish();
    }

    pub(super) fn hold(&mut self, bytes: Option<usize>) {
        self.held_bytes = bytes;
    }

    /// Writes the statistics that were calibrated, those that were let go of too.
    ///
    /// # Errors
    /// As [`Statistics::write_with_parts`].
    pub fn write(&self, statistics: &Statistics, path: &Path) -> Result<(), ModelError> {
        Ok(statistics.write_with_parts(path, &|layer| self.parts(layer))?)
    }

    fn parts(&self, layer: usize) -> PathBuf {
        self.work.dir().join(format!("layer-{layer}.safetensors"))
    }

    fn hidden(&self, layer: usize) -> PathBuf {
        self.work.dir().join(format!("hidden-{layer}"))
    }

    /// The layer that a calibration goes on at; the number of layers where all are done.
    pub fn next_layer(&self, config: &ModelConfig) -> usize {
        if !self.work.is_begun() {
            return 0;
        }
        let has_all = |end: usize| {
            let mut before = config.moe_layers.iter().filter(|layer| **layer < end);
            before.all(|layer| self.parts(*layer).exists())
        };
        let with_hidden = |layer: &usize| self.hidden(*layer).exists() && has_all(*layer);
        if has_all(config.num_layers) {
            return config.num_layers;
        }
        (1..config.num_layers).rev().find(with_hidden).unwrap_or(0)
    }

    /// Goes on where an earlier run of the same calibration stopped.
    pub(super) fn restore(
        &mut self,
        config: &ModelConfig,
        collected: &mut Collected,
        run: &mut Run<'_>,
        sequences: &Sequences,
    ) -> Result<(), ModelError> {
        let next = self.next_layer(config);
        for layer in config.moe_layers.iter().filter(|layer| **layer < next) {
            let Collected { statistics, folds } = collected;
            let wanted = |_: &str| self.held_bytes.is_none();
            read_parts(&self.parts(*layer), *layer, statistics, folds, &wanted)?;
        }
        if (1..config.num_layers).contains(&next) {
            read_hidden(&self.hidden(next), run, sequences.num_tokens())?;
        }
        run.skip_to(next);
        self.saved = next;
        Ok(())
    }

    /// A layer is done: keeps it and those before it, if it is time, or if they are too much to hold.
    pub(super) fn layer_done(
        &mut self,
        layers: &[usize],
        collected: &mut Collected,
        run: &Run<'_>,
        sequences: &Sequences,
    ) {
        if self.trouble.is_some() {
            return;
        }
        let pause = self.every.max(self.cost * TIME_SHARE);
        if self.last.elapsed() >= pause {
            let kept = self.save(layers, collected, run.layer());
            let kept = kept.and_then(|()| self.save_hidden(run, sequences));
            self.finish_keeping(kept);
        } else if self
            .held_bytes
            .is_some_and(|most| collected.table_bytes() > most)
        {
            // Without the hidden states: it is not yet time to go on from here.
            let kept = self.save(layers, collected, run.layer());
            self.trouble = kept.err().map(|error| error.to_string());
        }
    }

    /// All layers are done: keeps them for what follows, if that is worth it.
    pub(super) fn all_done(
        &mut self,
        layers: &[usize],
        collected: &mut Collected,
        num_layers: usize,
    ) {
        if self.trouble.is_none() && self.is_worth(self.started.elapsed()) {
            let kept = self.save(layers, collected, num_layers);
            self.remove_hidden(num_layers);
            self.finish_keeping(kept);
        }
    }

    fn finish_keeping(&mut self, kept: Result<(), ModelError>) {
        self.trouble = kept.err().map(|error| error.to_string());
        self.last = Instant::now();
    }

    /// Saves the statistics of the layers before `end`, and lets go of their tables.
    fn save(
        &mut self,
        layers: &[usize],
        collected: &mut Collected,
        end: usize,
    ) -> Result<(), ModelError> {
        let started = Instant::now();
        let new = self.saved..end;
        for layer in layers.iter().filter(|layer| new.contains(layer)) {
            let Collected { statistics, folds } = collected;
            write_parts(&self.parts(*layer), *layer, statistics, folds)?;
        }
        self.work.begin()?;
        self.saved = end;
        if self.held_bytes.is_some() {
            collected.let_go();
        }
        self.cost = started.elapsed();
        Ok(())
    }

    /// Saves the hidden states behind the last layer, and removes those behind earlier ones.
    fn save_hidden(&mut self, run: &Run<'_>, sequences: &Sequences) -> Result<(), ModelError> {
        let started = Instant::now();
        let path = self.hidden(run.layer());
        let partial = path.with_extension("tmp");
        let written = write_hidden(&partial, run, sequences.num_tokens());
        let written = written.and_then(|()| std::fs::rename(&partial, &path).map_err(io(&path)));
        if let Err(error) = written {
            let _ = std::fs::remove_file(&partial);
            return Err(error);
        }
        // The new ones have their name on the disk before the old ones lose theirs.
        sync_folder(self.work.dir());
        self.remove_hidden(run.layer());
        self.cost += started.elapsed();
        Ok(())
    }

    fn remove_hidden(&self, before: usize) {
        for layer in 1..before {
            let path = self.hidden(layer);
            if path.exists() {
                // One that stays costs room, and nothing else.
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

/// Rows of a chunk, of `row_bytes` each.
fn chunk_rows(row_bytes: usize) -> usize {
    (CHUNK_BYTES / row_bytes.max(1)).max(1)
}

/// First row and length of every chunk of `[tokens, H]`.
fn chunks(tokens: usize, hidden_size: usize) -> impl Iterator<Item = (usize, usize)> {
    let rows = chunk_rows(hidden_size * size_of::<f32>());
    (0..tokens)
        .step_by(rows)
        .map(move |first| (first, rows.min(tokens - first)))
}

fn write_hidden(path: &Path, run: &Run<'_>, tokens: usize) -> Result<(), ModelError> {
    let mut file = File::create(path).map_err(io(path))?;
    let mut values = Vec::new();
    for (first, rows) in chunks(tokens, run.hidden_size()) {
        values.resize(rows * run.hidden_size(), 0f32);
        run.read_hidden(first, &mut values)?;
        file.write_all(bytemuck::cast_slice(&values))
            .map_err(io(path))?;
    }
    file.sync_all().map_err(io(path))
}

fn read_hidden(path: &Path, run: &mut Run<'_>, tokens: usize) -> Result<(), ModelError> {
    let mut file = File::open(path).map_err(io(path))?;
    let mut values = Vec::new();
    for (first, rows) in chunks(tokens, run.hidden_size()) {
        values.resize(rows * run.hidden_size(), 0f32);
        file.read_exact(bytemuck::cast_slice_mut(&mut values))
            .map_err(io(path))?;
        run.write_hidden(first, &values)?;
    }
    Ok(())
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> ModelError {
    let path = path.to_path_buf();
    move |source| ModelError::Io { path, source }
}
