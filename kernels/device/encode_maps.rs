//! Tensor maps in the driver's form.

use cudarc::driver::sys::{
    self, CUtensorMapDataType as DataType, CUtensorMapFloatOOBfill as Outside,
    CUtensorMapInterleave as Interleave, CUtensorMapL2promotion as Promotion,
    CUtensorMapSwizzle as Swizzle,
};

use super::context::driver_error;
use super::tensor_map::{BOX_INNER, TensorMap};
use crate::KernelError;
use crate::params::{TenpTensorMap, TenpTensorMaps};

/// Encodes the three maps of a call.
pub(super) fn encode_maps(maps: &[TensorMap; 3]) -> Result<TenpTensorMaps, KernelError> {
    Ok(TenpTensorMaps {
        weights: encode(&maps[0])?,
        rows: encode(&maps[1])?,
        h: encode(&maps[2])?,
    })
}

/// Rows in groups are a third dimension.
fn encode(map: &TensorMap) -> Result<TenpTensorMap, KernelError> {
    let mut encoded = TenpTensorMap { words: [0; 16] };
    let grouped = map.group_pitch_bytes != 0;
    let (rank, dimensions, sides) = if grouped {
        (
            3,
            [map.inner, 8, map.rows / 8],
            [BOX_INNER, 8, map.box_rows / 8],
        )
    } else {
        (2, [map.inner, map.rows, 1], [BOX_INNER, map.box_rows, 1])
    };
    let strides = [map.pitch_bytes, map.group_pitch_bytes];
    // SAFETY: a map is 128 bytes, aligned by its type; the arrays are live during the call and as long as the rank asks
    // for. What the address points to is not touched.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            (&raw mut encoded).cast(),
            DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            rank,
            map.address as *mut _,
            dimensions.as_ptr(),
            strides.as_ptr(),
            sides.as_ptr(),
            [1, 1, 1].as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            Outside::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(|e| driver_error("encoding a tensor map", e))?;
    Ok(encoded)
}
