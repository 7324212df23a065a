//! Memory that kernels may touch.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::ptr::NonNull;

use bytemuck::{AnyBitPattern, NoUninit};

use crate::fault::{Fault, FaultKind};
use crate::ffi;

/// Bytes of buffers, by name.
pub type Held = BTreeMap<String, usize>;

thread_local! {
    /// What this thread's buffers hold now, and held when they held most.
    static MEMORY: RefCell<(Held, Held)> = const { RefCell::new((BTreeMap::new(), BTreeMap::new())) };
}

fn sum(held: &Held) -> usize {
    held.values().sum()
}

/// What this thread's buffers held when they held most while something ran, those from before included.
pub fn most_held(run: impl FnOnce()) -> Held {
    MEMORY.with_borrow_mut(|(now, most)| most.clone_from(now));
    run();
    MEMORY.with_borrow(|(_, most)| most.clone())
}

/// An array in the executor's global memory, with a name for reports.
///
/// Before and behind it lie 16 MiB that belong to nothing. Its start is a page's, so aligned for any access. It belongs
/// to the thread that made it: launches of other threads do not know it.
///
/// | made by | kernels may | starts as |
/// |---|---|---|
/// | [`Buffer::input`] | read | the values given |
/// | [`Buffer::in_out`] | read and write | the values given |
/// | [`Buffer::output`] | write, and read what a kernel wrote | 0xff bytes (NaN in bf16, f32 and f64; −1), counted as unwritten |
pub struct Buffer<T> {
    name: String,
    region: NonNull<c_void>,
    data: *mut T,
    len: usize,
    // Regions are registered per thread, so a buffer must not leave its thread.
    thread: PhantomData<*const ()>,
}

impl<T: NoUninit + AnyBitPattern> Buffer<T> {
    /// An array that kernels only read; a write to it is a [`FaultKind::ReadOnly`].
    ///
    /// # Panics
    /// As all constructors: if `name` holds a zero byte or `T` has no size.
    pub fn input(name: &str, values: &[T]) -> Self {
        Self::filled(name, values, false)
    }

    /// An array with values that kernels read and write.
    pub fn in_out(name: &str, values: &[T]) -> Self {
        Self::filled(name, values, true)
    }

    /// An array of `len` elements that kernels write first.
    pub fn output(name: &str, len: usize) -> Self {
        Self::new(name, len, true)
    }

    fn filled(name: &str, values: &[T], writable: bool) -> Self {
        let buffer = Self::new(name, values.len(), writable);
        // SAFETY: `data` points to `len` elements of this buffer alone.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), buffer.data, values.len()) };
        // SAFETY: `region` is alive as long as `self`.
        unsafe { ffi::simt_buffer_set_written(buffer.region.as_ptr()) };
        buffer
    }

    fn new(name: &str, len: usize, writable: bool) -> Self {
        assert!(size_of::<T>() > 0, "elements have a size");
        let c_name = CString::new(name).expect("a buffer's name has no zero byte");
        let mut data = std::ptr::null_mut();
        // SAFETY: the name is a C string, `data` is written before the call returns.
        let region = unsafe {
            ffi::simt_buffer_new(
                c_name.as_ptr(),
                (len * size_of::<T>()) as u64,
                size_of::<T>() as u64,
                u32::from(writable),
                &raw mut data,
            )
        };
        MEMORY.with_borrow_mut(|(now, most)| {
            *now.entry(name.to_owned()).or_default() += len * size_of::<T>();
            if sum(now) > sum(most) {
                most.clone_from(now);
            }
        });
        Self {
            name: name.to_string(),
            region: NonNull::new(region).expect("the executor gives a region or ends the process"),
            data: data.cast(),
            len,
            thread: PhantomData,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What a parameter struct holds for an input.
    pub fn ptr(&self) -> *const T {
        self.data
    }

    /// What a parameter struct holds for an output. Kernels write through it only within a launch, under its checks.
    pub fn mut_ptr(&self) -> *mut T {
        self.data
    }

    /// A copy of the elements; those never written are all 0xff bytes.
    pub fn to_vec(&self) -> Vec<T> {
        // SAFETY: `data` points to `len` elements, initialised with poison at least, any bit pattern of which is a `T`;
        // kernels of this thread, the only ones that know the buffer, do not run now.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }.to_vec()
    }

    /// Indices of the elements of which some byte was never written.
    pub fn unwritten(&self) -> Vec<usize> {
        let bytes = size_of::<T>();
        let written = |byte: usize| {
            // SAFETY: `region` is alive as long as `self`, and `byte` is within it.
            unsafe { ffi::simt_buffer_written(self.region.as_ptr(), byte as u64) != 0 }
        };
        (0..self.len)
            .filter(|i| !(i * bytes..(i + 1) * bytes).all(written))
            .collect()
    }

    /// A copy of the elements.
    ///
    /// # Errors
    /// [`FaultKind::Unwritten`] if there are elements never written; it names the first ones.
    pub fn written(&self) -> Result<Vec<T>, Fault> {
        let missing = self.unwritten();
        if missing.is_empty() {
            return Ok(self.to_vec());
        }
        let first = &missing[..missing.len().min(8)];
        let detail = format!(
            "{} of {} elements were never written, first {first:?}",
            missing.len(),
            self.len
        );
        Err(Fault::without_place(
            FaultKind::Unwritten,
            &self.name,
            detail,
        ))
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: made by `simt_buffer_new` on this thread, and freed once.
        unsafe { ffi::simt_buffer_free(self.region.as_ptr()) };
        let bytes = self.len * size_of::<T>();
        // A buffer may outlive what its thread counts in.
        let _ = MEMORY.try_with(|memory| {
            if let Some(held) = memory.borrow_mut().0.get_mut(&self.name) {
                *held -= bytes;
            }
        });
    }
}
