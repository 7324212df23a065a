//! `doctor`: what this machine has, and what is missing.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rustix::fs::{Advice, fadvise, statvfs};
use serde::Serialize;
use sysinfo::System;
use tenp_kernels::cpu::{Isa, isa};

use crate::cli::Doctor;
use crate::console;

/// Bytes that are written to measure a disk: some seconds on a slow one.
const MEASURED_BYTES: usize = 512 << 20;

/// Bytes that go to or from it at once.
const CHUNK_BYTES: usize = 8 << 20;

#[derive(Serialize)]
struct Machine {
    version: &'static str,
    cpu: Cpu,
    memory: Memory,
    disk: Disk,
    cuda: Cuda,
    /// What is not there, each with what it is needed for or how to get it.
    missing: Vec<String>,
}

#[derive(Serialize)]
struct Cpu {
    model: String,
    /// As many as this process may use at once.
    threads: usize,
    instructions: &'static str,
}

#[derive(Serialize)]
struct Memory {
    total_bytes: u64,
    available_bytes: u64,
}

#[derive(Serialize)]
struct Disk {
    folder: String,
    free_bytes: u64,
    /// Written and synced; none where there was no room to measure.
    write_bytes_per_second: Option<f64>,
    /// Read after the system was asked to forget the file.
    read_bytes_per_second: Option<f64>,
}

#[derive(Default, Serialize)]
struct Cuda {
    /// Architectures of the kernels in this program; none in a build without CUDA.
    built_for: Vec<String>,
    /// CUDA version that the driver supports.
    driver: Option<String>,
    cublas: bool,
    gpus: Vec<Gpu>,
}

#[derive(Serialize)]
#[cfg_attr(
    not(feature = "cuda"),
    allow(dead_code, reason = "made by a build with CUDA")
)]
struct Gpu {
    name: String,
    capability: String,
    memory_bytes: u64,
    free_bytes: u64,
    multiprocessors: usize,
}

pub(super) fn run(args: &Doctor) -> Result<()> {
    let mut missing = Vec::new();
    let machine = Machine {
        version: env!("CARGO_PKG_VERSION"),
        cpu: cpu(&mut missing)?,
        memory: memory()?,
        disk: disk(&args.folder, &mut missing)?,
        cuda: cuda(&mut missing),
        missing,
    };
    if args.json {
        console::json(&serde_json::to_value(&machine)?);
    } else {
        console::data(&as_text(&machine));
    }
    Ok(())
}

fn cpu(missing: &mut Vec<String>) -> Result<Cpu> {
    let mut system = System::new()?;
    system.refresh_cpu_all();
    let model = system.cpus().first().map_or("", |cpu| cpu.brand()).trim();
    let instructions = match isa() {
        Isa::Avx512Bf16 => "AVX-512 with bf16 products",
        Isa::Avx512 => "AVX-512",
        Isa::Avx2 => "AVX2",
        Isa::NeonBf16 => "NEON with bf16 products",
        Isa::Neon => "NEON",
        Isa::Portable => "no vector instructions that this program knows",
    };
    if !isa().has_pairs() {
        missing.push(
            "bf16 products of the CPU (AVX-512 BF16, or Arm's BF16): --compute bf16 is no faster than f32 here"
                .to_owned(),
        );
    }
    Ok(Cpu {
        model: if model.is_empty() {
            std::env::consts::ARCH.to_owned()
        } else {
            model.to_owned()
        },
        threads: rayon::current_num_threads(),
        instructions,
    })
}

/// Of this machine, or what its container may use.
fn memory() -> Result<Memory> {
    let mut system = System::new()?;
    system.refresh_memory();
    let machine = Memory {
        total_bytes: system.total_memory(),
        available_bytes: system.available_memory(),
    };
    Ok(match system.cgroup_limits() {
        Some(limits) if limits.total_memory < machine.total_bytes => Memory {
            total_bytes: limits.total_memory,
            available_bytes: limits.free_memory.min(machine.available_bytes),
        },
        _ => machine,
    })
}

fn disk(folder: &Path, missing: &mut Vec<String>) -> Result<Disk> {
    let stat = statvfs(folder)
        .with_context(|| format!("--folder: cannot look at {}", folder.display()))?;
    let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
    let mut disk = Disk {
        folder: folder
            .canonicalize()
            .unwrap_or_else(|_| folder.to_owned())
            .display()
            .to_string(),
        free_bytes,
        write_bytes_per_second: None,
        read_bytes_per_second: None,
    };
    if free_bytes < 2 * MEASURED_BYTES as u64 {
        missing.push(format!(
            "room in {} to measure the disk: {} are free",
            folder.display(),
            console::bytes(free_bytes)
        ));
        return Ok(disk);
    }
    let [write, read] = measure(folder).with_context(|| {
        format!(
            "--folder: cannot measure the disk of {}; name a folder that can be written",
            folder.display()
        )
    })?;
    disk.write_bytes_per_second = Some(write);
    disk.read_bytes_per_second = Some(read);
    Ok(disk)
}

