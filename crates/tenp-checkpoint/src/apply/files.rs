//! Everything beside the tensors: identical copies, tokenizer files, plan, report, model card.

use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};

use super::ahead::{Ahead, EndOf};
use super::form::Output;
use super::tensors::Copying;
use super::{ApplyOptions, Notes};
use crate::atomic::{Sink, write_new};
use crate::index::{INDEX_FILE, SINGLE_FILE};
use crate::plan::Plan;
use crate::shard::Shard;
use crate::writer::{Naming, WrittenShards, create_partial, pretty};
use crate::{Checkpoint, CheckpointError};

const CHUNK_BYTES: usize = 16 << 20;

/// The extra file that a rewriter's notes go into.
const CARD: &str = "README.md";

/// The report for people.
const PAGE: &str = "report.html";

/// Files that this crate writes itself.
const OWN_FILES: [&str; 6] = [
    "config.json",
    INDEX_FILE,
    SINGLE_FILE,
    "tenp_plan.json",
    "report.json",
    PAGE,
];

/// Names, or beginnings of names, of files that go along with the weights.
const COMPANIONS: [&str; 9] = [
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    "generation_config.json",
    "LICENSE",
    "NOTICE",
];

pub(super) fn check_extra(out: &Path, extra: &[(String, Vec<u8>)]) -> Result<(), CheckpointError> {
    for (name, _) in extra {
        let plain = Path::new(name)
            .file_name()
            .is_some_and(|file| file == name.as_str());
        let weights = Path::new(name)
            .extension()
            .is_some_and(|extension| extension == "safetensors");
        if !plain || weights || OWN_FILES.contains(&name.as_str()) {
            return Err(CheckpointError::Output {
                path: out.to_path_buf(),
                problem: format!("the extra file `{name}` cannot go into it"),
            });
        }
    }
    Ok(())
}

pub(super) fn write_json(path: &Path, value: &Value, needed: u64) -> Result<(), CheckpointError> {
    write_new(path, &pretty(value), needed)
}

/// Copies shards, index and config byte for byte.
pub(super) fn copy_checkpoint(
    checkpoint: &Checkpoint,
    dir: &Path,
    copying: &mut Copying<'_>,
) -> Result<WrittenShards, CheckpointError> {
    let total = copying.total;
    let shards = &checkpoint.shards;
    let chunks: Vec<(usize, Range<usize>)> = shards
        .iter()
        .enumerate()
        .flat_map(|(index, shard)| chunks_of(shard).map(move |range| (index, range)))
        .collect();
    let ahead = Ahead::of_chunks(checkpoint, &chunks);
    std::thread::scope(|scope| {
        let _end = EndOf(&ahead);
        scope.spawn(|| ahead.read());
        let mut naming = Naming::new(scope, total);
        let mut chunk = 0;
        let copied = shards.iter().try_for_each(|shard| {
            let path = dir.join(&shard.name);
            if copying.keeps(&path, shard.num_bytes()) {
                chunk += chunks_of(shard).count();
                ahead.passed(chunk - 1);
                return Ok(());
            }
            let (partial, file) = create_partial(&path, total)?;
            let mut sink = Sink::new(&file, &path, total);
            for range in chunks_of(shard) {
                checkpoint.check_stop()?;
                shard.copy(range.clone(), &mut sink)?;
                copying.advance(range.len() as u64);
                ahead.passed(chunk);
                chunk += 1;
                naming.name_synced(&mut || copying.completed())?;
            }
            sink.flush()?;
            naming.add(file, partial, path, &mut || copying.completed())
        });
        let named = naming.finish(&mut || copying.completed());
        copied.and(named)
    })?;
    for name in ["config.json", INDEX_FILE] {
        let from = checkpoint.dir().join(name);
        if from.is_file() {
            copy_file(&from, &dir.join(name), total)?;
        }
    }
    Ok(WrittenShards {
        shards: shards.iter().map(|shard| shard.name.clone()).collect(),
        bytes: total,
    })
}

