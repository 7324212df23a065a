//! The smallest use: three experts of different width on the CPU. `cargo run --example ragged_moe`

#![allow(clippy::print_stdout, reason = "an example shows its result")]
use tenp_kernels::cpu::moe::{ExpertActivations, ExpertWeights, combine, expert_forward};
use tenp_kernels::{Compute, ExpertGroups, KernelError, MatrixView};

const HIDDEN: usize = 8;

fn main() -> Result<(), KernelError> {
    let weights: Vec<f32> = (0..HIDDEN * 6).map(|i| (i as f32 * 0.37).sin()).collect();
    // Pruned to 6, 3 and no neurons: no padding, no masks.
    let experts: Vec<ExpertWeights<'_>> = [6, 3, 0]
        .into_iter()
        .map(|width| {
            let rows = MatrixView::from_f32(width, HIDDEN, &weights[..width * HIDDEN])?;
            let down = MatrixView::from_f32(HIDDEN, width, &weights[..width * HIDDEN])?;
            Ok(ExpertWeights {
                gate: rows,
                up: rows,
                down,
            })
        })
        .collect::<Result<_, KernelError>>()?;

    // Two tokens, two experts each, with their routing weights.
    let x: Vec<f32> = (0..2 * HIDDEN).map(|i| (i as f32 * 0.11).cos()).collect();
    let groups = ExpertGroups::new(experts.len(), 2, &[0, 1, 2, 0], &[0.7, 0.3, 0.4, 0.6])?;
    let mut activations = ExpertActivations::default();
    expert_forward(Compute::F32, &experts, &groups, &x, &mut activations)?;
    let mut out = vec![0.0; x.len()];
    combine(&groups, activations.outputs(), HIDDEN, &mut out)?;
    for (token, out) in out.chunks(HIDDEN).enumerate() {
        println!("token {token}: {out:.3?}");
    }
    Ok(())
}
