//! Checkpoints in, checkpoints out, on tiny synthesised models of every family.

mod configs;
mod fixture;
mod forms;
mod hostile;
mod output;
mod plans;
mod reading;
mod statistics;
