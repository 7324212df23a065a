//! Opening a checkpoint folder: config, shards, and the check that every tensor the model needs is there.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use serde_json::{Map, Value};

use crate::config::{ConfigFile, ModelConfig};
use crate::expected::{ExpectedTensor, Role, expected_tensors};
use crate::fingerprint;
use crate::header::Entry;
use crate::index::{self, INDEX_FILE, ShardList};
use crate::names::{Spelling, layer_of};
use crate::residency::LayerRanges;
use crate::shard::Shard;
use crate::{CheckpointError, Dtype};

/// A checkpoint folder, memory-mapped. Nothing but headers, and samples for the fingerprint, is read until a tensor's bytes are touched.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    config_json: Map<String, Value>,
    spelling: Spelling,
    pub(crate) shards: Vec<Shard>,
    /// Tensor name to shard and entry.
    by_name: HashMap<String, (usize, usize)>,
    missing: Vec<String>,
    promised: std::collections::BTreeMap<String, String>,
    fingerprint: String,
    pub(crate) ranges: LayerRanges,
    is_fp8: bool,
    /// Scales in f32 that are stored otherwise, by name.
    pub(crate) wide_scales: HashMap<String, OnceLock<Vec<u8>>>,
    stop: Arc<AtomicBool>,
}

/// A tensor inside a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Name.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: &'a [usize],
    /// Little-endian data at any alignment.
    pub bytes: &'a [u8],
}

