//! Feature `cuda`: compiles every `kernels/cuda/*.cu` to a fatbin in `OUT_DIR` and writes the table that embeds them.
//!
//! No download, no nvidia-smi, no CUDA library at link time. Without the feature this does nothing.
#![allow(clippy::print_stdout, reason = "that is how cargo is spoken to")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

#[path = "build/toolkit.rs"]
mod toolkit;

use toolkit::{
    DEFAULT_ARCHS, Surroundings, Target, VARIABLES, find_nvcc, is_warning, parse_archs, targets_of,
};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build/toolkit.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for name in VARIABLES {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if let Err(message) = build() {
        // One directive per line, or only the first line would be shown.
        for line in message.lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let package = PathBuf::from(var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(var("OUT_DIR")?);
    let archs = std::env::var("TENP_CUDA_ARCHS").unwrap_or_default();
    let archs = if archs.is_empty() {
        DEFAULT_ARCHS
    } else {
        &archs
    };
    let targets = parse_archs(archs)?;

    let folder = package.join("kernels/cuda");
    // A folder is watched with everything in it, so a new file counts as a change too.
    println!("cargo::rerun-if-changed={}", folder.display());
    let sources = files(&folder, &["cu"])?;
    if sources.is_empty() {
        return Err(format!("no kernel sources in {}", folder.display()));
    }
    if std::env::var_os("DOCS_RS").is_some() {
        return write_table(&out, &[], &targets);
    }
    let env: BTreeMap<String, String> = std::env::vars().collect();
    let nvcc = find_nvcc(&Surroundings {
        env: &env,
        package: &package,
        is_file: &|path| path.is_file(),
        list: &names,
    })?;
    println!("cargo::rerun-if-changed={}", nvcc.display());
    let sources: Vec<PathBuf> = sources
        .into_iter()
        .filter(|source| !targets_of(&stem(source), &targets).is_empty())
        .collect();
    let job = Job::new(nvcc, &targets, &folder, &out)?;
    job.compile_all(&sources)?;
    write_table(&out, &sources, &targets)
}

/// One way of calling nvcc.
struct Job<'a> {
    nvcc: PathBuf,
    options: Vec<String>,
    targets: &'a [Target],
    out: &'a Path,
    /// Hash of everything besides the source itself that decides the result.
    common: u64,
}

impl<'a> Job<'a> {
    fn new(
        nvcc: PathBuf,
        targets: &'a [Target],
        folder: &Path,
        out: &'a Path,
    ) -> Result<Self, String> {
        let version = run(Command::new(&nvcc).arg("--version"))?.0;
        let mut options: Vec<String> = ["--fatbin", "-O3", "-std=c++17", "-lineinfo"]
            .map(String::from)
            .into();
        options.push(format!("-I{}", folder.join("include").display()));
        let extra = std::env::var("TENP_NVCC_FLAGS").unwrap_or_default();
        options.extend(extra.split_whitespace().map(String::from));
        let mut hasher = DefaultHasher::new();
        let names: Vec<String> = targets.iter().map(Target::gencode).collect();
        (version, &options, names, std::env::var_os("NVCC_CCBIN")).hash(&mut hasher);
        for header in files(folder, &["cuh", "h", "hpp"])? {
            (&header, read(&header)?).hash(&mut hasher);
        }
        Ok(Self {
            nvcc,
            options,
            targets,
            out,
            common: hasher.finish(),
        })
    }

    /// Compiles on as many threads as cargo grants; the first error in source order is the one reported.
    fn compile_all(&self, sources: &[PathBuf]) -> Result<(), String> {
        let jobs = std::env::var("NUM_JOBS")
            .ok()
            .and_then(|n| n.parse::<usize>().ok())
            .unwrap_or(1)
            .clamp(1, sources.len());
        let next = AtomicUsize::new(0);
        let errors = Mutex::new(BTreeMap::new());
        std::thread::scope(|scope| {
            for _ in 0..jobs {
                scope.spawn(|| {
                    while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(error) = self.compile(source) {
                            errors
                                .lock()
                                .expect("no panic under the lock")
                                .insert(source, error);
                        }
                    }
                });
            }
        });
        let errors = errors.into_inner().expect("no panic under the lock");
        errors.into_values().next().map_or(Ok(()), Err)
    }

    /// Compiles one source, unless the fatbin there is already the result of the same bytes. What nvcc said of it is in
    /// a log beside it, for `scripts/sass-gate.py`.
    fn compile(&self, source: &Path) -> Result<(), String> {
        let stem = stem(source);
        let beside = |extension: &str| self.out.join(format!("{stem}.{extension}"));
        let (fatbin, log, key_file) = (beside("fatbin"), beside("log"), beside("key"));
        let mut hasher = DefaultHasher::new();
        (self.common, read(source)?).hash(&mut hasher);
        let key = format!("{:016x}", hasher.finish());
        let made = fatbin.is_file() && log.is_file();
        if made && fs::read_to_string(&key_file).is_ok_and(|old| old == key) {
            let said = fs::read_to_string(&log).map_err(|e| format!("{}: {e}", log.display()))?;
            warn_of(&said);
            return Ok(());
        }
        let partial = beside("fatbin.partial");
        let (_, said) = run(Command::new(&self.nvcc)
            .args(&self.options)
            .args(
                targets_of(&stem, self.targets)
                    .iter()
                    .flat_map(|target| ["-gencode".to_string(), target.gencode()]),
            )
            .arg("-o")
            .arg(&partial)
            .arg(source))?;
        let failed = |e: std::io::Error| format!("{}: {e}", fatbin.display());
        fs::rename(&partial, &fatbin).map_err(failed)?;
        fs::write(&log, &said).map_err(failed)?;
        warn_of(&said);
        fs::write(&key_file, key).map_err(failed)
    }
}

