//! Views of GPU memory: an address and a length, borrowed from whoever owns the memory.

use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::Pod;

use super::check::{check_alignment, check_multiple};
use crate::KernelError;

/// Elements on the GPU, to read.
#[derive(Debug)]
pub struct DeviceSlice<'a, T> {
    address: u64,
    len: usize,
    marker: PhantomData<&'a [T]>,
}

/// Elements on the GPU, to write.
#[derive(Debug)]
pub struct DeviceSliceMut<'a, T> {
    address: u64,
    len: usize,
    marker: PhantomData<&'a mut [T]>,
}

impl<T> Clone for DeviceSlice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DeviceSlice<'_, T> {}

fn check_range(range: &Range<usize>, len: usize) -> Result<(), KernelError> {
    if range.start <= range.end && range.end <= len {
        return Ok(());
    }
    Err(KernelError::Index {
        what: "part of a GPU buffer",
        index: range.end.max(range.start),
        len,
    })
}

/// A buffer may be longer than the batch in it, not shorter.
fn check_room(what: &'static str, needed: usize, got: usize) -> Result<(), KernelError> {
    if got >= needed {
        return Ok(());
    }
    Err(KernelError::Length {
        what,
        expected: needed,
        got,
    })
}

impl<'a, T: Pod> DeviceSlice<'a, T> {
    /// Views memory that something else owns: another runtime's tensor, or the executor's.
    ///
    /// # Safety
    /// `len` elements from `address` on stay allocated, where the kernels run, and are not written while this view and
    /// the work it was given to last.
    #[must_use]
    pub const unsafe fn from_raw(address: u64, len: usize) -> Self {
        Self {
            address,
            len,
            marker: PhantomData,
        }
    }

    /// Number of elements.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first element.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Elements `range`.
    ///
    /// # Errors
    /// [`KernelError::Index`] past the end.
    pub fn slice(&self, range: Range<usize>) -> Result<Self, KernelError> {
        check_range(&range, self.len)?;
        Ok(Self {
            address: self.address + (range.start * size_of::<T>()) as u64,
            len: range.len(),
            marker: PhantomData,
        })
    }

    /// The same bytes as elements of another type.
    ///
    /// # Errors
    /// [`KernelError::Misaligned`]; [`KernelError::Invalid`] if the bytes are no whole number of elements.
    pub fn cast<U: Pod>(&self) -> Result<DeviceSlice<'a, U>, KernelError> {
        let bytes = self.len * size_of::<T>();
        check_multiple("bytes of a GPU buffer", bytes, size_of::<U>())?;
        check_alignment("part of a GPU buffer", self.address, align_of::<U>() as u64)?;
        Ok(DeviceSlice {
            address: self.address,
            len: bytes / size_of::<U>(),
            marker: PhantomData,
        })
    }

    /// The pointer for a kernel, checked to hold at least `len` elements and to be aligned.
    pub(super) fn checked<P>(
        &self,
        what: &'static str,
        len: usize,
        alignment: u64,
    ) -> Result<*const P, KernelError> {
        check_room(what, len, self.len)?;
        check_alignment(what, self.address, alignment)?;
        Ok(self.address as *const P)
    }
}

impl<'a, T: Pod> DeviceSliceMut<'a, T> {
    /// Views memory that something else owns, to write.
    ///
    /// # Safety
    /// As [`DeviceSlice::from_raw`], and nothing else reads or writes the elements meanwhile.
    #[must_use]
    pub const unsafe fn from_raw(address: u64, len: usize) -> Self {
        Self {
            address,
            len,
            marker: PhantomData,
        }
    }

    /// Number of elements.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first element.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Address and length, which no view guards any more.
    pub(super) const fn into_raw(self) -> (u64, usize) {
        (self.address, self.len)
    }