impl Checkpoint {
    /// Opens a folder and checks it whole.
    ///
    /// # Errors
    /// A config that is unreadable or of an unknown family, a damaged or missing shard, an index that points outside
    /// the folder or contradicts its shards, a tensor that the model needs and that is missing, of the wrong shape or of
    /// an unsupported dtype. The message names file and tensor.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let checkpoint = Self::open_partial(dir)?;
        if let Some(shard) = checkpoint.missing.first() {
            return Err(CheckpointError::MissingShard {
                dir: dir.to_path_buf(),
                shard: shard.clone(),
                missing: checkpoint.missing.len(),
                total: checkpoint.missing.len() + checkpoint.shards.len(),
            });
        }
        Ok(checkpoint)
    }

    /// Like [`Self::open`], but shards that the index names and that are not there are listed by
    /// [`Self::missing_shards`]; tensors they should hold are not asked for.
    ///
    /// # Errors
    /// As [`Self::open`], except for missing shards.
    pub fn open_partial(dir: &Path) -> Result<Self, CheckpointError> {
        let config_path = dir.join("config.json");
        let text =
            std::fs::read(&config_path).map_err(CheckpointError::io("read", &config_path))?;
        let ConfigFile {
            json: config_json,
            model: config,
            fp8,
        } = ConfigFile::parse(&config_path, &text)?;
        let ShardList {
            present,
            missing,
            promised,
        } = index::locate(dir)?;
        let shards = present
            .iter()
            .map(|name| Shard::open(dir, name))
            .collect::<Result<Vec<_>, _>>()?;
        let by_name = by_name(&shards)?;
        check_index(dir, &promised, &missing, &shards, &by_name)?;
        let spelling = Spelling::detect(config.family, config.moe_layers[0], |name| {
            by_name.contains_key(name) || promised.contains_key(name)
        });
        let fingerprint = fingerprint::of(&text, &shards)?;
        let ranges = LayerRanges::new(&shards);
        let mut checkpoint = Self {
            dir: dir.to_path_buf(),
            config,
            config_json,
            spelling,
            shards,
            by_name,
            missing,
            promised,
            fingerprint,
            ranges,
            is_fp8: false,
            wide_scales: HashMap::new(),
            stop: Arc::default(),
        };
        for expected in expected_tensors(&checkpoint.config, spelling) {
            checkpoint.check(&expected)?;
        }
        checkpoint.check_last_layers(&config_path)?;
        checkpoint.is_fp8 = checkpoint.check_scales(fp8)?;
        checkpoint.note_wide_scales();
        Ok(checkpoint)
    }

    /// Layers behind those of the config are for multi-token prediction, and have the projection that joins its two inputs.
    fn check_last_layers(&self, config_path: &Path) -> Result<(), CheckpointError> {
        let num_layers = self.config.num_layers;
        for tensor in self.tensors() {
            let Some(layer) = layer_of(tensor.name).filter(|layer| *layer >= num_layers) else {
                continue;
            };
            let joins = format!("model.layers.{layer}.eh_proj.weight");
            if !self.contains(&joins) && !self.is_in_missing_shard(&joins) {
                return Err(CheckpointError::Config {
                    path: config_path.to_path_buf(),
                    field: "num_hidden_layers".to_owned(),
                    problem: format!(
                        "is {num_layers}, but there is {}, and layer {layer} is none for multi-token prediction; config.json \
                         is of another model, download both again",
                        tensor.name
                    ),
                });
            }
        }
        Ok(())
    }

    fn check(&self, expected: &ExpectedTensor) -> Result<(), CheckpointError> {
        let Some((shard, entry)) = self.find(&expected.name) else {
            if self.is_in_missing_shard(&expected.name) {
                return Ok(());
            }
            return Err(CheckpointError::MissingTensor {
                tensor: expected.name.clone(),
                shape: expected.shape.clone(),
                place: self.place_of_missing(&expected.name),
            });
        };
        check_shape(shard, entry, &expected.shape)?;
        // Its rows are cut and mixed one by one, and no published checkpoint has it in fp8.
        if expected.role == Role::Router && entry.dtype == Dtype::F8E4M3 {
            return Err(unreadable(shard, entry));
        }
        check_dtype(shard, entry)
    }

    /// Work on this checkpoint ends with [`CheckpointError::Interrupted`] soon after `stop` becomes true.
    pub fn stop_when(&mut self, stop: Arc<AtomicBool>) {
        self.stop = stop;
    }

    /// To be asked between parts of long work.
    ///
    /// # Errors
    /// [`CheckpointError::Interrupted`] once the work is to stop.
    pub fn check_stop(&self) -> Result<(), CheckpointError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(CheckpointError::Interrupted);
        }
        Ok(())
    }

    /// To be asked before a result is put in its place.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`] if a shard was written to since it was opened.
    pub fn check_unchanged(&self) -> Result<(), CheckpointError> {
        self.shards.iter().try_for_each(Shard::check_unchanged)
    }

    /// Shard names of the index that are not in the folder.
    pub fn missing_shards(&self) -> &[String] {
        &self.missing
    }

    /// The folder, as given.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What `config.json` says, normalised.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// `config.json` as it stands in the file.
    pub fn config_json(&self) -> &Map<String, Value> {
        &self.config_json
    }

    /// How the checkpoint spells its MoE tensors.
    pub fn spelling(&self) -> Spelling {
        self.spelling
    }

    /// Whether any weight is fp8.
    pub fn is_fp8(&self) -> bool {
        self.is_fp8
    }

    /// SHA-256, in hex, over `config.json`, every shard's name, length and header, and a few bytes of up to 4,096 tensors:
    /// all of a small model's, and of a large one so many that other weights of the same shapes hardly pass for these.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Whether a tensor of that name is there.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, CheckpointError> {
        self.find(name)
            .map(|(shard, entry)| view(shard, entry))
            .ok_or_else(|| CheckpointError::MissingTensor {
                tensor: name.to_owned(),
                shape: Vec::new(),
                place: self.place_of_missing(name),
            })
    }

    /// Copies a tensor's bytes as they are.
    pub(crate) fn copy(
        &self,
        tensor: &TensorView<'_>,
        sink: &mut crate::Sink<'_>,
    ) -> Result<(), CheckpointError> {
        match self.find(tensor.name) {
            Some((shard, entry)) => shard.copy(entry.start..entry.end, sink),
            None => sink.write(tensor.bytes),
        }
    }

    /// Every tensor: shards by name, inside a shard by offset.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.shards
            .iter()
            .flat_map(|shard| shard.entries.iter().map(move |entry| view(shard, entry)))
    }

    /// Shard and entry of a tensor.
    pub(crate) fn find(&self, name: &str) -> Option<(&Shard, &Entry)> {
        let (shard, entry) = *self.by_name.get(name)?;
        let shard = &self.shards[shard];
        Some((shard, &shard.entries[entry]))
    }

    /// File name of the shard that holds a tensor.
    pub fn shard_of(&self, name: &str) -> Option<&str> {
        self.find(name).map(|(shard, _)| shard.name.as_str())
    }

    /// Whether the index says that a tensor is in a shard that is not there.
    pub(crate) fn is_in_missing_shard(&self, name: &str) -> bool {
        let place = self.promised.get(name);
        place.is_some_and(|shard| self.missing.contains(shard))
    }

    fn place_of_missing(&self, name: &str) -> String {
        match self.promised.get(name) {
            Some(shard) => self.dir.join(shard).display().to_string(),
            None => self.dir.display().to_string(),
        }
    }
}

