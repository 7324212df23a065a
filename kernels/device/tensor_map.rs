//! Tensor maps: how the bulk copies of sm_90 see a matrix of bf16 in GPU memory.
//!
//! A map is data that only its runner can make: the driver encodes it for a GPU, the executor has a form of its own. A
//! [`Call`](super::Call) therefore carries what a map says, and whoever runs the call encodes it.

use half::bf16;

use super::check::{check_alignment, check_multiple};
use super::view::DeviceSlice;
use crate::KernelError;

/// Elements of a box's rows: 128 bytes, whose 16-byte chunks are permuted by the row (128-byte swizzle).
pub const BOX_INNER: u32 = 64;

/// A matrix of bf16, row after row, and the box that one copy takes from it. What a box holds outside the matrix is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Of the first element.
    pub address: u64,
    /// Elements of a row that are there.
    pub inner: u64,
    /// Rows.
    pub rows: u64,
    /// Bytes from one row to the next.
    pub pitch_bytes: u64,
    /// Bytes from one group of eight rows to the next, where rows come in groups; 0 where they do not.
    pub group_pitch_bytes: u64,
    /// Rows of a box; it is [`BOX_INNER`] wide.
    pub box_rows: u32,
}

impl TensorMap {
    /// The map of `[rows, inner]` in `matrix`, `pitch` elements from row to row.
    ///
    /// # Errors
    /// What `cuTensorMapEncodeTiled` refuses: a base or a pitch that is no multiple of 16 bytes, a box of more than 256
    /// rows; and a matrix longer than its memory.
    pub(super) fn new(
        what: &'static str,
        matrix: DeviceSlice<'_, bf16>,
        [rows, inner, pitch]: [usize; 3],
        box_rows: usize,
    ) -> Result<Self, KernelError> {
        check_alignment(what, matrix.address(), 16)?;
        check_multiple("pitch of a tensor map", pitch, 8)?;
        if rows > 0 && (rows - 1) * pitch + inner > matrix.len() {
            return Err(KernelError::Length {
                what,
                expected: (rows - 1) * pitch + inner,
                got: matrix.len(),
            });
        }
        if box_rows == 0 || box_rows > 256 || pitch >= 1 << 39 {
            return Err(KernelError::Invalid {
                what: "tensor map",
                why: format!(
                    "a box of {box_rows} rows, a pitch of {pitch} elements: at most 256 and 2^39"
                ),
            });
        }
        // The driver refuses an empty matrix; no box of one is ever asked for.
        Ok(Self {
            address: matrix.address(),
            inner: inner.max(1) as u64,
            rows: rows.max(1) as u64,
            pitch_bytes: 2 * pitch.max(8) as u64,
            group_pitch_bytes: 0,
            box_rows: box_rows as u32,
        })
    }

    /// The map of `[8 groups, inner]`: eight rows one behind the other from `first` on, every `group_pitch` rows.
    ///
    /// # Errors
    /// As [`Self::new`], and boxes that are no whole number of groups.
    pub(super) fn in_groups(
        what: &'static str,
        matrix: DeviceSlice<'_, bf16>,
        [groups, inner]: [usize; 2],
        (first, group_pitch): (usize, usize),
        box_rows: usize,
    ) -> Result<Self, KernelError> {
        check_multiple("rows of a box", box_rows, 8)?;
        let matrix = matrix.slice(first.min(matrix.len() / inner.max(1)) * inner..matrix.len())?;
        // The last group ends where the matrix may end, its pitch does not.
        let rows = (groups.max(1) - 1) * group_pitch + 8;
        let whole = Self::new(
            what,
            matrix,
            [rows.min(group_pitch * groups), inner, inner],
            box_rows,
        )?;
        Ok(Self {
            rows: (8 * groups).max(8) as u64,
            group_pitch_bytes: whole.pitch_bytes * group_pitch as u64,
            ..whole
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(
        len: usize,
        address: u64,
        shape: [usize; 3],
        box_rows: usize,
    ) -> Result<TensorMap, KernelError> {
        // SAFETY: nothing reads it.
        let matrix = unsafe { DeviceSlice::<bf16>::from_raw(address, len) };
        TensorMap::new("weights", matrix, shape, box_rows)
    }

    #[test]
    fn what_the_driver_would_refuse_is_refused_before() {
        assert!(map(64, 256, [4, 16, 16], 128).is_ok());
        assert!(matches!(
            map(64, 264, [4, 16, 16], 128),
            Err(KernelError::Misaligned { .. })
        ));
        assert!(map(64, 256, [4, 16, 12], 128).is_err());
        assert!(map(64, 256, [4, 16, 16], 257).is_err());
        assert!(matches!(
            map(63, 256, [4, 16, 16], 8),
            Err(KernelError::Length {
                expected: 64,
                got: 63,
                ..
            })
        ));
    }

    #[test]
    fn an_empty_matrix_has_a_map_that_no_one_uses() {
        let empty = map(0, 256, [0, 16, 16], 8).unwrap();
        assert_eq!((empty.rows, empty.inner), (1, 16));
    }
}