/// What is copied of a shard at once.
fn chunks_of(shard: &Shard) -> impl Iterator<Item = Range<usize>> + use<> {
    let length = shard.num_bytes() as usize;
    (0..length)
        .step_by(CHUNK_BYTES)
        .map(move |start| start..length.min(start + CHUNK_BYTES))
}

fn copy_file(from: &Path, to: &Path, needed: u64) -> Result<(), CheckpointError> {
    let bytes = std::fs::read(from).map_err(CheckpointError::io("read", from))?;
    write_new(to, &bytes, needed)
}

/// Everything the side files are made of.
pub(super) struct Side<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) plan: &'a Plan,
    pub(super) options: &'a ApplyOptions,
    /// Of the rewriter, if one was at work.
    pub(super) notes: Option<&'a Notes>,
    pub(super) output: &'a Output,
    /// What became of the MTP layers.
    pub(super) mtp: Option<Value>,
    pub(super) fingerprint: &'a str,
    pub(super) written: &'a WrittenShards,
    pub(super) num_tensors: usize,
    pub(super) needed: u64,
}

impl Side<'_> {
    pub(super) fn write(&self, dir: &Path) -> Result<(), CheckpointError> {
        self.copy_companions(dir)?;
        for (name, bytes) in &self.options.extra_files {
            let mut bytes = bytes.clone();
            if let Some(notes) = self.notes.filter(|_| name == CARD) {
                bytes.extend_from_slice(notes.card.as_bytes());
            }
            write_new(&dir.join(name), &bytes, self.needed)?;
        }
        let plan = dir.join("tenp_plan.json");
        write_new(&plan, &self.plan.to_json(&plan)?, self.needed)?;
        let report = self.report();
        if let Some(page) = self.options.page {
            let path = dir.join(PAGE);
            let text = page(&report).map_err(|error| CheckpointError::Output {
                path: path.clone(),
                problem: error.to_string(),
            })?;
            write_new(&path, text.as_bytes(), self.needed)?;
        }
        write_json(&dir.join("report.json"), &report, self.needed)
    }

    fn copy_companions(&self, dir: &Path) -> Result<(), CheckpointError> {
        let source = self.checkpoint.dir();
        let list = CheckpointError::io("list", source);
        let entries = std::fs::read_dir(source).map_err(list)?;
        for entry in entries {
            let entry = entry.map_err(CheckpointError::io("list", source))?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else {
                continue;
            };
            let companion = COMPANIONS.iter().any(|start| name.starts_with(start));
            let code = Path::new(name)
                .extension()
                .is_some_and(|extension| extension == "py");
            if companion && !code && entry.path().is_file() {
                copy_file(&entry.path(), &dir.join(name), self.needed)?;
            }
        }
        Ok(())
    }

    fn report(&self) -> Value {
        let mut report = self.options.report.clone();
        if let Some(notes) = self.notes {
            report.extend(notes.report.clone());
        }
        let mut add = |key: &str, value: Value| {
            report.insert(key.to_owned(), value);
        };
        add("run_fingerprint", json!(self.fingerprint));
        add("form", json!(self.output.name()));
        add("dtype", json!(self.options.dtype.name()));
        add(
            "source",
            json!({
                "name": folder_name(self.checkpoint.dir()),
                "fingerprint": self.checkpoint.fingerprint(),
            }),
        );
        let before: u64 = self.checkpoint.shards.iter().map(Shard::num_bytes).sum();
        add(
            "size",
            json!({
                "bytes_before": before,
                "bytes_after": self.written.bytes,
                "tensors": self.num_tensors,
                "shards": self.written.shards.len(),
                "experts": self.output.num_experts,
            }),
        );
        if let Some(mtp) = &self.mtp {
            add("mtp", mtp.clone());
        }
        Value::Object(report)
    }
}

/// The input's own name, also when it was given as `.` or through a symlink.
fn folder_name(dir: &Path) -> Option<String> {
    let dir = dir.canonicalize().ok()?;
    Some(dir.file_name()?.to_string_lossy().into_owned())
}