    /// The same elements, to read.
    #[must_use]
    pub const fn as_slice(&self) -> DeviceSlice<'_, T> {
        DeviceSlice {
            address: self.address,
            len: self.len,
            marker: PhantomData,
        }
    }

    /// The same elements for a shorter time, so that this view can be used again.
    #[must_use]
    pub const fn reborrow(&mut self) -> DeviceSliceMut<'_, T> {
        DeviceSliceMut {
            address: self.address,
            len: self.len,
            marker: PhantomData,
        }
    }

    /// Elements `range`, given up by this view.
    ///
    /// # Errors
    /// [`KernelError::Index`] past the end.
    pub fn slice(self, range: Range<usize>) -> Result<DeviceSliceMut<'a, T>, KernelError> {
        check_range(&range, self.len)?;
        Ok(DeviceSliceMut {
            address: self.address + (range.start * size_of::<T>()) as u64,
            len: range.len(),
            marker: PhantomData,
        })
    }

    /// The same bytes as elements of another type.
    ///
    /// # Errors
    /// As [`DeviceSlice::cast`].
    pub fn cast<U: Pod>(self) -> Result<DeviceSliceMut<'a, U>, KernelError> {
        let len = self.as_slice().cast::<U>()?.len();
        Ok(DeviceSliceMut {
            address: self.address,
            len,
            marker: PhantomData,
        })
    }

    /// The pointer for a kernel, checked to have room for `len` elements and to be aligned.
    pub(super) fn checked<P>(
        &mut self,
        what: &'static str,
        len: usize,
        alignment: u64,
    ) -> Result<*mut P, KernelError> {
        check_room(what, len, self.len)?;
        check_alignment(what, self.address, alignment)?;
        Ok(self.address as *mut P)
    }
}

/// An input, and where what is made of it goes.
#[derive(Debug)]
pub enum InOut<'a, T> {
    /// The result, if wanted, goes elsewhere.
    Apart(DeviceSlice<'a, T>, Option<DeviceSliceMut<'a, T>>),
    /// The result takes the input's place.
    Over(DeviceSliceMut<'a, T>),
}

impl<T: Pod> InOut<'_, T> {
    /// Both pointers; that of the result is null where it is not wanted.
    pub(super) fn checked<P>(
        &mut self,
        what: &'static str,
        lens: (usize, usize),
        alignment: u64,
    ) -> Result<(*const P, *mut P), KernelError> {
        match self {
            Self::Apart(input, output) => Ok((
                input.checked(what, lens.0, alignment)?,
                optional_mut(output.as_mut(), what, lens.1, alignment)?,
            )),
            Self::Over(both) => {
                let pointer: *mut P = both.checked(what, lens.0.max(lens.1), alignment)?;
                Ok((pointer.cast_const(), pointer))
            }
        }
    }
}

/// The pointer of an argument that may be left out.
pub(super) fn optional<T: Pod, P>(
    view: Option<&DeviceSlice<'_, T>>,
    what: &'static str,
    len: usize,
    alignment: u64,
) -> Result<*const P, KernelError> {
    view.map_or(Ok(std::ptr::null()), |v| v.checked(what, len, alignment))
}

/// The pointer of a result that may be left out.
pub(super) fn optional_mut<T: Pod, P>(
    view: Option<&mut DeviceSliceMut<'_, T>>,
    what: &'static str,
    len: usize,
    alignment: u64,
) -> Result<*mut P, KernelError> {
    view.map_or(Ok(std::ptr::null_mut()), |v| {
        v.checked(what, len, alignment)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_keep_inside_and_pointers_are_checked() {
        // SAFETY: nothing is ever read through the views.
        let view = unsafe { DeviceSlice::<f32>::from_raw(0x1000, 100) };
        let part = view.slice(10..30).unwrap();
        assert_eq!((part.address(), part.len()), (0x1028, 20));
        assert!(view.slice(90..101).is_err());
        assert!(matches!(
            part.checked::<f32>("x", 20, 16),
            Err(KernelError::Misaligned {
                what: "x",
                address: 0x1028,
                alignment: 16
            })
        ));
        assert!(matches!(
            part.checked::<f32>("x", 21, 4),
            Err(KernelError::Length {
                expected: 21,
                got: 20,
                ..
            })
        ));
        assert_eq!(part.checked::<f32>("x", 20, 8).unwrap() as u64, 0x1028);
        // SAFETY: as above.
        let mut out = unsafe { DeviceSliceMut::<u16>::from_raw(0x2000, 8) };
        assert_eq!(out.reborrow().slice(2..8).unwrap().address(), 0x2004);
        let words = out.reborrow().slice(2..8).unwrap().cast::<u32>().unwrap();
        assert_eq!((words.address(), words.len()), (0x2004, 3));
        assert!(out.reborrow().slice(1..7).unwrap().cast::<u32>().is_err());
        assert!(out.reborrow().slice(0..3).unwrap().cast::<u32>().is_err());
        assert!(out.checked::<u16>("y", 9, 2).is_err());
        assert!(optional::<f32, f32>(None, "z", 5, 4).unwrap().is_null());
    }
}
