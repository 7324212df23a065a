//! Every command on the repository's checkpoints: what it prints, what it writes, and that it does so the same way
//! each time.

mod answers;
mod calibration;
mod comparison;
mod counts;
mod dern;
mod doctor;
mod evaluation;
mod families;
mod folding;
mod fp8;
#[path = "../../../tenp-checkpoint/tests/support/fp8.rs"]
mod fp8_folder;
mod interrupted;
mod killed;
mod memory;
mod outputs;
mod plans;
mod recovery;
mod reports;
mod search;
#[path = "../support/mod.rs"]
mod support;
mod verify;
