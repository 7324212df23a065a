//! Plans: read, written, and refused when they do not fit.

use serde_json::json;
use tenp_checkpoint::{OutputForm, Plan};

use crate::fixture::{Fixture, Keep, dropping, plan, ragged};

#[test]
fn a_plan_survives_its_file() {
    let fixture = Fixture::new("olmoe");
    let mut plan = ragged(&fixture.open());
    plan.uncalibrated = vec![(0, 3), (2, 7)];
    plan.options.insert("seed".to_owned(), json!(7));
    plan.accounting.A = 0.1 + 0.2;
    let path = fixture.root().join("plan.json");
    plan.write(&path).unwrap();
    assert_eq!(Plan::read(&path).unwrap(), plan);
    assert_eq!(plan.uniform_width(), None);
    assert!(plan.drops_experts() || !plan.keeps_everything(fixture.open().config()));
    std::fs::write(&path, b"{}").unwrap();
    let error = Plan::read(&path).unwrap_err().to_string();
    assert!(
        error.contains("plan.json") && error.contains("format"),
        "{error}"
    );
}

type Damage = fn(&mut Plan);

#[test]
fn unsound_plans_name_layer_and_expert() {
    let table: [(Damage, &str); 13] = [
        (
            |plan| plan.fingerprint = "abc".into(),
            "made for checkpoint abc",
        ),
        (|plan| plan.version = 2, "version 2"),
        (|plan| plan.format = "x".into(), "`x`"),
        (|plan| drop(plan.layers.pop()), "MoE layers are [0, 1, 2]"),
        (
            |plan| plan.layers[1].layer = 7,
            "lists the layers [0, 7, 2]",
        ),
        (
            |plan| drop(plan.layers[1].experts.pop()),
            "layer 1: must list the experts 0 to 7",
        ),
        (
            |plan| plan.layers[2].experts[3].id = 4,
            "layer 2: must list",
        ),
        (
            |plan| plan.layers[2].experts[3].width = 49,
            "layer 2, expert 3: width 49 is above",
        ),
        (
            |plan| plan.layers[2].experts[3].width = 5,
            "layer 2, expert 3: width 5, but",
        ),
        (
            |plan| plan.layers[0].experts[4].neurons = None,
            "layer 0, expert 4: width",
        ),
        (
            |plan| {
                let neurons = plan.layers[0].experts[2].neurons.as_mut().unwrap();
                *neurons.last_mut().unwrap() = 48;
            },
            "layer 0, expert 2: neuron 48 does not exist",
        ),
        (
            |plan| {
                plan.layers[0].experts[2]
                    .neurons
                    .as_mut()
                    .unwrap()
                    .swap(0, 1);
            },
            "ids must ascend",
        ),
        (
            |plan| plan.layers[0].experts[2].dropped = true,
            "is dropped, but lists neurons",
        ),
    ];
    let fixture = Fixture::new("olmoe");
    let sound = ragged(&fixture.open());
    for (damage, message) in table {
        let mut plan = sound.clone();
        damage(&mut plan);
        let error = fixture
            .apply(&plan, OutputForm::Ragged)
            .unwrap_err()
            .to_string();
        assert!(error.contains(message), "{error} should contain {message}");
        assert_eq!(fixture.names(), ["input"]);
    }
    let mut twice = sound;
    let neurons = twice.layers[0].experts[2].neurons.as_mut().unwrap();
    neurons[1] = neurons[0];
    assert!(fixture.apply(&twice, OutputForm::Padded).is_err());
}

#[test]
fn dropping_must_leave_a_router_that_works() {
    let refused = |name: &str, keep: fn(usize, usize) -> bool, message: &str| {
        let fixture = Fixture::new(name);
        let plan = plan(&fixture.open(), |layer, expert| {
            if keep(layer, expert) {
                Keep::All
            } else {
                Keep::Drop
            }
        });
        let error = fixture
            .apply(&plan, OutputForm::Ragged)
            .unwrap_err()
            .to_string();
        assert!(error.contains(message), "{name}: {error}");
        assert_eq!(fixture.names(), ["input"]);
    };
    refused(
        "olmoe",
        |layer, expert| layer == 0 || expert < 2,
        "layer 1: keeps 2 experts",
    );
    refused("olmoe", |_, expert| expert < 2, "each token chooses 3");
    refused("deepseek_v2_group", |_, expert| expert > 0, "equal groups");
    refused(
        "deepseek_v2_group",
        |_, expert| expert % 2 == 0,
        "fewer than the 3",
    );
    refused(
        "deepseek_v3",
        |_, expert| expert % 2 == 0,
        "2 experts per group",
    );
}

#[test]
fn predicates_tell_the_kinds_of_plan_apart() {
    let fixture = Fixture::new("olmoe");
    let source = fixture.open();
    let config = source.config();
    let all = plan(&source, |_, _| Keep::All);
    assert!(all.keeps_everything(config) && all.uniform_width() == Some(48));
    let dropped = dropping(&source);
    assert!(dropped.drops_experts() && dropped.narrows_nothing(config));
    assert!(!dropped.keeps_everything(config) && dropped.is_stock(config));
    let uneven = plan(&source, |layer, expert| {
        if layer == 0 || expert > 0 {
            Keep::All
        } else {
            Keep::Drop
        }
    });
    assert_eq!(uneven.num_experts(), [8, 7, 7]);
    assert!(uneven.narrows_nothing(config) && !uneven.is_stock(config));
    let narrow = plan(&source, |_, _| Keep::Neurons((0..16).collect()));
    assert_eq!(narrow.uniform_width(), Some(16));
    assert!(!narrow.narrows_nothing(config));
    assert_eq!(narrow.widths(), vec![vec![16; 8]; 3]);
}
