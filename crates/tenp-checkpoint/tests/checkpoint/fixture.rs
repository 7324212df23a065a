//! Tiny checkpoints in a temporary folder, plans for them, and ways to damage them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tenp_checkpoint::{
    Accounting, ApplyOptions, ApplyOutcome, Checkpoint, CheckpointError, ExpertPlan, LayerPlan,
    OutputForm, Plan, SynthesiseOptions, apply, synthesise,
};

/// Every family, by the name of its config under `data/tiny`.
pub(crate) const TINY: [&str; 9] = [
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

pub(crate) fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(path)
}

pub(crate) fn json(path: &Path) -> Map<String, Value> {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A synthesised checkpoint in `input`, beside which outputs go.
pub(crate) struct Fixture {
    root: tempfile::TempDir,
}

impl Fixture {
    pub(crate) fn new(name: &str) -> Self {
        Self::with(name, SynthesiseOptions::default())
    }

    pub(crate) fn fused(name: &str) -> Self {
        Self::with(
            name,
            SynthesiseOptions {
                fused: true,
                ..SynthesiseOptions::default()
            },
        )
    }

    /// Shards of 100 kB, so that there are several.
    pub(crate) fn sharded(name: &str) -> Self {
        Self::with(
            name,
            SynthesiseOptions {
                shard_bytes: 100_000,
                ..SynthesiseOptions::default()
            },
        )
    }

    /// A `deepseek_v3` in fp8 whose matrices have several blocks, with tails both ways.
    pub(crate) fn fp8() -> Self {
        let source = tempfile::tempdir().unwrap();
        let mut config = json(&data("tiny/deepseek_v3.json"));
        for (field, size) in [
            ("hidden_size", 136),
            ("moe_intermediate_size", 300),
            ("intermediate_size", 140),
        ] {
            config[field] = size.into();
        }
        let path = source.path().join("config.json");
        std::fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
        let bf16 = Self::of(&path, SynthesiseOptions::default());
        let fixture = Self {
            root: tempfile::tempdir().unwrap(),
        };
        crate::support::quantise_unevenly(&bf16.input(), &fixture.input());
        fixture
    }

    /// The same with scales in bf16.
    pub(crate) fn fp8_with_bf16_scales() -> Self {
        let fixture = Self::fp8();
        for file in std::fs::read_dir(fixture.input()).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_some_and(|e| e == "safetensors") {
                edit_shard(&path, store_scales_in_bf16);
            }
        }
        fixture
    }

    pub(crate) fn with(name: &str, options: SynthesiseOptions) -> Self {
        Self::of(&data(&format!("tiny/{name}.json")), options)
    }

    fn of(config: &Path, options: SynthesiseOptions) -> Self {
        let root = tempfile::tempdir().unwrap();
        let fixture = Self { root };
        std::fs::create_dir(fixture.input()).unwrap();
        synthesise(config, &fixture.input(), options, &mut |_, _| ()).unwrap();
        for (file, text) in [
            ("tokenizer.json", "{}"),
            ("tokenizer_config.json", "{}"),
            ("generation_config.json", "{}"),
            ("LICENSE", "licence"),
            ("tokenizer_code.py", "not copied"),
            ("notes.txt", "not copied"),
        ] {
            std::fs::write(fixture.input().join(file), text).unwrap();
        }
        fixture
    }

    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    pub(crate) fn input(&self) -> PathBuf {
        self.root.path().join("input")
    }

    pub(crate) fn out(&self) -> PathBuf {
        self.root.path().join("out")
    }

    pub(crate) fn open(&self) -> Checkpoint {
        Checkpoint::open(&self.input()).unwrap()
    }

    /// Names in the folder that holds input and outputs.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.root())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    pub(crate) fn edit_config(&self, edit: impl FnOnce(&mut Map<String, Value>)) {
        let path = self.input().join("config.json");
        let mut config = json(&path);
        edit(&mut config);
        std::fs::write(path, serde_json::to_vec(&config).unwrap()).unwrap();
    }

    /// The first shard's path.
    pub(crate) fn shard(&self) -> PathBuf {
        let mut shards: Vec<PathBuf> = std::fs::read_dir(self.input())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|kind| kind == "safetensors"))
            .collect();
        shards.sort();
        shards.remove(0)
    }

    pub(crate) fn apply(
        &self,
        plan: &Plan,
        form: OutputForm,
    ) -> Result<ApplyOutcome, CheckpointError> {
        let options = ApplyOptions {
            form,
            ..ApplyOptions::default()
        };
        apply(&self.open(), plan, &self.out(), &options, &mut |_, _| ())
    }
}

