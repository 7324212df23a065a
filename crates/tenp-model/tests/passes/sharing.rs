//! A calibration of all samples, and one of every share of them, merged.

use tenp_checkpoint::Statistics;
use tenp_kernels::device::Backend;
use tenp_model::Model;
use tenp_model::calibrate::calibrate;
use tenp_model::device::DeviceModel;

use super::{Place, norm_of_difference, open, tables};

pub(crate) fn shares_merge_to_the_whole<B: Backend + 'static>(place: Place<'_, B>) {
    let mut most: f64 = 0.0;
    for (i, family) in ["deepseek_v3", "mixtral"].into_iter().enumerate() {
        let (checkpoint, ids, _) = open(family);
        // Of unlike lengths, so that rows lie elsewhere in their tiles, in other counts.
        let samples: Vec<Vec<u32>> = [(0, 0..40), (0, 40..96), (1, 0..25), (1, 25..96)]
            .into_iter()
            .map(|(sequence, range): (usize, _)| ids[sequence][range].to_vec())
            .collect();
        let device = DeviceModel::new(&checkpoint, place(i)).expect("found");
        let run = |samples: &[Vec<u32>]| -> Statistics {
            let domains = [("all".to_owned(), samples.to_vec())];
            calibrate(&Model::on(&device), &domains, &|_, _| ()).expect("runs")
        };
        let whole = run(&samples);
        for shares in [2, 4] {
            let mut merged = Statistics::default();
            for share in 0..shares {
                let own: Vec<_> = samples
                    .iter()
                    .skip(share)
                    .step_by(shares)
                    .cloned()
                    .collect();
                merged.merge(run(&own)).expect("merges");
            }
            for (layer, want) in &whole.domains["all"] {
                let got = &merged.domains["all"][layer];
                assert_eq!(
                    (got.total_tokens, &got.tokens),
                    (want.total_tokens, &want.tokens)
                );
                for ((table, got), (_, want)) in tables(got).into_iter().zip(tables(want)) {
                    let error = norm_of_difference(got, want);
                    most = most.max(error);
                    assert!(
                        error <= 1e-2,
                        "{family} in {shares} shares, layer {layer}, {table}: {error:.2e}"
                    );
                }
            }
        }
    }
    println!("merged shares differ from the whole by {most:.2e} at most");
}
