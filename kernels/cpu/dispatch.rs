//! Instruction sets, chosen at run time.

use std::sync::OnceLock;

/// The widest instruction set this machine has and this crate has a path for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the compiler's target offers.
    Portable,
    /// Arm's NEON.
    Neon,
    /// NEON with bf16 dot products.
    NeonBf16,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 (F, BW, VL, DQ).
    Avx512,
    /// AVX-512 with bf16 dot products.
    Avx512Bf16,
}

impl Isa {
    /// Whether bf16 products are of pairs, and so faster than those of f32.
    pub const fn has_pairs(self) -> bool {
        matches!(self, Self::NeonBf16 | Self::Avx512Bf16)
    }
}

/// Instruction sets of this architecture, ascending, as `TENP_ISA` names them.
const NAMES: &[(&str, Isa)] = &[
    ("portable", Isa::Portable),
    #[cfg(target_arch = "aarch64")]
    ("neon", Isa::Neon),
    #[cfg(target_arch = "aarch64")]
    ("neonbf16", Isa::NeonBf16),
    #[cfg(target_arch = "x86_64")]
    ("avx2", Isa::Avx2),
    #[cfg(target_arch = "x86_64")]
    ("avx512", Isa::Avx512),
    #[cfg(target_arch = "x86_64")]
    ("avx512bf16", Isa::Avx512Bf16),
];

/// The instruction set in use: the best the machine has, or at most what the environment variable `TENP_ISA` names:
/// `portable`, `avx2`, `avx512` or `avx512bf16`; on Arm `portable`, `neon` or `neonbf16`. Another value is no limit.
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| {
        let named = std::env::var("TENP_ISA").ok();
        let limit = NAMES
            .iter()
            .find(|(name, _)| Some(*name) == named.as_deref());
        let best = detect();
        limit.map_or(best, |(_, limit)| best.min(*limit))
    })
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    match (avx2, avx512) {
        (_, true) if is_x86_feature_detected!("avx512bf16") => Isa::Avx512Bf16,
        (_, true) => Isa::Avx512,
        (true, false) => Isa::Avx2,
        (false, false) => Isa::Portable,
    }
}

#[cfg(target_arch = "aarch64")]
fn detect() -> Isa {
    if std::arch::is_aarch64_feature_detected!("bf16") {
        Isa::NeonBf16
    } else {
        Isa::Neon
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect() -> Isa {
    Isa::Portable
}

/// Compiles a function once per instruction set and picks at run time, so that plain loops become wide vector code
/// without a wide compile target. On Arm the compile target has NEON.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        // The wrappers forward the body's own argument list, however long it is.
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[allow(clippy::inline_always, clippy::too_many_arguments)]
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                match $crate::cpu::isa() {
                    $crate::cpu::Isa::Avx512 | $crate::cpu::Isa::Avx512Bf16 => {
                        // SAFETY: `isa()` reports AVX-512 only after detecting all of these features.
                        return unsafe { avx512($($arg),*) };
                    }
                    $crate::cpu::Isa::Avx2 => {
                        // SAFETY: `isa()` reports AVX2 only after detecting both features.
                        return unsafe { avx2($($arg),*) };
                    }
                    _ => {}
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use multiversion;
