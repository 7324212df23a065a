//! Every operation on the CPU: one file per operation, the readable reference beside the fast path.
//!
//! Matrix products run on tiles of [`TILE_ROWS`] rows by [`TILE_COLS`] outputs over the whole inner dimension, so an
//! output is one chain of fused multiply-adds in index order: the batch, the thread count and zero padding at the end
//! of the inner dimension cannot change its bits.

mod disjoint;
mod dispatch;
mod pack;
mod panels;
mod tile;

pub mod attention;
pub mod direction;
pub mod elementwise;
pub mod linear;
pub mod moe;
pub mod neuron;
pub mod norm;
pub mod reduce;
pub mod rotary;
pub mod router;
pub mod segments;

pub(crate) use dispatch::multiversion;
pub use dispatch::{Isa, isa};
pub use tile::{TILE_COLS, TILE_ROWS};
