//! Weights that are computed and not copied: a file per layer in the work folder between being made, in depth order, and
//! being written, in the order of the shards.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::atomic::replace_file;
use crate::header::{self, PlannedTensor};
use crate::names::Part;
use crate::plan::{LayerPlan, Plan};
use crate::shard::Shard;
use crate::work::Work;
use crate::{Checkpoint, CheckpointError, Dtype, Matrix, OwnedMatrix, Room, StoredMatrix};

use super::OutputDtype;

/// In a layer file's metadata.
const OUTCOME: &str = "outcome";

const ROUTER: &str = "router";

/// Makes new weights for the MoE layers of a plan.
pub trait LayerRewriter {
    /// What decides the new weights beside checkpoint and plan: part of the run's fingerprint.
    fn settings(&self) -> String;

    /// The new weights of a layer, of `dtype` in the output, in `room`. Layers are asked for in depth order, each once.
    ///
    /// # Errors
    /// Whatever stands in the way.
    fn layer(
        &mut self,
        layer: &LayerPlan,
        dtype: OutputDtype,
        room: &Room,
    ) -> Result<RewrittenLayer, Box<dyn Error + Send + Sync>>;

    /// Instead of [`Self::layer`], for a layer that an earlier run of the same settings has made.
    ///
    /// # Errors
    /// Whatever stands in the way of the layers behind it.
    fn made_before(
        &mut self,
        _layer: &LayerPlan,
        _made: &RewrittenLayer,
        _dtype: OutputDtype,
        _room: &Room,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(())
    }

    /// What there is to say, from the outcomes of all layers in depth order.
    fn notes(&self, _outcomes: &[Value]) -> Notes {
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

/// New weights of a layer, in the dtypes that the tensors they replace have in the output.
#[derive(Debug, Default, PartialEq)]
pub struct RewrittenLayer {
    /// Experts of which something is new.
    pub experts: Vec<RewrittenExpert>,
    /// `[experts that stay, H]`; rows of the input where absent.
    pub router: Option<Vec<u8>>,
    /// What the rewriter wants to know of this layer when all are done.
    pub outcome: Value,
}

/// New matrices of an expert, of the width W that the plan gives it; the input's kept neurons where absent.
#[derive(Debug, Default, PartialEq)]
pub struct RewrittenExpert {
    /// Expert id in the input.
    pub id: usize,
    /// `[W, H]`.
    pub gate: Option<StoredMatrix>,
    /// `[W, H]`.
    pub up: Option<StoredMatrix>,
    /// `[H, W]`.
    pub down: Option<StoredMatrix>,
}

/// New weights of all layers.
#[derive(Debug)]
pub(super) struct Rewritten {
    files: HashMap<usize, Shard>,
    notes: Notes,
}

impl Rewritten {
    /// Asks for every layer that is not in the work folder.
    pub(super) fn collect<'a>(
        checkpoint: &'a Checkpoint,
        plan: &'a Plan,
        (rewriter, dtype): (&mut dyn LayerRewriter, OutputDtype),
        work: &mut Work,
        needed: u64,
    ) -> Result<Self, CheckpointError> {
        let dir = work.dir().to_path_buf();
        let mut files = HashMap::new();
        let mut outcomes = Vec::with_capacity(plan.layers.len());
        let failed = |source| CheckpointError::Rewrite { source };
        let file = |layer: &'a LayerPlan| LayerFile {
            checkpoint,
            layer,
            dtype,
            path: dir.join(format!("layer-{}.safetensors", layer.layer)),
        };
        let all_made = plan.layers.iter().all(|layer| file(layer).path.exists());
        for layer in &plan.layers {
            checkpoint.check_stop()?;
            let (file, room) = (file(layer), Room::new(&dir));
            if all_made {
                outcomes.push(file.outcome(&file.open()?)?);
            } else if file.path.exists() {
                let made = file.read(&room)?;
                rewriter
                    .made_before(layer, &made, dtype, &room)
                    .map_err(failed)?;
                outcomes.push(made.outcome);
            } else {
                let made = rewriter.layer(layer, dtype, &room).map_err(failed)?;
                work.begin()?;
                file.write(&made, needed)?;
                outcomes.push(made.outcome);
            }
            checkpoint.release_layer(layer.layer);
            files.insert(layer.layer, file.open()?);
        }
        Ok(Self {
            files,
            notes: rewriter.notes(&outcomes),
        })
    }

    pub(super) fn notes(&self) -> &Notes {
        &self.notes
    }

    /// A new router, if the layer has one.
    pub(super) fn router(&self, layer: usize) -> Option<Vec<u8>> {
        bytes_of(self.files.get(&layer)?, ROUTER)
    }

    /// Whether an expert has a new matrix.
    pub(super) fn holds(&self, layer: usize, expert: usize, part: Part) -> bool {
        let name = matrix_name(expert, part);
        let file = self.files.get(&layer);
        file.is_some_and(|file| file.entries.iter().any(|entry| entry.name == name))
    }

    /// A new matrix of an expert, if it has one.
    pub(super) fn expert(&self, layer: usize, expert: usize, part: Part) -> Option<OwnedMatrix> {
        matrix_of(self.files.get(&layer)?, expert, part)
    }
}

fn matrix_name(expert: usize, part: Part) -> String {
    format!("{expert}.{part:?}").to_lowercase()
}

/// Of the scales of an fp8 matrix.
fn scales_name(matrix: &str) -> String {
    format!("{matrix}.scales")
}

