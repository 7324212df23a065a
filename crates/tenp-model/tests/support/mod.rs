//! The golden checkpoints and what the public `transformers` library makes of them.

// Every test binary uses its own part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

pub(crate) const FAMILIES: [&str; 9] = [
    "deepseek",
    "deepseek_v2_group",
    "deepseek_v2_lite",
    "deepseek_v3",
    "glm4_moe",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
];

/// The repository: `TENP_REPO` where a test binary was carried to another machine.
pub(crate) fn repository() -> PathBuf {
    std::env::var_os("TENP_REPO").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."),
        PathBuf::from,
    )
}

pub(crate) fn golden_dir() -> PathBuf {
    repository().join("tests/golden")
}

pub(crate) fn golden(dir: &Path) -> (Vec<Vec<u32>>, Vec<f32>) {
    let bytes = std::fs::read(dir.join("golden.safetensors")).expect("golden file");
    let file = SafeTensors::deserialize(&bytes).expect("valid safetensors");
    let ids = file.tensor("input_ids").expect("input_ids");
    let len = ids.shape()[1];
    let ids: Vec<u32> = ids
        .data()
        .as_chunks::<8>()
        .0
        .iter()
        .map(|b| i64::from_le_bytes(*b) as u32)
        .collect();
    let logits = file.tensor("logits").expect("logits");
    let logits = logits
        .data()
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect();
    (ids.chunks(len).map(<[u32]>::to_vec).collect(), logits)
}

pub(crate) fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let sum = |f: &dyn Fn(usize) -> f64| (0..got.len()).map(|i| f(i).powi(2)).sum::<f64>().sqrt();
    sum(&|i| f64::from(got[i]) - f64::from(want[i])) / sum(&|i| f64::from(want[i]))
}

/// The library's own error in bf16 on a family's folder.
pub(crate) fn transformers_bf16_error(family: &str) -> f64 {
    let reference = std::fs::read(golden_dir().join("bf16_error.json")).expect("bf16_error.json");
    let reference: serde_json::Value = serde_json::from_slice(&reference).expect("JSON");
    reference[family]
        .as_f64()
        .unwrap_or_else(|| panic!("{family} in bf16_error.json"))
}

/// Replaces the first bytes of a tensor.
pub(crate) fn overwrite(folder: &Path, name: &str, with: &[u8]) {
    for entry in std::fs::read_dir(folder).expect("folder") {
        let path = entry.expect("entry").path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let mut bytes = std::fs::read(&path).expect("shard");
        let file = SafeTensors::deserialize(&bytes).expect("valid safetensors");
        let Ok(tensor) = file.tensor(name) else {
            continue;
        };
        let start = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
        bytes[start..start + with.len()].copy_from_slice(with);
        std::fs::write(&path, bytes).expect("written");
        return;
    }
    panic!("no tensor {name}");
}