/// Bytes a second, written and read.
fn measure(folder: &Path) -> Result<[f64; 2]> {
    // Without a name: gone with this process, however that ends.
    let mut file: File = tempfile::tempfile_in(folder)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let rate = |started: Instant| MEASURED_BYTES as f64 / started.elapsed().as_secs_f64();
    random.fill_bytes(&mut chunk);
    let started = Instant::now();
    for part in 0..MEASURED_BYTES / CHUNK_BYTES {
        // No two chunks alike, so that no disk stores them as one.
        chunk[..8].copy_from_slice(&part.to_le_bytes());
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    let written = rate(started);
    file.rewind()?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    let started = Instant::now();
    while file.read(&mut chunk)? > 0 {}
    Ok([written, rate(started)])
}

#[cfg(not(feature = "cuda"))]
fn cuda(missing: &mut Vec<String>) -> Cuda {
    let gpu = Path::new("/proc/driver/nvidia/version").exists();
    missing.push(format!(
        "GPU kernels: this program was built without CUDA{}; build it with --features cuda (docs/cuda.md)",
        if gpu { ", but there is an NVIDIA driver" } else { "" }
    ));
    Cuda::default()
}

#[cfg(feature = "cuda")]
fn cuda(missing: &mut Vec<String>) -> Cuda {
    use tenp_kernels::device::{Device, cublas_found, gpu_count};
    let mut cuda = Cuda {
        built_for: Device::built_for().iter().map(|&t| t.to_owned()).collect(),
        cublas: cublas_found(),
        ..Cuda::default()
    };
    let count = gpu_count().unwrap_or_else(|error| {
        missing.push(format!("a GPU: {error}"));
        0
    });
    for ordinal in 0..count {
        let device = match Device::open(ordinal) {
            Ok(device) => device,
            Err(error) => {
                missing.push(format!("cuda:{ordinal}: {error}"));
                continue;
            }
        };
        let properties = device.properties();
        let version = |number: i32| format!("{}.{}", number / 1000, number % 1000 / 10);
        cuda.driver = Some(version(properties.driver));
        cuda.gpus.push(Gpu {
            name: properties.name.clone(),
            capability: format!("{}.{}", properties.capability.0, properties.capability.1),
            memory_bytes: properties.memory_bytes as u64,
            free_bytes: device.free_bytes().unwrap_or_default(),
            multiprocessors: properties.multiprocessors,
        });
    }
    if !cuda.cublas {
        missing.push(
            "cuBLAS (libcublas.so.13): dense products on a GPU; it comes with the CUDA toolkit and the Python wheel \
             nvidia-cublas"
                .to_owned(),
        );
    }
    cuda
}

fn as_text(machine: &Machine) -> String {
    let (cpu, memory, disk) = (&machine.cpu, &machine.memory, &machine.disk);
    let rate = |rate: Option<f64>| match rate {
        Some(rate) => format!("{}/s", console::bytes(rate as u64)),
        None => "not measured".to_owned(),
    };
    let mut rows = vec![
        ("tenp-run", machine.version.to_owned()),
        (
            "CPU",
            format!(
                "{}, {} threads, {}",
                cpu.model, cpu.threads, cpu.instructions
            ),
        ),
        (
            "memory",
            format!(
                "{}, {} available",
                console::bytes(memory.total_bytes),
                console::bytes(memory.available_bytes)
            ),
        ),
        ("disk", disk.folder.clone()),
        ("  free", console::bytes(disk.free_bytes)),
        ("  write", rate(disk.write_bytes_per_second)),
        ("  read", rate(disk.read_bytes_per_second)),
    ];
    let cuda = &machine.cuda;
    let built_for = match &cuda.built_for[..] {
        [] => "none".to_owned(),
        targets => targets.join(", "),
    };
    rows.push(("GPU kernels", built_for));
    rows.extend(cuda.driver.iter().map(|d| ("CUDA driver", d.clone())));
    rows.extend(cuda.gpus.iter().map(|gpu| {
        let about = format!(
            "{} (capability {}, {} multiprocessors), {}, {} free",
            gpu.name,
            gpu.capability,
            gpu.multiprocessors,
            console::bytes(gpu.memory_bytes),
            console::bytes(gpu.free_bytes)
        );
        ("GPU", about)
    }));
    rows.extend(machine.missing.iter().map(|what| ("missing", what.clone())));
    console::pairs(rows.iter().map(|(name, value)| (*name, value.as_str())), 12)
}
