use std::path::Path;

use simt::{Schedule, Simulated};
use tenp_checkpoint::{Checkpoint, LayerStatistics, SynthesiseOptions, synthesise};
use tenp_kernels::RaggedLayout;

use super::*;
use crate::Model;
use crate::calibrate::calibrate;

fn layout(width: usize, experts: usize) -> PaddedLayout {
    let widths = RaggedLayout::new(vec![width; experts]).expect("a layout");
    PaddedLayout::new(&widths).expect("a layout")
}

#[test]
fn calibrating_deepseek_v3_takes_it_and_v2_lite_does_not() {
    let (v3, v2_lite) = (layout(2048, 256), layout(1408, 64));
    let text = 128 * 2048;
    assert!(wins(&v3, 7168, 8, text, text / 16_384));
    assert!(!wins(&v3, 7168, 8, 16_384, 1));
    assert!(!wins(&v2_lite, 2048, 6, text, text / 16_384));
    // At half their width.
    assert!(wins(&layout(704, 64), 2048, 6, text, text / 16_384));
    assert!(!wins(&layout(0, 0), 2048, 6, text, 1));
    // The demo model, by bytes: all its calibration text, and two samples a domain.
    assert!(wins(&layout(96, 16), 128, 4, 10_245, 1));
    assert!(!wins(&layout(96, 16), 128, 4, 160, 1));
}

/// A model whose experts are a quarter as wide as its hidden states.
fn narrow_model(root: &Path) -> Checkpoint {
    let tiny = "../tenp-checkpoint/tests/data/tiny/deepseek_v3.json";
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join(tiny);
    let text = std::fs::read_to_string(tiny).expect("config");
    let width = "\"moe_intermediate_size\": 48";
    assert!(text.contains(width));
    let text = text.replace(width, "\"moe_intermediate_size\": 16");
    std::fs::write(root.join("narrow.json"), text).expect("written");
    let folder = root.join("model");
    std::fs::create_dir(&folder).expect("a folder");
    let options = SynthesiseOptions::default();
    synthesise(&root.join("narrow.json"), &folder, options, &mut |_, _| ()).expect("made");
    Checkpoint::open(&folder).expect("opens")
}

/// Tokens do not see other samples: all in one pass, with Gram matrices, have the sums of passes too short for them.
#[test]
fn contributions_are_those_made_with_outputs() {
    let root = tempfile::tempdir().expect("a folder");
    let checkpoint = narrow_model(root.path());
    for backend in [
        Simulated::new(Schedule::UNLIKE[1]),
        Simulated::new(Schedule::UNLIKE[2]).with_wgmma(),
    ] {
        let device = DeviceModel::new(&checkpoint, backend).expect("found");
        let samples: Vec<Vec<u32>> = (0..5)
            .map(|s| (0..40).map(|i| (s * 61 + i * 13) % 320).collect())
            .collect();
        let parts = 2 * 8 * 16 * 16 * 2 + 16 * 16 * 4;
        assert_eq!(
            [40, 200].map(|tokens| device.gram_bytes(tokens, 1)),
            [0, parts]
        );

        let layers = |samples: &[Vec<u32>]| {
            let domains = [("all".to_owned(), samples.to_vec())];
            let statistics = calibrate(&Model::on(&device), &domains, &|_, _| ());
            statistics
                .expect("runs")
                .domains
                .remove("all")
                .expect("there")
        };
        let together = layers(&samples);
        let alone: Vec<_> = samples.chunks(1).map(layers).collect();
        assert!(!together.is_empty());
        for (layer, got) in &together {
            let sum = |table: fn(&LayerStatistics) -> &[f64]| {
                let mut sum = vec![0.0; table(got).len()];
                for part in &alone {
                    for (sum, value) in sum.iter_mut().zip(table(&part[layer])) {
                        *sum += value;
                    }
                }
                sum
            };
            let sizes = sum(|s| &s.contribution_abs);
            let (want, of_h) = (sum(|s| &s.contribution), sum(|s| &s.second_moment));
            let mut differing = 0;
            for (j, size) in sizes.iter().enumerate() {
                let close = |got: f64, want: f64| (got - want).abs() <= size / 200.0;
                let (got, got_abs) = (got.contribution[j], got.contribution_abs[j]);
                assert!(
                    close(got, want[j]),
                    "layer {layer}, neuron {j}: {got} {}",
                    want[j]
                );
                assert!(
                    close(got_abs, *size),
                    "layer {layer}, neuron {j}: {got_abs} {size}"
                );
                differing += usize::from(got != want[j]);
            }
            assert!(differing > sizes.len() / 2, "y was rounded in one of them");
            for (got, want) in got.second_moment.iter().zip(of_h) {
                assert!((got - want).abs() <= 1e-6 * want, "{got} {want}");
            }
        }
    }
}
