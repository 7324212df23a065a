//! `tenp-run`: shrink Mixture-of-Experts checkpoints without training.

#![forbid(unsafe_code)]
#![allow(clippy::doc_markdown)]

mod cards;
mod cli;
mod commands;
mod console;
mod failure;
mod models;
mod picture;
mod progress;
mod requests;

use std::process::ExitCode;

use clap::Parser;

// The passes allocate and free the same few large buffers block after block; the system's allocator gives their pages
// back each time, and faulting them in again took a fifth of a calibration.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}
