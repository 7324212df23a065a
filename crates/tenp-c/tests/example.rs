//! `examples/c`, compiled by the system's C compiler against both libraries, and run.

mod compiler;

use std::io::Write as _;
use std::path::Path;

use compiler::{compile, folder, library, run};

#[test]
fn the_c_example_agrees_with_its_plain_loops() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/c");
    let sources = ["ragged_moe.c", "cuda_memory.c"].map(|name| sources.join(name));
    let folder = folder();
    for kind in ["so", "a"] {
        let program = folder.path().join(kind);
        let sources = sources.each_ref().map(std::path::PathBuf::as_path);
        compile("-std=c99", &sources, &library(kind), &program);
        let text = run(&program);
        assert!(text.contains("cpu f32: same"), "{text}");
        assert!(text.contains("cpu bf16: same"), "{text}");
        assert!(text.contains("cpu scores: same"), "{text}");
        if text.contains("skipped: cuda") {
            // Past the capture of the test harness.
            let _ = writeln!(
                std::io::stderr(),
                "the_c_example, lib{kind}: {}",
                text.trim()
            );
            assert!(std::env::var_os("TENP_REQUIRE_GPU").is_none(), "{text}");
        } else {
            assert!(text.contains("cuda bf16: same"), "{text}");
        }
    }
}
