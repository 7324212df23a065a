//! Weights that reach the kernels' memory in fp8 are those of the CPU.

use tenp_checkpoint::Checkpoint;
use tenp_kernels::Compute;
use tenp_kernels::device::Backend;
use tenp_model::Model;
use tenp_model::device::DeviceModel;

use super::super::fp8::quantise;
use super::super::support::{golden, golden_dir, relative_error, transformers_bf16_error};
use super::{Place, logits, median_token_error, whole};

pub(crate) fn logits_of_fp8_weights<B: Backend + 'static>(place: Place<'_, B>) {
    let root = tempfile::tempdir().expect("a folder");
    for (i, family) in ["deepseek_v3", "deepseek_v2_lite"].into_iter().enumerate() {
        let (source, folder) = (golden_dir().join(family), root.path().join(family));
        quantise(&source, &folder);
        let checkpoint = Checkpoint::open(&folder).expect("opens");
        assert!(checkpoint.is_fp8());
        let sequences = whole(&golden(&source).0);
        let device = DeviceModel::new(&checkpoint, place(i)).expect("found");
        let got = logits(&Model::on(&device), &sequences);
        let want = logits(&Model::new(&checkpoint, Compute::F32), &sequences);
        let error = relative_error(&got, &want);
        let median = median_token_error(&got, &want, checkpoint.config().vocab_size);
        let theirs = transformers_bf16_error(family);
        println!(
            "{family} in fp8: {error:.2e}, median token {median:.2e}, transformers {theirs:.2e} in bf16"
        );
        assert!(
            median <= theirs && error <= 0.1,
            "{family}: {error:.2e}, {median:.2e}"
        );
    }
}
