//! The tables of a comparison.

use std::fmt::Write as _;

use super::cell::{Cell, Figures};
use super::results::{Group, Results, Spread};
use crate::console;

/// A figure of a cell, with the digits it is shown with.
type Column = (&'static str, fn(&Cell) -> Option<f64>, usize);

const COLUMNS: [Column; 11] = [
    ("accuracy", |c| c.figures.mean_accuracy(), 3),
    ("answer NLL", |c| c.figures.answer_nll(), 4),
    ("perplexity", |c| c.figures.perplexity(), 3),
    ("KL", |c| Some(c.kl), 4),
    ("top-1", |c| Some(c.top1), 3),
    ("layer error", |c| Some(c.layer_error()), 3),
    ("routing shift", Cell::routing_shift, 3),
    ("E", |c| Some(c.accounting.E), 3),
    ("A", |c| Some(c.accounting.A), 3),
    ("f", |c| Some(c.accounting.f), 3),
    ("seconds", |c| Some(c.prune_seconds + c.measure_seconds), 1),
];

fn shown(spread: Option<Spread>, digits: usize) -> String {
    match spread {
        None => "–".to_owned(),
        Some(Spread {
            mean,
            stderr: Some(stderr),
        }) if stderr > 0.0 => format!("{mean:.digits$} ± {stderr:.digits$}"),
        Some(Spread { mean, .. }) => format!("{mean:.digits$}"),
    }
}

/// Columns in which any model has a figure.
fn columns(results: &Results) -> Vec<Column> {
    let any = |(_, figure, _): &Column| results.cells.iter().any(|c| figure(c).is_some());
    COLUMNS.into_iter().filter(any).collect()
}

/// Header and rows: the full model, then every method at every budget.
pub(super) fn summary(results: &Results) -> (Vec<String>, Vec<Vec<String>>) {
    let columns = columns(results);
    let mut header = vec!["method".to_owned(), "keep".to_owned(), "size".to_owned()];
    header.extend(columns.iter().map(|(name, _, _)| (*name).to_owned()));
    let size = |bytes: u64| console::bytes(bytes);
    let before = results.cells.first().map(|c| c.accounting.bytes_before);
    let full = |f: &Figures, name: &str, digits: usize| {
        let value = match name {
            "accuracy" => f.mean_accuracy(),
            "answer NLL" => f.answer_nll(),
            "perplexity" => f.perplexity(),
            "KL" | "layer error" | "routing shift" => Some(0.0),
            "top-1" | "E" | "A" => Some(1.0),
            _ => None,
        };
        value.map_or_else(|| "–".to_owned(), |v| format!("{v:.digits$}"))
    };
    let mut rows = vec![vec![
        "full model".to_owned(),
        "1".to_owned(),
        before.map_or_else(String::new, size),
    ]];
    rows[0].extend(
        columns
            .iter()
            .map(|(name, _, digits)| full(&results.full, name, *digits)),
    );
    for group in &results.groups {
        let bytes = results.cells[group.cells[0]].accounting.bytes_after;
        let mut row = vec![group.method.clone(), group.keep.to_string(), size(bytes)];
        let figures = columns.iter();
        row.extend(
            figures.map(|(_, figure, digits)| shown(results.spread(group, figure), *digits)),
        );
        rows.push(row);
    }
    (header, rows)
}

/// One line a cell, one column a figure, tasks and texts apart.
pub(super) fn csv(results: &Results) -> String {
    let mut text = "method,keep,seed".to_owned();
    for (name, _, _) in COLUMNS {
        let _ = write!(text, ",{}", name.replace([' ', '-'], "_").to_lowercase());
    }
    text.push_str(",bytes_before,bytes_after,prune_seconds,measure_seconds");
    for (name, _) in &results.full.tasks {
        let _ = write!(text, ",{}", quoted(&format!("{name}_accuracy")));
        let _ = write!(text, ",{}", quoted(&format!("{name}_stderr")));
    }
    for (name, _) in &results.full.texts {
        let _ = write!(text, ",{}", quoted(&format!("{name}_perplexity")));
    }
    text.push('\n');
    for cell in &results.cells {
        let key = &cell.key;
        let _ = write!(text, "{},{},{}", quoted(&key.method), key.keep, key.seed);
        for (_, figure, _) in COLUMNS {
            let value = figure(cell).map_or_else(String::new, |v| v.to_string());
            let _ = write!(text, ",{value}");
        }
        let a = &cell.accounting;
        let _ = write!(
            text,
            ",{},{},{},{}",
            a.bytes_before, a.bytes_after, cell.prune_seconds, cell.measure_seconds
        );
        for (_, task) in &cell.figures.tasks {
            let _ = write!(text, ",{},{}", task.accuracy, task.stderr);
        }
        for (_, score) in &cell.figures.texts {
            let _ = write!(text, ",{}", score.perplexity);
        }
        text.push('\n');
    }
    text
}

/// A field of a CSV line (RFC 4180).
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

/// The summary, and accuracies task by task with their binomial standard errors.
pub(super) fn markdown(results: &Results) -> String {
    let (header, rows) = summary(results);
    let mut text = format!("# {}: pruning methods compared\n\n", results.model);
    text.push_str(&table(&header, &rows));
    if results.full.tasks.is_empty() {
        return text;
    }
    let mut header = vec!["method".to_owned(), "keep".to_owned()];
    header.extend(results.full.tasks.iter().map(|(name, _)| name.clone()));
    let full = results.full.tasks.iter();
    let full = full.map(|(_, t)| format!("{:.3} ± {:.3}", t.accuracy, t.stderr));
    let mut rows = vec![
        ["full model".to_owned(), "1".to_owned()]
            .into_iter()
            .chain(full)
            .collect(),
    ];
    for group in &results.groups {
        rows.push(task_row(results, group));
    }
    text.push_str("\nAccuracy by task, mean over draws ± binomial standard error:\n\n");
    text.push_str(&table(&header, &rows));
    text
}

fn task_row(results: &Results, group: &Group) -> Vec<String> {
    let mut row = vec![group.method.clone(), group.keep.to_string()];
    for task in 0..results.full.tasks.len() {
        let of = |c: &Cell| c.figures.tasks.get(task).map(|(_, t)| *t);
        let accuracy = results.spread(group, |c| of(c).map(|t| t.accuracy));
        let stderr = results.spread(group, |c| of(c).map(|t| t.stderr));
        let pair = accuracy.zip(stderr);
        row.push(pair.map_or_else(
            || "–".to_owned(),
            |(a, s)| format!("{:.3} ± {:.3}", a.mean, s.mean),
        ));
    }
    row
}

fn table(header: &[String], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | ").replace("||", "| |"));
    let mut text = line(header);
    let rule = std::iter::once("---").chain(std::iter::repeat_n("---:", header.len() - 1));
    let _ = writeln!(text, "|{}|", rule.collect::<Vec<_>>().join("|"));
    for row in rows {
        text.push_str(&line(row));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_with_commas_are_quoted() {
        assert_eq!(quoted("tenp"), "tenp");
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
    }

    #[test]
    fn spreads_are_shown_where_there_are_any() {
        let spread = |stderr| Some(Spread { mean: 0.5, stderr });
        assert_eq!(shown(spread(Some(0.01)), 3), "0.500 ± 0.010");
        assert_eq!(shown(spread(None), 2), "0.50");
        assert_eq!(shown(None, 2), "–");
    }
}
