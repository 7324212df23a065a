//! Compiles the executor, and every kernel source with its loads, stores and basic blocks instrumented.
//!
//! Each source becomes one unit in a namespace of its own, so that equal names in two sources stay two functions. An
//! object is compiled again only if its source, a header or the compiler's command changes.
#![allow(clippy::print_stdout, reason = "that is how cargo is spoken to")]

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

#[path = "build/planted.rs"]
mod planted;

use planted::PLANTED;

/// What makes g++ call the functions of `src-cpp/hooks.cpp`.
const INSTRUMENTATION: [&str; 3] = [
    "-fsanitize=thread",
    "-fsanitize-coverage=trace-pc",
    "-fsanitize=alignment,bounds,signed-integer-overflow,integer-divide-by-zero,shift,float-cast-overflow",
];

fn main() {
    if let Err(message) = build() {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let package = PathBuf::from(var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(var("OUT_DIR")?);
    let runtime = package.join("src-cpp");
    let product = package.join("../../kernels/cuda");
    let own = package.join("tests/kernels");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build/planted.rs");
    for folder in [&runtime, &product, &own] {
        // A folder is watched with everything in it, so a new file counts as a change too.
        println!("cargo::rerun-if-changed={}", folder.display());
    }

    let mut common = cc::Build::new();
    common
        .cpp(true)
        .std("c++20")
        .include(runtime.join("include"))
        .flag("-fno-omit-frame-pointer")
        .warnings(false);

    let mut headers = files(&runtime, &["hpp"])?;
    headers.extend(files(&runtime.join("include"), &["hpp"])?);
    let mut objects = Vec::new();
    let runtime_command = common
        .clone()
        .opt_level(2)
        .flags(["-Wall", "-Wextra", "-g1"])
        .get_compiler()
        .to_command();
    for source in files(&runtime, &["cpp"])? {
        objects.push(Unit::new(&source, "runtime", &runtime_command)?);
    }

    headers.extend(files(&product.join("include"), &["cuh", "h"])?);
    let kernel_command = kernel_compiler(&common, &product).to_command();
    for (group, folder) in [("kernel", &product), ("test", &own)] {
        for source in files(folder, &["cu"])? {
            let unit = Unit::new(&source, group, &kernel_command)?;
            objects.push(unit.wrapped(&out)?);
        }
    }
    for mistake in &PLANTED {
        let unit = Unit::new(&mistake.write(&product, &out)?, "planted", &kernel_command)?;
        objects.push(unit.wrapped(&out)?);
    }
    let headers = fingerprint(&headers)?;
    let archived = compile_all(&objects, headers, &out)?;
    let mut library = common;
    for object in archived {
        library.object(object);
    }
    // Entries put themselves into the table; nothing else refers to their objects.
    library
        .link_lib_modifier("+whole-archive")
        .try_compile("simt_kernels")
        .map_err(|e| e.to_string())
}

/// Optimised as little as keeps the tests quick: what is merged or dropped is not checked.
fn kernel_compiler(common: &cc::Build, product: &Path) -> cc::Tool {
    common
        .clone()
        .opt_level(1)
        .include(product.join("include"))
        .define("TENP_SIMT", None)
        .flags(["-include", "simt_kernel.hpp"])
        .flags(INSTRUMENTATION)
        // Registers that nothing wrote hold a pattern, as shared memory does.
        .flag_if_supported("-ftrivial-auto-var-init=pattern")
        .flags(["-fno-exceptions", "-fno-rtti", "-ffp-contract=off", "-g1"])
        .flags([
            "-Wall",
            "-Wextra",
            "-Wno-unknown-pragmas",
            "-Wno-unused-function",
        ])
        .get_compiler()
}

/// One source and the command that compiles it.
struct Unit {
    name: String,
    source: PathBuf,
    /// What is given to the compiler: the source, or a file that includes it.
    input: PathBuf,
    command: (PathBuf, Vec<String>),
}

impl Unit {
    fn new(source: &Path, group: &str, command: &Command) -> Result<Self, String> {
        let stem = source
            .file_stem()
            .and_then(|s| s.to_str())
            .ok_or("a source's name is not UTF-8")?;
        let arguments = command
            .get_args()
            .map(|a| a.to_string_lossy().into_owned())
            .collect();
        Ok(Self {
            name: format!("{group}_{stem}"),
            source: source.to_path_buf(),
            input: source.to_path_buf(),
            command: (PathBuf::from(command.get_program()), arguments),
        })
    }

    /// Puts the source into a namespace.
    fn wrapped(mut self, out: &Path) -> Result<Self, String> {
        self.input = out.join(format!("{}.cpp", self.name));
        let text = format!(
            "namespace simt_unit_{} {{\n#include \"{}\"\n}}\n",
            self.name,
            self.source.display()
        );
        if fs::read_to_string(&self.input).is_ok_and(|old| old == text) {
            return Ok(self);
        }
        fs::write(&self.input, text).map_err(|e| format!("{}: {e}", self.input.display()))?;
        Ok(self)
    }

    /// Compiles, unless the object there is already the result of the same bytes.
    fn compile(&self, headers: u64, out: &Path) -> Result<PathBuf, String> {
        let (object, key_file) = (
            out.join(format!("{}.o", self.name)),
            out.join(format!("{}.key", self.name)),
        );
        let mut hasher = DefaultHasher::new();
        (headers, &self.command, read(&self.source)?).hash(&mut hasher);
        let key = format!("{:016x}", hasher.finish());
        if object.is_file() && fs::read_to_string(&key_file).is_ok_and(|old| old == key) {
            return Ok(object);
        }
        let mut command = Command::new(&self.command.0);
        command
            .args(&self.command.1)
            .arg("-c")
            .arg(&self.input)
            .arg("-o")
            .arg(&object);
        let output = command
            .output()
            .map_err(|e| format!("{command:?} did not start: {e}"))?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            return Err(format!("{command:?} failed ({}):\n{stderr}", output.status));
        }
        for line in stderr.lines() {
            println!("cargo::warning={line}");
        }
        fs::write(&key_file, key).map_err(|e| format!("{}: {e}", key_file.display()))?;
        Ok(object)
    }
}

/// Compiles on as many threads as cargo grants; the first error in source order is the one reported.
fn compile_all(units: &[Unit], headers: u64, out: &Path) -> Result<Vec<PathBuf>, String> {
    let jobs = var("NUM_JOBS")?
        .parse::<usize>()
        .map_err(|e| format!("NUM_JOBS: {e}"))?;
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, units.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(unit) = units.get(index) else { break };
                    let result = unit.compile(headers, out);
                    results
                        .lock()
                        .expect("no panic under the lock")
                        .insert(index, result);
                }
            });
        }
    });
    results
        .into_inner()
        .expect("no panic under the lock")
        .into_values()
        .collect()
}

/// Files in `folder` with one of these extensions, sorted.
fn files(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(|e| format!("{}: {e}", folder.display()))?
            .path();
        if path
            .extension()
            .is_some_and(|e| extensions.iter().any(|x| e == *x))
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn fingerprint(headers: &[PathBuf]) -> Result<u64, String> {
    let mut hasher = DefaultHasher::new();
    for header in headers {
        (header, read(header)?).hash(&mut hasher);
    }
    Ok(hasher.finish())
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn var(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|e| format!("{name}: {e}"))
}
