//! docs/benchmarks/gpu.md has the floors that `cargo run --example gpu_floors` prints, in order, whatever is measured.

#[allow(dead_code, reason = "its main")]
#[path = "../examples/gpu_floors.rs"]
mod gpu_floors;

const PAGE: &str = include_str!("../docs/benchmarks/gpu.md");

#[test]
fn the_page_has_every_case_with_its_floor() {
    let mut lines = PAGE.lines();
    for table in gpu_floors::tables() {
        let title = format!("### {}", table.title);
        let header = table.header();
        for expected in [title, header].into_iter().chain(table.beginnings()) {
            assert!(
                lines.any(|line| line.starts_with(&expected)),
                "{expected} is not in its place; `cargo run --example gpu_floors` prints the tables"
            );
        }
    }
}
