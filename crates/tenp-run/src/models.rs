//! Opening checkpoints and data the way every command does.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tenp_checkpoint::{Checkpoint, Plan};
use tenp_kernels::Compute;
use tenp_model::ModelError;
use tenp_model::text::{Data, Task, Tokenizer, read_samples, read_task};

use crate::cli::{ComputeArgs, DataArgs};

/// Opens a whole checkpoint.
pub(crate) fn open(dir: &Path) -> Result<Checkpoint> {
    Checkpoint::open(dir).with_context(|| format!("cannot open the checkpoint {}", dir.display()))
}

impl From<ComputeArgs> for Compute {
    fn from(args: ComputeArgs) -> Self {
        match args.compute {
            crate::cli::ComputeArg::F32 => Self::F32,
            crate::cli::ComputeArg::Bf16 => Self::Bf16,
        }
    }
}

/// Text of a checkpoint's tokenizer, opened when a file first needs it.
pub(crate) struct Texts<'c> {
    checkpoint: &'c Checkpoint,
    tokenizer: OnceCell<Tokenizer>,
}

impl<'c> Texts<'c> {
    pub(crate) fn new(checkpoint: &'c Checkpoint) -> Self {
        Self {
            checkpoint,
            tokenizer: OnceCell::new(),
        }
    }

    pub(crate) fn tokenizer(&self) -> Result<&Tokenizer, ModelError> {
        if self.tokenizer.get().is_none() {
            let opened = Tokenizer::open(self.checkpoint)?;
            return Ok(self.tokenizer.get_or_init(|| opened));
        }
        Ok(self.tokenizer.get().expect("just checked"))
    }

    /// The first `limit` samples of a file, checked against the vocabulary.
    pub(crate) fn samples(
        &self,
        path: &Path,
        limit: usize,
        seq_len: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let samples = read_samples(path, limit, seq_len, &mut || self.tokenizer())?;
        let vocab = self.checkpoint.config().vocab_size;
        for (index, sample) in samples.iter().enumerate() {
            if let Some(&id) = sample.iter().find(|&&id| id as usize >= vocab) {
                let place = format!("{}, sample {index}", path.display());
                return Err(ModelError::TokenId {
                    place,
                    id,
                    vocab_size: vocab,
                }
                .into());
            }
        }
        Ok(samples)
    }

    /// Samples by domain, in the order the domains were first named; `--samples` counts per domain.
    pub(crate) fn domains(&self, args: &DataArgs) -> Result<Vec<(String, Vec<Vec<u32>>)>> {
        let mut domains: Vec<(String, Vec<Vec<u32>>)> = Vec::new();
        for Data { domain, path } in &args.data {
            let index = domains
                .iter()
                .position(|(name, _)| name == domain)
                .unwrap_or_else(|| {
                    domains.push((domain.clone(), Vec::new()));
                    domains.len() - 1
                });
            let room = args.samples as usize - domains[index].1.len();
            if room > 0 {
                domains[index]
                    .1
                    .extend(self.samples(path, room, args.seq_len as usize)?);
            }
        }
        Ok(domains)
    }

    /// Tasks of files and of folders of `.jsonl` files, in name order.
    pub(crate) fn tasks(&self, paths: &[PathBuf]) -> Result<Vec<Task>> {
        let mut files = Vec::new();
        for path in paths {
            if !path.is_dir() {
                files.push(path.clone());
                continue;
            }
            let entries = std::fs::read_dir(path)
                .with_context(|| format!("cannot list {}", path.display()))?;
            let mut found: Vec<PathBuf> = entries
                .filter_map(|e| e.ok().map(|e| e.path()))
                .filter(|p| p.extension().is_some_and(|e| e == "jsonl"))
                .collect();
            if found.is_empty() {
                return Err(crate::failure::usage(format!(
                    "--tasks {}: no .jsonl file in this folder",
                    path.display()
                )));
            }
            found.sort();
            files.extend(found);
        }
        files
            .iter()
            .map(|file| Ok(read_task(file, self.tokenizer()?)?))
            .collect()
    }
}

/// Tokens in all.
pub(crate) fn num_tokens(domains: &[(String, Vec<Vec<u32>>)]) -> usize {
    domains
        .iter()
        .flat_map(|(_, samples)| samples)
        .map(Vec::len)
        .sum()
}

/// Ids in the original of every expert that a pruned checkpoint still has, `[moe layer][expert]`, if its plan is of
/// `reference`.
pub(crate) fn kept_experts(
    pruned: &Checkpoint,
    reference: &Checkpoint,
) -> Result<Option<Vec<Vec<usize>>>> {
    let path = pruned.dir().join("tenp_plan.json");
    if !path.exists() {
        return Ok(None);
    }
    let plan = Plan::read(&path)?;
    if plan.fingerprint != reference.fingerprint() {
        return Ok(None);
    }
    let kept = |layer: &tenp_checkpoint::LayerPlan| {
        layer
            .experts
            .iter()
            .filter(|e| !e.dropped)
            .map(|e| e.id)
            .collect()
    };
    Ok(Some(plan.layers.iter().map(kept).collect()))
}
