//! `logits`: logits of given ids, streamed into one safetensors file.

use anyhow::Result;
use tenp_checkpoint::{CheckpointError, replace_file};
use tenp_model::{Model, Sequences};

use crate::cli::Logits;
use crate::failure::usage;
use crate::place::Place;
use crate::progress::{Progress, Unit};
use crate::{console, models};

/// What the forward pass itself may take: hidden states of one pass.
const PASS_BYTES: usize = 1 << 30;

pub(super) fn run(args: &Logits) -> Result<()> {
    let checkpoint = models::open(&args.model)?;
    if args.input.extension().is_none_or(|e| e != "safetensors") {
        return Err(usage(format!(
            "--input {}: expected .safetensors with input_ids",
            args.input.display()
        )));
    }
    let read = [args.input.as_path()];
    models::check_file("--output", &args.output, Some(&args.model), &read)?;
    let samples = models::Texts::new(&checkpoint).samples(&args.input, usize::MAX, usize::MAX)?;
    let place = Place::new(args.run)?;
    place.with_model(&checkpoint, |model| stream(&model, &samples, args))
}

/// Runs the samples pass by pass, and writes each pass's logits behind those of the last.
fn stream(model: &Model<'_>, samples: &[Vec<u32>], args: &Logits) -> Result<()> {
    let checkpoint = model.checkpoint();
    let (n, len, vocab) = (
        samples.len(),
        samples[0].len(),
        checkpoint.config().vocab_size,
    );
    let bytes = (n * len * vocab * 4) as u64;
    // The format: header length, JSON padded with blanks to 8 bytes, data.
    let mut header = format!(
        r#"{{"logits":{{"dtype":"F32","shape":[{n},{len},{vocab}],"data_offsets":[0,{bytes}]}}}}"#
    );
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let layers = checkpoint.config().num_layers;
    let progress = Progress::new("logits", Unit::Tokens, (n * len * layers) as u64, layers);
    let per_pass = (PASS_BYTES / model.hidden_bytes_per_token() / len).max(1);
    let mut failure: Option<anyhow::Error> = None;
    let written = replace_file(&args.output, bytes + 8 + header.len() as u64, |sink| {
        sink.write(&(header.len() as u64).to_le_bytes())?;
        sink.write(header.as_bytes())?;
        for samples in samples.chunks(per_pass) {
            let logits = pass(model, samples, &progress, &mut |row| sink.write(row));
            if let Err(error) = logits {
                // The file is not replaced; the reason reaches the user below.
                failure = Some(error);
                return Err(CheckpointError::NotMoe { layer: 0 });
            }
        }
        checkpoint.check_unchanged()
    });
    if let Some(error) = failure {
        return Err(error);
    }
    written?;
    progress.finish();
    console::note(&format!("wrote {}", args.output.display()));
    Ok(())
}

/// Runs one pass and hands out each row's logits as bytes.
fn pass(
    model: &Model<'_>,
    samples: &[Vec<u32>],
    progress: &Progress,
    write: &mut dyn FnMut(&[u8]) -> Result<(), CheckpointError>,
) -> Result<()> {
    let mut sequences = Sequences::default();
    for sample in samples {
        sequences.push(sample, 0);
    }
    let hidden = model.hidden_states(&sequences, &super::eval::Watch(progress))?;
    let rows: Vec<usize> = (0..sequences.num_tokens()).collect();
    let mut result = Ok(());
    model.head()?.for_each(&hidden, &rows, |_, logits| {
        if result.is_ok() {
            let bytes: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
            result = write(&bytes);
        }
    })?;
    Ok(result?)
}
