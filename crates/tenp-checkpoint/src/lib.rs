//! x
pub mod config;
pub mod plan;
pub mod statistics;
