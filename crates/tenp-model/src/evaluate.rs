//! Multiple choice by likelihood, perplexity, and comparison with a reference model.

mod compare;
mod score;

pub use compare::{Comparison, LayerComparison, check_comparable, compare, comparison_passes};
pub(crate) use compare::{logit_bytes, output_bytes};
pub use score::{TaskScore, TextScore, score_tasks, score_text, task_passes, text_passes};
