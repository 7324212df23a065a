//! What comes out: JSON, CSV, Markdown, plots, and one page with everything.

use std::path::Path;

use anyhow::{Context, Result};
use minijinja::{Environment, context};
use serde_json::{Value, json};
use tenp_checkpoint::Checkpoint;

use super::cell::{Cell, Figures, mean, write_json};
use super::tables;
use crate::console;
use crate::plots::{HeatMap, Lines, Plot, Series};

/// The page. Everything is inside, so that it can be sent around.
const PAGE: &str = include_str!("page.html");

/// Everything measured.
pub(super) struct Results {
    pub(super) model: String,
    pub(super) full: Figures,
    pub(super) cells: Vec<Cell>,
    /// Cells of a method and a budget, in the order of the command line.
    pub(super) groups: Vec<Group>,
    expert_width: usize,
    moe_layers: Vec<usize>,
}

/// A method at a budget, over the draws.
pub(super) struct Group {
    pub(super) method: String,
    pub(super) keep: f64,
    pub(super) cells: Vec<usize>,
}

/// A mean over draws, and its standard error where there are several.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spread {
    pub(super) mean: f64,
    pub(super) stderr: Option<f64>,
}

impl Spread {
    pub(super) fn of(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        let mean = (!values.is_empty()).then(|| mean(values.iter().copied()))?;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        let stderr = (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt());
        Some(Self { mean, stderr })
    }
}

impl Results {
    pub(super) fn new(checkpoint: &Checkpoint, full: Figures, cells: Vec<Cell>) -> Self {
        let mut groups: Vec<Group> = Vec::new();
        for (index, cell) in cells.iter().enumerate() {
            let same = |g: &&mut Group| g.method == cell.key.method && g.keep == cell.key.keep;
            match groups.iter_mut().find(same) {
                Some(group) => group.cells.push(index),
                None => groups.push(Group {
                    method: cell.key.method.clone(),
                    keep: cell.key.keep,
                    cells: vec![index],
                }),
            }
        }
        let name = checkpoint.dir().file_name();
        Self {
            model: name.map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
            full,
            cells,
            groups,
            expert_width: checkpoint.config().moe.expert_width,
            moe_layers: checkpoint.config().moe_layers.clone(),
        }
    }

    /// A figure of a group, over its draws.
    pub(super) fn spread(
        &self,
        group: &Group,
        figure: impl Fn(&Cell) -> Option<f64>,
    ) -> Option<Spread> {
        let values: Option<Vec<f64>> = group
            .cells
            .iter()
            .map(|&i| figure(&self.cells[i]))
            .collect();
        Spread::of(&values?)
    }

    pub(super) fn json(&self) -> Value {
        json!({"model": self.model, "full": self.full, "cells": self.cells})
    }

    /// The table for a terminal.
    pub(super) fn text(&self) -> String {
        let (header, rows) = tables::summary(self);
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        console::table(&header, &rows)
    }

    fn methods(&self) -> Vec<&str> {
        let mut methods: Vec<&str> = Vec::new();
        for group in &self.groups {
            if !methods.contains(&group.method.as_str()) {
                methods.push(&group.method);
            }
        }
        methods
    }

    /// A figure against the kept share, a line a method.
    fn over_keep(
        &self,
        title: &str,
        y: &str,
        log_y: bool,
        figure: impl Fn(&Cell) -> Option<f64>,
    ) -> Option<Plot> {
        let lines = self.methods().into_iter().map(|method| {
            let groups = self.groups.iter().filter(|g| g.method == method);
            let mut points: Vec<(f64, f64, f64)> = groups
                .filter_map(|g| {
                    let kept = self.spread(g, |c| Some(c.accounting.E))?.mean;
                    let spread = self.spread(g, &figure)?;
                    Some((kept, spread.mean, spread.stderr.unwrap_or(0.0)))
                })
                .collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            Series {
                name: method.to_owned(),
                points,
            }
        });
        let series: Vec<Series> = lines.collect();
        series.iter().any(|s| !s.points.is_empty()).then(|| {
            Plot::Lines(Lines {
                title: title.to_owned(),
                x: "share of routed-expert parameters kept (E)".to_owned(),
                y: y.to_owned(),
                log_y,
                series,
            })
        })
    }

