//! Checks made before a launch: what a kernel would read or write out of bounds is refused here, with its name.

use crate::KernelError;

/// Prefix sums must start at 0 or more and never go down.
///
/// # Errors
/// [`KernelError::NotMonotonic`] with the first entry that is wrong.
pub fn check_offsets(what: &'static str, offsets: &[i32]) -> Result<(), KernelError> {
    let mut least = 0;
    for (index, &offset) in offsets.iter().enumerate() {
        if offset < least {
            return Err(KernelError::NotMonotonic {
                what,
                index,
                got: i64::from(offset),
                least: i64::from(least),
            });
        }
        least = offset;
    }
    Ok(())
}

/// An address must be a multiple of `alignment`.
///
/// # Errors
/// [`KernelError::Misaligned`].
pub fn check_alignment(
    what: &'static str,
    address: u64,
    alignment: u64,
) -> Result<(), KernelError> {
    if address.is_multiple_of(alignment) {
        return Ok(());
    }
    Err(KernelError::Misaligned {
        what,
        address,
        alignment,
    })
}

/// A size that must be a multiple of another.
///
/// # Errors
/// [`KernelError::Invalid`].
pub fn check_multiple(what: &'static str, value: usize, of: usize) -> Result<(), KernelError> {
    if value.is_multiple_of(of) {
        return Ok(());
    }
    Err(KernelError::Invalid {
        what,
        why: format!("{value} is not a multiple of {of}"),
    })
}

/// The size as the kernels count it.
///
/// # Errors
/// [`KernelError::Invalid`] from 2³¹ on.
pub fn to_i32(what: &'static str, value: usize) -> Result<i32, KernelError> {
    i32::try_from(value).map_err(|_| KernelError::Invalid {
        what,
        why: format!("{value} is past what a kernel can count (2^31 − 1)"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_that_go_down_are_named() {
        assert_eq!(check_offsets("offsets", &[0, 0, 5, 5]), Ok(()));
        assert_eq!(check_offsets("offsets", &[]), Ok(()));
        let error = check_offsets("offsets", &[0, 7, 3]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "offsets: entry 2 is 3, expected at least 7"
        );
        assert!(check_offsets("offsets", &[-1]).is_err());
    }

    #[test]
    fn addresses_and_sizes() {
        assert!(check_alignment("x", 4096 + 8, 8).is_ok());
        let error = check_alignment("x", 4096 + 8, 16).unwrap_err();
        assert_eq!(
            error.to_string(),
            "x: address 0x1008 is not a multiple of 16 bytes"
        );
        assert!(check_multiple("hidden size", 2048, 8).is_ok());
        assert!(check_multiple("hidden size", 2047, 8).is_err());
        assert_eq!(to_i32("rows", i32::MAX as usize), Ok(i32::MAX));
        assert!(to_i32("rows", 1 << 31).is_err());
    }

    #[test]
    fn messages_give_what_is_wanted_and_what_is_free() {
        let error = KernelError::OutOfMemory {
            what: "a layer's experts",
            wanted_bytes: 3 << 30,
            free_bytes: 512 << 20,
            advice: "--batch-tokens lowers it".into(),
        };
        assert_eq!(
            error.to_string(),
            "out of GPU memory for a layer's experts: wanted 3072.0 MiB, free 512.0 MiB; --batch-tokens lowers it"
        );
        assert!(!error.is_environment());
        let old = KernelError::DriverTooOld {
            driver: (12, 4),
            needed: (13, 0),
        };
        assert!(old.is_environment() && old.to_string().contains("12.4"));
    }
}
