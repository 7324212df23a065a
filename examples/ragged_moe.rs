//! The smallest use: three experts of different width on the CPU. `cargo run --example ragged_moe`
#![allow(clippy::print_stdout, reason = "an example shows its result")]

use tenp_kernels::cpu::moe::{ExpertActivations, ExpertWeights, combine, expert_forward};
use tenp_kernels::{Compute, ExpertGroups, KernelError, MatrixView};

pub(crate) const HIDDEN: usize = 8;

pub(crate) fn layer(weights: &[f32], x: &[f32]) -> Result<Vec<f32>, KernelError> {
    // Pruned to 6, 3 and no neurons: no padding, no masks.
    let expert = |width| {
        let rows = MatrixView::from_f32(width, HIDDEN, &weights[..width * HIDDEN])?;
        Ok(ExpertWeights {
            gate: rows,
            up: rows,
            down: MatrixView::from_f32(HIDDEN, width, &weights[..width * HIDDEN])?,
        })
    };
    let experts = [6, 3, 0].map(expert).into_iter();
    let experts = experts.collect::<Result<Vec<_>, KernelError>>()?;
    // Two tokens, two experts each, with their routing weights.
    let groups = ExpertGroups::new(experts.len(), 2, &[0, 1, 2, 0], &[0.7, 0.3, 0.4, 0.6])?;
    let mut activations = ExpertActivations::default();
    expert_forward(Compute::F32, &experts, &groups, x, &mut activations)?;
    let mut out = vec![0.0; x.len()];
    combine(&groups, activations.outputs(), HIDDEN, &mut out)?;
    Ok(out)
}

pub(crate) fn main() -> Result<(), KernelError> {
    let weights: Vec<f32> = (0..HIDDEN * 6).map(|i| (i as f32 * 0.37).sin()).collect();
    let x: Vec<f32> = (0..HIDDEN * 2).map(|i| (i as f32 * 0.11).cos()).collect();
    for (token, out) in layer(&weights, &x)?.chunks(HIDDEN).enumerate() {
        println!("token {token}: {out:.3?}");
    }
    Ok(())
}
