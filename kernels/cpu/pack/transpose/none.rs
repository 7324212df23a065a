//! For processors without a path of their own, which never come here.

use super::Source;
use crate::cpu::tile::TILE_COLS;

/// # Safety
/// None.
pub(in super::super) unsafe fn columns(_: Source, _: &[&[u8]; 16], _: usize, _: *mut u32) {
    unreachable!("not available");
}

/// # Safety
/// None.
pub(in super::super) unsafe fn rows(_: &[&[f32]], _: usize, _: *mut u32, _: usize) {
    unreachable!("not available");
}

/// # Safety
/// None.
pub(in super::super) unsafe fn steps(
    _: *const u32,
    _: usize,
    _: usize,
    _: &mut [[f32; TILE_COLS]],
) {
    unreachable!("not available");
}
