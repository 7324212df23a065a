//! From f32 back to a tensor's own dtype, into the room that a layer's new matrices have.

use tenp_checkpoint::{Dtype, OwnedMatrix, Room, StoredMatrix};

use crate::ModelError;

/// A new matrix of an expert of `layer` in a weight dtype.
pub(super) fn encode(
    room: &Room,
    (layer, expert): (usize, usize),
    dtype: Dtype,
    (rows, cols): (usize, usize),
    values: &[f32],
) -> Result<StoredMatrix, ModelError> {
    let matrix = OwnedMatrix::encode_storable(dtype, rows, cols, values);
    let matrix = matrix.map_err(|error| ModelError::NonFinite {
        place: format!("layer {layer}, expert {expert}"),
        cause: format!(
            "its new weights cannot be written in fp8: {error}; write them with --dtype bf16"
        ),
    })?;
    Ok(room.keep(matrix)?)
}
