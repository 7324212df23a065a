//! Tokenizer, chat template, and the data files of calibration and evaluation.

mod files;
mod prompts;
mod tokenizer;

pub use files::{Data, Task, TaskItem, read_samples, read_task};
pub use prompts::read_prompts;
pub use tokenizer::Tokenizer;
