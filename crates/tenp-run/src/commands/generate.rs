//! `generate`: continue a prompt, token by token on the terminal.

use anyhow::Result;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tenp_model::Model;
use tenp_model::generate::{Generator, arg_max};
use tenp_model::text::Tokenizer;

use crate::cli::Generate;
use crate::failure::usage;
use crate::place::Place;
use crate::{console, models};

pub(super) fn run(args: &Generate) -> Result<()> {
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(usage(format!(
            "--temperature {}: expected a number of at least 0",
            args.temperature
        )));
    }
    let checkpoint = models::open(&args.model)?;
    let tokenizer = Tokenizer::open(&checkpoint)?;
    let prompt = tokenizer.sequence(&args.prompt)?;
    if prompt.is_empty() {
        return Err(usage(
            "--prompt is empty, and the tokenizer adds no first token",
        ));
    }
    let max = checkpoint.config().max_positions;
    if prompt.len() > max {
        return Err(usage(format!(
            "--prompt has {} tokens, the model has {max} positions; shorten it",
            prompt.len()
        )));
    }
    let place = Place::new(args.run)?;
    place.with_model(&checkpoint, |model| {
        stream(model, &tokenizer, &prompt, args)
    })
}

/// Writes the continuation as it comes.
fn stream(model: Model<'_>, tokenizer: &Tokenizer, prompt: &[u32], args: &Generate) -> Result<()> {
    let config = model.config();
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let mut generator = Generator::new(model);
    console::data(&args.prompt);
    let mut generated: Vec<u32> = Vec::new();
    let mut shown = 0;
    let mut logits = generator.feed(prompt)?;
    let started = std::time::Instant::now();
    while generated.len() < args.max_tokens && generator.position() < config.max_positions {
        let next = if args.temperature == 0.0 {
            arg_max(&logits)
        } else {
            sample(&logits, args.temperature, &mut rng)
        };
        if config.eos_token_ids.contains(&next) {
            break;
        }
        generated.push(next);
        let text = tokenizer.text(&generated)?;
        // A character may be spread over tokens: wait until it is whole.
        if !text.ends_with('\u{fffd}')
            && text.is_char_boundary(shown.min(text.len()))
            && text.len() > shown
        {
            console::data(&text[shown..]);
            shown = text.len();
        }
        logits = generator.feed(&[next])?;
    }
    // What was held back because its last character was not whole.
    let text = tokenizer.text(&generated)?;
    console::data(text.get(shown..).unwrap_or_default());
    console::data("\n");
    let seconds = started.elapsed().as_secs_f64().max(1e-9);
    let rate = generated.len() as f64 / seconds;
    console::note(&format!("{} tokens, {rate:.1} tokens/s", generated.len()));
    Ok(())
}

/// A token drawn from softmax(logits / temperature).
fn sample(logits: &[f32], temperature: f64, rng: &mut ChaCha8Rng) -> u32 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let weights: Vec<f64> = logits
        .iter()
        .map(|&l| ((f64::from(l) - max) / temperature).exp())
        .collect();
    let mut left = rng.random::<f64>() * weights.iter().sum::<f64>();
    for (id, weight) in weights.iter().enumerate() {
        left -= weight;
        if left <= 0.0 {
            return id as u32;
        }
    }
    arg_max(logits)
}
