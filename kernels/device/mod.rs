//! The CUDA side: weights as the kernels want them, checked launches, and (feature `cuda`) the GPU itself.
//!
//! Everything up to the launch needs no GPU: a wrapper checks its arguments and makes a [`Call`], which a [`Runner`]
//! runs. The `simt` crate's executor is one runner, so the wrappers are tested on every machine; the GPU is the other.
//!
//! | module | what is in it |
//! |---|---|
//! | [`packed`] | padded neuron offsets, and packing of expert weights on the host |
//! | [`geometry`] | how kernels are launched, the choice of tiles |
//! | [`view`], [`call`] | borrowed GPU memory, checked launches |
//! | [`tensor_map`] | matrices as the bulk copies of sm_90 see them |
//! | [`ragged_moe`] | a whole layer over another runtime's memory, and (feature `cuda`) stream |
//! | [`backend`], [`dense`] | what a forward pass needs of the place it runs on |
//! | [`check`] | checks of offsets, alignment and sizes |
//! | one per `.cu` file | argument structures and the functions that make calls of them |
//! | `Device`, `DeviceBuffer`, … | feature `cuda`: the GPU, its memory, uploads, times, cuBLAS |

pub mod attention;
pub mod backend;
pub mod call;
pub mod check;
pub mod dense;
pub mod dequantise_fp8;
pub mod elementwise;
pub mod expert_sums;
pub mod geometry;
pub mod gram;
pub mod kmeans_centres;
pub mod mla_keys;
pub mod moe_accumulate;
pub mod moe_combine;
pub mod moe_contribution;
pub mod moe_direction;
pub mod moe_down;
pub mod moe_gate_up;
pub mod moe_group;
pub mod moe_row_norms;
pub mod moe_schedule;
pub mod pack;
pub mod packed;
pub mod ragged_moe;
pub mod rms_norm;
pub mod rotary;
pub mod router;
pub mod rows;
pub mod segment_match;
pub mod segment_norms;
pub mod tensor_map;
pub mod view;

#[cfg(feature = "cuda")]
mod blas;
#[cfg(feature = "cuda")]
mod buffer;
#[cfg(feature = "cuda")]
mod context;
#[cfg(feature = "cuda")]
mod encode_maps;
#[cfg(any(feature = "cuda", test))]
mod entries;
#[cfg(feature = "cuda")]
mod fatbins;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
mod graph;
#[cfg(feature = "cuda")]
mod libraries;
#[cfg(feature = "cuda")]
mod stream;
#[cfg(feature = "cuda")]
mod timing;
#[cfg(feature = "cuda")]
mod upload;

pub use backend::{Backend, Memory};
pub use call::{Call, Runner};
pub use dense::{DenseElement, DenseShape, InputLayout, WeightLayout};
pub use geometry::{Launch, Product, Tile};
pub use packed::PaddedLayout;
pub use ragged_moe::{MoeBatch, MoeWeights, RaggedMoe};
pub use tensor_map::TensorMap;
pub use view::{DeviceSlice, DeviceSliceMut, InOut};

#[cfg(feature = "cuda")]
pub use self::{
    blas::{GroupedDense, GroupedProduct, cublas_found},
    buffer::DeviceBuffer,
    context::{Device, Properties, gpu_count},
    graph::Graph,
    stream::OnStream,
    timing::Timer,
    upload::{IdleBuffer, PinnedBuffer, Upload},
};
