//! The compiled kernels, as `build.rs` embeds them.

use crate::KernelError;

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// CUDA version the kernels need from the driver: what nvcc of that release writes, older drivers do not read.
pub(super) const NEEDED_DRIVER: (u32, u32) = (13, 0);

/// Whether a GPU of this compute capability runs anything that was compiled for `targets`.
///
/// Machine code `sm_XY` runs on X.Z with Z ≥ Y, `sm_XYa` on X.Y alone, portable `compute_XY` on everything from X.Y on.
fn runs(targets: &[&str], capability: (u32, u32)) -> bool {
    targets.iter().any(|target| {
        let (portable, arch) = match target.strip_prefix("compute_") {
            Some(arch) => (true, arch),
            None => (false, target.trim_start_matches("sm_")),
        };
        let digits = arch.trim_end_matches(['a', 'f']);
        let Ok(number) = digits.parse::<u32>() else {
            return false;
        };
        let of = (number / 10, number % 10);
        match (portable, arch.ends_with('a')) {
            (true, _) => capability >= of,
            (false, true) => capability == of,
            (false, false) => capability.0 == of.0 && capability.1 >= of.1,
        }
    })
}

/// What the names of sources end in that are compiled for sm_90a alone.
pub(super) const WGMMA_STEM: &str = "_sm90";

/// Whether the kernels for sm_90 were compiled, and this GPU is one.
pub(super) fn runs_wgmma(capability: (u32, u32)) -> bool {
    runs_wgmma_of(TARGETS, capability)
}

fn runs_wgmma_of(targets: &[&str], capability: (u32, u32)) -> bool {
    capability == (9, 0) && targets.contains(&"sm_90a")
}

/// Refuses a GPU or a driver that cannot run the embedded kernels.
pub(super) fn check_gpu(name: &str, capability: (u32, u32)) -> Result<(), KernelError> {
    if runs(TARGETS, capability) {
        return Ok(());
    }
    Err(KernelError::UnsupportedGpu {
        name: name.to_string(),
        capability,
        built_for: TARGETS.join(", "),
    })
}

/// `version` is the driver's own number: 1000 · major + 10 · minor.
pub(super) fn check_driver(version: i32) -> Result<(), KernelError> {
    let version = version.unsigned_abs();
    let driver = (version / 1000, version % 1000 / 10);
    if driver >= NEEDED_DRIVER {
        return Ok(());
    }
    Err(KernelError::DriverTooOld {
        driver,
        needed: NEEDED_DRIVER,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_run_what_was_compiled_for_them() {
        let default = ["sm_90a", "sm_80", "compute_80"];
        for (capability, expected) in [
            ((7, 5), false),
            ((8, 0), true),
            ((8, 9), true),
            ((9, 0), true),
            ((12, 0), true),
        ] {
            assert_eq!(runs(&default, capability), expected, "{capability:?}");
        }
        assert!(!runs(&["sm_90a"], (10, 0)) && !runs(&["sm_90a"], (8, 0)));
        assert!(runs(&["sm_80"], (8, 6)) && !runs(&["sm_80"], (9, 0)));
        assert!(runs(&["compute_80"], (9, 0)) && !runs(&[], (9, 0)));
    }

    #[test]
    fn warpgroup_products_run_on_hopper_alone() {
        assert!(runs_wgmma_of(&["sm_90a", "sm_80"], (9, 0)));
        assert!(!runs_wgmma_of(&["sm_90a", "compute_80"], (10, 0)));
        assert!(!runs_wgmma_of(&["sm_90", "compute_80"], (9, 0)));
    }

    #[test]
    fn drivers_are_compared_by_the_cuda_version_they_support() {
        assert!(check_driver(13000).is_ok() && check_driver(13020).is_ok());
        assert!(matches!(
            check_driver(12080),
            Err(KernelError::DriverTooOld {
                driver: (12, 8),
                needed: (13, 0)
            })
        ));
    }

    #[test]
    fn every_source_is_embedded() {
        assert!(FATBINS.iter().any(|(stem, _)| *stem == "rms_norm"));
        for (stem, fatbin) in FATBINS {
            // The magic number of a fatbin.
            assert_eq!(fatbin[..4], 0xBA55_ED50u32.to_le_bytes(), "{stem}");
        }
    }
}
