//! Calibration samples without their answers, for the model to give its own.

use std::path::Path;

use serde_json::{Value, json};

use super::Tokenizer;
use super::files::{cut, data, extension, json_lines, messages, text_lines, unknown_kind};
use crate::ModelError;

/// The prompts of the first `limit` samples of a file as token ids, each cut at `seq_len`: `prompt`, or `messages` without
/// an assistant's message at their end. An `answer` need not be there and is not read.
///
/// # Errors
/// As [`super::read_samples`]; [`ModelError::NoPrompt`] for a sample that is only text or token ids.
pub fn read_prompts<'t>(
    path: &Path,
    limit: usize,
    seq_len: usize,
    tokenizer: &mut dyn FnMut() -> Result<&'t Tokenizer, ModelError>,
) -> Result<Vec<Vec<u32>>, ModelError> {
    let lines = match extension(path) {
        "jsonl" => json_lines(path)?.take(limit),
        "txt" => {
            let line = text_lines(path)?.next().transpose()?;
            return Err(no_prompt(path, line.map(|(n, _)| n), "is plain text"));
        }
        "safetensors" => return Err(no_prompt(path, None, "is token ids")),
        _ => return Err(unknown_kind(path)),
    };
    // The lines first: what they lack is found without a tokenizer.
    let lines = lines.collect::<Result<Vec<_>, _>>()?;
    let prompts = lines
        .iter()
        .map(|(n, value)| Prompt::of(path, *n, value))
        .collect::<Result<Vec<_>, _>>()?;
    let tokenizer = tokenizer()?;
    let ids = lines.iter().zip(prompts).map(|((n, _), prompt)| {
        let ids = match prompt {
            Prompt::Text(text) => tokenizer.sequence(text)?,
            Prompt::Chat(messages) => tokenizer.chat(&messages, true)?,
        };
        if ids.is_empty() {
            let why = "the prompt has no tokens, so there is nothing to answer";
            return Err(data(path, Some(*n), why));
        }
        Ok(ids)
    });
    cut(path, ids.collect::<Result<_, _>>()?, seq_len)
}

/// What is to be answered.
enum Prompt<'v> {
    Text(&'v str),
    Chat(Value),
}

impl<'v> Prompt<'v> {
    fn of(path: &Path, line: usize, value: &'v Value) -> Result<Self, ModelError> {
        // As where the given answers are read, `text` goes first.
        if value["text"].is_string() {
            return Err(no_prompt(path, Some(line), "is plain text (`text`)"));
        }
        if let Some(prompt) = value["prompt"].as_str() {
            return Ok(Self::Text(prompt));
        }
        let Some(messages) = messages(path, line, value)?.and_then(Value::as_array) else {
            return Err(no_prompt(path, Some(line), "has neither"));
        };
        let asked = match messages.split_last() {
            Some((last, before)) if last["role"] == "assistant" => before,
            _ => messages,
        };
        if asked.is_empty() {
            let why = "has no message before the assistant's";
            return Err(no_prompt(path, Some(line), why));
        }
        Ok(Self::Chat(json!(asked)))
    }
}

fn no_prompt(path: &Path, line: Option<usize>, what: &str) -> ModelError {
    ModelError::NoPrompt {
        path: path.to_owned(),
        line,
        why: format!(
            "--answers generate needs samples with a `prompt`, or `messages`; this {what}"
        ),
    }
}
