//! Plans and statistics that do not belong to the checkpoint.

use std::path::PathBuf;

use serde_json::json;

use super::options::statistics;
use super::{FAILED, Place, USAGE};
use crate::support::fixtures::{demo, demo_file, edit_json, golden};
use crate::support::tenp;

/// A change to a plan.
type Damage = fn(&mut serde_json::Map<String, serde_json::Value>);

fn demo_plan(place: &Place) -> PathBuf {
    let plan = place.join("plan.json");
    tenp(
        "plan {} --stats {} --keep 0.6 -o {}",
        &[&place.model, statistics(), &plan],
    )
    .ok();
    plan
}

#[test]
fn a_plan_for_another_checkpoint() {
    let place = Place::demo();
    let plan = demo_plan(&place);
    let out = place.join("out");
    let other = golden("olmoe");
    place.refuses(
        "apply {} --plan {} -o {}",
        &[&other, &plan, &out],
        FAILED,
        &["plan.json", "this one is", "make a plan"],
    );
}

#[test]
fn a_plan_that_is_none() {
    let place = Place::demo();
    let (plan, out) = (demo_plan(&place), place.join("out"));
    let apply = |needles: &[&str]| {
        place.refuses(
            "apply {} --plan {} -o {}",
            &[&place.model, &plan, &out],
            FAILED,
            needles,
        );
    };
    let good = std::fs::read(&plan).unwrap();
    std::fs::write(&plan, "{\"format\": ").unwrap();
    apply(&["plan.json", "line 1"]);
    std::fs::write(&plan, "{}").unwrap();
    apply(&["plan.json", "format"]);
    std::fs::remove_file(&plan).unwrap();
    apply(&["plan.json", "No such file"]);
    let damages: [(Damage, &[&str]); 11] = [
        (|p| p["version"] = json!(2), &["version 2", "`plan`"]),
        (|p| p["format"] = json!("other"), &["other", "`plan`"]),
        (
            |p| p["layers"].as_array_mut().unwrap().truncate(3),
            &["layers", "make the plan again"],
        ),
        (
            |p| p["layers"][2]["experts"][4]["width"] = json!(500),
            &["layer 3, expert 4", "500", "make the plan again"],
        ),
        (
            |p| p["layers"][2]["experts"][4]["neurons"] = json!([5, 4]),
            &["layer 3, expert 4", "make the plan again"],
        ),
        (
            |p| {
                let expert = &mut p["layers"][1]["experts"][3];
                let full = expert["neurons"].as_array().map_or(0, Vec::len);
                assert!(full > 0, "a narrow expert");
                expert["neurons"][full - 1] = json!(4_000_000_000_u32);
            },
            &[
                "layer 2, expert 3",
                "neuron 4000000000",
                "make the plan again",
            ],
        ),
        (
            |p| p["layers"][1]["experts"][3]["neurons"][0] = json!(-1),
            &["plan.json", "-1"],
        ),
        (
            |p| p["layers"][1]["experts"][3]["dropped"] = json!(true),
            &["layer 2, expert 3", "is dropped", "make the plan again"],
        ),
        (
            |p| {
                let experts = p["layers"][1]["experts"].as_array_mut().unwrap();
                for expert in &mut experts[1..] {
                    *expert = json!({"id": expert["id"], "width": 0, "dropped": true});
                }
            },
            &["layer 2", "keeps 1 experts", "keep more"],
        ),
        (
            |p| p["layers"][1]["experts"][3]["id"] = json!(4),
            &["layer 2", "once, in order"],
        ),
        (
            |p| {
                p["layers"][0]["experts"].as_array_mut().unwrap().pop();
            },
            &["layer 1", "0 to 15"],
        ),
    ];
    for (damage, needles) in damages {
        std::fs::write(&plan, &good).unwrap();
        edit_json(&plan, damage);
        apply(needles);
    }
}

