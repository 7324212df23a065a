//! Typed access: matrices, vectors, experts, routers, shared experts.

use crate::checkpoint::{Checkpoint, TensorView, check_dtype, check_shape};
use crate::fp8::{self, FP8_BLOCK};
use crate::names::Part;
use crate::{CheckpointError, Dtype};

/// A row-major matrix inside a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix<'a> {
    /// `F32`, `F16`, `BF16` or `F8E4M3`.
    pub dtype: Dtype,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// `rows * cols` little-endian elements at any alignment.
    pub bytes: &'a [u8],
    /// Of fp8: little-endian f32, `[⌈rows / 128⌉, ⌈cols / 128⌉]`, one for each block. Else empty.
    pub scales: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// Bytes of one row; empty for a row that does not exist.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let stride = self.cols * self.dtype.size();
        self.bytes
            .get(row * stride..(row + 1) * stride)
            .unwrap_or(&[])
    }

    /// Scales of a row's blocks; empty unless the matrix is fp8.
    fn row_scales(&self, row: usize) -> &'a [[u8; 4]] {
        let across = self.cols.div_ceil(FP8_BLOCK);
        let scales = self.scales.as_chunks::<4>().0;
        scales
            .get(row / FP8_BLOCK * across..(row / FP8_BLOCK + 1) * across)
            .unwrap_or(&[])
    }

    /// Widens a row to f32; `out` is one row long.
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        if self.dtype == Dtype::F8E4M3 {
            fp8::widen_row(self.row(row), self.row_scales(row), out);
        } else {
            self.dtype.widen(self.row(row), out);
        }
    }

    /// Widened to f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        for (row, out) in values.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.widen_row(row, out);
        }
        values
    }
}

/// The three matrices of a routed expert of width I.
#[derive(Clone, Copy, Debug)]
pub struct ExpertTensors<'a> {
    /// `[I, H]`.
    pub gate: Matrix<'a>,
    /// `[I, H]`.
    pub up: Matrix<'a>,
    /// `[H, I]`.
    pub down: Matrix<'a>,
}

impl<'a> ExpertTensors<'a> {
    /// One of the three.
    pub fn part(&self, part: Part) -> Matrix<'a> {
        match part {
            Part::Gate => self.gate,
            Part::Up => self.up,
            Part::Down => self.down,
        }
    }
}

/// A layer's router.
#[derive(Clone, Debug)]
pub struct RouterTensors<'a> {
    /// `[N, H]`.
    pub weight: Matrix<'a>,
    /// `[N]`, added to the scores for the selection.
    pub correction_bias: Option<Vec<f32>>,
}

/// A layer's shared expert of width S.
#[derive(Clone, Copy, Debug)]
pub struct SharedTensors<'a> {
    /// `[S, H]`.
    pub gate: Matrix<'a>,
    /// `[S, H]`.
    pub up: Matrix<'a>,
    /// `[H, S]`.
    pub down: Matrix<'a>,
    /// `[1, H]`: the output is multiplied by the sigmoid of this times x.
    pub gate_weight: Option<Matrix<'a>>,
}

