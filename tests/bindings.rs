//! `kernels/params.rs` is what bindgen makes of `kernels/cuda/include/params.h` today.
//!
//! `scripts/bindings.sh` runs this; with `--write` it replaces the committed file instead of comparing.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Precedes the generated text. Comments of the header become documentation, where C's brackets are no links.
const HEAD: &str = "//! Parameter structs of the kernels, generated from `cuda/include/params.h` by `scripts/bindings.sh`.
#![allow(missing_docs, non_snake_case, non_camel_case_types, clippy::pedantic, rustdoc::all)]
";

fn generate(header: &Path) -> String {
    bindgen::Builder::default()
        .header(header.to_str().expect("the checkout's path is UTF-8"))
        .clang_args(["-x", "c", "-std=c11"])
        .allowlist_type("Tenp.*")
        .allowlist_var("TENP_.*")
        .prepend_enum_name(false)
        .layout_tests(false)
        .merge_extern_blocks(true)
        .disable_header_comment()
        .formatter(bindgen::Formatter::None)
        .generate()
        .expect("params.h compiles as C11")
        .to_string()
}

/// The header's own assertions, `TENP_SIZE(type, bytes);`, once more in Rust.
fn sizes(header: &Path) -> String {
    let read = |path: &Path| std::fs::read_to_string(path).expect("the header is text");
    let whole = read(header);
    // Its parts, where it includes them.
    let header: String = whole
        .lines()
        .map(|line| {
            let part = line.strip_prefix("#include \"");
            let part = part.and_then(|rest| rest.strip_suffix('"'));
            part.map_or_else(
                || format!("{line}\n"),
                |name| read(&header.with_file_name(name)),
            )
        })
        .collect();
    let asserted = header.lines().filter_map(|line| {
        let (name, bytes) = line
            .strip_prefix("TENP_SIZE(")?
            .strip_suffix(");")?
            .split_once(", ")?;
        Some(format!(
            "const _: () = assert!(size_of::<{name}>() == {bytes});"
        ))
    });
    let asserted: Vec<String> = asserted.collect();
    let structs = header.matches("typedef struct").count();
    assert_eq!(
        asserted.len(),
        structs,
        "every struct of params.h needs its TENP_SIZE line"
    );
    asserted.join("\n")
}

fn rustfmt(text: &str) -> String {
    let mut child = Command::new("rustfmt")
        .args(["--edition", "2024", "--emit", "stdout"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("rustfmt starts");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    stdin.write_all(text.as_bytes()).expect("rustfmt reads");
    drop(stdin);
    let output = child.wait_with_output().expect("rustfmt ends");
    assert!(output.status.success(), "rustfmt failed");
    String::from_utf8(output.stdout).expect("rustfmt writes UTF-8")
}

#[test]
#[allow(clippy::print_stderr, reason = "a skip must be seen")]
fn params_rs_matches_params_h() {
    if std::env::var_os("LIBCLANG_PATH").is_none() {
        assert!(
            std::env::var_os("TENP_REQUIRE_LIBCLANG").is_none(),
            "LIBCLANG_PATH is not set"
        );
        eprintln!(
            "SKIPPED params_rs_matches_params_h: LIBCLANG_PATH is not set; scripts/bindings.sh sets it"
        );
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let committed = root.join("kernels/params.rs");
    let header = root.join("kernels/cuda/include/params.h");
    let text = rustfmt(&format!(
        "{HEAD}
{}
{}",
        generate(&header),
        sizes(&header)
    ));
    if std::env::var_os("TENP_WRITE_BINDINGS").is_some() {
        std::fs::write(&committed, text).expect("kernels/params.rs can be written");
        return;
    }
    let old = std::fs::read_to_string(&committed).expect("kernels/params.rs is there");
    if let Some((line, (old, new))) = old
        .lines()
        .zip(text.lines())
        .enumerate()
        .find(|(_, (old, new))| old != new)
    {
        panic!(
            "kernels/params.rs differs from params.h at line {}:\n  committed {old}\n  generated {new}\n\
             run scripts/bindings.sh --write",
            line + 1
        );
    }
    assert_eq!(
        old.len(),
        text.len(),
        "one is longer; run scripts/bindings.sh --write"
    );
}