fn matrix_of(file: &Shard, expert: usize, part: Part) -> Option<OwnedMatrix> {
    let name = matrix_name(expert, part);
    let entry = file.entries.iter().find(|entry| entry.name == name)?;
    let &[rows, cols] = &entry.shape[..] else {
        return None;
    };
    Some(OwnedMatrix {
        dtype: entry.dtype,
        rows,
        cols,
        bytes: bytes_of(file, &name)?,
        scales: bytes_of(file, &scales_name(&name)).unwrap_or_default(),
    })
}

fn bytes_of(file: &Shard, name: &str) -> Option<Vec<u8>> {
    let entry = file.entries.iter().find(|entry| entry.name == name)?;
    let bytes = file.bytes(entry).to_vec();
    file.release(entry.start..entry.end);
    Some(bytes)
}

/// The new weights of one layer on the disk: a safetensors file; routers and scales as bytes.
struct LayerFile<'a> {
    checkpoint: &'a Checkpoint,
    layer: &'a LayerPlan,
    dtype: OutputDtype,
    path: PathBuf,
}

impl LayerFile<'_> {
    fn open(&self) -> Result<Shard, CheckpointError> {
        Shard::open_file(self.path.clone(), "new weights")
    }

    fn read(&self, room: &Room) -> Result<RewrittenLayer, CheckpointError> {
        let file = self.open()?;
        let mut made = RewrittenLayer {
            router: bytes_of(&file, ROUTER),
            outcome: self.outcome(&file)?,
            experts: Vec::new(),
        };
        for plan in self.layer.kept() {
            let find = |part| {
                let matrix = matrix_of(&file, plan.id, part);
                matrix.map(|matrix| room.keep(matrix)).transpose()
            };
            let expert = RewrittenExpert {
                id: plan.id,
                gate: find(Part::Gate)?,
                up: find(Part::Up)?,
                down: find(Part::Down)?,
            };
            if expert.gate.is_some() || expert.up.is_some() || expert.down.is_some() {
                made.experts.push(expert);
            }
        }
        Ok(made)
    }

    /// What the rewriter noted of the layer.
    fn outcome(&self, file: &Shard) -> Result<Value, CheckpointError> {
        let outcome = file.metadata.get(OUTCOME).map_or("null", String::as_str);
        serde_json::from_str(outcome).map_err(|source| CheckpointError::Json {
            path: self.path.clone(),
            source,
        })
    }

    fn write(&self, made: &RewrittenLayer, needed: u64) -> Result<(), CheckpointError> {
        let parts = self.parts(made)?;
        let planned: Vec<&PlannedTensor> = parts.iter().map(|(planned, _)| planned).collect();
        let metadata = BTreeMap::from([(OUTCOME.to_owned(), made.outcome.to_string())]);
        replace_file(&self.path, needed, |sink| {
            sink.write(&header::build(&metadata, &planned))?;
            parts.iter().try_for_each(|(_, bytes)| sink.write(bytes))
        })
    }

    /// Every new tensor, of the type and size that it should have.
    fn parts<'m>(
        &self,
        made: &'m RewrittenLayer,
    ) -> Result<Vec<(PlannedTensor, &'m [u8])>, CheckpointError> {
        let (checkpoint, index) = (self.checkpoint, self.layer.layer);
        let hidden = checkpoint.config().hidden_size;
        let plain = |name, bytes: &'m [u8]| {
            let planned = PlannedTensor {
                name,
                dtype: Dtype::U8,
                shape: vec![bytes.len()],
            };
            (planned, bytes)
        };
        let mut parts: Vec<(PlannedTensor, &[u8])> = Vec::new();
        for expert in &made.experts {
            let planned = self.layer.kept().find(|plan| plan.id == expert.id);
            let width = planned.map_or(0, |plan| plan.width);
            let old = checkpoint.expert(index, expert.id)?;
            for (part, matrix, old, shape) in [
                (Part::Gate, &expert.gate, old.gate, (width, hidden)),
                (Part::Up, &expert.up, old.up, (width, hidden)),
                (Part::Down, &expert.down, old.down, (hidden, width)),
            ] {
                let Some(matrix) = matrix.as_ref().map(StoredMatrix::view) else {
                    continue;
                };
                let (rows, cols) = shape;
                let fits = (matrix.rows, matrix.cols) == shape
                    && matrix.dtype == self.dtype.of(old.dtype)
                    && matrix.bytes.len() == rows * cols * matrix.dtype.size();
                if !fits {
                    return Err(misfit(index, &matrix));
                }
                let name = matrix_name(expert.id, part);
                if !matrix.scales.is_empty() {
                    parts.push(plain(scales_name(&name), matrix.scales));
                }
                let planned = PlannedTensor {
                    name,
                    dtype: matrix.dtype,
                    shape: vec![rows, cols],
                };
                parts.push((planned, matrix.bytes));
            }
        }
        if let Some(bytes) = &made.router {
            let old = checkpoint.router(index)?.weight;
            let expected = self.layer.kept().count() * old.row(0).len();
            if bytes.len() != expected {
                return Err(wrong_size(index, expected, bytes.len()));
            }
            parts.push(plain(ROUTER.to_owned(), bytes));
        }
        Ok(parts)
    }
}

fn wrong_size(layer: usize, expected: usize, got: usize) -> CheckpointError {
    CheckpointError::Rewrite {
        source: format!("layer {layer}: a new tensor has {got} bytes instead of {expected}").into(),
    }
}

fn misfit(layer: usize, matrix: &Matrix<'_>) -> CheckpointError {
    let Matrix {
        dtype, rows, cols, ..
    } = matrix;
    CheckpointError::Rewrite {
        source: format!(
            "layer {layer}: a new matrix is {dtype} {rows} × {cols}, which does not fit its plan"
        )
        .into(),
    }
}