/// Shows what nvcc and ptxas warn of. What they merely note (where a fence was put in) stays in the log.
fn warn_of(said: &str) {
    for line in said.lines().filter(|line| is_warning(line)) {
        println!("cargo::warning={line}");
    }
}

/// Writes `fatbins.rs`: the fatbins by stem, and the names of the architectures in them.
fn write_table(out: &Path, sources: &[PathBuf], targets: &[Target]) -> Result<(), String> {
    let mut text = String::from("pub(crate) static FATBINS: &[(&str, &[u8])] = &[\n");
    for source in sources {
        let stem = stem(source);
        let _ = writeln!(
            text,
            "    ({stem:?}, include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{stem}.fatbin\"))),"
        );
    }
    let names: Vec<String> = targets.iter().map(Target::name).collect();
    let _ = writeln!(text, "];\npub(crate) static TARGETS: &[&str] = &{names:?};");
    let file = out.join("fatbins.rs");
    fs::write(&file, text).map_err(|e| format!("{}: {e}", file.display()))
}

/// Files under `folder` with one of these extensions, sorted.
fn files(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, String> {
    let mut found = Vec::new();
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    for entry in entries {
        let path = entry
            .map_err(|e| format!("{}: {e}", folder.display()))?
            .path();
        if path.is_dir() {
            found.extend(files(&path, extensions)?);
        } else if path
            .extension()
            .is_some_and(|e| extensions.iter().any(|x| e == *x))
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|e| e.file_name().into_string().ok())
        .collect()
}

fn stem(source: &Path) -> String {
    let stem = source
        .file_stem()
        .expect("a file found by its extension has a stem");
    stem.to_string_lossy().into_owned()
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn var(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|e| format!("{name}: {e}"))
}

/// Runs a command to its end and returns what it printed to stdout and to stderr; an error holds the whole command and
/// all it printed.
fn run(command: &mut Command) -> Result<(String, String), String> {
    let output = command
        .output()
        .map_err(|e| format!("{command:?} did not start: {e}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        return Ok((stdout, stderr));
    }
    Err(format!(
        "{command:?} failed ({}):\n{stdout}{stderr}",
        output.status
    ))
}
