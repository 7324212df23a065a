//! Weights that are computed and not copied: kept in a scratch file between being made, layer by layer in depth order,
//! and being written, in the order of the shards.

use std::collections::HashMap;
use std::error::Error;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::atomic::write_error;
use crate::names::Part;
use crate::plan::{LayerPlan, Plan};
use crate::{Checkpoint, CheckpointError};

/// Makes new weights for the MoE layers of a plan.
pub trait LayerRewriter {
    /// What decides the new weights beside checkpoint and plan: part of the run's fingerprint.
    fn settings(&self) -> String;

    /// The new weights of a layer. Layers are asked for in depth order, each once.
    ///
    /// # Errors
    /// Whatever stands in the way; nothing is written then.
    fn layer(&mut self, layer: &LayerPlan) -> Result<RewrittenLayer, Box<dyn Error + Send + Sync>>;

    /// What there is to say, after the last layer.
    fn notes(&self) -> Notes {
        Notes::default()
    }
}

/// What a rewriter tells about its work.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Notes {
    /// Goes into `report.json`.
    pub report: Map<String, Value>,
    /// Markdown, appended to the model card.
    pub card: String,
}

/// New weights of a layer, in the dtypes of the tensors they replace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RewrittenLayer {
    /// Experts of which something is new.
    pub experts: Vec<RewrittenExpert>,
    /// `[experts that stay, H]`; rows of the input where absent.
    pub router: Option<Vec<u8>>,
}

/// New matrices of an expert, of the width W that the plan gives it; the input's kept neurons where absent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RewrittenExpert {
    /// Expert id in the input.
    pub id: usize,
    /// `[W, H]`.
    pub gate: Option<Vec<u8>>,
    /// `[W, H]`.
    pub up: Option<Vec<u8>>,
    /// `[H, W]`.
    pub down: Option<Vec<u8>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    Router(usize),
    Expert(usize, usize, Part),
}

/// New weights of all layers.
#[derive(Debug)]
pub(super) struct Rewritten {
    file: File,
    /// Where the file is, for messages: it has no name.
    dir: PathBuf,
    /// Offset and length.
    places: HashMap<Key, (u64, usize)>,
    notes: Notes,
}

impl Rewritten {
    /// Asks for every layer. The scratch file lies in `dir`, without a name, and goes away with this value.
    pub(super) fn collect(
        checkpoint: &Checkpoint,
        plan: &Plan,
        rewriter: &mut dyn LayerRewriter,
        dir: &Path,
        needed: u64,
    ) -> Result<Self, CheckpointError> {
        let file =
            tempfile::tempfile_in(dir).map_err(CheckpointError::io("create a file in", dir))?;
        let mut all = Self {
            file,
            dir: dir.to_path_buf(),
            places: HashMap::new(),
            notes: Notes::default(),
        };
        let mut end = 0;
        for layer in &plan.layers {
            let index = layer.layer;
            let new = rewriter
                .layer(layer)
                .map_err(|source| CheckpointError::Rewrite { source })?;
            let mut add = |key: Key, bytes: &[u8], expected: usize| {
                if bytes.len() != expected {
                    return Err(wrong_size(index, expected, bytes.len()));
                }
                all.file
                    .write_all(bytes)
                    .map_err(|error| write_error(error, dir, needed))?;
                all.places.insert(key, (end, bytes.len()));
                end += bytes.len() as u64;
                Ok(())
            };
            for expert in &new.experts {
                let planned = layer.kept().find(|plan| plan.id == expert.id);
                let width = planned.map_or(0, |plan| plan.width);
                let old = checkpoint.expert(index, expert.id)?;
                let hidden = checkpoint.config().hidden_size;
                for (part, bytes, matrix) in [
                    (Part::Gate, &expert.gate, old.gate),
                    (Part::Up, &expert.up, old.up),
                    (Part::Down, &expert.down, old.down),
                ] {
                    if let Some(bytes) = bytes {
                        let expected = width * hidden * matrix.dtype.size();
                        add(Key::Expert(index, expert.id, part), bytes, expected)?;
                    }
                }
            }
            if let Some(bytes) = &new.router {
                let old = checkpoint.router(index)?.weight;
                add(
                    Key::Router(index),
                    bytes,
                    layer.kept().count() * old.row(0).len(),
                )?;
            }
            checkpoint.release_layer(index);
        }
        all.notes = rewriter.notes();
        Ok(all)
    }

    pub(super) fn notes(&self) -> &Notes {
        &self.notes
    }

    /// A new router, if the layer has one.
    pub(super) fn router(&self, layer: usize) -> Result<Option<Vec<u8>>, CheckpointError> {
        self.read(Key::Router(layer))
    }

    /// A new matrix of an expert, if it has one.
    pub(super) fn expert(
        &self,
        layer: usize,
        expert: usize,
        part: Part,
    ) -> Result<Option<Vec<u8>>, CheckpointError> {
        self.read(Key::Expert(layer, expert, part))
    }

    fn read(&self, key: Key) -> Result<Option<Vec<u8>>, CheckpointError> {
        let Some((offset, length)) = self.places.get(&key) else {
            return Ok(None);
        };
        let mut bytes = vec![0; *length];
        let mut file = &self.file;
        file.seek(SeekFrom::Start(*offset))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(CheckpointError::io(
                "read back a scratch file in",
                &self.dir,
            ))?;
        Ok(Some(bytes))
    }
}

fn wrong_size(layer: usize, expected: usize, got: usize) -> CheckpointError {
    CheckpointError::Rewrite {
        source: format!("layer {layer}: a new tensor has {got} bytes instead of {expected}").into(),
    }
}