#[test]
fn statistics_of_another_checkpoint() {
    let place = Place::golden("olmoe");
    let (out, ids) = (place.join("plan.json"), place.join("ids"));
    place.refuses(
        "plan {} --stats {} --keep 0.6 -o {}",
        &[&place.model, statistics(), &out],
        FAILED,
        &[
            "stats.safetensors",
            "statistics are of checkpoint",
            "calibrate this model",
        ],
    );
    let golden = golden("olmoe").join("golden.safetensors");
    tenp(
        "calibrate {} --data {} -o {}",
        &[&place.model, &golden, &ids],
    )
    .ok();
    place.refuses(
        "stats merge {} {} -o {}",
        &[statistics(), &ids, &out],
        FAILED,
        &["cannot add", "ids", "calibrate the same checkpoint"],
    );
    place.refuses(
        "stats merge {} {} -o {}",
        &[&ids, &ids, &out],
        FAILED,
        &["ids", "same calibration text", "leave one out"],
    );
    place.refuses("stats merge {} -o {}", &[&ids, &out], USAGE, &["FILES"]);
}

#[test]
fn statistics_that_are_none() {
    let place = Place::golden("olmoe");
    let (out, bad) = (place.join("plan.json"), place.join("bad.safetensors"));
    let needles = |problem: &'static str| ["bad.safetensors", problem];
    let refused = |code, needles: &[&str]| {
        place.refuses("stats show {}", &[&bad], code, needles);
        place.refuses(
            "stats merge {} {} -o {}",
            &[&bad, &bad, &out],
            code,
            needles,
        );
        place.refuses(
            "plan {} --stats {} --keep 0.6 -o {}",
            &[&place.model, &bad, &out],
            code,
            needles,
        );
    };
    refused(FAILED, &needles("No such file"));
    std::fs::copy(golden("olmoe").join("golden.safetensors"), &bad).unwrap();
    refused(FAILED, &needles("`calibrate`"));
    let whole = std::fs::read(statistics()).unwrap();
    std::fs::write(&bad, &whole[..whole.len() / 2]).unwrap();
    refused(FAILED, &["bad.safetensors", "damaged", "write it again"]);
    let mut nan = whole.clone();
    let end = nan.len();
    nan[end - 8..].copy_from_slice(&f64::NAN.to_le_bytes());
    std::fs::write(&bad, &nan).unwrap();
    // Only what is read is looked at: `plan` takes a table where a score needs it.
    let needles = &needles("down_norm_sq");
    let merge = "stats merge {} {} -o {}";
    place.refuses(merge, &[&bad, statistics(), &out], FAILED, needles);
    let plan = "plan {} --stats {} --keep 0.6 --neuron-score wifv -o {}";
    place.refuses(plan, &[&place.model, &bad, &out], FAILED, needles);
}

#[test]
fn a_checkpoint_that_is_already_pruned() {
    let place = Place::demo();
    let (plan, ragged) = (demo_plan(&place), place.join("ragged"));
    let (out, data) = (place.join("out"), demo_file("calibration", "facts"));
    tenp("apply {} --plan {} -o {}", &[&place.model, &plan, &ragged]).ok();
    let needles = &["already pruned", "original"];
    place.refuses(
        "prune {} --data {} --keep 0.6 -o {}",
        &[&ragged, &data, &out],
        USAGE,
        needles,
    );
    place.refuses(
        "plan {} --stats {} --keep 0.6 -o {}",
        &[&ragged, statistics(), &out],
        USAGE,
        needles,
    );
    place.refuses(
        "apply {} --plan {} -o {}",
        &[&ragged, &plan, &out],
        FAILED,
        needles,
    );
    // A padded copy has the stock architecture, and is pruned all the same.
    let padded = place.join("padded");
    tenp(
        "apply {} --plan {} --form padded -o {}",
        &[&demo(), &plan, &padded],
    )
    .ok();
    place.refuses(
        "prune {} --data {} --keep 0.6 -o {}",
        &[&padded, &data, &out],
        USAGE,
        needles,
    );
}
