//! Least squares on the moments that kernels make, against the CPU in bf16.

use serde_json::Value;
use tenp_checkpoint::{ExpertPlan, LayerPlan, LayerRewriter as _, OutputDtype, Room};
use tenp_kernels::Compute;
use tenp_kernels::device::Backend;
use tenp_model::Model;
use tenp_model::device::DeviceModel;
use tenp_model::rewrite::{LeastSquares, RecoverOptions};

use super::{Place, open, whole};

/// Every expert but the first loses neurons, the second all of them.
fn narrowed(layer: usize, experts: usize, full: usize) -> LayerPlan {
    let expert = |id: usize| {
        let step = if id.is_multiple_of(2) { 2 } else { 3 };
        let neurons: Vec<u32> = match id {
            1 => Vec::new(),
            _ => (0..full as u32).filter(|n| n % step != 1).collect(),
        };
        let whole = id == 0;
        ExpertPlan {
            id,
            width: if whole { full } else { neurons.len() },
            neurons: (!whole).then_some(neurons),
            dropped: false,
        }
    };
    LayerPlan {
        layer,
        experts: (0..experts).map(expert).collect(),
    }
}

/// What the report says of every layer, once all are fitted, new matrices of more than `memory` bytes being in files.
fn fitted(mut fit: LeastSquares<'_>, layers: &[LayerPlan], memory: usize) -> Vec<Value> {
    let dir = tempfile::tempdir().expect("a folder");
    let room = Room::with_memory(dir.path(), memory);
    let made = layers.iter().map(|layer| {
        let made = fit.layer(layer, OutputDtype::Same, &room);
        made.expect("fits").outcome
    });
    made.collect()
}

/// The errors before and after, over the tokens fitted and those held out, of every layer: the later ones see what the
/// layers before them have become.
pub(crate) fn experts_are_fitted_as_on_the_cpu<B: Backend + 'static>(place: Place<'_, B>) {
    for (i, family) in ["olmoe", "deepseek_v2_lite", "qwen2_moe"]
        .into_iter()
        .enumerate()
    {
        let (checkpoint, ids, _) = open(family);
        let (moe, sequences) = (&checkpoint.config().moe, whole(&ids));
        let layers: Vec<LayerPlan> = checkpoint
            .config()
            .moe_layers
            .iter()
            .map(|&layer| narrowed(layer, moe.num_experts, moe.expert_width))
            .collect();
        let device = DeviceModel::new(&checkpoint, place(i)).expect("found");
        for gated in [true, false] {
            let options = RecoverOptions {
                gated,
                on_pruned: gated,
            };
            let of = |model: &Model<'_>, bytes: usize| {
                let fit = LeastSquares::new(model, &sequences, options, Box::new(|_| ()));
                fitted(fit.expect("starts").holding(bytes), &layers, bytes)
            };
            let on_cpu = Model::new(&checkpoint, Compute::Bf16);
            let want = of(&on_cpu, usize::MAX);
            assert_eq!(
                of(&on_cpu, 1),
                want,
                "an expert at a time, matrices in files"
            );
            let got = of(&Model::on(&device), 1);
            assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(&want) {
                let cut = want["error_cut"].as_f64().expect("a number");
                for figure in [
                    "error_cut",
                    "error_recovered",
                    "held_out_error_cut",
                    "held_out_error_recovered",
                ] {
                    let (got, want) = (got[figure].as_f64(), want[figure].as_f64());
                    let (got, want) = (got.expect("a number"), want.expect("a number"));
                    println!("{family} {gated} {figure}: {got:.4} {want:.4}");
                    // Where two ridges are nearly as good, either may be chosen.
                    assert!((got - want).abs() <= 0.02 * cut, "{family} {figure}");
                }
                assert!(got["error_recovered"].as_f64() < got["error_cut"].as_f64());
            }
        }
    }
}
