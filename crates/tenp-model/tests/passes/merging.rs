//! DERN's merging where kernels compare the neurons, against the CPU in bf16.

use tenp_checkpoint::plan::{Dern as Settings, Initialisation, MergeWeights, RouterRule, Scope};
use tenp_checkpoint::{
    Checkpoint, ExpertPlan, LayerPlan, LayerRewriter as _, OutputDtype, Plan, RewrittenLayer, Room,
};
use tenp_kernels::Compute;
use tenp_kernels::device::Backend;
use tenp_model::rewrite::Dern;

use super::{Place, fewer_experts, open};

/// Every layer drops its first experts, or all experts lose every second neuron.
fn plan(checkpoint: &Checkpoint, scope: Scope, sign_canonical: bool) -> Plan {
    let moe = &checkpoint.config().moe;
    let (experts, full) = (moe.num_experts, moe.expert_width);
    let expert = |id: usize| {
        let dropped = scope == Scope::Experts && id < 2;
        let neurons: Vec<u32> = (0..full as u32).step_by(2).collect();
        let narrow = scope == Scope::Neurons;
        ExpertPlan {
            id,
            width: match (dropped, narrow) {
                (true, _) => 0,
                (_, true) => neurons.len(),
                _ => full,
            },
            neurons: narrow.then_some(neurons),
            dropped,
        }
    };
    let layers = checkpoint.config().moe_layers.iter();
    let experts_of = |&layer: &usize| LayerPlan {
        layer,
        experts: (0..experts).map(expert).collect(),
    };
    let score = |id: usize| (id + 1) as f64;
    let (router, merge_weights) = match scope {
        Scope::Experts => (RouterRule::Transfer, MergeWeights::Router),
        Scope::Neurons => (RouterRule::Keep, MergeWeights::Uniform),
    };
    Plan {
        dern: Some(Settings {
            scope,
            lambda: [0.2, 0.4, 0.4],
            threshold: 0.0,
            sign_canonical,
            router,
            initialisation: Initialisation::Peak,
            seed: None,
            merge_weights,
            rounds: 30,
            scores: match scope {
                Scope::Experts => layers
                    .clone()
                    .map(|_| (0..experts).map(score).collect())
                    .collect(),
                Scope::Neurons => Vec::new(),
            },
            weights: Vec::new(),
        }),
        layers: layers.map(experts_of).collect(),
        ..fewer_experts(checkpoint)
    }
}

fn rewritten(mut dern: Dern<'_>, plan: &Plan) -> (Vec<RewrittenLayer>, serde_json::Value) {
    let dir = tempfile::tempdir().expect("a folder");
    let room = Room::new(dir.path());
    let layers = plan
        .layers
        .iter()
        .map(|layer| dern.layer(layer, OutputDtype::Same, &room).expect("merges"));
    let layers: Vec<_> = layers.collect();
    let outcomes: Vec<_> = layers.iter().map(|layer| layer.outcome.clone()).collect();
    (layers, dern.notes(&outcomes).report["dern"].clone())
}

/// The centres are means of the same weights on both sides, so where every neuron goes to the same place all bytes are the
/// same. Sums in another order may turn a tie over.
pub(crate) fn neurons_are_merged_as_on_the_cpu<B: Backend + 'static>(place: Place<'_, B>) {
    for (i, family) in ["olmoe", "deepseek_v2_lite", "qwen2_moe"]
        .into_iter()
        .enumerate()
    {
        let (checkpoint, _, _) = open(family);
        for (scope, canonical) in [
            (Scope::Experts, false),
            (Scope::Experts, true),
            (Scope::Neurons, true),
        ] {
            let plan = plan(&checkpoint, scope, canonical);
            plan.validate(&checkpoint).expect("a sound plan");
            let told = || Box::new(|_| ());
            let cpu = Dern::new(&checkpoint, &plan, Compute::Bf16, told()).expect("merges");
            let device = Dern::on(&checkpoint, &plan, place(i), told()).expect("merges");
            let ((want, want_report), (got, report)) =
                (rewritten(cpu, &plan), rewritten(device, &plan));
            println!("{family} {scope:?} {canonical}: {} moved", report["moved"]);
            assert!(report["moved"].as_u64() > Some(0), "{family}: {report}");
            assert_eq!(report["moved"], want_report["moved"], "{family}");
            let experts = |layers: Vec<RewrittenLayer>| -> Vec<_> {
                layers.into_iter().flat_map(|layer| layer.experts).collect()
            };
            let (got, want) = (experts(got), experts(want));
            assert_eq!(got.len(), want.len());
            let same = got
                .iter()
                .zip(&want)
                .filter(|(got, want)| got == want)
                .count();
            assert!(
                same + 1 >= want.len(),
                "{family}: {same} of {} experts",
                want.len()
            );
        }
    }
}
