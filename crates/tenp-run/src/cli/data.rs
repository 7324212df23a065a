//! Options of calibration text.

use std::path::Path;

use clap::{Args, ValueEnum};
use tenp_checkpoint::statistics::Share;
use tenp_model::text::Data;

#[derive(Clone, Debug, Args)]
pub(crate) struct DataArgs {
    /// Calibration text: .jsonl (`text`, or `prompt` and `answer`, or `messages`), .txt (a sample a line), or
    /// .safetensors (`input_ids` [n, len]). A file without DOMAIN= is of domain `default`. May repeat; MODEL goes before
    /// it.
    #[arg(long, required = true, num_args = 1.., value_name = "[DOMAIN=]FILE")]
    pub(crate) data: Vec<Data>,
    /// Samples per domain, the first ones.
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) samples: u32,
    /// Tokens per sample; longer ones are cut [default: 2048, or the model's positions if those are fewer].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) seq_len: Option<u32>,
    /// Warn of experts that see fewer tokens than this.
    #[arg(long, default_value_t = MIN_TOKENS, value_name = "N")]
    pub(crate) min_tokens: u32,
}

/// Tokens below which an expert's scores are said to rest on little.
pub(crate) const MIN_TOKENS: u32 = 32;

impl DataArgs {
    /// The files that are read.
    pub(crate) fn files(&self) -> Vec<&Path> {
        self.data.iter().map(|data| data.path.as_path()).collect()
    }
}

/// Whose answers are calibrated on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum AnswersArg {
    /// Those in the files.
    #[default]
    Given,
    /// The full model's own.
    Generate,
}

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct AnswersArgs {
    /// What follows a sample's prompt: the answer given in the file, or the one that the full model generates (likeliest
    /// token by token). generate needs .jsonl with `prompt`, or `messages`; an answer in the file is not read.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) answers: AnswersArg,
    /// Tokens of a generated answer at most; a prompt with its answer has at most --seq-len [default: 256].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) answer_tokens: Option<u32>,
}

/// A share of the samples: which of how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShareArg {
    pub(crate) part: u32,
    pub(crate) parts: u32,
}

impl std::str::FromStr for ShareArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no share, such as 1/4 (the first of four)");
        let (part, parts) = text.split_once('/').ok_or_else(wrong)?;
        let [part, parts] = [part, parts].map(str::parse);
        let (part, parts) = (part.map_err(|_| wrong())?, parts.map_err(|_| wrong())?);
        if parts > Share::MAX_PARTS {
            return Err(format!(
                "`{text}` is of more than {} shares",
                Share::MAX_PARTS
            ));
        }
        if (1..=parts).contains(&part) {
            Ok(Self { part, parts })
        } else {
            Err(wrong())
        }
    }
}
