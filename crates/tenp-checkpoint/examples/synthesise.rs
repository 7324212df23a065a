//! Writes a random-weight bf16 or fp8 checkpoint of a config's real shapes, to try sizes and memory without a download.
//!
//! `cargo run --release -p tenp-checkpoint --example synthesise -- CONFIG.json OUT [--layers N] [--experts N]
//! [--dtype bf16|fp8] [--mtp] [--shard-size 5GB] [--seed 0] [--fused] [--holes] [--statistics FILE]`
//!
//! `--dtype fp8` writes the projections as DeepSeek-V3 stores them, some of the scales in another shard than their matrix;
//! `--mtp` adds the MTP layers that the config announces. `--holes` leaves the weights out (zeros that take no room), for what reads headers only; `--statistics` writes a
//! statistics file of random numbers beside it, to try planning.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use tenp_checkpoint::{Checkpoint, Dtype, SynthesiseOptions, synthesise, synthesise_statistics};

const USAGE: &str = "usage: synthesise CONFIG.json OUT [--layers N] [--experts N] [--dtype bf16|fp8] [--mtp] \
     [--shard-size 5GB] [--seed 0] [--fused] [--holes] [--statistics FILE]";

struct Arguments {
    config: PathBuf,
    out: PathBuf,
    options: SynthesiseOptions,
    statistics: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(problem) => {
            eprintln!("{problem}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let out = &arguments.out;
    std::fs::create_dir_all(out)?;
    if std::fs::read_dir(out)?.next().is_some() {
        return Err(format!("{} is not empty; choose another folder", out.display()).into());
    }
    let start = Instant::now();
    let mut shown = 0;
    let written = synthesise(
        &arguments.config,
        out,
        arguments.options,
        &mut |done, total| {
            let percent = done * 100 / total.max(1);
            if percent >= shown + 10 {
                shown = percent;
                eprintln!("{percent} % of {:.2} GB", total as f64 / 1e9);
            }
        },
    )?;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{}: {} shards, {:.3} GB in {seconds:.1} s ({:.2} GB/s)",
        out.display(),
        written.shards.len(),
        written.bytes as f64 / 1e9,
        written.bytes as f64 / 1e9 / seconds
    );
    if let Some(path) = &arguments.statistics {
        let checkpoint = Checkpoint::open(out)?;
        synthesise_statistics(&checkpoint, arguments.options.seed).write(path)?;
        println!("{}", path.display());
    }
    Ok(())
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut places = Vec::new();
    let mut options = SynthesiseOptions::default();
    let mut statistics = None;
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .ok_or_else(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            "--layers" => options.num_layers = Some(number(&value()?)? as usize),
            "--experts" => options.num_experts = Some(number(&value()?)? as usize),
            "--dtype" => {
                options.dtype = match value()?.as_str() {
                    "bf16" => Dtype::BF16,
                    "fp8" => Dtype::F8E4M3,
                    other => return Err(format!("--dtype {other} is not known; bf16 and fp8 are")),
                }
            }
            "--mtp" => options.mtp = true,
            "--seed" => options.seed = number(&value()?)?,
            "--shard-size" => options.shard_bytes = bytes(&value()?)?,
            "--fused" => options.fused = true,
            "--holes" => options.holes = true,
            "--statistics" => statistics = Some(PathBuf::from(value()?)),
            flag if flag.starts_with("--") => return Err(format!("unknown flag {flag}")),
            place => places.push(PathBuf::from(place)),
        }
    }
    if options.dtype == Dtype::F8E4M3 && options.fused {
        return Err("--fused experts are not fp8; leave one of the two out".to_owned());
    }
    match <[PathBuf; 2]>::try_from(places) {
        Ok([config, out]) => Ok(Arguments {
            config,
            out,
            options,
            statistics,
        }),
        Err(_) => Err("a config and an output folder are needed".to_owned()),
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_| format!("`{text}` is not a whole number"))
}

/// `5GB`, `500MB`, or plain bytes.
fn bytes(text: &str) -> Result<u64, String> {
    let units = [("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1_000)];
    for (suffix, unit) in units {
        if let Some(count) = text.strip_suffix(suffix) {
            return Ok(number(count)?.saturating_mul(unit));
        }
    }
    number(text)
}
