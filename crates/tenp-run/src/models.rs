//! Opening checkpoints and data the way every command does.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};
use tenp_checkpoint::{
    Checkpoint, CheckpointError, Plan, check_not_linked, check_replaceable, check_writable,
    folder_of,
};
use tenp_model::ModelError;
use tenp_model::text::{Data, Task, Tokenizer, read_prompts, read_samples, read_task};

use crate::cli::DataArgs;
use crate::failure::usage;
use crate::interrupt;

/// Opens a whole checkpoint.
pub(crate) fn open(dir: &Path) -> Result<Checkpoint> {
    opened(dir, Checkpoint::open)
}

/// Opens a checkpoint whose shards need not all be there.
pub(crate) fn open_partial(dir: &Path) -> Result<Checkpoint> {
    opened(dir, Checkpoint::open_partial)
}

fn opened(
    dir: &Path,
    open: fn(&Path) -> Result<Checkpoint, CheckpointError>,
) -> Result<Checkpoint> {
    check_folder(dir)?;
    let checkpoint = open(dir);
    let mut checkpoint =
        checkpoint.with_context(|| format!("cannot open the checkpoint {}", dir.display()))?;
    checkpoint.stop_when(interrupt::stop());
    Ok(checkpoint)
}

/// Refuses what is no folder of a checkpoint.
pub(crate) fn check_folder(dir: &Path) -> Result<()> {
    let what = if !dir.exists() {
        "does not exist"
    } else if !dir.is_dir() {
        "is a file"
    } else if !dir.join("config.json").exists() {
        "has no config.json"
    } else {
        return Ok(());
    };
    bail!(
        "{} {what}; give the folder of a checkpoint, as downloaded from Hugging Face",
        dir.display()
    )
}

/// Refuses a place where a single file cannot or must not be written, before any work: nothing is written into the folder
/// `model` or over one of the files `read`.
pub(crate) fn check_file(
    flag: &str,
    path: &Path,
    model: Option<&Path>,
    read: &[&Path],
) -> Result<()> {
    let refuse = |problem: &str| Err(usage(format!("{flag} {}: {problem}", path.display())));
    let accept = |checked: Result<(), CheckpointError>| match checked {
        Err(CheckpointError::Output { problem, .. }) => refuse(&problem),
        other => Ok(other?),
    };
    accept(check_replaceable(path))?;
    let Ok(parent) = folder_of(path).canonicalize() else {
        return refuse("lies in a folder that does not exist; create that folder first");
    };
    let model = model.and_then(|model| model.canonicalize().ok());
    if let Some(model) = &model {
        accept(check_not_linked(path, model))?;
    }
    if model.is_some_and(|model| parent.starts_with(model)) {
        return refuse("lies inside the input folder, which is never touched; choose another");
    }
    // What is there may be finished.
    if !path.exists() {
        accept(check_writable(&parent, path))?;
    }
    let place = path.canonicalize().ok();
    let mut read = read.iter().filter_map(|file| file.canonicalize().ok());
    if place.is_some() && read.any(|file| Some(file) == place) {
        return refuse("is a file that is read, which is never touched; choose another");
    }
    Ok(())
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .map_or_else(String::new, |s| s.to_string_lossy().into_owned())
}

/// Results go by the files' stems, which must therefore differ.
fn check_names(flag: &str, files: &[PathBuf]) -> Result<()> {
    for (index, file) in files.iter().enumerate() {
        if let Some(other) = files[..index].iter().find(|f| stem(f) == stem(file)) {
            return Err(usage(format!(
                "{flag}: {} and {} have the same name `{}`, by which results go; rename one",
                other.display(),
                file.display(),
                stem(file)
            )));
        }
    }
    Ok(())
}

/// Samples by domain.
pub(crate) type Domains = Vec<(String, Samples)>;

/// Token ids of samples.
type Samples = Vec<Vec<u32>>;

