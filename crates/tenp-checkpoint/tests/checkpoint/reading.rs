//! Opening checkpoints and looking at their tensors.

use tenp_checkpoint::{Checkpoint, Dtype, Part, Spelling};

use crate::fixture::{Fixture, TINY, edit_shard};

#[test]
fn every_family_opens_and_gives_its_experts() {
    for name in TINY {
        let fixture = Fixture::sharded(name);
        let checkpoint = fixture.open();
        let config = checkpoint.config().clone();
        assert!(checkpoint.shards_on_disk(&fixture) > 1, "{name}");
        for layer in &config.moe_layers {
            for expert in 0..config.moe.num_experts {
                let tensors = checkpoint.expert(*layer, expert).unwrap();
                assert_eq!(tensors.gate.rows, config.moe.expert_width);
                assert_eq!(tensors.down.cols, config.moe.expert_width);
                let name = checkpoint.spelling().expert(*layer, expert, Part::Up);
                assert_eq!(tensors.up.bytes, checkpoint.tensor(&name).unwrap().bytes);
            }
            let router = checkpoint.router(*layer).unwrap();
            assert_eq!(router.weight.rows, config.moe.num_experts);
            assert_eq!(
                router.correction_bias.is_some(),
                config.moe.router.correction_bias
            );
            let shared = checkpoint.shared_expert(*layer).unwrap();
            assert_eq!(shared.is_some(), config.moe.shared_width > 0, "{name}");
        }
        assert!(
            checkpoint
                .expert(99, 0)
                .unwrap_err()
                .to_string()
                .contains("layer 99")
        );
        let beyond = checkpoint.expert(config.moe_layers[0], 64).unwrap_err();
        assert!(beyond.to_string().contains("no expert 64"));
    }
}

/// Counts shard files without trusting the reader.
trait OnDisk {
    fn shards_on_disk(&self, fixture: &Fixture) -> usize;
}

impl OnDisk for Checkpoint {
    fn shards_on_disk(&self, fixture: &Fixture) -> usize {
        std::fs::read_dir(fixture.input())
            .unwrap()
            .filter(|entry| {
                let path = entry.as_ref().unwrap().path();
                path.extension().is_some_and(|kind| kind == "safetensors")
            })
            .count()
    }
}

#[test]
fn fused_experts_are_slices_of_the_fused_tensors() {
    for name in ["mixtral", "qwen3_moe", "deepseek_v3"] {
        let fixture = Fixture::fused(name);
        let checkpoint = fixture.open();
        assert!(checkpoint.spelling().fused);
        let config = checkpoint.config();
        let layer = config.moe_layers[1];
        let fused = checkpoint
            .tensor(&checkpoint.spelling().fused_gate_up(layer))
            .unwrap();
        let matrix = config.moe.expert_width * config.hidden_size * 2;
        let expert = checkpoint.expert(layer, 2).unwrap();
        assert_eq!(expert.gate.bytes, &fused.bytes[4 * matrix..5 * matrix]);
        assert_eq!(expert.up.bytes, &fused.bytes[5 * matrix..6 * matrix]);
        let down = checkpoint
            .tensor(&checkpoint.spelling().fused_down(layer))
            .unwrap();
        assert_eq!(expert.down.bytes, &down.bytes[2 * matrix..3 * matrix]);
    }
}

#[test]
fn mixtral_with_the_block_called_mlp() {
    let fixture = Fixture::fused("mixtral");
    edit_shard(&fixture.shard(), |header, _| {
        *header = std::mem::take(header)
            .into_iter()
            .map(|(name, info)| (name.replace("block_sparse_moe", "mlp"), info))
            .collect();
    });
    std::fs::rename(fixture.shard(), fixture.input().join("model.safetensors")).unwrap();
    std::fs::remove_file(fixture.input().join("model.safetensors.index.json")).unwrap();
    let checkpoint = fixture.open();
    assert_eq!(
        checkpoint.spelling().router(0),
        "model.layers.0.mlp.gate.weight"
    );
    assert!(checkpoint.expert(0, 3).is_ok() && checkpoint.router(2).is_ok());
}

#[test]
fn unaligned_data_is_read_alike() {
    let fixture = Fixture::new("deepseek_v3");
    let before = fixture.open();
    let layer = before.config().moe_layers[0];
    let bias = before.router(layer).unwrap().correction_bias;
    let gate = before.expert(layer, 3).unwrap().gate.to_f32();
    // Re-serialising drops the padding of the header; one more key makes its length odd.
    edit_shard(&fixture.shard(), |header, _| {
        header["__metadata__"]["x"] = "".into();
        let length = serde_json::to_vec(header).unwrap().len();
        header["__metadata__"]["x"] = "y".repeat((length + 1) % 2).into();
    });
    let file = std::fs::read(fixture.shard()).unwrap();
    assert_eq!(file[0] % 2, 1, "the data must start at an odd address");
    let after = fixture.open();
    assert_eq!(after.router(layer).unwrap().correction_bias, bias);
    assert_eq!(after.expert(layer, 3).unwrap().gate.to_f32(), gate);
    assert_ne!(after.fingerprint(), before.fingerprint());
}

