//! A checked launch: which entry, how, with what. Made by the functions of the kernel families, run by a [`Runner`].
//!
//! Making a call needs no GPU, so the checks, the geometry and the parameters are tested with the executor, which runs
//! the same calls on the CPU.

use std::marker::PhantomData;

use super::geometry::Launch;
use super::tensor_map::TensorMap;

/// Words of the largest parameter structure.
const MAX_WORDS: usize = 24;

/// One launch whose arguments have been checked. It borrows the memory it was made for.
#[derive(Clone, Debug)]
#[must_use = "a call does nothing until it is run"]
pub struct Call<'a> {
    entry: &'static str,
    launch: Launch,
    words: [u64; MAX_WORDS],
    num_words: usize,
    maps: Option<[TensorMap; 3]>,
    marker: PhantomData<&'a mut ()>,
}

impl Call<'_> {
    /// `P` is the parameter structure of `entry`: one of those in [`crate::params`], which have no holes.
    pub(super) fn new<P: Copy>(entry: &'static str, launch: Launch, params: &P) -> Self {
        const {
            assert!(size_of::<P>() <= size_of::<u64>() * MAX_WORDS && align_of::<P>() == 8);
        }
        let mut words = [0; MAX_WORDS];
        // SAFETY: both are live, apart, and as large, by the assertion; the structures have no padding, so every byte
        // copied is initialised.
        unsafe {
            std::ptr::copy_nonoverlapping(
                std::ptr::from_ref(params).cast::<u8>(),
                words.as_mut_ptr().cast::<u8>(),
                size_of::<P>(),
            );
        }
        Self {
            entry,
            launch,
            words,
            num_words: size_of::<P>() / size_of::<u64>(),
            maps: None,
            marker: PhantomData,
        }
    }

    /// The same call of an entry that takes tensor maps: of its weights, of its rows of activations, and of h.
    pub(super) fn with_maps(self, maps: [TensorMap; 3]) -> Self {
        Self {
            maps: Some(maps),
            ..self
        }
    }

    /// Name of the kernel entry.
    #[must_use]
    pub const fn entry(&self) -> &'static str {
        self.entry
    }

    /// Grid, block and shared memory.
    #[must_use]
    pub const fn launch(&self) -> Launch {
        self.launch
    }

    /// The parameter structure.
    #[must_use]
    pub fn params(&self) -> &[u64] {
        &self.words[..self.num_words]
    }

    /// What goes into `TenpTensorMaps`, the second argument of the entries for sm_90.
    #[must_use]
    pub const fn tensor_maps(&self) -> Option<&[TensorMap; 3]> {
        self.maps.as_ref()
    }
}

/// What runs calls: a GPU, or the executor.
pub trait Runner {
    /// How it fails.
    type Error: From<crate::KernelError>;

    /// Multiprocessors, which persistent kernels spread over.
    fn multiprocessors(&self) -> usize;

    /// Whether it runs the entries for sm_90: warpgroup products and bulk copies.
    fn has_wgmma(&self) -> bool;

    /// Runs one call after all calls before it.
    ///
    /// # Errors
    /// The runner's own.
    fn run(&self, call: &Call<'_>) -> Result<(), Self::Error>;
}
