//! Checkpoints in, checkpoints out, on tiny synthesised models of every family.

mod configs;
mod fixture;
mod forms;
mod fp8;
mod hostile;
mod mtp;
mod output;
mod plans;
mod reading;
mod resuming;
mod statistics;
#[path = "../support/fp8.rs"]
mod support;