pub(crate) fn view<'a>(shard: &'a Shard, entry: &'a Entry) -> TensorView<'a> {
    TensorView {
        name: &entry.name,
        dtype: entry.dtype,
        shape: &entry.shape,
        bytes: shard.bytes(entry),
    }
}

pub(crate) fn check_shape(
    shard: &Shard,
    entry: &Entry,
    expected: &[usize],
) -> Result<(), CheckpointError> {
    if entry.shape == expected {
        return Ok(());
    }
    Err(CheckpointError::Shape {
        tensor: entry.name.clone(),
        shard: shard.path.display().to_string(),
        expected: expected.to_vec(),
        got: entry.shape.clone(),
    })
}

pub(crate) fn check_dtype(shard: &Shard, entry: &Entry) -> Result<(), CheckpointError> {
    // That an fp8 matrix has its scales is checked when the folder is opened.
    if entry.dtype.is_weight() || (entry.dtype == Dtype::F8E4M3 && entry.shape.len() == 2) {
        return Ok(());
    }
    Err(unreadable(shard, entry))
}

pub(crate) fn unreadable(shard: &Shard, entry: &Entry) -> CheckpointError {
    CheckpointError::Dtype {
        tensor: entry.name.clone(),
        shard: shard.path.display().to_string(),
        got: entry.dtype,
        remedy: match entry.dtype {
            Dtype::F8E4M3 => {
                "of fp8 only matrices of two axes that are no router are read; convert it to bf16 first"
            }
            _ => "convert it to bf16 first",
        },
    }
}

fn by_name(shards: &[Shard]) -> Result<HashMap<String, (usize, usize)>, CheckpointError> {
    let mut by_name = HashMap::new();
    for (shard_index, shard) in shards.iter().enumerate() {
        for (index, entry) in shard.entries.iter().enumerate() {
            if let Some((first, _)) = by_name.insert(entry.name.clone(), (shard_index, index)) {
                return Err(CheckpointError::DuplicateTensor {
                    tensor: entry.name.clone(),
                    first: shards[first].path.display().to_string(),
                    second: shard.path.display().to_string(),
                });
            }
        }
    }
    Ok(by_name)
}

fn check_index(
    dir: &Path,
    promised: &std::collections::BTreeMap<String, String>,
    missing: &[String],
    shards: &[Shard],
    by_name: &HashMap<String, (usize, usize)>,
) -> Result<(), CheckpointError> {
    for (tensor, shard) in promised {
        if missing.contains(shard) {
            continue;
        }
        let holder = by_name.get(tensor).map(|(index, _)| &shards[*index].name);
        if holder != Some(shard) {
            let found = holder.map_or("is not in it".to_owned(), |name| format!("is in {name}"));
            return Err(CheckpointError::Index {
                path: dir.join(INDEX_FILE),
                problem: format!(
                    "says tensor {tensor} is in {shard}, but it {found}; index and shards are of different downloads, \
                     download again"
                ),
            });
        }
    }
    Ok(())
}
