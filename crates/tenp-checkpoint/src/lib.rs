//! Checkpoints of Mixture-of-Experts models: memory-mapped safetensors in, sharded safetensors out, plans and statistics.
//!
//! | what | where |
//! |---|---|
//! | open a folder, look at tensors | [`Checkpoint`] |
//! | what `config.json` says | [`config::ModelConfig`] |
//! | which tensors a model has | [`expected_tensors`], [`Spelling`] |
//! | calibration statistics | [`statistics::Statistics`] |
//! | which neurons stay | [`plan::Plan`] |
//! | write the pruned checkpoint | [`apply()`] |
//! | check a pruned checkpoint | [`verify()`] |
//! | make a random checkpoint of given shapes | [`synthesise()`] |
//! | write any checkpoint, a tensor at a time | [`write_shards`] |
//! | keep what an unfinished run has done | [`Work`] |
//!
//! This crate knows no kernel: it moves bytes and checks them.

mod access;
pub mod apply;
mod atomic;
mod checkpoint;
pub mod config;
mod dtype;
mod error;
mod expected;
mod fingerprint;
mod fp8;
mod header;
mod heap;
mod index;
#[cfg(unix)]
mod mapped;
mod names;
mod neurons;
pub mod plan;
#[doc(hidden)]
pub mod readers;
mod residency;
mod room;
mod scales;
mod scratch;
mod shard;
mod size;
pub mod statistics;
mod synthesise;
mod work;
mod writer;

pub use access::{ExpertTensors, Matrix, RouterTensors, SharedTensors};
pub use apply::{
    ApplyOptions, ApplyOutcome, Difference, LayerRewriter, Mtp, Notes, OutputDtype, OutputForm,
    ReportPage, RewrittenExpert, RewrittenLayer, Verification, apply, apply_rewritten, check_form,
    check_output, check_unfinished, output_bytes, verify, writing_memory,
};
pub use atomic::{
    Sink, check_not_linked, check_replaceable, check_writable, folder_of, replace_file, sync_folder,
};
pub use checkpoint::{Checkpoint, TensorView};
pub use config::{Family, ModelConfig};
pub use dtype::Dtype;
pub use error::CheckpointError;
pub use expected::{ExpectedTensor, Role, expected_tensors, mtp_tensors};
pub use fp8::{FP8_BLOCK, NonFinite, holds_nan, weight_of_scale};
pub use header::PlannedTensor;
pub use heap::return_large_buffers;
#[cfg(unix)]
pub use mapped::explain_faults;
pub use names::{Part, Spelling, dense, layer_of};
pub use neurons::OwnedMatrix;
pub use plan::{Accounting, ExpertPlan, LayerPlan, Plan};
pub use room::{Room, StoredMatrix};
pub use scratch::ScratchValues;
pub use size::{CheckpointSize, PrunedFrom};
pub use statistics::{Folds, LayerStatistics, Statistics};
pub use synthesise::{SynthesiseOptions, synthesise, synthesise_statistics};
pub use work::{Inputs, Work};
pub use writer::{DEFAULT_SHARD_BYTES, WrittenShards, write_shards};
