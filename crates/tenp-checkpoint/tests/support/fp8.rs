//! Folders in fp8 and back, for the tests of several crates.

// Every test binary uses its own part of this.
#![allow(dead_code)]

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Map, Value, json};
use tenp_checkpoint::{
    Checkpoint, Dtype, OwnedMatrix, PlannedTensor, Role, TensorView, expected_tensors,
    weight_of_scale, write_shards,
};

/// A tensor to write.
struct Tensor {
    planned: PlannedTensor,
    bytes: Vec<u8>,
}

/// Writes `from` with its projections in fp8 into the new folder `to`, in several shards. The scales of every second
/// matrix come last, in another shard than the matrix.
pub(crate) fn quantise(from: &Path, to: &Path) {
    quantise_with(from, to, |_, _| 1.0);
}

/// The same with weights that differ in size from place to place, so that the scales do.
pub(crate) fn quantise_unevenly(from: &Path, to: &Path) {
    quantise_with(from, to, |row, col| {
        1.0 + ((row / 100 + 2 * (col / 90)) % 4) as f32
    });
}

fn quantise_with(from: &Path, to: &Path, factor: impl Fn(usize, usize) -> f32) {
    let checkpoint = Checkpoint::open(from).expect("opens");
    let expected = expected_tensors(checkpoint.config(), checkpoint.spelling());
    let projections: HashSet<String> = expected
        .filter(|tensor| tensor.role == Role::Projection && tensor.shape.len() == 2)
        .map(|tensor| tensor.name)
        .collect();
    let (mut tensors, mut last) = (Vec::new(), Vec::new());
    for (number, source) in checkpoint.tensors().enumerate() {
        if !projections.contains(source.name) {
            tensors.push(plain(&source));
            continue;
        }
        let (rows, cols) = (source.shape[0], source.shape[1]);
        let matrix = checkpoint
            .matrix(source.name, rows, cols)
            .expect("a matrix");
        let mut values = matrix.to_f32();
        for (index, value) in values.iter_mut().enumerate() {
            *value *= factor(index / cols, index % cols);
        }
        let new = OwnedMatrix::encode(Dtype::F8E4M3, rows, cols, &values).expect("finite");
        let scales = tensor(
            format!("{}_scale_inv", source.name),
            Dtype::F32,
            vec![rows.div_ceil(128), cols.div_ceil(128)],
            new.scales,
        );
        // Before its matrix, as in published files.
        if number % 2 == 0 {
            tensors.push(scales);
        } else {
            last.push(scales);
        }
        let name = source.name.to_owned();
        tensors.push(tensor(name, Dtype::F8E4M3, vec![rows, cols], new.bytes));
    }
    tensors.append(&mut last);
    let mut config = checkpoint.config_json().clone();
    config.insert("quantization_config".to_owned(), quantization_config());
    write(to, &config, &tensors);
}

/// What DeepSeek-V3's own config says.
pub(crate) fn quantization_config() -> Value {
    json!({
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    })
}

/// Writes the numbers of an fp8 folder in f32 into the new folder `to`.
pub(crate) fn dequantise(from: &Path, to: &Path) {
    let checkpoint = Checkpoint::open(from).expect("opens");
    let sources = checkpoint
        .tensors()
        .filter(|tensor| weight_of_scale(tensor.name).is_none());
    let tensors: Vec<Tensor> = sources
        .map(|source| {
            if source.dtype != Dtype::F8E4M3 {
                return plain(&source);
            }
            let (rows, cols) = (source.shape[0], source.shape[1]);
            let matrix = checkpoint
                .matrix(source.name, rows, cols)
                .expect("a matrix");
            let values = matrix.to_f32();
            let bytes = values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect();
            tensor(
                source.name.to_owned(),
                Dtype::F32,
                source.shape.to_vec(),
                bytes,
            )
        })
        .collect();
    let mut config = checkpoint.config_json().clone();
    config.shift_remove("quantization_config");
    write(to, &config, &tensors);
}

fn plain(source: &TensorView<'_>) -> Tensor {
    tensor(
        source.name.to_owned(),
        source.dtype,
        source.shape.to_vec(),
        source.bytes.to_vec(),
    )
}

fn tensor(name: String, dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>) -> Tensor {
    Tensor {
        planned: PlannedTensor { name, dtype, shape },
        bytes,
    }
}

fn write(to: &Path, config: &Map<String, Value>, tensors: &[Tensor]) {
    std::fs::create_dir_all(to).expect("a folder");
    let text = serde_json::to_vec_pretty(config).expect("JSON");
    std::fs::write(to.join("config.json"), text).expect("written");
    let planned: Vec<PlannedTensor> = tensors.iter().map(|t| t.planned.clone()).collect();
    write_shards(to, &planned, 100_000, &mut |index, sink| {
        sink.write(&tensors[index].bytes)
    })
    .expect("written");
}
