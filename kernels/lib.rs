//! Kernels for Mixture-of-Experts layers whose experts differ in width.
//!
//! | module | what is in it |
//! |---|---|
//! | [`matrix`] | [`MatrixView`]: a weight matrix as it lies in a checkpoint (f32, f16, bf16 or block-scaled fp8, any alignment) |
//! | [`layout`] | [`RaggedLayout`] of neurons, [`ExpertGroups`]: the routed rows of every expert |
//! | [`cpu`] | every operation of a streaming forward pass and of the scoring, on the CPU |
//! | [`cost`] | FLOPs, bytes and floor times of the operations |
//! | [`params`] | what the CUDA kernels are called with, as the C header declares it |
//! | [`device`] | weights as the CUDA kernels want them, launch geometry; with the feature `cuda` the GPU itself |
//!
//! # What runs where
//!
//! On the CPU weights are read as they are stored (f32, f16, bf16, fp8), products are f32 or bf16 as [`Compute`] says,
//! sums f32, statistics f64; vectors are AVX-512, AVX2, NEON or what the compiler's target has, chosen at run time, and
//! bf16 products are the processor's own where it has AVX-512 BF16 or Arm's BF16 ([`cpu::isa`]). On a GPU products are
//! bf16 with sums in f32, from sm_80 on with `mma`, on sm_90 also with `wgmma`; a letter and the rows of a tile end an entry's name, and
//! [`Tile::choose`](device::Tile::choose) says which one is taken.
//!
//! | operation | CPU | GPU: sources in `kernels/cuda` | input → output there | sm_80 and later | sm_90a besides |
//! |---|---|---|---|---|---|
//! | h = silu(gate x) · (up x), every expert | [`cpu::moe`] | `moe_gate_up`, `moe_gate_up_sm90` | bf16 → bf16 | `r2` `n16` `n64` `n128` | `w8` `w16` `w32` `w64` `w128` `w192` `w256`, rows in order or gathered |
//! | the same, with sums over h | [`cpu::neuron`] | `moe_gate_up`, `moe_gate_up_sm90` | bf16 → bf16, f32 | `n64` `n128` | `w8` `w16` `w32` `w64` `w128` `w192` `w256`, in order or gathered |
//! | y = down h, every expert | [`cpu::moe`] | `moe_down`, `moe_down_sm90` | bf16 → f32, bf16 | `r2` `n16` `n64` `n128` | `w8` `w16` `w32` `w64` `w128` `w192` `w256` |
//! | contribution of neurons | [`cpu::neuron`] | `moe_contribution`, `moe_contribution_sm90` | bf16 → f32 | `n64` `n128` | `w8` `w16` `w32` `w64` `w128` `w192` `w256` |
//! | Gram matrices for it | – | `gram_split`, behind a dense product | f32 → bf16 | all | – |
//! | Σ g y of each token | [`cpu::moe`] | `moe_combine` | f32 or bf16 → f32 | all | – |
//! | sizes and turns of outputs, sums of experts | [`cpu::direction`] | `moe_direction`, `moe_row_norms`, `expert_sums` | f32 or bf16 → f64 | all | – |
//! | sums over batches | [`cpu::neuron`] | `moe_accumulate` | f32 → f64 | all | – |
//! | rows by expert, tiles of the products | [`layout`] | `moe_group`, `moe_schedule` | i32 | all | – |
//! | similarity of neurons | [`cpu::segments`] | `segment_norms`, `segment_match`, `segment_match_sm90`, `segment_best` | bf16 → f32 | all | `w` |
//! | centres of neurons | [`cpu::segments`] | `kmeans_centres` | bf16 → bf16 | all | – |
//! | experts of a token | [`cpu::router`] | `router` | f32 → i32, f32 | all | – |
//! | attention | [`cpu::attention`] | `attention_prefill`, `attention_decode`, `mla_keys` | bf16 → bf16 | heads of up to `64` `128` `192` `256` | – |
//! | norms, rotary positions | [`cpu::norm`], [`cpu::rotary`] | `rms_norm`, `rotary` | f32 → f32, bf16 | all | – |
//! | element by element, rows | [`cpu::elementwise`] | `elementwise`, `rows` | f32, bf16, f16 → f32, bf16 | all | – |
//! | dense products | [`cpu::linear`] | cuBLAS | bf16 or f32 → f32 or bf16 | all | – |
//! | weights in device form | – | `pack`, `dequantise_fp8` | bf16, fp8 → bf16 | all | – |
//!
//! How other runtimes call the grouped experts (Rust, C, candle): `docs/runtimes.md` of the source tree.
//!
//! All CPU operations keep one promise: a row of a result depends on that row's inputs only, and every sum runs in a
//! fixed order. So results do not depend on the batch, on the number of threads, or (in f32) on the instruction set.

pub mod cost;
pub mod cpu;
pub mod device;
pub mod error;
mod fp8;
pub mod layout;
pub mod matrix;
pub mod params;

pub use error::KernelError;
pub use fp8::FP8_BLOCK;
pub use layout::{ExpertGroups, RaggedLayout};
pub use matrix::{Dtype, MatrixView};

/// Precision of the matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compute {
    /// Weights widened to f32, products and sums in f32.
    F32,
    /// Both factors rounded to bf16 (nearest even), sums in f32.
    Bf16,
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// The table above names every source of a kernel.
    #[test]
    fn no_kernel_is_missing_from_the_table() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/cuda");
        let mut num_sources = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "cu") {
                let stem = path.file_stem().unwrap().to_str().unwrap().to_string();
                let table = include_str!("lib.rs");
                assert!(table.contains(&format!("`{stem}`")), "{stem}");
                num_sources += 1;
            }
        }
        assert!(num_sources > 20, "{num_sources}");
    }

    /// The tiles that the table gives the grouped products are those that there are.
    #[test]
    fn the_table_has_the_tiles_of_the_products() {
        use crate::device::{Product, Tile};
        type Products = fn(Tile) -> Product;
        let kinds: [(&str, Products); 4] = [
            ("| h = silu", Product::gate_up),
            ("| the same, with sums", Product::gate_up_stats),
            ("| y = down", Product::down),
            ("| contribution", Product::contribution),
        ];
        for (row, product) in kinds {
            let line = include_str!("lib.rs").lines();
            let line = line.map(|l| l.trim_start_matches("//! "));
            let mut line = line.filter(|l| l.starts_with(row));
            let line = line.next().expect("a row of the table");
            let cells: Vec<&str> = line.split('|').collect();
            for (cell, tiles) in [(cells[5], &Tile::ALL[..]), (cells[6], &Tile::WGMMA[..])] {
                let named: Vec<&str> = cell.split('`').skip(1).step_by(2).collect();
                let mut there = Vec::new();
                for &tile in tiles {
                    let end = product(tile).entry.rsplit('_').next().unwrap();
                    if !there.contains(&end) {
                        there.push(end);
                    }
                }
                assert_eq!(named, there, "{row}");
            }
        }
    }
}
