//! The examples give what they should, and docs/runtimes.md quotes them.

#[path = "../examples/ragged_moe.rs"]
mod ragged_moe;

use ragged_moe::{HIDDEN, layer, main as run};

/// One expert's output for one token by plain loops.
fn expert(width: usize, weights: &[f32], x: &[f32]) -> Vec<f64> {
    let row = |j: usize| &weights[j * HIDDEN..(j + 1) * HIDDEN];
    let h: Vec<f64> = (0..width)
        .map(|j| row(j).iter().zip(x).map(|(w, x)| f64::from(w * x)).sum())
        .map(|gate: f64| gate / (1.0 + (-gate).exp()) * gate)
        .collect();
    let down = |i: usize| (0..width).map(move |j| f64::from(weights[i * width + j]));
    (0..HIDDEN)
        .map(|i| down(i).zip(&h).map(|(w, h)| w * h).sum())
        .collect()
}

#[test]
fn the_smallest_use_agrees_with_plain_loops() {
    let weights: Vec<f32> = (0..HIDDEN * 6).map(|i| (i as f32 * 0.7).cos()).collect();
    let x: Vec<f32> = (0..HIDDEN * 2).map(|i| (i as f32 * 0.3).sin()).collect();
    let got = layer(&weights, &x).unwrap();
    // Token, width of an expert that it chose, weight; the third has no neurons.
    for (token, chosen) in [[(6, 0.7), (3, 0.3)], [(0, 0.4), (6, 0.6)]]
        .iter()
        .enumerate()
    {
        let x = &x[token * HIDDEN..(token + 1) * HIDDEN];
        let mut want = vec![0.0; HIDDEN];
        for &(width, gate) in chosen {
            for (sum, y) in want.iter_mut().zip(expert(width, &weights, x)) {
                *sum += gate * y;
            }
        }
        for (got, want) in got[token * HIDDEN..].iter().zip(want) {
            let difference = (f64::from(*got) - want).abs();
            assert!(difference < 1e-5 * (1.0 + want.abs()), "{got} for {want}");
        }
    }
    assert!(run().is_ok());
}

/// The lines of the page's Rust are lines of the example, one behind the other.
#[test]
fn the_page_on_runtimes_quotes_the_example() {
    let page = include_str!("../docs/runtimes.md");
    let example: Vec<&str> = include_str!("../examples/cudarc.rs")
        .lines()
        .map(str::trim)
        .collect();
    let mut quotes = page.split("```rust").skip(1);
    let quote = quotes.next().and_then(|q| q.split("```").next()).unwrap();
    let quote: Vec<&str> = quote.lines().map(str::trim).skip(1).collect();
    assert!(quote.len() > 10 && quotes.next().is_none());
    // A line of dots leaves lines out.
    let mut from = 0;
    for part in quote.split(|line| *line == "// …") {
        let found = example[from..].windows(part.len()).position(|w| w == part);
        from += found.unwrap_or_else(|| panic!("examples/cudarc.rs has no\n{}", part.join("\n")));
        from += part.len();
    }
}
