//! From f32 back to a tensor's own dtype.

use tenp_checkpoint::{Dtype, OwnedMatrix};

use crate::ModelError;

/// A new matrix of an expert of `layer` in a weight dtype.
pub(super) fn encode(
    (layer, expert): (usize, usize),
    dtype: Dtype,
    (rows, cols): (usize, usize),
    values: &[f32],
) -> Result<OwnedMatrix, ModelError> {
    let matrix = OwnedMatrix::encode_storable(dtype, rows, cols, values);
    matrix.map_err(|error| ModelError::NonFinite {
        place: format!("layer {layer}, expert {expert}"),
        cause: format!(
            "its new weights cannot be written in fp8: {error}; write them with --dtype bf16"
        ),
    })
}
