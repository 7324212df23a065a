//! Weights that are not numbers: the tensor is named.

use super::{FAILED, Place};
use crate::support::fixtures::{golden, overwrite};

/// NaN and infinity in bf16.
const BAD: [[u8; 2]; 2] = [[0xc0, 0x7f], [0x80, 0x7f]];

/// Puts a NaN, then an infinity, into a tensor; every command that runs the model names it.
fn named(tensor: &str) {
    for value in BAD {
        let place = Place::golden("deepseek");
        overwrite(&place.model, tensor, &value);
        let ids = golden("deepseek").join("golden.safetensors");
        let (model, out) = (place.model.as_path(), place.join("out"));
        let needles = &[tensor, "damaged", "download"];
        for (line, paths) in [
            ("calibrate {} --data {} -o {}", &[model, &ids, &out][..]),
            ("prune {} --data {} --keep 0.6 -o {}", &[model, &ids, &out]),
            ("eval {} --text {} --json", &[model, &ids]),
            ("logits {} --input {} --output {}", &[model, &ids, &out]),
        ] {
            // Calibration never looks at the head.
            let head = tensor == "lm_head.weight" || tensor == "model.norm.weight";
            if head && !line.starts_with("eval") && !line.starts_with("logits") {
                continue;
            }
            place.refuses(line, paths, FAILED, needles);
        }
    }
}

#[test]
fn in_an_expert() {
    named("model.layers.1.mlp.experts.0.gate_proj.weight");
    named("model.layers.2.mlp.experts.5.down_proj.weight");
}

#[test]
fn in_the_shared_expert_and_the_router() {
    named("model.layers.1.mlp.shared_experts.up_proj.weight");
    named("model.layers.2.mlp.gate.weight");
}

#[test]
fn in_a_norm() {
    named("model.layers.0.input_layernorm.weight");
    named("model.layers.1.post_attention_layernorm.weight");
}

#[test]
fn in_attention_and_in_the_dense_layer() {
    named("model.layers.1.self_attn.q_proj.weight");
    named("model.layers.2.self_attn.o_proj.weight");
    named("model.layers.0.mlp.up_proj.weight");
}

#[test]
fn in_the_head() {
    named("lm_head.weight");
    named("model.norm.weight");
}

#[test]
fn in_the_embedding() {
    let place = Place::golden("deepseek");
    let (_, range) = crate::support::fixtures::place(&place.model, "model.embed_tokens.weight");
    let nan = BAD[0].repeat(range.len() / 2);
    overwrite(&place.model, "model.embed_tokens.weight", &nan);
    place.refuses_everywhere_it_runs("model.embed_tokens.weight");
}

/// An expert that no token reaches still has its norms in the statistics.
#[test]
fn in_an_expert_that_no_token_reaches() {
    let place = Place::golden("deepseek");
    let ids = place.join("ids.safetensors");
    crate::support::fixtures::write_ids(&ids, &[vec![7]]);
    let stats = place.join("stats");
    crate::support::tenp(
        "calibrate {} --data {} -o {}",
        &[&place.model, &ids, &stats],
    )
    .ok();
    let shown = crate::support::tenp("stats show {} --json", &[&stats])
        .ok()
        .json();
    std::fs::remove_file(&stats).unwrap();
    let pair = &shown["domains"][0]["unreached"][0];
    let tensor = format!(
        "model.layers.{}.mlp.experts.{}.up_proj.weight",
        pair[0], pair[1]
    );
    overwrite(&place.model, &tensor, &BAD[0]);
    let out = place.join("out");
    for line in [
        "prune {} --data {} --keep 0.6 -o {}",
        "calibrate {} --data {} -o {}",
    ] {
        place.refuses(
            line,
            &[&place.model, &ids, &out],
            FAILED,
            &[&tensor, "download"],
        );
    }
}

impl Place {
    fn refuses_everywhere_it_runs(&self, needle: &str) {
        let ids = golden("deepseek").join("golden.safetensors");
        let out = self.join("out");
        let line = "calibrate {} --data {} -o {}";
        self.refuses(
            line,
            &[&self.model, &ids, &out],
            FAILED,
            &[needle, "damaged"],
        );
        let line = "logits {} --input {} --output {}";
        self.refuses(
            line,
            &[&self.model, &ids, &out],
            FAILED,
            &[needle, "damaged"],
        );
    }
}
