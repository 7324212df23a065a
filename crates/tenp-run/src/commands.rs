//! One file per command.

mod apply;
pub(crate) mod calibrate;
mod compare;
mod demo;
mod doctor;
mod eval;
mod generate;
mod inspect;
mod logits;
mod plan;
mod prune;
mod stats;
mod verify;

use anyhow::{Context, Result};

use crate::cli::{Cli, Command};

/// Runs the command of the command line.
pub(crate) fn run(cli: Cli) -> Result<()> {
    if let Some(threads) = cli.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.into());
        pool.build_global().context("cannot start the threads")?;
    }
    // From inside the pool every parallel loop starts without waking the pool up.
    let mut result = Ok(());
    rayon::scope(|_| result = dispatch(cli.command));
    result
}

fn dispatch(command: Command) -> Result<()> {
    match command {
        Command::Inspect(args) => inspect::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Stats(args) => stats::run(args),
        Command::Plan(args) => plan::run(&args),
        Command::Apply(args) => apply::run(&args),
        Command::Prune(args) => prune::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    }
}