/// A short name for data: equal data, equal names.
pub(crate) fn fingerprint(data: &impl serde::Serialize) -> String {
    let text = serde_json::to_vec(data).expect("plain data");
    let digest = Sha256::digest(&text);
    digest
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
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
        self.checked(
            path,
            read_samples(path, limit, seq_len, &mut || self.tokenizer())?,
        )
    }

    fn checked(&self, path: &Path, samples: Samples) -> Result<Samples> {
        for (index, sample) in samples.iter().enumerate() {
            self.check(sample, || format!("{}, sample {index}", path.display()))?;
        }
        Ok(samples)
    }

    /// Tokens of a sample: as many as were asked for, else 2048 or what the model has positions for.
    pub(crate) fn seq_len(&self, asked: Option<u32>) -> usize {
        asked.map_or_else(
            || self.checkpoint.config().max_positions.min(2048),
            |len| len as usize,
        )
    }

    /// The named texts of the files, whole.
    pub(crate) fn texts(
        &self,
        flag: &str,
        paths: &[PathBuf],
        seq_len: Option<u32>,
    ) -> Result<Domains> {
        check_names(flag, paths)?;
        paths
            .iter()
            .map(|path| {
                let samples = self.samples(path, usize::MAX, self.seq_len(seq_len))?;
                if samples.iter().all(|sample| sample.len() < 2) {
                    let path = path.display();
                    return Err(usage(format!(
                        "{flag} {path}: no sample has a second token to predict; give longer text"
                    )));
                }
                Ok((stem(path), samples))
            })
            .collect()
    }

    /// A sequence is in the vocabulary and no longer than the model allows.
    fn check(&self, ids: &[u32], place: impl Fn() -> String) -> Result<(), ModelError> {
        let config = self.checkpoint.config();
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= config.vocab_size) {
            return Err(ModelError::TokenId {
                place: place(),
                id,
                vocab_size: config.vocab_size,
            });
        }
        if ids.len() > config.max_positions {
            return Err(ModelError::TooLong {
                place: place(),
                len: ids.len(),
                max: config.max_positions,
            });
        }
        Ok(())
    }

    fn task(&self, file: &Path) -> Result<Task> {
        let task = read_task(file, self.tokenizer()?)?;
        for (index, item) in task.items.iter().enumerate() {
            let place = || format!("{}, question {index}", file.display());
            for choice in &item.choices {
                self.check(&[&item.prompt[..], choice].concat(), place)?;
            }
        }
        Ok(task)
    }

    /// Samples by domain, in the order the domains were first named; `--samples` counts per domain.
    pub(crate) fn domains(&self, args: &DataArgs) -> Result<Domains> {
        let seq_len = self.seq_len(args.seq_len);
        by_domain(args, &|path, limit| self.samples(path, limit, seq_len))
    }

    /// The samples' prompts by domain, in the same order.
    pub(crate) fn prompts(&self, args: &DataArgs) -> Result<Domains> {
        let seq_len = self.seq_len(args.seq_len);
        by_domain(args, &|path, limit| {
            let tokenizer = &mut || self.tokenizer();
            self.checked(path, read_prompts(path, limit, seq_len, tokenizer)?)
        })
    }

    /// Calibration draws: `--samples` samples of each domain, other ones in each draw where there are enough, in the
    /// order of their files. The first draw is what `calibrate` would take.
    pub(crate) fn draws(&self, args: &DataArgs, draws: u32) -> Result<Vec<Domains>> {
        let everything = DataArgs {
            samples: u32::MAX,
            ..args.clone()
        };
        let all = self.domains(&everything)?;
        let draw = |seed: u32| {
            let domains = all.iter().map(|(name, samples)| {
                let wanted = (args.samples as usize).min(samples.len());
                let mut ids: Vec<usize> = if seed == 0 {
                    (0..wanted).collect()
                } else {
                    let mut rng = ChaCha8Rng::seed_from_u64(u64::from(seed));
                    rand::seq::index::sample(&mut rng, samples.len(), wanted).into_vec()
                };
                ids.sort_unstable();
                let chosen = ids.into_iter().map(|i| samples[i].clone()).collect();
                (name.clone(), chosen)
            });
            domains.collect()
        };
        Ok((0..draws).map(draw).collect())
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
                return Err(usage(format!(
                    "--tasks {}: no .jsonl file in this folder",
                    path.display()
                )));
            }
            found.sort();
            files.extend(found);
        }
        check_names("--tasks", &files)?;
        files.iter().map(|file| self.task(file)).collect()
    }
}

/// What `read` takes of each file, by domain in the order the domains were first named; of a domain no more than
/// `--samples`.
fn by_domain(args: &DataArgs, read: &dyn Fn(&Path, usize) -> Result<Samples>) -> Result<Domains> {
    let mut domains: Domains = Vec::new();
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
            domains[index].1.extend(read(path, room)?);
        }
    }
    Ok(domains)
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
