//! Hidden states of all tokens between the layers: in memory, or in a file where they are too many.

use std::ops::{Deref, DerefMut};
use std::path::PathBuf;

use tenp_checkpoint::{Checkpoint, ScratchValues};

use crate::ModelError;
use crate::forward::embed;

/// Tokens that are embedded at once.
const CHUNK_TOKENS: usize = 8192;

/// Where hidden states go that are too many for the memory.
#[derive(Clone, Debug)]
pub struct Spill {
    /// Bytes that stay in memory.
    pub over: u64,
    /// Folder of the file, which has no name there.
    pub dir: PathBuf,
}

/// `[tokens, H]`.
pub(crate) enum Hidden {
    Memory(Vec<f32>),
    File(ScratchValues),
}

impl Hidden {
    fn zeros(len: usize, spill: Option<&Spill>) -> Result<Self, ModelError> {
        Ok(match spill {
            Some(spill) if (len * size_of::<f32>()) as u64 > spill.over => {
                Self::File(ScratchValues::new(&spill.dir, len)?)
            }
            _ => Self::Memory(vec![0.0; len]),
        })
    }

    /// The embedding's rows of `ids`, which are in the vocabulary.
    pub(crate) fn embedded(
        checkpoint: &Checkpoint,
        ids: &[u32],
        spill: Option<&Spill>,
    ) -> Result<Self, ModelError> {
        let width = checkpoint.config().hidden_size;
        let mut hidden = Self::zeros(ids.len() * width, spill)?;
        let chunks = hidden.chunks_mut(CHUNK_TOKENS * width);
        for (ids, rows) in ids.chunks(CHUNK_TOKENS).zip(chunks) {
            embed(checkpoint, ids, rows)?;
        }
        Ok(hidden)
    }

    /// The same values at the same kind of place.
    pub(crate) fn copy(&self, spill: Option<&Spill>) -> Result<Self, ModelError> {
        let mut copy = Self::zeros(self.len(), spill)?;
        copy.copy_from_slice(self);
        Ok(copy)
    }

    pub(crate) fn into_memory(self) -> Vec<f32> {
        match self {
            Self::Memory(values) => values,
            Self::File(values) => values.to_vec(),
        }
    }
}

impl Deref for Hidden {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Memory(values) => values,
            Self::File(values) => values,
        }
    }
}

impl DerefMut for Hidden {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Memory(values) => values,
            Self::File(values) => values,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_over_the_limit_goes_to_a_file() {
        let dir = tempfile::tempdir().expect("a folder");
        let spill = Spill {
            over: 400,
            dir: dir.path().to_path_buf(),
        };
        let kind = |len, spill| Hidden::zeros(len, spill).expect("there is room");
        assert!(matches!(kind(100, Some(&spill)), Hidden::Memory(_)));
        assert!(matches!(kind(1000, None), Hidden::Memory(_)));
        let mut hidden = kind(101, Some(&spill));
        assert!(matches!(hidden, Hidden::File(_)));
        hidden[100] = 3.0;
        let copy = hidden.copy(Some(&spill)).expect("there is room");
        assert!(matches!(copy, Hidden::File(_)));
        assert_eq!(copy.into_memory(), hidden.into_memory());
    }
}
