//! From f32 back to a tensor's own dtype.

use tenp_checkpoint::Dtype;
use tenp_kernels::KernelError;

use crate::ModelError;
use crate::error::AtLayer;

/// Little-endian bytes of `values` in a weight dtype.
pub(super) fn encode(layer: usize, dtype: Dtype, values: &[f32]) -> Result<Vec<u8>, ModelError> {
    let bytes = dtype.narrow(values).ok_or_else(|| KernelError::Invalid {
        what: "weight dtype",
        why: format!("{dtype:?} cannot be written"),
    });
    bytes.at(layer)
}
