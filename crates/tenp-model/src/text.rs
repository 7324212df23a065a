//! Tokenizer, chat template, and the data files of calibration and evaluation.

mod files;
mod tokenizer;

pub use files::{Data, Task, TaskItem, read_samples, read_task};
pub use tokenizer::Tokenizer;
