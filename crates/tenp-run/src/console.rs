//! Data on stdout, everything else on stderr. A reader that goes away (`| head`) ends the output, not the program.

#![allow(clippy::print_stderr)]

use std::io::Write;
use std::sync::OnceLock;

/// Prints data.
pub(crate) fn data(text: &str) {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // A closed pipe is the reader's choice.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            let _ = UNWRITTEN.set(error.to_string());
        }
        _ => {}
    }
}

/// Why some data could not be printed.
static UNWRITTEN: OnceLock<String> = OnceLock::new();

/// Why some data could not be printed, if so.
pub(crate) fn unwritten() -> Option<&'static str> {
    UNWRITTEN.get().map(String::as_str)
}

/// Prints data and a line end.
pub(crate) fn data_line(text: &str) {
    data(&format!("{text}\n"));
}

/// Prints a JSON value for a machine.
pub(crate) fn json(value: &serde_json::Value) {
    data_line(&format!("{value:#}"));
}

/// Tells the person at the terminal something.
pub(crate) fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Whether a person watches stderr.
pub(crate) fn user_attended_stderr() -> bool {
    console::user_attended_stderr()
}

/// Columns of the terminal, 100 where there is none.
pub(crate) fn columns() -> usize {
    console::Term::stdout()
        .size_checked()
        .map_or(100, |(_, columns)| usize::from(columns))
}

/// Names in a column of `width`, each with its value beside it.
pub(crate) fn pairs<'r>(
    rows: impl IntoIterator<Item = (&'r str, &'r str)>,
    width: usize,
) -> String {
    rows.into_iter().fold(String::new(), |text, (name, value)| {
        text + &format!("{name:width$} {value}\n")
    })
}

/// Columns aligned by their widest cell; the first left, the others right.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |c: usize| {
        let cells = rows.iter().map(|r| r[c].chars().count());
        cells.chain([header[c].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: &[String]| {
        let mut out = String::new();
        for (c, (cell, &width)) in cells.iter().zip(&widths).enumerate() {
            let gap = " ".repeat(width - cell.chars().count());
            let parts = match c {
                0 => ["", cell.as_str(), &gap],
                _ => ["  ", &gap, cell.as_str()],
            };
            out.extend(parts);
        }
        format!("{}\n", out.trim_end())
    };
    let head: Vec<String> = header.iter().map(|h| (*h).to_owned()).collect();
    rows.iter().fold(line(&head), |text, row| text + &line(row))
}

/// `15.7 B`, `5.2 M`, `812`.
pub(crate) fn count(n: u64) -> String {
    scaled(n as f64, 1000.0, &["", " k", " M", " B", " T"])
}

/// `31.4 GB`, decimal like disk sizes.
pub(crate) fn bytes(n: u64) -> String {
    scaled(n as f64, 1000.0, &[" B", " kB", " MB", " GB", " TB"])
}

fn scaled(mut value: f64, base: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    if unit == 0 {
        format!("{value:.0}{}", units[0])
    } else {
        format!("{value:.1}{}", units[unit])
    }
}

/// `63.8 %`.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(bytes(31_412_345_678), "31.4 GB");
        assert_eq!(count(5_203_200), "5.2 M");
        assert_eq!(count(812), "812");
        assert_eq!(bytes(999_999), "1.0 MB");
    }

    #[test]
    fn tables_align() {
        let text = table(
            &["a", "value"],
            &[
                vec!["long name".into(), "1".into()],
                vec!["b".into(), "22".into()],
            ],
        );
        assert_eq!(
            text,
            "a          value\nlong name      1\nb             22\n"
        );
    }
}
