//! How long the steps of a run compute, from short measurements: a dense product, one of the model's experts with as many
//! rows as an expert gets (so that unpacking its weights counts as it will), one fit of least squares.

use std::time::Instant;

use tenp_checkpoint::{Checkpoint, ExpertPlan, Plan};
use tenp_kernels::cpu::direction::{ExpertSums, TokenContext, accumulate_expert_sums};
use tenp_kernels::cpu::linear::linear;
use tenp_kernels::cpu::moe::{ExpertActivations, expert_forward};
use tenp_kernels::cpu::neuron::{NeuronSums, accumulate_neuron_sums};
use tenp_kernels::{Compute, ExpertGroups, KernelError, MatrixView, RaggedLayout};

use crate::error::AtLayer;
use crate::weights::expert;
use crate::{Model, ModelError, Sequences, rewrite};

/// A measurement takes at least this long, after one run that warms up.
const SECONDS: f64 = 0.2;

/// Floating-point operations a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Of a dense product.
    pub dense: f64,
    /// Of routed experts, and of routed experts with their statistics (the operations of the forward pass counted).
    pub experts: [f64; 2],
}

/// Operations of a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Operations {
    dense: f64,
    experts: f64,
}

impl Speed {
    /// On a text of these sequences.
    ///
    /// # Errors
    /// An expert that cannot be read; the GPU's own words.
    pub fn measure(model: &Model<'_>, sequences: &Sequences) -> Result<Self, ModelError> {
        if let Some(rate) = model.engine_rate()? {
            // The contributions are a third of the routed products once more.
            let experts = [rate, rate * 3.0 / 4.0];
            return Ok(Self {
                dense: rate,
                experts,
            });
        }
        let compute = model.compute();
        let rows = rows_of_busy_expert(model, sequences);
        Ok(Self {
            dense: dense(compute).at(0)?,
            experts: experts(model.checkpoint(), compute, rows)?,
        })
    }

    /// Seconds of a pass of the whole model, with `kept` of its routed neurons.
    pub fn pass(
        &self,
        model: &Model<'_>,
        sequences: &Sequences,
        kept: f64,
        with_statistics: bool,
    ) -> f64 {
        let operations = operations(model, sequences);
        operations.dense / self.dense
            + kept * operations.experts / self.experts[usize::from(with_statistics)]
    }

    /// Seconds of the logits of `rows` rows.
    pub fn logits(&self, model: &Model<'_>, rows: usize) -> f64 {
        let config = model.config();
        2.0 * rows as f64 * (config.vocab_size * config.hidden_size) as f64 / self.dense
    }

    /// Seconds of measuring what cuts cost: a pass, and the down projections once more, in parts.
    pub fn cuts(&self, model: &Model<'_>, sequences: &Sequences) -> f64 {
        let again = operations(model, sequences).experts / 3.0;
        self.pass(model, sequences, 1.0, false) + again / self.dense
    }

    /// Seconds of least squares: every layer once for its moments and once more as it is pruned, and the fits.
    pub fn fits(&self, model: &Model<'_>, sequences: &Sequences, plan: &Plan) -> f64 {
        let moe = &model.config().moe;
        let width = moe.expert_width;
        let rows = sequences.num_tokens() * moe.top_k * plan.layers.len();
        let moments = 2.0 * rows as f64 * (width * width) as f64;
        let narrow = plan.layers.iter().flat_map(|layer| &layer.experts);
        let narrow = narrow.filter(|e: &&ExpertPlan| e.width > 0 && e.width < width);
        let hidden = model.config().hidden_size;
        let fits: f64 = narrow
            .map(|e| rewrite::fit_operations(hidden, width, e.width))
            .sum();
        let threads = rayon::current_num_threads() as f64;
        passes_for_moments(plan, width) as f64 * self.pass(model, sequences, 1.0, false)
            + self.pass(model, sequences, plan.accounting.E, false)
            + moments / self.dense
            + fits / (threads * rewrite::fit_rate(width))
    }

    /// Seconds of comparing the neurons of dropped experts with those of kept ones, by two projections.
    pub fn comparisons(&self, model: &Model<'_>, plan: &Plan) -> f64 {
        let config = model.config();
        let pairs = plan.layers.iter().map(|layer| {
            let kept = layer.kept().count();
            kept * (layer.experts.len() - kept)
        });
        let pair = 4.0 * config.hidden_size as f64 * (config.moe.expert_width as f64).powi(2);
        pairs.sum::<usize>() as f64 * pair / self.dense
    }
}

/// Passes that least squares makes for the moments of the layer that takes most.
pub fn passes_for_moments(plan: &Plan, width: usize) -> usize {
    let narrow = |e: &&ExpertPlan| e.width > 0 && e.width < width;
    let runs = plan.layers.iter().map(|layer| {
        let experts = layer.experts.iter().filter(narrow).count();
        rewrite::runs_for_moments(experts, width)
    });
    runs.max().unwrap_or(1)
}

