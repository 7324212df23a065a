//! fp8 weights and their scales.

use serde_json::json;

use super::{FAILED, Place, fp8_folder};
use crate::support::Scratch;
use crate::support::fixtures::{edit_header, edit_json, golden, overwrite, place as find};

const TENSOR: &str = "model.layers.1.mlp.experts.2.up_proj.weight";
const SCALE: &str = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv";

/// A golden model in fp8.
fn fp8() -> Place {
    let scratch = Scratch::new();
    let model = scratch.join("model");
    fp8_folder::quantise(&golden("deepseek_v3"), &model);
    Place { scratch, model }
}

/// Renames a tensor in its shard and in the index.
fn rename(place: &Place, from: &str, to: &str) {
    let (shard, _) = find(&place.model, from);
    edit_header(&shard, |header| {
        let entry = header.remove(from).unwrap();
        header.insert(to.to_owned(), entry);
    });
    edit_json(&place.model.join("model.safetensors.index.json"), |index| {
        let map = index["weight_map"].as_object_mut().unwrap();
        let shard = map.remove(from).unwrap();
        map.insert(to.to_owned(), shard);
    });
}

#[test]
fn a_weight_without_its_scales() {
    let place = fp8();
    rename(&place, SCALE, "model.stray");
    let needles = &[TENSOR, "model-0", "scales", "missing", "download"];
    place.refuses("inspect {} --json", &[&place.model], FAILED, needles);
    place.refuses_everywhere(needles);
}

#[test]
fn scales_of_another_shape_or_type() {
    for (field, value) in [("shape", json!([1])), ("dtype", json!("I32"))] {
        let place = fp8();
        let (shard, _) = find(&place.model, SCALE);
        edit_header(&shard, |header| header[SCALE][field] = value);
        place.refuses_everywhere(&[SCALE, "model-0", "needs f32 of shape [1, 1]", "download"]);
    }
}

/// Found when it is computed with: nothing looks at every weight before.
#[test]
fn values_that_are_not_numbers() {
    let ids = golden("deepseek_v3").join("golden.safetensors");
    for (tensor, bytes) in [
        (TENSOR, &[0x7f][..]),
        (SCALE, &f32::INFINITY.to_le_bytes()),
        (SCALE, &f32::NAN.to_le_bytes()),
    ] {
        let place = fp8();
        overwrite(&place.model, tensor, bytes);
        let (model, out) = (place.model.as_path(), place.join("out"));
        for (line, paths) in [
            ("calibrate {} --data {} -o {}", &[model, &ids, &out][..]),
            ("prune {} --data {} --keep 0.6 -o {}", &[model, &ids, &out]),
            ("eval {} --text {} --json", &[model, &ids]),
        ] {
            place.refuses(line, paths, FAILED, &[TENSOR, "damaged", "download"]);
        }
    }
}
