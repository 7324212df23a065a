//! A pass over the layers: hidden states, the buffers of the blocks in flight, what each thread keeps for itself.

use tenp_checkpoint::ModelConfig;
use tenp_checkpoint::config::Attention;
use tenp_kernels::cpu::moe::activation_bytes;
use tenp_kernels::cpu::{attention, linear};

use crate::attention::buffer_bytes as attention_bytes;
use crate::cpu::CpuModel;
use crate::{Model, Sequences, sensitivity};

/// Names and bytes.
type Parts = Vec<(&'static str, usize)>;

const HIDDEN: &str = "hidden states";
const ACTIVATIONS: &str = "activations";

/// A pass over some sequences on the CPU.
pub(super) struct PassMemory<'m> {
    cpu: CpuModel<'m>,
    /// Of the largest block.
    rows: usize,
    /// Of as many blocks, the largest, as are in flight at once.
    in_flight: Vec<usize>,
    longest: usize,
    tokens: usize,
    /// Bytes that stay in memory.
    hidden: usize,
}

impl<'m> PassMemory<'m> {
    pub(super) fn new(model: &Model<'m>, sequences: &Sequences) -> Self {
        let cpu = model.on_cpu();
        let blocks = sequences.blocks(cpu.block_tokens());
        let rows = blocks.iter().map(|block| sequences.rows(block).len());
        let mut in_flight: Vec<usize> = rows.collect();
        in_flight.sort_unstable_by_key(|rows| std::cmp::Reverse(*rows));
        in_flight.truncate(cpu.blocks_in_flight());
        let tokens = sequences.num_tokens();
        Self {
            cpu,
            rows: in_flight.first().copied().unwrap_or(0),
            in_flight,
            longest: sequences.max_positions(),
            tokens,
            hidden: tokens * model.hidden_bytes_per_token() - model.spilled_bytes(tokens),
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    pub(super) fn hidden(&self) -> usize {
        self.hidden
    }

    /// With y kept packed where statistics are made.
    pub(super) fn parts(&self, with_statistics: bool) -> Parts {
        let blocks = self.in_flight.iter();
        let blocks = blocks.map(|rows| block_bytes(&self.cpu, *rows, with_statistics));
        vec![
            (HIDDEN, self.hidden),
            // An id, a position, and the calibration text's own copy of the id.
            ("token ids", 3 * size_of::<u32>() * self.tokens),
            (ACTIVATIONS, blocks.sum()),
            (
                "weights and keys at the threads",
                rayon::current_num_threads() * self.thread_bytes(),
            ),
        ]
    }

    /// So many passes in turn, each with its own hidden states and buffers; and when they are over, what they leave.
    pub(super) fn measuring(&self, passes: usize) -> (Parts, Parts) {
        let mut running = self.parts(false);
        for (what, bytes) in &mut running {
            if matches!(*what, HIDDEN | ACTIVATIONS) {
                *bytes *= passes;
            }
        }
        let behind = |(what, _): &&(_, _)| *what != ACTIVATIONS;
        let left = running.iter().filter(behind).copied().collect();
        (running, left)
    }

    /// A thread's blocks of weights, for the widest inner dimension, and its keys and values.
    fn thread_bytes(&self) -> usize {
        let config = self.cpu.checkpoint.config();
        let moe = &config.moe;
        let (shape, _) = crate::attention::attention_shape(config, 0, 1.0);
        let inner = [
            config.hidden_size,
            config.dense_width,
            moe.expert_width,
            moe.shared_width,
            shape.num_heads * shape.v_dim,
            match &config.attention {
                Attention::Mla { q_lora_rank, .. } => q_lora_rank.unwrap_or(0),
                Attention::Gqa { .. } => 0,
            },
        ];
        let blocks = inner.map(|inner| linear::thread_bytes(self.cpu.compute, inner));
        blocks.into_iter().max().unwrap_or(0) + attention::thread_bytes(&shape, self.longest)
    }

    /// What the threads hold that measure the cuts of an expert each: its down projection, the outputs gone and going, and
    /// its activations of the neurons at hand. Rows as many as an expert has on average.
    pub(super) fn cutting(&self) -> usize {
        let config = self.cpu.checkpoint.config();
        let moe = &config.moe;
        let (hidden, width) = (config.hidden_size, moe.expert_width);
        let rows = (self.rows * moe.top_k).div_ceil(moe.num_experts);
        let values = hidden * width + rows * (2 * hidden + width);
        rayon::current_num_threads() * size_of::<f32>() * values
    }

    /// Activations that are held until the cuts of many blocks are measured together.
    pub(super) fn held_activations(&self) -> usize {
        let moe = &self.cpu.checkpoint.config().moe;
        let of = |tokens| size_of::<f32>() * tokens * moe.top_k * moe.expert_width;
        sensitivity::held_bytes(of(self.tokens), of(self.rows))
    }
}

/// Bytes of the buffers of a block of `rows` tokens; with statistics, the outputs of experts are kept packed too.
fn block_bytes(model: &CpuModel<'_>, rows: usize, with_statistics: bool) -> usize {
    let (config, compute) = (model.checkpoint.config(), model.compute);
    let (hidden, moe) = (config.hidden_size, &config.moe);
    let routed = rows * moe.top_k;
    // A config may say a width that no layer has.
    let dense = if moe_only(config) {
        0
    } else {
        config.dense_width
    };
    let experts = [
        activation_bytes(compute, routed, (hidden, moe.expert_width), with_statistics),
        activation_bytes(compute, rows, (hidden, moe.shared_width), false),
        activation_bytes(compute, rows, (hidden, dense), false),
    ];
    let largest = (0..4).filter_map(|buffer| experts.iter().map(|bytes| bytes[buffer]).max());
    // x, the router's input, and the layer's output.
    3 * size_of::<f32>() * rows * hidden
        + attention_bytes(config, compute, rows)
        + largest.sum::<usize>()
}

fn moe_only(config: &ModelConfig) -> bool {
    config.moe_layers.len() == config.num_layers
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use tenp_checkpoint::Checkpoint;
    use tenp_kernels::{Compute, RaggedLayout};

    use super::*;
    use crate::cpu::{BufferPool, CpuPass};
    use crate::engine::Pass as _;
    use crate::{BlockSums, ModelError, Observer, WeightNorms};

    /// Wants every sum, and forgets it.
    struct Sums;

    impl Observer for Sums {
        fn wants_sums(&self) -> bool {
            true
        }

        fn begin_sums(&self, _: usize, _: &RaggedLayout, _: WeightNorms) -> Result<(), ModelError> {
            Ok(())
        }

        fn sums(&self, _: usize, _: usize, _: BlockSums) -> Result<(), ModelError> {
            Ok(())
        }
    }

    #[test]
    fn blocks_take_what_is_said_in_every_family() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        let families = std::fs::read_dir(golden).expect("golden checkpoints");
        let mut tried = 0;
        for dir in families.map(|entry| entry.expect("an entry").path()) {
            if !dir.join("config.json").exists() {
                continue;
            }
            let checkpoint = Checkpoint::open(&dir).expect("a checkpoint");
            for (compute, with_statistics) in [(Compute::F32, true), (Compute::Bf16, false)] {
                let cpu = CpuModel {
                    checkpoint: &checkpoint,
                    compute,
                    spill: None,
                };
                let mut sequences = Sequences::default();
                sequences.push(&[1; 17], 0);
                sequences.push(&[2; 6], 0);
                let buffers = Arc::new(BufferPool::default());
                let pass = CpuPass::new(cpu, &sequences, None).expect("a pass");
                let mut pass = pass.sharing(&buffers);
                let observer: &dyn Observer = if with_statistics { &Sums } else { &() };
                while pass.step(observer).expect("a layer") {}
                let said = block_bytes(&cpu, 23, with_statistics);
                assert_eq!(
                    buffers.held_bytes(),
                    [said],
                    "{} {compute:?}",
                    dir.display()
                );
            }
            tried += 1;
        }
        assert!(tried > 5, "{tried} golden checkpoints");
    }
}