#[test]
fn tensors_come_in_a_fixed_order() {
    let fixture = Fixture::sharded("olmoe");
    let checkpoint = fixture.open();
    let names = |checkpoint: &Checkpoint| -> Vec<String> {
        checkpoint
            .tensors()
            .map(|tensor| tensor.name.to_owned())
            .collect()
    };
    assert_eq!(names(&checkpoint), names(&fixture.open()));
    assert_eq!(names(&checkpoint)[0], "model.embed_tokens.weight");
    assert_eq!(checkpoint.fingerprint(), fixture.open().fingerprint());
    assert_eq!(checkpoint.fingerprint().len(), 64);
}

/// A model that was trained further has the headers of its origin.
#[test]
fn other_weights_have_another_fingerprint() {
    let fixture = Fixture::new("deepseek_v3");
    let checkpoint = fixture.open();
    let whole = std::fs::read(fixture.shard()).unwrap();
    for name in [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.experts.3.down_proj.weight",
        "model.norm.weight",
    ] {
        let weight = checkpoint.tensor(name).unwrap().bytes;
        let start = whole
            .windows(weight.len())
            .position(|bytes| bytes == weight);
        let start = start.expect("it is in the file");
        let mut other = whole.clone();
        for byte in &mut other[start..start + weight.len()] {
            *byte ^= 1;
        }
        let changed = Fixture::new("deepseek_v3");
        std::fs::write(changed.shard(), other).unwrap();
        let changed = changed.open();
        assert_ne!(changed.fingerprint(), checkpoint.fingerprint(), "{name}");
    }
}

#[test]
fn layers_are_let_go_and_read_again() {
    let fixture = Fixture::sharded("qwen2_moe");
    let checkpoint = fixture.open();
    let all: u64 = (0..3).map(|layer| checkpoint.layer_bytes(layer)).sum();
    let outside = [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    .map(|name| checkpoint.tensor(name).unwrap().bytes.len() as u64);
    assert_eq!(
        all + outside.iter().sum::<u64>(),
        checkpoint.size().bytes_total
    );
    let before = checkpoint.expert(1, 5).unwrap().down.to_f32();
    for layer in 0..5 {
        checkpoint.prefetch_layer(layer);
        checkpoint.release_layer(layer);
    }
    assert_eq!(checkpoint.expert(1, 5).unwrap().down.to_f32(), before);
}

#[test]
fn sizes_count_parameters() {
    let fixture = Fixture::new("deepseek_v2_lite");
    let checkpoint = fixture.open();
    let size = checkpoint.size();
    assert_eq!(size.parameters_routed, 2 * 8 * 3 * 48 * 64);
    assert_eq!(size.bytes_routed, 2 * size.parameters_routed);
    assert_eq!(size.bytes_total, 2 * size.parameters_total);
    let skipped = size.parameters_routed / 8 * 5;
    assert_eq!(size.parameters_active, size.parameters_total - skipped);
    assert_eq!(checkpoint.dtype(), Dtype::BF16);
    assert_eq!(checkpoint.pruned_from(), None);
}

#[test]
fn a_checkpoint_without_some_shards_can_be_inspected() {
    let fixture = Fixture::sharded("qwen3_moe");
    let whole = fixture.open().size();
    let shard = fixture.shard();
    std::fs::remove_file(&shard).unwrap();
    let name = shard.file_name().unwrap().to_str().unwrap();
    let partial = Checkpoint::open_partial(&fixture.input()).unwrap();
    assert_eq!(partial.missing_shards(), [name]);
    assert_eq!(partial.size().parameters_total, whole.parameters_total);
    assert!(partial.size().bytes_total < whole.bytes_total);
    let error = Checkpoint::open(&fixture.input()).unwrap_err().to_string();
    assert!(
        error.contains(name) && error.contains("download it again"),
        "{error}"
    );
}

#[test]
fn spellings_name_their_family() {
    let mixtral = Spelling::classic(tenp_checkpoint::Family::Mixtral);
    assert_eq!(
        mixtral.expert(3, 1, Part::Down),
        "model.layers.3.block_sparse_moe.experts.1.w2.weight"
    );
    let qwen = Spelling::classic(tenp_checkpoint::Family::Qwen2Moe);
    assert_eq!(
        qwen.shared(0, Part::Gate),
        "model.layers.0.mlp.shared_expert.gate_proj.weight"
    );
}
