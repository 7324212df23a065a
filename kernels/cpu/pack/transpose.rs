//! Transposes of 16 × 16 in registers: how rows become steps. All have one contract, whatever the unit.

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod none;

#[cfg(target_arch = "x86_64")]
pub(super) use avx512::{columns, rows, steps};
#[cfg(target_arch = "aarch64")]
pub(super) use neon::{columns, rows, steps};
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) use none::{columns, rows, steps};

use crate::cpu::{Isa, isa};

/// Whether the others of this module may be called.
pub(super) fn is_available() -> bool {
    matches!(
        isa(),
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Neon | Isa::NeonBf16
    )
}

/// What 16 consecutive steps of a column are in memory.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Source {
    /// 16 f32.
    F32,
    /// 16 bf16, to be widened.
    Bf16,
    /// 16 pairs of bf16, as they are.
    Pairs,
}
