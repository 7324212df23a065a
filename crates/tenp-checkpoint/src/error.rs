//! The one error type of this crate: where, what was expected, what was found, and what to do about it.

use std::path::PathBuf;

/// Everything that can go wrong with checkpoints, plans and statistics.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb ("read", "create").
        action: &'static str,
        /// File or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file that should be JSON of a known form is not.
    #[error("{}: {source}; the file is damaged or of another kind, download or make it again", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Parser's message with line and column.
        source: serde_json::Error,
    },
    /// A field of `config.json` is missing, has the wrong type or contradicts another.
    #[error("{}: `{field}` {problem}", path.display())]
    Config {
        /// The config file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// `model_type` names a family this program does not know.
    #[error(
        "{}: model_type `{model_type}` is not supported; known: deepseek, deepseek_v2, deepseek_v3, glm4_moe, qwen2_moe, \
         qwen3_moe, mixtral, olmoe (and tenp_… of these); use a model of one of these",
        path.display()
    )]
    UnknownFamily {
        /// The config file.
        path: PathBuf,
        /// What it says.
        model_type: String,
    },
    /// The folder holds neither a sharded nor a single-file safetensors checkpoint.
    #[error(
        "{}: neither model.safetensors.index.json nor model.safetensors is here; give a folder downloaded from \
         Hugging Face in safetensors format",
        dir.display()
    )]
    NoWeights {
        /// The folder.
        dir: PathBuf,
    },
    /// `model.safetensors.index.json` is not usable.
    #[error("{}: {problem}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A shard that the index names is not in the folder.
    #[error("{}: shard {shard} is missing ({missing} of {total} shards are); download it again", dir.display())]
    MissingShard {
        /// The folder.
        dir: PathBuf,
        /// First missing shard.
        shard: String,
        /// How many are missing.
        missing: usize,
        /// How many the index names.
        total: usize,
    },
    /// A safetensors file breaks the format.
    #[error("{}: {problem}; the file is damaged, download or write it again", path.display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// The broken rule.
        problem: String,
    },
    /// A shard was written to while it was read.
    #[error(
        "{}: was changed while it was read, so nothing made of it is kept; let no other program write to it, then give the \
         same command again",
        path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Two shards hold a tensor of the same name.
    #[error(
        "tensor {tensor} is in both {first} and {second}; delete stale shards and download the checkpoint again"
    )]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// First shard.
        first: String,
        /// Second shard.
        second: String,
    },
    /// A tensor that the model needs is absent.
    #[error(
        "tensor {tensor} {shape:?} is missing from {place}; the download is incomplete or config.json belongs to another model"
    )]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// The shape it should have; empty when not known.
        shape: Vec<usize>,
        /// Shard that should hold it, or the folder.
        place: String,
    },
    /// A tensor's shape is not what the config asks for.
    #[error(
        "tensor {tensor} in {shard}: shape {got:?}, but config.json asks for {expected:?}; one of them is of another model, \
         download both again"
    )]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shard.
        shard: String,
        /// Expected shape.
        expected: Vec<usize>,
        /// Shape found.
        got: Vec<usize>,
    },
    /// A weight is not stored as f32, f16, bf16 or block-scaled fp8.
    #[error(
        "tensor {tensor} in {shard}: dtype {got} is not supported for weights (f32, f16, bf16 and e4m3 matrices with \
         scales are); {remedy}"
    )]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its shard.
        shard: String,
        /// Dtype found.
        got: crate::Dtype,
        /// What to do.
        remedy: &'static str,
    },
    /// An fp8 matrix and its scales do not belong together.
    #[error("tensor {tensor} in {shard}: {problem}; download the checkpoint again")]
    Scale {
        /// The matrix or its scales.
        tensor: String,
        /// Its shard.
        shard: String,
        /// What does not fit.
        problem: String,
    },
    /// Numbers that have to be computed with are not finite.
    #[error("tensor {tensor} in {shard}: {problem}; the checkpoint is damaged, download it again")]
    NonFinite {
        /// The fp8 matrix.
        tensor: String,
        /// Its shard.
        shard: String,
        /// Where in it.
        problem: crate::NonFinite,
    },
    /// A layer that is not a Mixture-of-Experts layer of the model was asked for.
    #[error("layer {layer} is not a Mixture-of-Experts layer of this model")]
    NotMoe {
        /// The layer.
        layer: usize,
    },
    /// An expert id beyond the layer's experts.
    #[error("layer {layer} has {num_experts} experts; there is no expert {expert}")]
    NoSuchExpert {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: usize,
        /// Experts of the layer.
        num_experts: usize,
    },
    /// The input of a pruning step is itself the output of one.
    #[error("{} is already pruned (from {original}); plan and apply from the original checkpoint", dir.display())]
    AlreadyPruned {
        /// The folder.
        dir: PathBuf,
        /// What is known of the original.
        original: String,
    },
    /// A plan was made for another checkpoint.
    #[error(
        "the plan was made for checkpoint {plan}, this one is {checkpoint}; make a plan from this checkpoint"
    )]
    PlanMismatch {
        /// Fingerprint in the plan.
        plan: String,
        /// Fingerprint of the checkpoint.
        checkpoint: String,
    },
    /// A plan contradicts itself or the model.
    #[error("plan{place}: {problem}")]
    Plan {
        /// `""`, `, layer 3` or `, layer 3, expert 5`.
        place: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// New weights could not be computed.
    #[error("cannot compute the new weights: {source}")]
    Rewrite {
        /// The rewriter's reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The output form cannot express the plan.
    #[error("the {form} form cannot hold this plan: {problem}")]
    Form {
        /// The form.
        form: &'static str,
        /// Why, and what to use instead.
        problem: String,
    },
    /// The output folder is not acceptable.
    #[error("output {}: {problem}", path.display())]
    Output {
        /// The output folder.
        path: PathBuf,
        /// Why, and what to do.
        problem: String,
    },
    /// The disk has no room for the output.
    #[error("{}: no space left for the output, which needs {needed} bytes; free some or choose another disk", path.display())]
    DiskFull {
        /// Where it was to be written.
        path: PathBuf,
        /// Bytes the whole output needs.
        needed: u64,
    },
    /// The work was told to stop.
    #[error("interrupted")]
    Interrupted,
    /// A statistics file or a merge of two is not sound.
    #[error("{place}: {problem}")]
    Statistics {
        /// File, or the statistic's name in it.
        place: String,
        /// What is wrong and what to do.
        problem: String,
    },
}

impl CheckpointError {
    /// For `map_err` on file operations.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
