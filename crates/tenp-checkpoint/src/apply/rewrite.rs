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
use crate::{Checkpoint, CheckpointError, Dtype, OwnedMatrix};

use super::OutputDtype;

/// Makes new weights for the MoE layers of a plan.
pub trait LayerRewriter {
    /// What decides the new weights beside checkpoint and plan: part of the run's fingerprint.
    fn settings(&self) -> String;

    /// The new weights of a layer, of `dtype` in the output. Layers are asked for in depth order, each once.
    ///
    /// # Errors
    /// Whatever stands in the way; nothing is written then.
    fn layer(
        &mut self,
        layer: &LayerPlan,
        dtype: OutputDtype,
    ) -> Result<RewrittenLayer, Box<dyn Error + Send + Sync>>;

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

/// New weights of a layer, in the dtypes that the tensors they replace have in the output.
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
    pub gate: Option<OwnedMatrix>,
    /// `[W, H]`.
    pub up: Option<OwnedMatrix>,
    /// `[H, W]`.
    pub down: Option<OwnedMatrix>,
}

/// Offset and length in the scratch file.
type Place = (u64, usize);

/// Where a matrix's elements and scales are.
#[derive(Clone, Copy, Debug)]
struct MatrixPlace {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    bytes: Place,
    scales: Place,
}

/// New weights of all layers.
#[derive(Debug)]
pub(super) struct Rewritten {
    file: File,
    /// Where the file is, for messages: it has no name.
    dir: PathBuf,
    routers: HashMap<usize, Place>,
    experts: HashMap<(usize, usize, Part), MatrixPlace>,
    /// Bytes in the file.
    end: u64,
    notes: Notes,
}

impl Rewritten {
    /// Asks for every layer. The scratch file lies in `dir`, without a name, and goes away with this value.
    pub(super) fn collect(
        checkpoint: &Checkpoint,
        plan: &Plan,
        (rewriter, dtype): (&mut dyn LayerRewriter, OutputDtype),
        dir: &Path,
        needed: u64,
    ) -> Result<Self, CheckpointError> {
        let file =
            tempfile::tempfile_in(dir).map_err(CheckpointError::io("create a file in", dir))?;
        let mut all = Self {
            file,
            dir: dir.to_path_buf(),
            routers: HashMap::new(),
            experts: HashMap::new(),
            end: 0,
            notes: Notes::default(),
        };
        for layer in &plan.layers {
            let index = layer.layer;
            let new = rewriter
                .layer(layer, dtype)
                .map_err(|source| CheckpointError::Rewrite { source })?;
            for expert in &new.experts {
                let planned = layer.kept().find(|plan| plan.id == expert.id);
                let width = planned.map_or(0, |plan| plan.width);
                let old = checkpoint.expert(index, expert.id)?;
                let hidden = checkpoint.config().hidden_size;
                for (part, matrix, old, shape) in [
                    (Part::Gate, &expert.gate, old.gate, (width, hidden)),
                    (Part::Up, &expert.up, old.up, (width, hidden)),
                    (Part::Down, &expert.down, old.down, (hidden, width)),
                ] {
                    if let Some(matrix) = matrix {
                        if (matrix.rows, matrix.cols) != shape
                            || matrix.dtype != dtype.of(old.dtype)
                        {
                            return Err(misfit(index, matrix));
                        }
                        let place = all.add_matrix(matrix, needed)?;
                        all.experts.insert((index, expert.id, part), place);
                    }
                }
            }
            if let Some(bytes) = &new.router {
                let old = checkpoint.router(index)?.weight;
                let expected = layer.kept().count() * old.row(0).len();
                if bytes.len() != expected {
                    return Err(wrong_size(index, expected, bytes.len()));
                }
                let place = all.add(bytes, needed)?;
                all.routers.insert(index, place);
            }
            checkpoint.release_layer(index);
        }
        all.notes = rewriter.notes();
        Ok(all)
    }

    fn add(&mut self, bytes: &[u8], needed: u64) -> Result<Place, CheckpointError> {
        self.file
            .write_all(bytes)
            .map_err(|error| write_error(error, &self.dir, needed))?;
        let start = self.end;
        self.end += bytes.len() as u64;
        Ok((start, bytes.len()))
    }

    fn add_matrix(
        &mut self,
        matrix: &OwnedMatrix,
        needed: u64,
    ) -> Result<MatrixPlace, CheckpointError> {
        Ok(MatrixPlace {
            dtype: matrix.dtype,
            rows: matrix.rows,
            cols: matrix.cols,
            bytes: self.add(&matrix.bytes, needed)?,
            scales: self.add(&matrix.scales, needed)?,
        })
    }

    pub(super) fn notes(&self) -> &Notes {
        &self.notes
    }

    /// A new router, if the layer has one.
    pub(super) fn router(&self, layer: usize) -> Result<Option<Vec<u8>>, CheckpointError> {
        let place = self.routers.get(&layer);
        place.map(|place| self.read(*place)).transpose()
    }

    /// A new matrix of an expert, if it has one.
    pub(super) fn expert(
        &self,
        layer: usize,
        expert: usize,
        part: Part,
    ) -> Result<Option<OwnedMatrix>, CheckpointError> {
        let Some(place) = self.experts.get(&(layer, expert, part)) else {
            return Ok(None);
        };
        Ok(Some(OwnedMatrix {
            dtype: place.dtype,
            rows: place.rows,
            cols: place.cols,
            bytes: self.read(place.bytes)?,
            scales: self.read(place.scales)?,
        }))
    }

    fn read(&self, (offset, length): Place) -> Result<Vec<u8>, CheckpointError> {
        let mut bytes = vec![0; length];
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(CheckpointError::io(
                "read back a scratch file in",
                &self.dir,
            ))?;
        Ok(bytes)
    }
}

fn wrong_size(layer: usize, expected: usize, got: usize) -> CheckpointError {
    CheckpointError::Rewrite {
        source: format!("layer {layer}: a new tensor has {got} bytes instead of {expected}").into(),
    }
}

fn misfit(layer: usize, matrix: &OwnedMatrix) -> CheckpointError {
    let OwnedMatrix {
        dtype, rows, cols, ..
    } = matrix;
    CheckpointError::Rewrite {
        source: format!(
            "layer {layer}: a new matrix is {dtype} {rows} × {cols}, which does not fit its plan"
        )
        .into(),
    }
}
