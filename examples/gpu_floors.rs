//! Prints the tables of docs/benchmarks/gpu.md: the floor of every short case of the GPU bench, and cells for what a GPU
//! is to measure. `cargo run --example gpu_floors`
#![allow(clippy::print_stdout, reason = "an example shows its result")]

use tenp_kernels::cost::{Ceilings, MoeWork, floor, segment_bytes, segment_flops};

#[allow(dead_code, unreachable_pub, reason = "the bench uses all of it")]
#[path = "../benches/gpu/cases.rs"]
mod cases;

use cases::{Case, Routing, SHAPES, Shape, Widths, cases};

/// A table: its title, its header, and the cells of each row that are known; a GPU is to measure the others.
pub(crate) struct Table {
    pub(crate) title: String,
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

const EXPERTS: [&str; 14] = [
    "T",
    "rows an expert",
    "widths",
    "routing",
    "floor, µs",
    "ours, µs",
    "TFLOP/s",
    "GB/s",
    "cuBLAS grouped, µs",
    "cuBLAS loop, µs",
    "torch._grouped_mm, µs",
    "Triton fused, µs",
    "Triton grouped, µs",
    "DeepGEMM, µs",
];

const SCORES: [&str; 10] = [
    "T",
    "contribution: floor, µs",
    "direction: floor, µs",
    "scored layer: floor, µs",
    "contribution, µs",
    "TFLOP/s",
    "direction, µs",
    "GB/s",
    "scored layer, µs",
    "over the plain layer",
];

const SEGMENTS: [&str; 6] = [
    "shape",
    "segments",
    "against",
    "floor, µs",
    "ours, µs",
    "TFLOP/s",
];

fn bound(flops: f64, bytes: f64) -> String {
    let floor = floor(flops, bytes, Ceilings::H200);
    format!("{:.1} ({})", floor.seconds * 1e6, floor.bound.name())
}

fn work(case: &Case) -> MoeWork {
    case.work(&case.routing.ids(&case.shape, case.tokens))
}

fn experts(shape: &Shape) -> Table {
    let row = |case: Case| {
        let load = (case.tokens * shape.top_k) as f64 / shape.experts as f64;
        let work = work(&case);
        vec![
            case.tokens.to_string(),
            format!("{load:.*}", if load < 10.0 { 2 } else { 0 }),
            case.widths.name().into(),
            case.routing.name().into(),
            bound(work.forward_flops(), work.forward_bytes()),
        ]
    };
    Table {
        title: shape.name.into(),
        header: EXPERTS.into(),
        rows: cases(shape, "short").into_iter().map(row).collect(),
    }
}

fn scores(shape: &Shape) -> Table {
    let row = |tokens| {
        let work = work(&Case {
            shape: *shape,
            tokens,
            widths: Widths::Full,
            routing: Routing::Uniform,
        });
        vec![
            tokens.to_string(),
            bound(work.down_flops(), work.contribution_bytes()),
            bound(0.0, work.direction_bytes()),
            bound(work.scored_flops(), work.scored_bytes()),
        ]
    };
    Table {
        title: format!("{}, scores", shape.name),
        header: SCORES.into(),
        rows: [512, 2048, 8192].map(row).into(),
    }
}

fn segments() -> Table {
    let of = |shape: &Shape| {
        let (rows, against) = (shape.width, shape.experts * 3 / 4 * shape.width);
        let sizes = (rows, against);
        vec![
            shape.name.into(),
            rows.to_string(),
            against.to_string(),
            bound(
                segment_flops(sizes, 2, shape.hidden),
                segment_bytes(sizes, 2, shape.hidden),
            ),
        ]
    };
    let models = SHAPES.iter().filter(|s| s.name.starts_with("DeepSeek"));
    Table {
        title: "Segment similarity".into(),
        header: SEGMENTS.into(),
        rows: models.map(of).collect(),
    }
}

impl Table {
    /// The cells that are known, as the row begins.
    pub(crate) fn beginnings(&self) -> impl Iterator<Item = String> {
        self.rows.iter().map(|r| format!("| {} |", r.join(" | ")))
    }

    pub(crate) fn header(&self) -> String {
        format!("| {} |", self.header.join(" | "))
    }
}

pub(crate) fn tables() -> Vec<Table> {
    let of_shape = |shape: &Shape| [experts(shape), scores(shape)];
    let tables = SHAPES.iter().flat_map(of_shape);
    tables.chain([segments()]).collect()
}

fn main() {
    for table in tables() {
        println!("### {}\n\n{}", table.title, table.header());
        println!("|{}", "---:|".repeat(table.header.len()));
        for (row, known) in table.beginnings().zip(&table.rows) {
            println!("{row}{}", "  |".repeat(table.header.len() - known.len()));
        }
        println!();
    }
}
