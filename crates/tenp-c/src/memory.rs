//! The caller's pointers as slices: null, too long and misaligned ones are refused by name.

use crate::status::{
    Failure, TENP_ERROR_INVALID, TENP_ERROR_MISALIGNED, TENP_ERROR_NULL, TENP_ERROR_SIZE,
};

fn null(what: &str) -> Failure {
    Failure::new(TENP_ERROR_NULL, format!("{what}: the pointer is null"))
}

fn check<T>(what: &str, pointer: *const T, len: usize) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(null(what));
    }
    if !pointer.is_aligned() {
        return Err(Failure::new(
            TENP_ERROR_MISALIGNED,
            format!(
                "{what}: address {pointer:p} is not a multiple of {} bytes",
                align_of::<T>()
            ),
        ));
    }
    if len > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Failure::new(
            TENP_ERROR_SIZE,
            format!("{what}: {len} elements do not fit in memory"),
        ));
    }
    Ok(())
}

/// `len` elements to read; a null pointer to none is fine.
///
/// # Safety
/// A pointer that is not null leads to `len` initialised elements, which nothing writes during 'a.
pub(crate) unsafe fn slice<'a, T>(
    what: &str,
    pointer: *const T,
    len: usize,
) -> Result<&'a [T], Failure> {
    if len == 0 {
        return Ok(&[]);
    }
    check(what, pointer, len)?;
    // SAFETY: checked above, and the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(pointer, len) })
}

/// `len` elements to write; a null pointer to none is fine.
///
/// # Safety
/// A pointer that is not null leads to `len` elements, which nothing else reads or writes during 'a.
pub(crate) unsafe fn slice_mut<'a, T: bytemuck::Pod>(
    what: &str,
    pointer: *mut T,
    len: usize,
) -> Result<&'a mut [T], Failure> {
    if len == 0 {
        return Ok(&mut []);
    }
    check(what, pointer, len)?;
    // SAFETY: checked above, and the caller's promise; plain numbers are valid whatever their bytes.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, len) })
}

/// `bytes` bytes to write, as elements.
///
/// # Safety
/// As [`slice_mut`].
pub(crate) unsafe fn elements_mut<'a, T: bytemuck::Pod>(
    what: &str,
    pointer: *mut std::ffi::c_void,
    bytes: usize,
) -> Result<&'a mut [T], Failure> {
    let len = elements::<T>(what, bytes)?;
    // SAFETY: the caller's promise.
    unsafe { slice_mut(what, pointer.cast(), len) }
}

/// Elements in so many bytes.
pub(crate) fn elements<T>(what: &str, bytes: usize) -> Result<usize, Failure> {
    if bytes.is_multiple_of(size_of::<T>()) {
        return Ok(bytes / size_of::<T>());
    }
    Err(Failure::new(
        TENP_ERROR_SIZE,
        format!(
            "{what}: {bytes} bytes are no whole number of elements of {}",
            size_of::<T>()
        ),
    ))
}

/// What a pointer leads to.
///
/// # Safety
/// A pointer that is not null leads to a value that nothing writes during 'a.
pub(crate) unsafe fn get<'a, T>(what: &str, pointer: *const T) -> Result<&'a T, Failure> {
    check(what, pointer, 1)?;
    // SAFETY: checked above, and the caller's promise.
    Ok(unsafe { &*pointer })
}

/// Writes results, all or none.
///
/// # Safety
/// A pointer that is not null leads to room for a value.
pub(crate) unsafe fn write<T: Copy, const N: usize>(
    results: [(&str, *mut T, T); N],
) -> Result<(), Failure> {
    for (what, pointer, _) in results {
        check(what, pointer, 1)?;
    }
    for (_, pointer, value) in results {
        // SAFETY: checked above, and the caller's promise.
        unsafe { pointer.write(value) };
    }
    Ok(())
}

/// A constant of the header that is none.
pub(crate) fn unknown(what: &str, value: i32) -> Failure {
    Failure::new(TENP_ERROR_INVALID, format!("{what}: there is no {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_are_refused_by_name() {
        let value = [1u32, 2];
        let at = value.as_ptr();
        // SAFETY: what is not refused is live.
        unsafe {
            assert_eq!(slice("x", at, 2).unwrap(), &[1, 2]);
            assert!(slice::<u32>("x", std::ptr::null(), 0).unwrap().is_empty());
            let none = slice::<u32>("x", std::ptr::null(), 1).unwrap_err();
            assert_eq!(
                (none.status, none.text.as_str()),
                (TENP_ERROR_NULL, "x: the pointer is null")
            );
            let odd = get("x", at.byte_add(1)).unwrap_err();
            assert_eq!(odd.status, TENP_ERROR_MISALIGNED);
            assert!(odd.text.ends_with("is not a multiple of 4 bytes"));
            let long = slice("x", at, usize::MAX / 4).unwrap_err();
            assert_eq!(long.status, TENP_ERROR_SIZE);
            let mut out = 7u32;
            let results = [("a", &raw mut out, 8), ("b", std::ptr::null_mut(), 3)];
            assert!(write(results).is_err() && out == 7);
            let mut bytes = [0u32; 2];
            let to = bytes.as_mut_ptr().cast();
            assert_eq!(elements_mut::<u16>("y", to, 6).unwrap().len(), 3);
            assert_eq!(
                elements_mut::<u16>("y", to, 7).unwrap_err().text,
                "y: 7 bytes are no whole number of elements of 2"
            );
        }
    }
}
