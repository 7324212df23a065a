//! Answers that the full model gives to the prompts of the calibration text itself.

use std::time::Instant;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tenp_checkpoint::statistics::Share;
use tenp_checkpoint::{Inputs, replace_file};
use tenp_model::Model;
use tenp_model::calibrate::{Keep, tokens_fingerprint};
use tenp_model::generate::{Limits, complete};

use crate::cli::{AnswersArg, AnswersArgs, DataArgs, ShareArg};
use crate::console;
use crate::failure::usage;
use crate::models::{self, Domains, Texts};
use crate::progress::{Progress, Unit};

/// Tokens of an answer at most, where nothing else is said.
const ANSWER_TOKENS: u32 = 256;

/// Calibration text whose answers are given, or are still to be generated.
pub(crate) struct Samples {
    /// Whole samples, or prompts.
    pub(crate) domains: Domains,
    /// How answers are generated, if they are.
    limits: Option<Limits>,
}

/// In the folder of an unfinished calibration.
const ANSWERS: &str = "answers.json";

/// Calibration text with its answers.
#[derive(Deserialize, Serialize)]
pub(crate) struct Answered {
    pub(crate) domains: Domains,
    /// Tokens that were generated, where any were to be.
    generated: Option<usize>,
}

/// What the flags ask for.
///
/// # Errors
/// A limit on answers that are not generated.
pub(crate) fn check(args: AnswersArgs) -> Result<()> {
    if args.answers == AnswersArg::Given && args.answer_tokens.is_some() {
        return Err(usage(
            "--answer-tokens has no effect on given answers; it needs --answers generate",
        ));
    }
    Ok(())
}

/// What decides the statistics of text that is there, by name, for people.
pub(crate) fn text_inputs(domains: &Domains) -> Inputs {
    let texts = domains.iter().enumerate();
    texts
        .map(|(place, (name, samples))| {
            let text = format!("{} in place {place}", tokens_fingerprint(samples));
            (format!("text of domain {name}"), text)
        })
        .collect()
}

impl Samples {
    /// Reads the files as far as they are needed.
    ///
    /// # Errors
    /// Files that cannot be read; samples without a prompt where one is needed.
    pub(crate) fn read(texts: &Texts<'_>, data: &DataArgs, args: AnswersArgs) -> Result<Self> {
        Ok(match args.answers {
            AnswersArg::Given => Self {
                domains: texts.domains(data)?,
                limits: None,
            },
            AnswersArg::Generate => Self {
                domains: texts.prompts(data)?,
                limits: Some(Limits {
                    new_tokens: args.answer_tokens.unwrap_or(ANSWER_TOKENS) as usize,
                    len: texts.seq_len(data.seq_len),
                }),
            },
        })
    }

    /// What decides the tokens beside the model: equal here, equal there.
    pub(crate) fn inputs(&self) -> impl serde::Serialize + '_ {
        (&self.domains, self.limits.map(|l| (l.new_tokens, l.len)))
    }

    /// Leaves one share of the samples of every domain.
    ///
    /// # Errors
    /// A domain that has fewer samples than there are shares.
    pub(crate) fn take_share(&mut self, ShareArg { part, parts }: ShareArg) -> Result<Share> {
        let of_text = models::fingerprint(&self.inputs());
        for (name, samples) in &mut self.domains {
            let (len, part, parts) = (samples.len(), part as usize, parts as usize);
            if len < parts {
                return Err(usage(format!(
                    "--shard {part}/{parts}: domain `{name}` has only {len} sample(s); use at most {len} share(s), or give \
                     more samples"
                )));
            }
            *samples = samples[len * (part - 1) / parts..len * part / parts].to_vec();
        }
        Ok(Share {
            of_text,
            part,
            parts,
        })
    }

    /// The same by name, for people.
    pub(crate) fn named_inputs(&self) -> Inputs {
        let mut inputs = text_inputs(&self.domains);
        let answers = match self.limits {
            None => "given".to_owned(),
            Some(limits) => format!("generated, {} of {} tokens", limits.new_tokens, limits.len),
        };
        inputs.insert("answers".to_owned(), answers);
        inputs
    }

    /// The samples with answers as long as they may be; of generated ones only the length is meant.
    pub(crate) fn longest(&self, model: &Model<'_>) -> Domains {
        let mut domains = self.domains.clone();
        if let Some(limits) = self.limits {
            for sample in domains.iter_mut().flat_map(|(_, samples)| samples) {
                let room = limits.room(sample.len(), model.config());
                sample.resize(sample.len() + room, 0);
            }
        }
        domains
    }

    /// Tokens of the longest answer that may be generated; `None` where answers are given.
    pub(crate) fn new_tokens(&self, model: &Model<'_>) -> Option<usize> {
        let limits = self.limits?;
        let samples = self.domains.iter().flat_map(|(_, samples)| samples);
        let rooms = samples.map(|sample| limits.room(sample.len(), model.config()));
        rooms.max()
    }

    fn room(&self, limits: Limits, model: &Model<'_>) -> usize {
        let samples = self.domains.iter().flat_map(|(_, samples)| samples);
        samples
            .map(|sample| limits.room(sample.len(), model.config()))
            .sum()
    }

    /// The model's answers behind the prompts, where none are given. What took long is kept.
    ///
    /// # Errors
    /// Those of the model.
    pub(crate) fn answer(self, model: &Model<'_>, keep: &mut Keep) -> Result<Answered> {
        let Some(limits) = self.limits else {
            return Ok(Answered {
                domains: self.domains,
                generated: None,
            });
        };
        let path = keep.work().dir().join(ANSWERS);
        if path.exists() {
            return Ok(serde_json::from_slice(&std::fs::read(&path)?)?);
        }
        let started = Instant::now();
        let answered = self.generate(model, limits)?;
        if keep.is_worth(started.elapsed()) {
            let text = json!(answered).to_string();
            keep.work().begin()?;
            replace_file(&path, text.len() as u64, |sink| sink.write(text.as_bytes()))?;
        }
        Ok(answered)
    }

    fn generate(self, model: &Model<'_>, limits: Limits) -> Result<Answered> {
        let total = self.room(limits, model);
        let mut domains = self.domains;
        let samples = || domains.iter().flat_map(|(_, samples)| samples);
        let full = samples().filter(|s| limits.room(s.len(), model.config()) == 0);
        let full = full.count();
        if full > 0 {
            console::note(&format!(
                "{full} prompts fill --seq-len or the model's positions and get no answer"
            ));
        }
        let prompts: Vec<&[u32]> = samples().map(Vec::as_slice).collect();
        let progress = Progress::new("generate answers", Unit::Tokens, total as u64, 1);
        let answers = complete(model, &prompts, limits, &|n| progress.advance(n as u64))?;
        progress.finish();
        let generated = answers.iter().map(Vec::len).sum();
        let samples = domains.iter_mut().flat_map(|(_, samples)| samples);
        for (sample, answer) in samples.zip(answers) {
            sample.extend(answer);
        }
        Ok(Answered {
            domains,
            generated: Some(generated),
        })
    }
}

impl Answered {
    /// Adds what a report says of the answers.
    pub(crate) fn tell(&self, report: &mut Map<String, Value>) {
        let answers = if self.generated.is_some() {
            "generated"
        } else {
            "given"
        };
        report.insert("answers".to_owned(), answers.into());
        if let Some(tokens) = self.generated {
            report.insert("generated_tokens".to_owned(), tokens.into());
        }
    }
}
