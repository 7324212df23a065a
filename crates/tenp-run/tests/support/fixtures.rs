//! The repository's checkpoints, copies of them, and files made for a test.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde_json::{Map, Value};

use super::tenp;

/// Tiny checkpoints with `golden.safetensors`, below `tests/golden`.
pub(crate) const GOLDEN: [&str; 13] = [
    "deepseek",
    "deepseek_v2_group",
    "deepseek_v2_lite",
    "deepseek_v3",
    "glm4_moe",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "variants/deepseek_v2_lite_rope_scaling",
    "variants/mixtral_f16",
    "variants/olmoe_f32",
    "variants/qwen3_moe_fused",
];

/// Domains of the demo.
pub(crate) const DOMAINS: [&str; 4] = ["arith", "code", "facts", "lists"];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub(crate) fn golden(name: &str) -> PathBuf {
    repository().join("tests/golden").join(name)
}

pub(crate) fn demo() -> PathBuf {
    repository().join("demo")
}

/// A file of the demo.
pub(crate) fn demo_file(kind: &str, domain: &str) -> PathBuf {
    demo().join(kind).join(format!("{domain}.jsonl"))
}

/// Copies the files of a folder, not the folders in it.
pub(crate) fn copy(from: &Path, to: &Path) -> PathBuf {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
    to.to_owned()
}

/// Every file below a folder with its bytes, every link with its target.
pub(crate) fn snapshot(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(dir).unwrap().to_owned();
            if let Ok(target) = std::fs::read_link(&path) {
                files.insert(name, target.into_os_string().into_encoded_bytes());
            } else if path.is_dir() {
                folders.push(path);
            } else {
                files.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// Asserts that two folders hold the same files with the same bytes, apart from `except`.
#[track_caller]
pub(crate) fn assert_same_files(left: &Path, right: &Path, except: &[&str]) {
    let files = |dir: &Path| {
        let mut files = snapshot(dir);
        files.retain(|name, _| !except.iter().any(|e| Path::new(e) == name));
        files
    };
    let (a, b) = (files(left), files(right));
    assert_eq!(
        a.keys().collect::<Vec<_>>(),
        b.keys().collect::<Vec<_>>(),
        "{} and {} hold different files",
        left.display(),
        right.display()
    );
    for (name, bytes) in &a {
        assert!(
            *bytes == b[name],
            "{} differs between {} and {}",
            name.display(),
            left.display(),
            right.display()
        );
    }
}

/// Names in a folder, ascending.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Changes a JSON object in its file.
pub(crate) fn edit_json(path: &Path, change: impl FnOnce(&mut Map<String, Value>)) {
    let mut value = read_json(path);
    change(value.as_object_mut().unwrap());
    std::fs::write(path, value.to_string()).unwrap();
}

/// A `.safetensors` file of one tensor `input_ids` [samples, length].
pub(crate) fn write_ids(path: &Path, samples: &[Vec<i64>]) -> PathBuf {
    let bytes: Vec<u8> = samples
        .iter()
        .flatten()
        .flat_map(|id| id.to_le_bytes())
        .collect();
    let shape = vec![samples.len(), samples.first().map_or(0, Vec::len)];
    let view = TensorView::new(Dtype::I64, shape, &bytes).unwrap();
    std::fs::write(path, serialize([("input_ids", view)], None).unwrap()).unwrap();
    path.to_owned()
}

/// The values of a tensor of a `.safetensors` file, widened.
pub(crate) fn tensor(path: &Path, name: &str) -> (Vec<usize>, Vec<f64>) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    (tensor.shape().to_vec(), widen(&tensor))
}

/// Every tensor of a `.safetensors` file by name.
pub(crate) fn tensors(path: &Path) -> BTreeMap<String, Vec<f64>> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, tensor)| (name.to_owned(), widen(&tensor)))
        .collect()
}

fn widen(tensor: &TensorView<'_>) -> Vec<f64> {
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => values(data, |b| f32::from_le_bytes(b).into()),
        Dtype::F64 => values(data, f64::from_le_bytes),
        Dtype::I64 => values(data, |b| i64::from_le_bytes(b) as f64),
        other => panic!("{other:?} is not read here"),
    }
}

fn values<const N: usize>(data: &[u8], value: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    data.as_chunks().0.iter().map(|b| value(*b)).collect()
}

/// Shard that holds a tensor, and the byte range of the tensor in it.
pub(crate) fn place(model: &Path, name: &str) -> (PathBuf, std::ops::Range<usize>) {
    let index = model.join("model.safetensors.index.json");
    let shard = if index.exists() {
        read_json(&index)["weight_map"][name]
            .as_str()
            .unwrap_or_else(|| panic!("no tensor {name}"))
            .to_owned()
    } else {
        "model.safetensors".to_owned()
    };
    let path = model.join(shard);
    let bytes = std::fs::read(&path).unwrap();
    let (header, info) = SafeTensors::read_metadata(&bytes).unwrap();
    let (start, end) = info.info(name).unwrap().data_offsets;
    let data = 8 + header;
    (path, data + start..data + end)
}

/// Overwrites the first bytes of a tensor.
pub(crate) fn overwrite(model: &Path, name: &str, with: &[u8]) {
    let (path, range) = place(model, name);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[range.start..range.start + with.len()].copy_from_slice(with);
    std::fs::write(path, bytes).unwrap();
}

/// Replaces a shard's header by what `change` makes of it; the data stays.
pub(crate) fn edit_header(shard: &Path, change: impl FnOnce(&mut Map<String, Value>)) {
    let bytes = std::fs::read(shard).unwrap();
    let length = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let mut header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    change(&mut header);
    let mut text = serde_json::to_string(&header).unwrap();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out.extend(&bytes[8 + length..]);
    std::fs::write(shard, out).unwrap();
}

/// Statistics of the demo model: the first `samples` samples of each domain.
#[track_caller]
pub(crate) fn calibrate_demo(samples: usize, out: &Path) {
    let files = DOMAINS.map(|domain| demo_file("calibration", domain));
    let [arith, code, facts, lists] = files.each_ref().map(PathBuf::as_path);
    let line = format!(
        "calibrate {{}} --samples {samples} --data arith={{}} code={{}} facts={{}} lists={{}} -o {{}}"
    );
    tenp(&line, &[&demo(), arith, code, facts, lists, out]).ok();
}

/// Makes a plan one for a model whose weights were changed under it.
pub(crate) fn adopt(plan: &Path, model: &Path) {
    let checkpoint = tenp_checkpoint::Checkpoint::open(model).unwrap();
    edit_json(plan, |plan| {
        plan.insert("fingerprint".to_owned(), checkpoint.fingerprint().into());
    });
}
