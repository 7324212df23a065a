//! `tenp-run`: shrink Mixture-of-Experts checkpoints without training.

#![forbid(unsafe_code)]
#![allow(clippy::doc_markdown)]

mod answers;
mod cards;
mod cli;
mod commands;
mod console;
mod coverage;
mod failure;
mod forecast;
mod interrupt;
mod models;
mod picture;
mod place;
mod plots;
mod progress;
mod recovery;
mod report_page;
mod requests;
mod search;
mod unfinished;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;

fn main() -> ExitCode {
    tenp_checkpoint::return_large_buffers();
    let cli = cli::Cli::parse();
    #[cfg(unix)]
    tenp_checkpoint::explain_faults();
    let unwritten = || match console::unwritten() {
        Some(why) => Err(anyhow::anyhow!("cannot write to standard output: {why}")),
        None => Ok(()),
    };
    let listening = interrupt::listen().context("cannot listen for signals");
    match listening
        .and_then(|()| commands::run(cli))
        .and_then(|()| unwritten())
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}
