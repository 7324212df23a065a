//! `report.html`: the report of one prune, for people. Everything is inside, so that it can be sent around.

use std::error::Error;

use anyhow::Result;
use minijinja::{Environment, context};
use serde_json::Value;

use crate::console;
use crate::plots::{HeatMap, Lines, Plot, Series};

const PAGE: &str = include_str!("report.html");

/// As [`Series`] has them.
type Points = Vec<(f64, f64, f64)>;

/// The page of a finished `report.json`.
pub(crate) fn page(report: &Value) -> Result<String, Box<dyn Error + Send + Sync>> {
    Ok(render(report)?)
}

fn render(report: &Value) -> Result<String> {
    let pictures = plots(report)
        .iter()
        .map(Plot::svg)
        .collect::<Result<Vec<_>>>()?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let page = Environment::new().render_named_str(
        "report.html",
        PAGE,
        context! {
            model => text(&report["source"]["name"]),
            method => text(&report["method"]),
            command => text(&report["command"]),
            program => text(&report["program"]),
            rows => rows(report),
            paragraphs => paragraphs(report),
            pictures => pictures,
        },
    )?;
    Ok(page)
}

fn rows(report: &Value) -> Vec<[String; 2]> {
    let a = &report["accounting"];
    let percent = |value: &Value| console::percent(value.as_f64().unwrap_or_default());
    let bytes = |value: &Value| console::bytes(value.as_u64().unwrap_or_default());
    let mut rows = vec![
        ("routed-expert parameters kept (E)", percent(&a["E"])),
        (
            "routed-expert parameters run per token (A)",
            percent(&a["A"]),
        ),
        ("activations on whole experts (f)", percent(&a["f"])),
        ("whole model kept", percent(&a["model"])),
        (
            "bytes",
            format!(
                "{} → {}",
                bytes(&report["size"]["bytes_before"]),
                bytes(&report["size"]["bytes_after"])
            ),
        ),
    ];
    let stability = &report["stability"];
    if stability.is_object() {
        rows.extend([
            (
                "kept neurons that other samples would change",
                percent(&stability["neurons_changed"]),
            ),
            (
                "experts (kept whole, or kept) that they would change",
                percent(&stability["experts_changed"]),
            ),
            (
                "rank correlation of expert scores",
                format!(
                    "{:.3}",
                    stability["expert_rank_correlation"]
                        .as_f64()
                        .unwrap_or_default()
                ),
            ),
        ]);
    }
    rows.into_iter()
        .map(|(name, value)| [name.to_owned(), value])
        .collect()
}

fn paragraphs(report: &Value) -> Vec<String> {
    let mut paragraphs = Vec::new();
    let stability = &report["stability"];
    if stability.is_object() {
        paragraphs.push(format!(
            "Stability: {} plans were made again, each from {} groups of calibration samples drawn with replacement.",
            stability["replicates"], stability["groups"]
        ));
    }
    let coverage = &report["coverage"];
    let few = coverage["below"].as_array().map_or(&[][..], Vec::as_slice);
    if !few.is_empty() {
        let list: Vec<String> = few
            .iter()
            .map(|e| format!("{}/{} ({})", e[0], e[1], e[2]))
            .collect();
        paragraphs.push(format!(
            "{} experts saw fewer than {} calibration tokens, layer/expert (tokens): {}.",
            few.len(),
            coverage["min_tokens"],
            list.join(", ")
        ));
    }
    paragraphs
}

fn plots(report: &Value) -> Vec<Plot> {
    let layers = list(&report["layers"]);
    let names: Vec<String> = layers.iter().map(|l| l["layer"].to_string()).collect();
    let mut plots = Vec::new();
    let full = number(&report["expert_width"]).max(1.0);
    plots.push(heat_map("Kept width", &names, layers.iter(), |layer| {
        numbers(&layer["widths"]).iter().map(|w| w / full).collect()
    }));
    plots.push(over_depth(
        "Share of each layer that is kept",
        "share",
        [("kept neurons", points(layers, "kept"))],
    ));
    let stability = list(&report["stability"]["layers"]);
    if !stability.is_empty() {
        plots.push(over_depth(
            "What other calibration samples would change",
            "share of what is kept",
            [
                ("neurons", points(stability, "neurons_changed")),
                ("experts", points(stability, "experts_changed")),
            ],
        ));
    }
    let tokens = list(&report["coverage"]["tokens"]);
    if !tokens.is_empty() {
        let all = tokens.iter().flat_map(numbers);
        let most = all.fold(1.0, f64::max);
        let title = "Calibration tokens of each expert, as a share of the most";
        plots.push(heat_map(title, &names, tokens.iter(), |row| {
            numbers(row).iter().map(|n| n / most).collect()
        }));
    }
    let recovery = list(&report["recovery"]["layers"]);
    if !recovery.is_empty() {
        plots.push(over_depth(
            "Error of the narrowed experts' outputs on held-out calibration text",
            "‖y − y′‖ / ‖y‖",
            [
                ("cut", points(recovery, "held_out_error_cut")),
                ("recovered", points(recovery, "held_out_error_recovered")),
            ],
        ));
    }
    plots
}

fn heat_map<'v>(
    title: &str,
    names: &[String],
    rows: impl Iterator<Item = &'v Value>,
    shares: impl Fn(&Value) -> Vec<f64>,
) -> Plot {
    Plot::HeatMap(HeatMap {
        title: title.to_owned(),
        x: "expert".to_owned(),
        y: "layer".to_owned(),
        rows: names.iter().cloned().zip(rows.map(shares)).collect(),
    })
}

fn over_depth<const N: usize>(title: &str, y: &str, series: [(&str, Points); N]) -> Plot {
    let series = series.into_iter().map(|(name, points)| Series {
        name: name.to_owned(),
        points,
    });
    Plot::Lines(Lines {
        title: title.to_owned(),
        x: "layer".to_owned(),
        y: y.to_owned(),
        log_y: false,
        series: series.collect(),
    })
}

fn points(layers: &[Value], key: &str) -> Points {
    let point = |layer: &Value| (number(&layer["layer"]), number(&layer[key]), 0.0);
    layers.iter().map(point).collect()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_default()
}

fn numbers(value: &Value) -> Vec<f64> {
    list(value).iter().map(number).collect()
}
