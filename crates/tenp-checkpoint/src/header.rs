//! The header of a safetensors file: read strictly, written in a fixed order.
//!
//! The entries are those of the `safetensors` crate; the checks are made here because every message names the tensor
//! that breaks the rule, because several empty tensors must keep a fixed order, and because sums of hostile offsets
//! must not overflow.

use std::collections::{BTreeMap, HashSet};

use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde::ser::{SerializeMap, Serializer};

use crate::Dtype;

/// The bound of the reference implementation.
const MAX_HEADER_BYTES: usize = 100_000_000;
const LENGTH_BYTES: usize = 8;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Byte range inside the file.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// A checked header.
#[derive(Debug)]
pub(crate) struct Header {
    /// Ascending by offset, empty tensors of equal offset by name.
    pub(crate) entries: Vec<Entry>,
    pub(crate) metadata: BTreeMap<String, String>,
    /// Where the first tensor begins.
    pub(crate) data_start: usize,
}

/// Parses and checks the header of a whole file.
///
/// # Errors
/// The broken rule, naming the tensor where one is to blame.
pub(crate) fn parse(file: &[u8]) -> Result<Header, String> {
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!(
            "only {} bytes long, not even a header length",
            file.len()
        ));
    };
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > rest.len() {
        return Err(format!(
            "header length {length} goes beyond the file's {} bytes (truncated, or not safetensors)",
            file.len()
        ));
    }
    if length > MAX_HEADER_BYTES {
        return Err(format!(
            "header length {length} is above {MAX_HEADER_BYTES}"
        ));
    }
    // As a whole: the parser itself does not look into fields that it skips.
    let text = str::from_utf8(&rest[..length])
        .map_err(|error| format!("the header is not valid: {error}"))?;
    let raw: RawHeader =
        serde_json::from_str(text).map_err(|error| format!("the header is not valid: {error}"))?;
    let data_start = LENGTH_BYTES + length;
    let entries = check(raw.entries, data_start, file.len() - data_start)?;
    Ok(Header {
        entries,
        metadata: raw.metadata,
        data_start,
    })
}

fn check(
    mut raw: Vec<(String, TensorInfo)>,
    data_start: usize,
    data_bytes: usize,
) -> Result<Vec<Entry>, String> {
    raw.sort_by(|(name, info), (other_name, other)| {
        (info.data_offsets, name).cmp(&(other.data_offsets, other_name))
    });
    let mut expected = 0;
    let mut entries = Vec::with_capacity(raw.len());
    for (name, info) in raw {
        let (start, end) = info.data_offsets;
        if end < start {
            return Err(format!(
                "tensor {name} ends at {end}, before its start {start}"
            ));
        }
        if end > data_bytes {
            return Err(format!(
                "tensor {name} ends at byte {end} of {data_bytes} bytes of data (truncated?)"
            ));
        }
        if start < expected {
            return Err(format!(
                "tensor {name} overlaps the one before it at byte {start}"
            ));
        }
        if start > expected {
            return Err(format!(
                "{} unused bytes before tensor {name}",
                start - expected
            ));
        }
        let dtype = Dtype::from_safetensors(info.dtype)
            .ok_or_else(|| format!("tensor {name} has the unsupported dtype {}", info.dtype))?;
        let size = info
            .shape
            .iter()
            .try_fold(dtype.size(), |size, axis| size.checked_mul(*axis));
        if size != Some(end - start) {
            return Err(format!(
                "tensor {name}: {dtype} of shape {:?} does not fit its {} bytes",
                info.shape,
                end - start
            ));
        }
        expected = end;
        entries.push(Entry {
            name,
            dtype,
            shape: info.shape,
            start: data_start + start,
            end: data_start + end,
        });
    }
    if expected < data_bytes {
        return Err(format!(
            "{} bytes after the last tensor",
            data_bytes - expected
        ));
    }
    Ok(entries)
}

struct RawHeader {
    entries: Vec<(String, TensorInfo)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RawHeaderVisitor)
    }
}

struct RawHeaderVisitor;

impl<'de> Visitor<'de> for RawHeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut seen = HashSet::new();
        let mut header = RawHeader {
            entries: Vec::new(),
            metadata: BTreeMap::new(),
        };
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("`{name}` appears twice")));
            }
            if name == "__metadata__" {
                header.metadata = map.next_value()?;
            } else {
                let info = map
                    .next_value()
                    .map_err(|error| A::Error::custom(format!("tensor {name}: {error}")))?;
                header.entries.push((name, info));
            }
        }
        Ok(header)
    }
}

/// A tensor whose bytes do not exist yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
}

impl PlannedTensor {
    /// Size of the tensor's data.
    pub fn num_bytes(&self) -> u64 {
        self.shape
            .iter()
            .fold(self.dtype.size() as u64, |size, axis| {
                size.saturating_mul(*axis as u64)
            })
    }
}

/// The bytes before the data: length and header, padded so that the data starts 8-byte aligned. Tensors lie in the
/// given order without gaps.
pub(crate) fn build(metadata: &BTreeMap<String, String>, tensors: &[&PlannedTensor]) -> Vec<u8> {
    let mut bytes = vec![0; LENGTH_BYTES];
    // Writing to a vector cannot fail, and every key is a string.
    let _ = write(&mut bytes, metadata, tensors);
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    let length = (bytes.len() - LENGTH_BYTES) as u64;
    bytes[..LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
    bytes
}

fn write(
    bytes: &mut Vec<u8>,
    metadata: &BTreeMap<String, String>,
    tensors: &[&PlannedTensor],
) -> Result<(), serde_json::Error> {
    let mut serializer = serde_json::Serializer::new(bytes);
    let mut map = serializer.serialize_map(Some(tensors.len() + 1))?;
    map.serialize_entry("__metadata__", metadata)?;
    let mut start = 0_usize;
    for tensor in tensors {
        let end = start.saturating_add(tensor.num_bytes() as usize);
        let info = TensorInfo {
            dtype: tensor.dtype.to_safetensors(),
            shape: tensor.shape.clone(),
            data_offsets: (start, end),
        };
        map.serialize_entry(&tensor.name, &info)?;
        start = end;
    }
    map.end()
}
