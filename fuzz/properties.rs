//! What must hold of every reader whatever bytes it is given: one function for each, called by the fuzz targets and by the
//! test that replays the corpus.

// Every target uses its own function.
#![allow(dead_code)]

use std::path::{Component, Path};

use tenp_checkpoint::{
    Checkpoint, ModelConfig, Spelling, expected_tensors, layer_of, mtp_tensors, readers,
};

/// Tensors of a config that are looked at.
const TENSORS: usize = 10_000;

/// Only files of the folder itself are named.
pub(crate) fn index(text: &[u8]) {
    let Ok(promised) = readers::index(text) else {
        return;
    };
    for shard in promised.values() {
        let parts: Vec<_> = Path::new(shard).components().collect();
        assert!(matches!(parts[..], [Component::Normal(name)] if name == shard.as_str()));
    }
}

/// The tensors fill the file, and the format's own library reads the same of it.
pub(crate) fn header(file: &[u8]) {
    let Ok(tensors) = readers::header(file) else {
        return;
    };
    let (length, reference) = safetensors::SafeTensors::read_metadata(file).unwrap();
    let data = 8 + length;
    let mut position = data;
    for (tensor, range) in &tensors {
        assert_eq!(range.start, position);
        assert_eq!(range.len() as u64, tensor.num_bytes());
        position = range.end;
        let info = reference.info(&tensor.name).unwrap();
        assert_eq!(info.shape, tensor.shape);
        assert_eq!(info.data_offsets, (range.start - data, range.end - data));
    }
    assert_eq!(position, file.len());
    assert_eq!(reference.tensors().len(), tensors.len());
}

/// Every tensor of the model has a name of its own layer and a size that is a number.
pub(crate) fn config(text: &[u8]) {
    let Ok((config, _)) = readers::config(text) else {
        return;
    };
    assert!(
        config
            .moe_layers
            .iter()
            .all(|layer| *layer < config.num_layers)
    );
    for spelling in [
        Spelling::classic(config.family),
        Spelling::fused(config.family),
    ] {
        let own = expected_tensors(&config, spelling).take(TENSORS);
        let mtp = mtp_tensors(&config, spelling).take(TENSORS);
        for tensor in own.chain(mtp) {
            let layers = config.num_layers + config.num_mtp_layers;
            assert!(layer_of(&tensor.name).is_none_or(|layer| layer < layers));
            let size = tensor
                .shape
                .iter()
                .try_fold(1_u128, |n, axis| n.checked_mul(*axis as u128));
            assert!(size.is_some());
        }
    }
}

/// A sound plan says the same of itself after it has been written and read again.
pub(crate) fn plan(text: &[u8]) {
    let config = model();
    let Ok(plan) = readers::plan(text, &config) else {
        return;
    };
    let again = readers::plan_text(&plan).unwrap();
    assert_eq!(readers::plan(&again, &config).unwrap(), plan);
    for (layer, counts) in plan.layers.iter().zip(plan.num_experts()) {
        assert!(counts >= config.moe.top_k);
        let kept: usize = layer.kept().map(|expert| expert.width).sum();
        assert_eq!(layer.widths().iter().sum::<usize>(), kept);
        for expert in layer.kept() {
            let fits = |neuron: &u32| (*neuron as usize) < config.moe.expert_width;
            assert!(expert.kept().is_none_or(|neurons| neurons.iter().all(fits)));
        }
    }
    assert!(!plan.is_stock(&config) || plan.narrows_nothing(&config));
    assert!(
        plan.uniform_width()
            .is_none_or(|width| width <= config.moe.expert_width)
    );
}

/// Tables are of the layer's shape and finite, also once they are added to others.
pub(crate) fn statistics(file: &[u8]) {
    let Ok(read) = readers::statistics(file) else {
        return;
    };
    assert!(
        read.missing_shares()
            .iter()
            .all(|share| share.part <= share.parts)
    );
    let mut other = read.clone();
    other.tokens.clear();
    for share in &mut other.shares {
        share.of_text.push('x');
    }
    let mut merged = other.clone();
    if merged.merge(read.clone()).is_err() {
        assert_eq!(merged, other);
    }
    for statistics in [read, merged] {
        for layer in statistics
            .domains
            .values()
            .flat_map(|layers| layers.values())
        {
            assert_eq!(layer.tokens.len(), layer.num_experts);
            assert_eq!(layer.gate_sum.len(), layer.num_experts);
            assert_eq!(layer.energy.len(), layer.num_experts * layer.width);
            let tables = [
                &layer.gate_sum,
                &layer.energy,
                &layer.peak,
                &layer.down_norm_sq,
            ];
            assert!(tables.into_iter().flatten().all(|value| value.is_finite()));
        }
    }
}

/// The model that plans are read for: three layers, of 8 experts in groups.
fn model() -> ModelConfig {
    let text = include_bytes!("../crates/tenp-checkpoint/tests/data/tiny/deepseek_v3.json");
    readers::config(text).unwrap().0
}

/// Between the files of a folder.
const NEXT_FILE: &[u8] = b"\n----\n";

/// What is opened can be used: config, index and two shards, each as a file; what is empty is not there.
pub(crate) fn folder(bytes: &[u8]) {
    let dir = std::env::temp_dir().join(format!("tenp-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let mut rest = bytes;
    for name in [
        "config.json",
        "model.safetensors.index.json",
        "a.safetensors",
        "b.safetensors",
    ] {
        let end = rest
            .windows(NEXT_FILE.len())
            .position(|window| window == NEXT_FILE);
        let file = &rest[..end.unwrap_or(rest.len())];
        rest = end.map_or(&[], |end| &rest[end + NEXT_FILE.len()..]);
        let path = dir.join(name);
        let _ = std::fs::remove_file(&path);
        if !file.is_empty() {
            std::fs::write(path, file).unwrap();
        }
    }
    if let Ok(checkpoint) = Checkpoint::open_partial(&dir) {
        used(&checkpoint);
    }
    std::fs::remove_dir_all(dir).unwrap();
}

fn used(checkpoint: &Checkpoint) {
    let (config, size) = (checkpoint.config(), checkpoint.size());
    let whole = checkpoint.missing_shards().is_empty();
    let bytes: usize = checkpoint.tensors().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(size.bytes_total, bytes as u64);
    assert!(!whole || size.parameters_routed <= size.parameters_total);
    assert!(size.parameters_active <= size.parameters_total);
    let _ = (checkpoint.has_mtp(), checkpoint.dtype());
    for (index, layer) in config.moe_layers.iter().copied().enumerate().take(4) {
        assert!(!whole || checkpoint.router(layer).is_ok());
        assert!(!whole || checkpoint.shared_expert(layer).is_ok());
        let num_experts = config.num_experts(index);
        assert!(checkpoint.expert(layer, num_experts).is_err());
        for id in (0..num_experts.min(4)).chain([num_experts - 1]) {
            let expert = checkpoint.expert(layer, id);
            assert!(!whole || expert.is_ok());
            let matrices = expert.map(|expert| [expert.gate, expert.up, expert.down]);
            for matrix in matrices.into_iter().flatten() {
                assert_eq!(matrix.to_f32().len(), matrix.rows * matrix.cols);
            }
        }
    }
}