/// Every file of a folder.
pub(crate) fn snapshot(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, std::fs::read(entry.path()).unwrap())
        })
        .collect()
}

/// Rewrites a safetensors file through its header and data.
pub(crate) fn edit_shard(path: &Path, edit: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) {
    let file = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let mut data = file[8 + length..].to_vec();
    edit(&mut header, &mut data);
    write_shard(path, &serde_json::to_vec(&header).unwrap(), &data);
}

pub(crate) fn write_shard(path: &Path, header: &[u8], data: &[u8]) {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.extend_from_slice(data);
    std::fs::write(path, file).unwrap();
}

/// What a test plan does with an expert.
pub(crate) enum Keep {
    All,
    Neurons(Vec<u32>),
    Drop,
}

pub(crate) fn plan(checkpoint: &Checkpoint, keep: impl Fn(usize, usize) -> Keep) -> Plan {
    let config = checkpoint.config();
    let expert = |layer, id| match keep(layer, id) {
        Keep::All => ExpertPlan {
            id,
            width: config.moe.expert_width,
            neurons: None,
            dropped: false,
        },
        Keep::Neurons(neurons) => ExpertPlan {
            id,
            width: neurons.len(),
            neurons: Some(neurons),
            dropped: false,
        },
        Keep::Drop => ExpertPlan {
            id,
            width: 0,
            neurons: None,
            dropped: true,
        },
    };
    Plan {
        format: "tenp-plan".to_owned(),
        version: 1,
        method: "test".to_owned(),
        options: Map::new(),
        fingerprint: checkpoint.fingerprint().to_owned(),
        dern: None,
        layers: config
            .moe_layers
            .iter()
            .map(|layer| LayerPlan {
                layer: *layer,
                experts: (0..config.moe.num_experts)
                    .map(|id| expert(*layer, id))
                    .collect(),
            })
            .collect(),
        accounting: Accounting::default(),
        uncalibrated: Vec::new(),
    }
}

/// Expert 0 whole, expert 1 of width 0, the others of different widths with gaps between their neurons.
pub(crate) fn ragged(checkpoint: &Checkpoint) -> Plan {
    let full = checkpoint.config().moe.expert_width as u32;
    plan(checkpoint, |layer, expert| match expert {
        0 => Keep::All,
        1 => Keep::Neurons(Vec::new()),
        _ => Keep::Neurons(some_neurons(full, layer + expert)),
    })
}

pub(crate) fn some_neurons(full: u32, variant: usize) -> Vec<u32> {
    let step = 2 + variant as u32 % 3;
    (0..full).filter(|id| id % step == 1).collect()
}

/// Drops the last expert of every group, or every fourth.
pub(crate) fn dropping(checkpoint: &Checkpoint) -> Plan {
    let moe = &checkpoint.config().moe;
    let size = moe.router.groups.map_or(moe.num_experts, |groups| {
        moe.num_experts / groups.num_groups
    });
    plan(checkpoint, |_, expert| {
        if size > 2 && expert % size == size - 1 {
            Keep::Drop
        } else {
            Keep::All
        }
    })
}

/// Scales of fp8 matrices, in the header and the data of a shard, cut from f32 to bf16.
fn store_scales_in_bf16(header: &mut Map<String, Value>, data: &mut Vec<u8>) {
    let offset =
        |tensor: &Value, end: usize| tensor["data_offsets"][end].as_u64().unwrap() as usize;
    let mut names: Vec<String> = header.keys().cloned().collect();
    names.retain(|name| name != "__metadata__");
    names.sort_by_key(|name| (offset(&header[name], 0), offset(&header[name], 1)));
    let old = std::mem::take(data);
    for name in names {
        let tensor = &mut header[&name];
        let bytes = &old[offset(tensor, 0)..offset(tensor, 1)];
        let start = data.len();
        if name.ends_with("_scale_inv") {
            let scales = bytes.as_chunks::<4>().0.iter();
            data.extend(scales.flat_map(|scale| [scale[2], scale[3]]));
            tensor["dtype"] = "BF16".into();
        } else {
            data.extend_from_slice(bytes);
        }
        tensor["data_offsets"] = serde_json::json!([start, data.len()]);
    }
}
