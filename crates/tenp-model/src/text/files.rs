//! Calibration and evaluation files: `.jsonl`, `.txt`, `.safetensors`.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::Tokenizer;
use crate::ModelError;

/// A `[DOMAIN=]FILE` argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    /// Domain, `default` when none was given.
    pub domain: String,
    /// The file.
    pub path: PathBuf,
}

impl std::str::FromStr for Data {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (domain, path) = match text.split_once('=') {
            // A path that contains `=` but no domain still works if the file exists.
            Some(_) if Path::new(text).exists() => ("default", text),
            Some((domain, path)) => (domain, path),
            None => ("default", text),
        };
        if domain.is_empty() || domain.contains(['/', '\\']) || path.is_empty() {
            return Err(format!(
                "`{text}` is not [DOMAIN=]FILE; for a path with an `=` in it give a domain too: default={text}"
            ));
        }
        Ok(Self {
            domain: domain.to_owned(),
            path: PathBuf::from(path),
        })
    }
}

/// The first `limit` samples of a file as token ids, each cut at `seq_len`.
///
/// `tokenizer` is called only for files that hold text.
///
/// # Errors
/// Unreadable or empty files, lines without a usable field, a tokenizer that cannot be opened.
pub fn read_samples<'t>(
    path: &Path,
    limit: usize,
    seq_len: usize,
    tokenizer: &mut dyn FnMut() -> Result<&'t Tokenizer, ModelError>,
) -> Result<Vec<Vec<u32>>, ModelError> {
    let samples = match extension(path) {
        "safetensors" => token_ids(path, limit)?,
        "jsonl" => {
            let lines = json_lines(path)?.take(limit);
            let tokenizer = tokenizer()?;
            lines
                .map(|line| line.and_then(|(n, value)| sample(path, n, &value, tokenizer)))
                .collect::<Result<_, _>>()?
        }
        "txt" => {
            let lines = text_lines(path)?.take(limit);
            let tokenizer = tokenizer()?;
            lines
                .map(|line| line.and_then(|(_, text)| tokenizer.sequence(&text)))
                .collect::<Result<_, _>>()?
        }
        _ => return Err(unknown_kind(path)),
    };
    cut(path, samples, seq_len)
}

/// The samples that are not empty, each cut at `seq_len`.
pub(super) fn cut(
    path: &Path,
    mut samples: Vec<Vec<u32>>,
    seq_len: usize,
) -> Result<Vec<Vec<u32>>, ModelError> {
    for sample in &mut samples {
        sample.truncate(seq_len);
    }
    samples.retain(|s| !s.is_empty());
    if samples.is_empty() {
        return Err(data(
            path,
            None,
            "there is no sample in this file; give one with text, a sample a line",
        ));
    }
    Ok(samples)
}

/// One multiple-choice question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskItem {
    /// Token ids of the prompt, with the beginning-of-sequence token where the tokenizer wants one.
    pub prompt: Vec<u32>,
    /// Token ids of each choice.
    pub choices: Vec<Vec<u32>>,
    /// Index of the right choice.
    pub answer: usize,
}

/// A file of multiple-choice questions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The file's stem.
    pub name: String,
    /// Its questions.
    pub items: Vec<TaskItem>,
}

/// Reads a task: `.jsonl` with `prompt`, `choices` and `answer` (an index).
///
/// # Errors
/// Unreadable or empty files, lines without these fields, an answer that is no choice, a choice without tokens.
pub fn read_task(path: &Path, tokenizer: &Tokenizer) -> Result<Task, ModelError> {
    let mut items = Vec::new();
    for line in json_lines(path)? {
        let (line, value) = line?;
        let bad = |why: &str| data(path, Some(line), why);
        let prompt = value["prompt"]
            .as_str()
            .ok_or_else(|| bad("`prompt` is missing"))?;
        let choices = value["choices"]
            .as_array()
            .ok_or_else(|| bad("`choices` is missing"))?;
        let answer = value["answer"]
            .as_u64()
            .ok_or_else(|| bad("`answer` must be the index of a choice"))?
            as usize;
        if answer >= choices.len() {
            return Err(bad(&format!(
                "`answer` is {answer} but there are {} choices",
                choices.len()
            )));
        }
        let choices = choices
            .iter()
            .map(|choice| {
                let ids = tokenizer.ids(
                    choice
                        .as_str()
                        .ok_or_else(|| bad("a choice is not a text"))?,
                )?;
                if ids.is_empty() {
                    Err(bad("a choice has no tokens"))
                } else {
                    Ok(ids)
                }
            })
            .collect::<Result<Vec<_>, _>>()?;
        let prompt = tokenizer.sequence(prompt)?;
        if prompt.is_empty() {
            return Err(bad(
                "the prompt has no tokens, so nothing comes before the choices",
            ));
        }
        items.push(TaskItem {
            prompt,
            choices,
            answer,
        });
    }
    if items.is_empty() {
        return Err(data(path, None, "there is no question in this file"));
    }
    let name = path
        .file_stem()
        .map_or_else(String::new, |s| s.to_string_lossy().into_owned());
    Ok(Task { name, items })
}

