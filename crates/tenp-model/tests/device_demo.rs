//! The demo model calibrated by the GPU's kernels, run by the executor of the `simt` crate, against the CPU in bf16: every
//! statistic, and the neurons that TENP keeps.
//!
//! `TENP_DEMO_SAMPLES=128 cargo test -p tenp-model --test device_demo -- --nocapture` takes all calibration text and some
//! minutes.

#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};

use simt::{Schedule, Simulated};
use tenp_checkpoint::{Checkpoint, LayerStatistics, Plan, Statistics};
use tenp_kernels::Compute;
use tenp_model::Model;
use tenp_model::calibrate::calibrate;
use tenp_model::device::DeviceModel;
use tenp_model::text::{Tokenizer, read_samples};
use tenp_prune::{Method, ModelSize, PlanRequest};

const DOMAINS: [&str; 4] = ["arith", "code", "facts", "lists"];

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo")
}

/// What the comparison may call a table.
type Table = fn(&LayerStatistics) -> &[f64];

const TABLES: [(&str, Table); 15] = [
    ("gate_sum", |s| &s.gate_sum),
    ("normalised_gate_sum", |s| &s.normalised_gate_sum),
    ("norm_sum", |s| &s.norm_sum),
    ("norm_sq_sum", |s| &s.norm_sq_sum),
    ("gated_norm_sum", |s| &s.gated_norm_sum),
    ("direction", |s| &s.direction),
    ("residual_direction", |s| &s.residual_direction),
    ("output_peak", |s| &s.output_peak),
    ("contribution", |s| &s.contribution),
    ("contribution_abs", |s| &s.contribution_abs),
    ("activation_norm", |s| &s.activation_norm),
    ("energy", |s| &s.energy),
    ("peak", |s| &s.peak),
    ("mean", |s| &s.mean),
    ("second_moment", |s| &s.second_moment),
];

/// ‖got − want‖ / ‖want‖ of a table over all layers and domains.
fn relative_error(got: &Statistics, want: &Statistics, table: Table) -> f64 {
    let (mut difference, mut norm) = (0.0, 0.0);
    for (domain, layers) in &want.domains {
        for (layer, want) in layers {
            let pairs = table(&got.domains[domain][layer]).iter().zip(table(want));
            for (g, w) in pairs {
                difference += (g - w) * (g - w);
                norm += w * w;
            }
        }
    }
    (difference / norm).sqrt()
}

fn plan(checkpoint: &Checkpoint, statistics: &Statistics) -> Plan {
    let size = checkpoint.size();
    let row = checkpoint.config().hidden_size as u64;
    let size = ModelSize {
        parameters_total: size.parameters_total,
        parameters_routed: size.parameters_routed,
        bytes_total: size.bytes_total,
        routed_bytes: size.bytes_routed,
        router_row_bytes: 2 * row,
        router_row_parameters: row,
    };
    let request = PlanRequest {
        method: Method::Tenp,
        keep: 0.6,
        ..PlanRequest::default()
    };
    let (config, fingerprint) = (checkpoint.config(), checkpoint.fingerprint());
    tenp_prune::plan(config, &size, fingerprint, statistics, &request).expect("a plan")
}

/// (neurons that both plans keep, neurons that `want` keeps).
fn kept_in_common(got: &Plan, want: &Plan, width: usize) -> (usize, usize) {
    let (mut both, mut all) = (0, 0);
    for (got, want) in got.layers.iter().zip(&want.layers) {
        for (got, want) in got.experts.iter().zip(&want.experts) {
            let ids = |expert: &tenp_checkpoint::ExpertPlan| -> Vec<u32> {
                let whole = (0..width as u32).take(expert.width).collect();
                expert.neurons.clone().unwrap_or(whole)
            };
            let (got, want) = (ids(got), ids(want));
            both += want
                .iter()
                .filter(|id| got.binary_search(id).is_ok())
                .count();
            all += want.len();
        }
    }
    (both, all)
}

#[test]
fn statistics_and_kept_neurons_are_those_of_the_cpu() {
    let samples = std::env::var("TENP_DEMO_SAMPLES").map_or(2, |n| n.parse().expect("a number"));
    let checkpoint = Checkpoint::open(&demo()).expect("the demo checkpoint");
    let tokenizer = Tokenizer::open(&checkpoint).expect("its tokenizer");
    let domains: Vec<(String, Vec<Vec<u32>>)> = DOMAINS
        .iter()
        .map(|domain| {
            let path = demo().join("calibration").join(format!("{domain}.jsonl"));
            let samples = read_samples(&path, samples, 2048, &mut || Ok(&tokenizer));
            ((*domain).to_owned(), samples.expect("calibration text"))
        })
        .collect();
    let run = |model: Model<'_>| calibrate(&model, &domains, &|_, _| ()).expect("runs");
    let want = run(Model::new(&checkpoint, Compute::Bf16));
    let device = DeviceModel::new(&checkpoint, Simulated::new(Schedule::Forward)).expect("found");
    let got = run(Model::on(&device));

    let tokens: usize = domains.iter().flat_map(|(_, s)| s).map(Vec::len).sum();
    println!(
        "{tokens} tokens; relative difference of each statistic, GPU kernels and CPU in bf16:"
    );
    for (name, table) in TABLES {
        let error = relative_error(&got, &want, table);
        println!("{name:22} {error:.2e}");
        // A maximum is one token's; the bound on sums holds with a few tokens already.
        let most = if name.ends_with("peak") { 5e-2 } else { 1e-2 };
        assert!(error <= most, "{name}: {error:.2e}");
    }
    let width = checkpoint.config().moe.expert_width;
    let (both, all) = kept_in_common(&plan(&checkpoint, &got), &plan(&checkpoint, &want), width);
    let share = both as f64 / all as f64;
    println!(
        "kept neurons in common at keep 0.6: {both} of {all} ({:.2} %)",
        100.0 * share
    );
    assert!(share >= 0.99, "{both} of {all}");
}
