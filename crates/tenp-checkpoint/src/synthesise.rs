//! Random checkpoints with a family's real tensor names and shapes, for tests and for trying out sizes.

use std::num::NonZero;
use std::path::Path;

use half::bf16;
use serde_json::{Map, Value, json};

use crate::atomic::{Sink, write_new};
use crate::expected::{ExpectedTensor, Role, expected_tensors, mtp_tensors};
use crate::fp8::{self, scale_name, scale_shape};
use crate::names::Spelling;
use crate::writer::{DEFAULT_SHARD_BYTES, WrittenShards, pretty, write_shards};
use crate::{CheckpointError, Dtype, ModelConfig, PlannedTensor};

/// How to synthesise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SynthesiseOptions {
    /// Fewer layers than the config says.
    pub num_layers: Option<usize>,
    /// Another number of routed experts than the config says.
    pub num_experts: Option<usize>,
    /// `BF16`; or `F8E4M3` for the projections, the scales of every eighth in the last shards, apart from their matrices.
    pub dtype: Dtype,
    /// The MTP layers that the config announces, too.
    pub mtp: bool,
    /// Upper bound of a shard's tensor bytes.
    pub shard_bytes: u64,
    /// Seed: same config, options and seed give the same bytes.
    pub seed: u64,
    /// Experts in the fused spelling.
    pub fused: bool,
    /// Leave the weights out: zeros that take no room on most file systems. For what reads headers only.
    pub holes: bool,
}

impl Default for SynthesiseOptions {
    fn default() -> Self {
        Self {
            num_layers: None,
            num_experts: None,
            dtype: Dtype::BF16,
            mtp: false,
            shard_bytes: DEFAULT_SHARD_BYTES,
            seed: 0,
            fused: false,
            holes: false,
        }
    }
}

/// Writes `config.json`, shards and index of a random bf16 or fp8 checkpoint into an existing folder.
///
/// Projections and router rows are near-normal with standard deviation `1/sqrt(fan_in)`, embeddings have 1, norms are
/// 1, biases small; score correction biases are f32, as DeepSeek-V3 stores them. `progress` is called with tensor bytes
/// written and the total. The written config has a `quantization_config` where the weights are fp8, and only there.
///
/// # Errors
/// A config that [`ModelConfig::from_json`] refuses, or a file that cannot be written.
pub fn synthesise(
    config_path: &Path,
    out: &Path,
    options: SynthesiseOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<WrittenShards, CheckpointError> {
    let text = std::fs::read(config_path).map_err(CheckpointError::io("read", config_path))?;
    let mut json: Map<String, Value> =
        serde_json::from_slice(&text).map_err(|source| CheckpointError::Json {
            path: config_path.to_path_buf(),
            source,
        })?;
    edit_config(&mut json, options);
    let config = ModelConfig::from_json(config_path, &json)?;
    let spelling = if options.fused {
        Spelling::fused(config.family)
    } else {
        Spelling::classic(config.family)
    };
    let mtp = mtp_tensors(&config, spelling).take_while(|_| options.mtp);
    let expected = expected_tensors(&config, spelling).chain(mtp);
    let tensors = contents(expected, options.dtype);
    let planned: Vec<PlannedTensor> = tensors.iter().map(|(tensor, _)| tensor.clone()).collect();
    let total = planned.iter().map(PlannedTensor::num_bytes).sum();
    write_new(
        &out.join("config.json"),
        &pretty(&Value::Object(json)),
        total,
    )?;
    let mut generator = Generator::new(options.seed);
    let mut done = 0;
    write_shards(out, &planned, options.shard_bytes, &mut |index, sink| {
        if options.holes {
            sink.skip(planned[index].num_bytes())?;
        } else {
            generator.fill(index as u64, &tensors[index], sink)?;
        }
        done += planned[index].num_bytes();
        progress(done, total);
        Ok(())
    })
}

/// What a tensor is filled with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    Role(Role),
    Codes,
    /// Scales of codes whose rows are this long.
    Scales(usize),
}

