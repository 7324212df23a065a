//! C interface of `tenp-kernels`: `include/tenp.h`, a shared library and a static one.
//!
//! ```text
//! cargo build --release -p tenp-c                    # target/release/libtenp.so and libtenp.a
//! cargo build --release -p tenp-c --features cuda    # with the GPU's functions
//! ```
//!
//! The header says what every function does; here is what holds for all of them.
//!
//! | rule | kept by |
//! |---|---|
//! | every function returns a [`tenp_status`] | [`status`], the only place that makes one |
//! | no panic leaves the library | [`status`] catches it: [`TENP_ERROR_INTERNAL`](status::TENP_ERROR_INTERNAL) |
//! | null pointers and wrong sizes are refused before anything is computed | [`memory`], and the kernels' own checks |
//! | whoever makes a handle gives it back, all other memory is the caller's | handles are boxes, nothing else is kept |
//! | handles may be used by many threads at once, but for giving them back | they are immutable, `Send` and `Sync` |
//! | header and library say the same | `tests/header.rs` compares both, names, types, values and sizes |
//!
//! What cannot be checked is the caller's promise, the `# Safety` of each function: that pointers lead to as much memory
//! as the sizes say, live, initialised, and not written by others meanwhile.
#![allow(non_camel_case_types, reason = "the header's names")]

pub mod cpu;
pub mod gpu;
pub mod memory;
pub mod moe;
pub mod status;
pub mod types;

pub use cpu::{tenp_moe_forward_cpu, tenp_moe_score_cpu};
pub use gpu::{tenp_gpu_close, tenp_gpu_count, tenp_gpu_open, tenp_moe_forward_cuda};
pub use moe::{
    tenp_moe_create, tenp_moe_destroy, tenp_moe_pack, tenp_moe_packed_bytes,
    tenp_moe_workspace_bytes,
};
pub use status::{tenp_last_error, tenp_status, tenp_status_string, tenp_version};
pub use types::{
    tenp_batch, tenp_batch_cuda, tenp_compute, tenp_dtype, tenp_expert, tenp_gpu, tenp_matrix,
    tenp_moe, tenp_stream, tenp_weights_cuda,
};
