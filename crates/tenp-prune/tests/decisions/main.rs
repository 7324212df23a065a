//! Plans from synthetic statistics: methods, scores, accounting, refusals, and the properties that hold for all.

#![allow(clippy::doc_markdown)]

mod accounting;
mod methods;
mod properties;
mod refusals;
mod scores;
mod synthetic;