    /// The first draw's cells at the budget nearest to 0.6.
    fn at_typical_budget(&self) -> Vec<&Cell> {
        let distance = |keep: f64| (keep - 0.6).abs();
        let nearest = self.groups.iter().map(|g| g.keep);
        let nearest = nearest.min_by(|a, b| distance(*a).total_cmp(&distance(*b)));
        let groups = self.groups.iter().filter(|g| Some(g.keep) == nearest);
        groups.map(|g| &self.cells[g.cells[0]]).collect()
    }

    fn layer_plot(&self) -> Plot {
        let cells = self.at_typical_budget();
        let keep = cells.first().map_or(1.0, |cell| cell.key.keep);
        let series = cells.into_iter().map(|cell| Series {
            name: cell.key.method.clone(),
            points: cell
                .layers
                .iter()
                .map(|l| (l.layer as f64, l.output_error, 0.0))
                .collect(),
        });
        Plot::Lines(Lines {
            title: format!("Output error of each MoE layer, keep {keep}"),
            x: "layer".to_owned(),
            y: "‖o − o_full‖ / ‖o_full‖".to_owned(),
            log_y: false,
            series: series.collect(),
        })
    }

    fn width_plot(&self, cell: &Cell) -> Plot {
        let rows = self.moe_layers.iter().zip(&cell.widths);
        let share = |width: &usize| *width as f64 / self.expert_width.max(1) as f64;
        Plot::HeatMap(HeatMap {
            title: format!("Kept width, {} at keep {}", cell.key.method, cell.key.keep),
            x: "expert".to_owned(),
            y: "layer".to_owned(),
            rows: rows
                .map(|(layer, widths)| (layer.to_string(), widths.iter().map(share).collect()))
                .collect(),
        })
    }

    fn plots(&self) -> Vec<(String, Plot)> {
        let mut plots = Vec::new();
        let mut add = |stem: &str, plot: Option<Plot>| {
            plots.extend(plot.map(|plot| (stem.to_owned(), plot)));
        };
        let accuracy = |c: &Cell| c.figures.mean_accuracy();
        add(
            "accuracy",
            self.over_keep("Mean accuracy", "accuracy", false, accuracy),
        );
        add(
            "kl",
            self.over_keep(
                "Distance from the full model",
                "KL, nats a token",
                true,
                |c| Some(c.kl),
            ),
        );
        let nll = |c: &Cell| c.figures.answer_nll();
        add(
            "answer-nll",
            self.over_keep("Answer NLL", "nats a token", false, nll),
        );
        let perplexity = |c: &Cell| c.figures.perplexity();
        add(
            "perplexity",
            self.over_keep("Perplexity", "perplexity", true, perplexity),
        );
        add("layer-error", Some(self.layer_plot()));
        for cell in self.at_typical_budget() {
            let stem = format!("widths-{}", cell.key.stem());
            add(&stem, Some(self.width_plot(cell)));
        }
        plots
    }

    /// Writes every file; earlier ones are replaced.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        write_json(&folder.join("results.json"), &self.json())?;
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("results.csv", tables::csv(self))?;
        write("results.md", tables::markdown(self))?;
        let plots = folder.join("plots");
        std::fs::create_dir_all(&plots)
            .with_context(|| format!("cannot create {}", plots.display()))?;
        let mut pictures = Vec::new();
        for (stem, plot) in self.plots() {
            pictures.push(plot.write(&plots, &stem)?);
        }
        let (header, rows) = tables::summary(self);
        let environment = Environment::new();
        let page = environment.render_named_str(
            "page.html",
            PAGE,
            context! {
                model => &self.model,
                version => env!("CARGO_PKG_VERSION"),
                header => header,
                rows => rows,
                pictures => pictures,
            },
        )?;
        write("index.html", page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        let spread = Spread::of(&[1.0, 3.0]).unwrap();
        assert_eq!((spread.mean, spread.stderr), (2.0, Some(1.0)));
        assert_eq!(Spread::of(&[4.0]).unwrap().stderr, None);
        assert!(Spread::of(&[]).is_none());
    }
}