/// Of a forward pass: two for each active weight, and attention's own (a query with all keys before it).
fn operations(model: &Model<'_>, sequences: &Sequences) -> Operations {
    let (size, config) = (model.checkpoint().size(), model.config());
    let moe = &config.moe;
    let routed = size.parameters_routed as f64 * moe.top_k as f64 / moe.num_experts as f64;
    // Looked up, and the head of generation: not part of the layers.
    let matrices = if config.tie_word_embeddings { 1 } else { 2 };
    let embeddings = (matrices * config.vocab_size * config.hidden_size) as f64;
    let tokens = sequences.num_tokens() as f64;
    let (shape, _) = crate::attention::attention_shape(config, 0, 1.0);
    let pairs: f64 = sequences
        .spans()
        .iter()
        .map(|span| {
            span.rows.len() as f64 * (span.first_position as f64 + span.rows.len() as f64 / 2.0)
        })
        .sum();
    let per_pair = 2 * config.num_layers * shape.num_heads * (shape.qk_dim + shape.v_dim);
    Operations {
        dense: 2.0 * tokens * (size.parameters_active as f64 - routed - embeddings)
            + pairs * per_pair as f64,
        experts: 2.0 * tokens * routed,
    }
}

/// Rows that an expert gets in a block on average, if it gets any.
fn rows_of_busy_expert(model: &Model<'_>, sequences: &Sequences) -> usize {
    let moe = &model.config().moe;
    let blocks = sequences.blocks(model.block_tokens()).len().max(1);
    let tokens = sequences.num_tokens() as f64 / blocks as f64;
    busy_rows(tokens, moe.top_k as f64 / moe.num_experts as f64)
}

/// Mean rows of an expert that has some, where each token takes it with the chance `share`.
fn busy_rows(tokens: f64, share: f64) -> usize {
    let busy = 1.0 - (1.0 - share).powf(tokens);
    ((tokens * share / busy.max(f64::MIN_POSITIVE)).round() as usize).max(1)
}

/// Runs `work` until [`SECONDS`] have passed: runs a second.
fn repeated(mut work: impl FnMut() -> Result<(), KernelError>) -> Result<f64, KernelError> {
    work()?;
    let started = Instant::now();
    let mut runs = 0.0;
    while started.elapsed().as_secs_f64() < SECONDS {
        work()?;
        runs += 1.0;
    }
    Ok(runs / started.elapsed().as_secs_f64())
}

fn values(count: usize, period: usize) -> Vec<f32> {
    let value = |i: usize| (i % period) as f32 * 0.1 - 0.7;
    (0..count).map(value).collect()
}

fn dense(compute: Compute) -> Result<f64, KernelError> {
    let (rows, inner, outputs) = (448, 1024, 1024);
    let (x, w) = (values(rows * inner, 17), values(outputs * inner, 13));
    let weight = MatrixView::from_f32(outputs, inner, &w)?;
    let mut out = vec![0.0; rows * outputs];
    let runs = repeated(|| linear(compute, &x, &weight, None, &mut out))?;
    Ok((2 * rows * inner * outputs) as f64 * runs)
}

/// The model's first routed expert on `rows` rows, without and with every statistic.
fn experts(checkpoint: &Checkpoint, compute: Compute, rows: usize) -> Result<[f64; 2], ModelError> {
    let config = checkpoint.config();
    let layer = config.moe_layers.first().copied().unwrap_or(0);
    let weights = [expert(&checkpoint.expert(layer, 0)?).at(layer)?];
    let (hidden, width) = (config.hidden_size, weights[0].width());
    let x = values(rows * hidden, 19);
    let groups = ExpertGroups::dense(rows);
    let layout = RaggedLayout::new(vec![width]).at(layer)?;
    let operations = (6 * rows * hidden * width) as f64;
    let run = |with_statistics: bool| {
        let mut activations = ExpertActivations::default();
        activations.keep_packed_outputs(with_statistics);
        let mut sums = NeuronSums::new(layout.clone());
        repeated(|| {
            expert_forward(compute, &weights, &groups, &x, &mut activations)?;
            if !with_statistics {
                return Ok(());
            }
            let context = TokenContext {
                x: &x,
                residual: &x,
                combined: &x,
            };
            let mut experts = [ExpertSums::default()];
            let outputs = activations.outputs();
            let norms = accumulate_expert_sums(&groups, context, outputs, hidden, &mut experts)?;
            accumulate_neuron_sums(&weights, &groups, &activations, &norms, &mut sums)
        })
    };
    let rates = [run(false).at(layer)?, run(true).at(layer)?];
    Ok(rates.map(|runs| operations * runs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_without_rows_do_not_count() {
        // One token of 8 in 256: the chosen ones have a row each.
        assert_eq!(busy_rows(1.0, 8.0 / 256.0), 1);
        assert_eq!(busy_rows(4096.0, 8.0 / 256.0), 128);
        // 32 tokens: 1 expected, but 36 % of the experts have none.
        assert_eq!(busy_rows(32.0, 8.0 / 256.0), 2);
        assert_eq!(busy_rows(0.0, 0.5), 1);
    }

    #[test]
    fn a_pass_takes_less_where_experts_are_kept_in_part() {
        let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        let checkpoint = Checkpoint::open(&golden.join("olmoe")).expect("a checkpoint");
        let model = Model::new(&checkpoint, Compute::F32);
        let mut text = Sequences::default();
        text.push(&[1; 16], 0);
        let speed = Speed {
            dense: 1e9,
            experts: [1e9, 0.5e9],
        };
        let pass = |kept, sums| speed.pass(&model, &text, kept, sums);
        let routed = operations(&model, &text).experts / 1e9;
        let near = |a: f64, b: f64| (a - b).abs() < 1e-12;
        assert!(near(pass(1.0, false) - pass(0.5, false), 0.5 * routed));
        assert!(near(pass(1.0, true) - pass(1.0, false), routed));
        let measured = Speed::measure(&model, &text).expect("a measurement");
        assert!(measured.experts[0] > 0.0 && measured.dense > 0.0);
    }
}
