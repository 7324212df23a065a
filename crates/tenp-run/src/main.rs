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
mod place;
mod plots;
mod progress;
mod requests;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}
