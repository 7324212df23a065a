//! Multiple choice by likelihood, perplexity, and comparison with a reference model.

mod compare;
mod score;

pub use compare::{Comparison, LayerComparison, check_comparable, compare};
pub use score::{TaskScore, TextScore, score_tasks, score_text};