/// The config as it will be written.
fn edit_config(json: &mut Map<String, Value>, options: SynthesiseOptions) {
    if options.dtype != Dtype::F8E4M3 {
        json.shift_remove("quantization_config");
    } else if !json.contains_key("quantization_config") {
        let quantisation = json!({
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [fp8::FP8_BLOCK, fp8::FP8_BLOCK],
        });
        json.insert("quantization_config".to_owned(), quantisation);
    }
    if let Some(layers) = options.num_layers {
        json.insert("num_hidden_layers".to_owned(), layers.into());
    }
    let fields = ["n_routed_experts", "num_local_experts", "num_experts"];
    if let Some(experts) = options.num_experts {
        for field in fields
            .into_iter()
            .filter(|field| json.contains_key(*field))
            .collect::<Vec<_>>()
        {
            json.insert(field.to_owned(), experts.into());
        }
    }
}

/// Every tensor to write, in order.
fn contents(
    expected: impl Iterator<Item = ExpectedTensor>,
    dtype: Dtype,
) -> Vec<(PlannedTensor, Fill)> {
    let (mut tensors, mut last) = (Vec::new(), Vec::new());
    for (number, tensor) in expected.enumerate() {
        let quantised =
            dtype == Dtype::F8E4M3 && tensor.role == Role::Projection && tensor.shape.len() == 2;
        let dtype = match tensor.role {
            Role::CorrectionBias => Dtype::F32,
            _ if quantised => dtype,
            _ => Dtype::BF16,
        };
        let scales = quantised.then(|| {
            let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
            let planned = PlannedTensor {
                name: scale_name(&tensor.name),
                dtype: Dtype::F32,
                shape: scale_shape(rows, cols).to_vec(),
            };
            (planned, Fill::Scales(cols))
        });
        let fill = if quantised {
            Fill::Codes
        } else {
            Fill::Role(tensor.role)
        };
        let (name, shape) = (tensor.name, tensor.shape);
        tensors.push((PlannedTensor { name, dtype, shape }, fill));
        match scales {
            Some(scales) if number % 8 == 7 => last.push(scales),
            Some(scales) => tensors.push(scales),
            None => {}
        }
    }
    tensors.append(&mut last);
    tensors
}

