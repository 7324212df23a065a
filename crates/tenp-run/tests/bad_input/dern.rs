//! DERN's options out of range, counts that a router cannot choose from, plans that were tampered with.

use serde_json::{Value, json};

use super::options::refused;
use super::{FAILED, Place, USAGE};
use crate::options::statistics;
use crate::support::Scratch;
use crate::support::fixtures::{copy, edit_json, golden};
use crate::support::tenp;

#[test]
fn values_out_of_range() {
    for (options, needles) in [
        ("--threshold 1", ["--threshold 1", "below 1"]),
        ("--threshold=-0.1", ["--threshold -0.1", "at least 0"]),
        ("--threshold nan", ["--threshold NaN", "below 1"]),
        ("--lambda 0,0.1,0.1", ["--threshold 0.4", "below 0.2"]),
        ("--lambda 0,0,0", ["--lambda 0,0,0", "not all 0"]),
        ("--lambda=-1,1,1", ["--lambda -1,1,1", "at least 0"]),
        ("--lambda 0,inf,1", ["--lambda 0,inf,1", "at least 0"]),
        ("--lambda 1,2", ["--lambda", "three numbers"]),
        ("--router move", ["--router", "transfer"]),
        ("--init first", ["--init", "peak"]),
    ] {
        refused(&format!("--method dern --experts 12 {options}"), &needles);
    }
}

#[test]
fn counts() {
    for (count, needle) in [
        ("17", "a layer has 16 experts"),
        ("3", "could not choose its 4"),
        ("0", "could not choose its 4"),
    ] {
        let options = format!("--method dern --experts {count}");
        refused(&options, &["--experts", needle, "possible here: 4, 5"]);
    }
    refused(
        "--method dern --experts 12 --keep 0.5",
        &["--experts", "--keep"],
    );
    refused("--method dern", &["--keep", "--experts"]);
    refused(
        "--method tenp --experts 12",
        &["--experts", "drops experts"],
    );
    refused(
        "--method reap --keep 0.5 --threshold 0.5",
        &["--threshold", "--method dern"],
    );
    refused(
        "--method reap --keep 0.5 --sign-canonical",
        &["--sign-canonical", "dern"],
    );
    refused(
        "--method dern --keep 0.5 --alpha 0.1",
        &["--alpha", "no effect"],
    );
}

#[test]
fn counts_of_layers() {
    for (counts, needles) in [
        (
            "12,12",
            ["--experts lists 2 counts", "each of the 7 MoE layers"],
        ),
        (
            "12,12,12,12,12,12,12,12",
            ["--experts lists 8 counts", "7 MoE layers"],
        ),
        (
            "12,12,12,3,12,12,12",
            ["--experts 3: for layer 4", "could not choose its 4"],
        ),
        (
            "17,12,12,12,12,12,12",
            ["--experts 17: for layer 1", "a layer has 16 experts"],
        ),
        ("12,,12", ["--experts", "invalid value"]),
        ("12,x", ["--experts", "invalid value 'x'"]),
    ] {
        for method in ["dern", "reap"] {
            refused(&format!("--method {method} --experts {counts}"), &needles);
        }
    }
    let place = Place::demo();
    let (plan, out) = (place.join("plan.json"), place.join("out"));
    let line = "plan {} --stats {} --method reap --experts 16,12,12,12,12,12,8 -o {}";
    tenp(line, &[&place.model, statistics(), &plan]).ok();
    for form in ["padded", "uniform"] {
        place.refuses(
            &format!("apply {{}} --plan {{}} --form {form} -o {{}}"),
            &[&place.model, &plan, &out],
            USAGE,
            &[
                form,
                "8 to 16 experts",
                "no form brings a dropped expert back",
            ],
        );
    }
}