/// One of the matrices of equal shape that a fused tensor consists of.
fn nth(tensor: TensorView<'_>, position: usize, (rows, cols): (usize, usize)) -> Matrix<'_> {
    let length = rows * cols * tensor.dtype.size();
    Matrix {
        dtype: tensor.dtype,
        rows,
        cols,
        bytes: &tensor.bytes[position * length..(position + 1) * length],
        scales: &[],
    }
}

impl Checkpoint {
    /// A weight of a given shape.
    fn weight(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, CheckpointError> {
        if let Some((shard, entry)) = self.find(name) {
            check_shape(shard, entry, shape)?;
            check_dtype(shard, entry)?;
        }
        self.tensor(name).map_err(|error| match error {
            CheckpointError::MissingTensor { tensor, place, .. } => {
                CheckpointError::MissingTensor {
                    tensor,
                    place,
                    shape: shape.to_vec(),
                }
            }
            other => other,
        })
    }

    /// A `[rows, cols]` weight.
    ///
    /// # Errors
    /// The tensor is missing, has another shape, or is not f32, f16, bf16 or block-scaled fp8.
    pub fn matrix(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Matrix<'_>, CheckpointError> {
        let tensor = self.weight(name, &[rows, cols])?;
        Ok(Matrix {
            dtype: tensor.dtype,
            rows,
            cols,
            bytes: tensor.bytes,
            scales: match tensor.dtype {
                Dtype::F8E4M3 => self.scales(name),
                _ => &[],
            },
        })
    }

    /// A `[len]` weight.
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub fn vector(&self, name: &str, len: usize) -> Result<TensorView<'_>, CheckpointError> {
        self.weight(name, &[len])
    }

    /// A `[len]` weight, widened.
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub fn vector_f32(&self, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
        let tensor = self.vector(name, len)?;
        let mut values = vec![0.0; len];
        tensor.dtype.widen(tensor.bytes, &mut values);
        Ok(values)
    }

    /// Position of a layer among the MoE layers.
    pub(crate) fn moe_index(&self, layer: usize) -> Result<usize, CheckpointError> {
        self.config()
            .moe_index(layer)
            .ok_or(CheckpointError::NotMoe { layer })
    }

    /// A routed expert in either spelling, with its own width in a ragged checkpoint (0 is possible).
    ///
    /// # Errors
    /// `layer` has no experts, `expert` does not exist, or as [`Self::matrix`].
    pub fn expert(
        &self,
        layer: usize,
        expert: usize,
    ) -> Result<ExpertTensors<'_>, CheckpointError> {
        let config = self.config();
        let index = config.moe_index(layer);
        // An MTP layer has its experts at full width; what a ragged checkpoint left of it is not read.
        let mtp = layer >= config.num_layers && self.layer_bytes(layer) > 0;
        if index.is_none() && (!mtp || config.widths.is_some()) {
            return Err(CheckpointError::NotMoe { layer });
        }
        let num_experts = index.map_or(config.moe.num_experts, |index| config.num_experts(index));
        if expert >= num_experts {
            return Err(CheckpointError::NoSuchExpert {
                layer,
                expert,
                num_experts,
            });
        }
        let width = index.map_or(config.moe.expert_width, |index| config.width(index, expert));
        let hidden = config.hidden_size;
        let spelling = self.spelling();
        if !spelling.fused {
            let name = |part| spelling.expert(layer, expert, part);
            return Ok(ExpertTensors {
                gate: self.matrix(&name(Part::Gate), width, hidden)?,
                up: self.matrix(&name(Part::Up), width, hidden)?,
                down: self.matrix(&name(Part::Down), hidden, width)?,
            });
        }
        let gate_up = self.weight(
            &spelling.fused_gate_up(layer),
            &[num_experts, 2 * width, hidden],
        )?;
        let down = self.weight(&spelling.fused_down(layer), &[num_experts, hidden, width])?;
        Ok(ExpertTensors {
            gate: nth(gate_up, 2 * expert, (width, hidden)),
            up: nth(gate_up, 2 * expert + 1, (width, hidden)),
            down: nth(down, expert, (hidden, width)),
        })
    }

    /// A layer's router.
    ///
    /// # Errors
    /// `layer` has no router, or as [`Self::matrix`].
    pub fn router(&self, layer: usize) -> Result<RouterTensors<'_>, CheckpointError> {
        let num_experts = self.config().num_experts(self.moe_index(layer)?);
        let (moe, spelling) = (&self.config().moe, self.spelling());
        let correction_bias = if moe.router.correction_bias {
            Some(self.vector_f32(&spelling.correction_bias(layer), num_experts)?)
        } else {
            None
        };
        Ok(RouterTensors {
            weight: self.matrix(
                &spelling.router(layer),
                num_experts,
                self.config().hidden_size,
            )?,
            correction_bias,
        })
    }

    /// A layer's shared expert (all shared experts as one), if the model has one.
    ///
    /// # Errors
    /// `layer` is not a MoE layer, or as [`Self::matrix`].
    pub fn shared_expert(
        &self,
        layer: usize,
    ) -> Result<Option<SharedTensors<'_>>, CheckpointError> {
        self.moe_index(layer)?;
        let (moe, spelling) = (&self.config().moe, self.spelling());
        let (width, hidden) = (moe.shared_width, self.config().hidden_size);
        if width == 0 {
            return Ok(None);
        }
        let gate_weight = if moe.shared_gate {
            Some(self.matrix(&spelling.shared_gate(layer), 1, hidden)?)
        } else {
            None
        };
        Ok(Some(SharedTensors {
            gate: self.matrix(&spelling.shared(layer, Part::Gate), width, hidden)?,
            up: self.matrix(&spelling.shared(layer, Part::Up), width, hidden)?,
            down: self.matrix(&spelling.shared(layer, Part::Down), hidden, width)?,
            gate_weight,
        }))
    }
}
