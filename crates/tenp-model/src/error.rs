//! The one error type of this crate.

use std::path::PathBuf;

use tenp_checkpoint::CheckpointError;
use tenp_kernels::KernelError;

/// What can go wrong while running a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A tensor cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A kernel refused its arguments.
    #[error("layer {layer}: {source}")]
    Kernel {
        /// Layer of the model.
        layer: usize,
        /// The kernel's reason.
        source: KernelError,
    },
    /// A token id is outside the vocabulary.
    #[error(
        "{place}: token id {id} is not below the vocabulary size {vocab_size}; was the text tokenised for another model?"
    )]
    TokenId {
        /// Which sample.
        place: String,
        /// The id.
        id: u32,
        /// Vocabulary size.
        vocab_size: usize,
    },
    /// A sequence is longer than the model's positions.
    #[error(
        "{place}: {len} tokens are more than the model's {max} positions; use shorter text or a lower --seq-len"
    )]
    TooLong {
        /// Which sample.
        place: String,
        /// Its length.
        len: usize,
        /// `max_position_embeddings`.
        max: usize,
    },
    /// Activations became NaN or infinite.
    #[error("{place}: activations are not finite: {cause}")]
    NonFinite {
        /// Where: a layer, one of its experts, the embedding or the output head.
        place: String,
        /// The tensor that holds a NaN or an infinity, or that none does, and what helps.
        cause: String,
    },
    /// A file cannot be read.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A data file's content cannot be used.
    #[error("{}{}: {why}", .path.display(), .line.map_or(String::new(), |l| format!(", line {l}")))]
    Data {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: Option<usize>,
        /// What is wrong and what helps.
        why: String,
    },
    /// A sample that is to be answered has no prompt of its own.
    #[error("{}{}: {why}", .path.display(), .line.map_or(String::new(), |l| format!(", line {l}")))]
    NoPrompt {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: Option<usize>,
        /// What there is and what is needed.
        why: String,
    },
    /// The tokenizer or its chat template cannot be used.
    #[error("{}: {why}", .path.display())]
    Tokenizer {
        /// The tokenizer's file.
        path: PathBuf,
        /// What is wrong and what helps.
        why: String,
    },
    /// Two models cannot be compared.
    #[error("the reference model does not fit: {why}")]
    Reference {
        /// What differs.
        why: String,
    },
}

/// Attaches the layer to a kernel's refusal.
pub(crate) trait AtLayer<T> {
    fn at(self, layer: usize) -> Result<T, ModelError>;
}

impl<T> AtLayer<T> for Result<T, KernelError> {
    fn at(self, layer: usize) -> Result<T, ModelError> {
        self.map_err(|source| ModelError::Kernel { layer, source })
    }
}