#[test]
fn within_experts_there_is_no_router_to_change() {
    for (options, needles) in [
        ("--router keep", ["--router", "--method dern"]),
        (
            "--merge-weights router",
            ["--merge-weights router", "--method dern"],
        ),
        ("--experts 12", ["--experts", "--keep"]),
        ("--threshold 1", ["--threshold 1", "below 1"]),
        ("--lambda 0,0,0", ["--lambda 0,0,0", "not all 0"]),
    ] {
        refused(
            &format!("--method tenp+dern --keep 0.6 {options}"),
            &needles,
        );
    }
    refused(
        "--method tenp+dern --experts 12",
        &["--experts", "drops experts"],
    );
    refused(
        "--method dern --experts 12 --merge-weights energy",
        &["--merge-weights energy", "--method tenp+dern"],
    );
    refused(
        "--keep 0.6 --merge-weights uniform",
        &["--merge-weights", "dern or tenp+dern"],
    );
}

#[test]
fn groups_are_kept_even() {
    let scratch = Scratch::new();
    let model = copy(&golden("deepseek_v3"), &scratch.join("model"));
    edit_json(&model.join("config.json"), |config| {
        config.insert("n_group".to_owned(), json!(2));
    });
    let ids = model.join("golden.safetensors");
    let out = scratch.join("out");
    for (model, count, needles) in [
        (&model, "5", ["each of the 2 router groups", "4, 6, 8"]),
        (&model, "2", ["could not choose its 3", "4, 6, 8"]),
        (
            &model,
            "6,5",
            ["for layer 2: each of the 2 router groups", "4, 6, 8"],
        ),
        (
            &model,
            "2,6",
            ["for layer 1: the router could not choose its 3", "4, 6, 8"],
        ),
        (
            &golden("deepseek_v3"),
            "4",
            ["could not choose its 3", "possible here: 8"],
        ),
    ] {
        let line = format!("prune {{}} --data {{}} --method dern --experts {count} -o {{}}");
        tenp(&line, &[model, &ids, &out]).refused(USAGE, &needles);
    }
    assert!(!out.exists());
}

#[test]
fn plans_that_were_tampered_with() {
    let place = Place::demo();
    let (plan, bad, out) = (
        place.join("plan.json"),
        place.join("bad.json"),
        place.join("out"),
    );
    let line = "plan {} --stats {} --method dern --experts 12 -o {}";
    tenp(line, &[&place.model, statistics(), &plan]).ok();
    let cases: [(&str, Value, &str); 7] = [
        ("threshold", json!(null), "expected f64"),
        ("lambda", json!([0.0, 0.0, 0.0]), "every lambda is 0"),
        ("lambda", json!([0.0, -1.0, 0.0]), "lambda -1"),
        ("rounds", json!(0), "no round"),
        ("initialisation", json!("random"), "no seed"),
        ("S", json!([[0.5]]), "7 lists of 16"),
        ("router", json!("swap"), "swap"),
    ];
    for (field, value, needle) in cases {
        std::fs::copy(&plan, &bad).unwrap();
        edit_json(&bad, |plan| plan["dern"][field] = value);
        place.refuses(
            "apply {} --plan {} -o {}",
            &[&place.model, &bad, &out],
            FAILED,
            &[needle],
        );
    }
    let line = "plan {} --stats {} --method tenp+dern --keep 0.6 -o {}";
    tenp(line, &[&place.model, statistics(), &plan]).ok();
    let cases: [(&str, Value, &str); 6] = [
        ("router", json!("transfer"), "the router stays"),
        ("merge_weights", json!("router"), "weighs nothing"),
        ("merge_weights", json!("uniform"), "need no list"),
        ("weights", json!([[[1.0]]]), "a list of 96 numbers"),
        ("weights", json!([]), "a list of 96 numbers"),
        ("scope", json!("experts"), "only have a part within"),
    ];
    for (field, value, needle) in cases {
        std::fs::copy(&plan, &bad).unwrap();
        edit_json(&bad, |plan| plan["dern"][field] = value);
        place.refuses(
            "apply {} --plan {} -o {}",
            &[&place.model, &bad, &out],
            FAILED,
            &[needle],
        );
    }
}