pub(super) fn extension(path: &Path) -> &str {
    path.extension()
        .and_then(|e| e.to_str())
        .unwrap_or_default()
}

pub(super) fn unknown_kind(path: &Path) -> ModelError {
    data(
        path,
        None,
        "unknown kind of file; use .jsonl, .txt or .safetensors",
    )
}

pub(super) fn data(path: &Path, line: Option<usize>, why: &str) -> ModelError {
    ModelError::Data {
        path: path.to_owned(),
        line,
        why: why.to_owned(),
    }
}

/// Lines that are not blank, with their numbers; read as they are asked for, so that the first samples of a large file cost
/// no more than themselves.
pub(super) fn text_lines(
    path: &Path,
) -> Result<impl Iterator<Item = Result<(usize, String), ModelError>> + '_, ModelError> {
    let io = |source| ModelError::Io {
        path: path.to_owned(),
        source,
    };
    let lines = BufReader::new(File::open(path).map_err(io)?).split(b'\n');
    let lines = lines.enumerate().map(move |(i, bytes)| {
        let mut bytes = bytes.map_err(io)?;
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok((i + 1, text)),
            Err(_) => Err(data(path, Some(i + 1), "is not UTF-8 text")),
        }
    });
    Ok(lines.filter(|line| !matches!(line, Ok((_, text)) if text.trim().is_empty())))
}

/// The same lines, parsed.
pub(super) fn json_lines(
    path: &Path,
) -> Result<impl Iterator<Item = Result<(usize, Value), ModelError>> + '_, ModelError> {
    let lines = text_lines(path)?;
    Ok(lines.map(move |line| {
        let (number, text) = line?;
        match serde_json::from_str(&text) {
            Ok(value) => Ok((number, value)),
            Err(e) => Err(data(path, Some(number), &format!("is not JSON: {e}"))),
        }
    }))
}

/// The `messages` of a line, if it has any, every one of them whole.
pub(super) fn messages<'v>(
    path: &Path,
    line: usize,
    value: &'v Value,
) -> Result<Option<&'v Value>, ModelError> {
    let Some(messages) = value["messages"].as_array() else {
        return Ok(None);
    };
    let whole = |m: &Value| m["role"].is_string() && m["content"].is_string();
    if messages.is_empty() || !messages.iter().all(whole) {
        return Err(data(
            path,
            Some(line),
            "every one of `messages` needs a `role` and a `content`, and there must be one",
        ));
    }
    Ok(Some(&value["messages"]))
}

fn sample(
    path: &Path,
    line: usize,
    value: &Value,
    tokenizer: &Tokenizer,
) -> Result<Vec<u32>, ModelError> {
    if let Some(text) = value["text"].as_str() {
        if text.is_empty() {
            return Err(data(
                path,
                Some(line),
                "`text` is empty; leave the line out",
            ));
        }
        return tokenizer.sequence(text);
    }
    if let (Some(prompt), Some(answer)) = (value["prompt"].as_str(), value["answer"].as_str()) {
        // Apart, so that the boundary is where it is at test time.
        let mut ids = tokenizer.sequence(prompt)?;
        ids.extend(tokenizer.ids(answer)?);
        return Ok(ids);
    }
    if let Some(messages) = messages(path, line, value)? {
        return tokenizer.chat(messages, false);
    }
    Err(data(
        path,
        Some(line),
        "needs `text`, or `prompt` and `answer`, or `messages`",
    ))
}

/// `input_ids` `[n, len]`, used as they are.
fn token_ids(path: &Path, limit: usize) -> Result<Vec<Vec<u32>>, ModelError> {
    let bytes = std::fs::read(path).map_err(|source| ModelError::Io {
        path: path.to_owned(),
        source,
    })?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| {
        let why = format!(
            "is not a sound safetensors file ({e}); it should hold `input_ids` [samples, length]"
        );
        data(path, None, &why)
    })?;
    let tensor = file.tensor("input_ids").map_err(|_| {
        data(
            path,
            None,
            "has no tensor `input_ids`; token ids [samples, length] go by that name",
        )
    })?;
    let &[_, len] = tensor.shape() else {
        return Err(data(
            path,
            None,
            &format!(
                "`input_ids` has shape {:?}, not [samples, length]",
                tensor.shape()
            ),
        ));
    };
    let wide: Vec<i64> = match tensor.dtype() {
        Dtype::I64 => tensor
            .data()
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b))
            .collect(),
        Dtype::I32 => tensor
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| i32::from_le_bytes(*b).into())
            .collect(),
        other => {
            return Err(data(
                path,
                None,
                &format!("`input_ids` is {other:?}, not I64 or I32"),
            ));
        }
    };
    let ids = wide
        .into_iter()
        .map(|id| {
            u32::try_from(id).map_err(|_| {
                let why =
                    format!("`input_ids` holds {id}, which is in no vocabulary; leave padding out");
                data(path, None, &why)
            })
        })
        .collect::<Result<Vec<u32>, _>>()?;
    Ok(if len == 0 {
        Vec::new()
    } else {
        ids.chunks(len).take(limit).map(<[u32]>::to_vec).collect()
    })
}