/// Statistics of random numbers in the shapes that a calibration of `checkpoint` has, one domain `default`, to try how long
/// planning takes. A tenth of the neurons contribute negatively.
pub fn synthesise_statistics(checkpoint: &crate::Checkpoint, seed: u64) -> crate::Statistics {
    let config = checkpoint.config();
    let (experts, width) = (config.moe.num_experts, config.moe.expert_width);
    let mut state = mix(seed ^ 0x7374_6174);
    let mut draw = || (next(&mut state) >> 11) as f64 * (-53_f64).exp2();
    let layers = config.moe_layers.iter().map(|&index| {
        let mut layer = crate::LayerStatistics::zeros(experts, width);
        layer.tokens.fill_with(|| 1 + (draw() * 1e4) as i64);
        layer.total_tokens = layer.tokens.iter().sum::<i64>() / config.moe.top_k.max(1) as i64;
        layer.fill(&mut draw);
        let contributions = layer.contribution.iter_mut();
        contributions.for_each(|value| *value -= 0.1);
        (index, layer)
    });
    crate::Statistics {
        checkpoint: checkpoint.fingerprint().to_owned(),
        tokens: [("default".to_owned(), vec!["synthetic".to_owned()])].into(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        run: String::new(),
        shares: Vec::new(),
        compute: vec!["f32".to_owned()],
        domains: [("default".to_owned(), layers.collect())].into(),
    }
}

/// Elements that one thread makes from one seed; the split of work does not show in the result.
const BLOCK: usize = 1 << 18;
const BLOCKS_AT_ONCE: usize = 64;
const TABLE: usize = 1 << 12;
const DRAWS_PER_WORD: usize = 5;

/// A draw goes up to 6 standard deviations, fp8 to 448.
const CODES_PER_DEVIATION: f32 = 448.0 / 6.0;

struct Generator {
    seed: u64,
    threads: usize,
    /// Standard normal draws, approximated by sums of twelve uniform ones.
    normal: Vec<f32>,
}

impl Generator {
    fn new(seed: u64) -> Self {
        let mut state = mix(seed ^ 0x7465_6E70);
        let normal = (0..TABLE)
            .map(|_| {
                let sum: f32 = (0..12).map(|_| (next(&mut state) >> 40) as f32).sum();
                sum / (1 << 24) as f32 - 6.0
            })
            .collect();
        Self {
            seed,
            threads: std::thread::available_parallelism().map_or(1, NonZero::get),
            normal,
        }
    }

    fn fill(
        &mut self,
        tensor_index: u64,
        (tensor, fill): &(PlannedTensor, Fill),
        sink: &mut Sink<'_>,
    ) -> Result<(), CheckpointError> {
        let count: usize = tensor.shape.iter().product();
        let fan_in = tensor.shape.last().copied().unwrap_or(1).max(1) as f32;
        let seed = mix(self.seed ^ mix(tensor_index));
        let scale = match fill {
            Fill::Codes => {
                let codes = self
                    .normal
                    .iter()
                    .map(|draw| fp8::encode(draw * CODES_PER_DEVIATION));
                return self.blocks(&codes.collect::<Vec<u8>>(), count, seed, sink);
            }
            Fill::Scales(inner) => {
                let mut state = seed;
                let largest = (*inner as f32).sqrt().recip() / CODES_PER_DEVIATION;
                // From three quarters to five: neighbouring blocks differ.
                let draw =
                    |_| largest * (0.75 + (next(&mut state) >> 40) as f32 / (1 << 25) as f32);
                let bytes: Vec<u8> = (0..count).map(draw).flat_map(f32::to_le_bytes).collect();
                return sink.write(&bytes);
            }
            Fill::Role(Role::Norm) => return ones(count, sink),
            Fill::Role(Role::Embedding) => 1.0,
            Fill::Role(Role::Head | Role::Projection | Role::Router) => fan_in.sqrt().recip(),
            Fill::Role(Role::Bias) => 0.02,
            Fill::Role(Role::CorrectionBias) => {
                let mut state = seed;
                let draw = |_| self.normal[next(&mut state) as usize % TABLE] * 0.01;
                let bytes: Vec<u8> = (0..count).map(draw).flat_map(f32::to_le_bytes).collect();
                return sink.write(&bytes);
            }
        };
        let table: Vec<u16> = self
            .normal
            .iter()
            .map(|draw| bf16::from_f32(draw * scale).to_bits().to_le())
            .collect();
        self.blocks(&table, count, seed, sink)
    }

    /// Writes `count` draws from a table.
    fn blocks<T: bytemuck::Pod + Send + Sync>(
        &self,
        table: &[T],
        count: usize,
        seed: u64,
        sink: &mut Sink<'_>,
    ) -> Result<(), CheckpointError> {
        let mut buffer = vec![T::zeroed(); count.min(BLOCK * BLOCKS_AT_ONCE)];
        let (mut left, mut first_block) = (count, 0);
        while left > 0 {
            let length = left.min(buffer.len());
            let part = &mut buffer[..length];
            fill_blocks(part, table, seed, first_block, self.threads);
            sink.write(bytemuck::cast_slice(part))?;
            left -= length;
            first_block += BLOCKS_AT_ONCE as u64;
        }
        Ok(())
    }
}

fn ones(count: usize, sink: &mut Sink<'_>) -> Result<(), CheckpointError> {
    sink.write(&bf16::ONE.to_le_bytes().repeat(count))
}

fn fill_blocks<T: Copy + Send + Sync>(
    buffer: &mut [T],
    table: &[T],
    seed: u64,
    first_block: u64,
    threads: usize,
) {
    let share = buffer.len().div_ceil(BLOCK).div_ceil(threads.max(1)).max(1);
    let total = buffer.len();
    std::thread::scope(|scope| {
        for (number, part) in buffer.chunks_mut(share * BLOCK).enumerate() {
            let first = first_block + (number * share) as u64;
            let mut work = move || {
                for (index, block) in part.chunks_mut(BLOCK).enumerate() {
                    fill_block(block, table, mix(seed ^ mix(first + index as u64)));
                }
            };
            if share * BLOCK >= total {
                work();
            } else {
                scope.spawn(work);
            }
        }
    });
}

fn fill_block<T: Copy>(block: &mut [T], table: &[T], mut state: u64) {
    for group in block.chunks_mut(DRAWS_PER_WORD) {
        let mut word = next(&mut state);
        for value in group {
            *value = table[word as usize % TABLE];
            word >>= 12;
        }
    }
}

/// The next number of a SplitMix64 sequence (Steele, Lea, Flood 2014).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    mix(*state)
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}
