//! The command line.

mod alpha;
mod data;
mod keep;
mod output;
mod run;
mod single;
mod verify;
mod weights;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tenp_model::text::Data;
use tenp_prune::{ErrorScale, ExpertScore, Method, NeuronScore};

pub(crate) use alpha::AlphaArg;
pub(crate) use data::{AnswersArg, AnswersArgs, DataArgs, MIN_TOKENS, ShareArg};
pub(crate) use keep::{HiddenArgs, KeepArgs};
pub(crate) use output::{DtypeArg, MtpArg};
pub(crate) use run::{ComputeArg, DeviceArg, RunArgs};
pub(crate) use single::{Demo, Generate, Logits};
pub(crate) use verify::Verify;
pub(crate) use weights::{DernArgs, GatesArg, InputsArg, RecoverArg, RecoverArgs};

/// Shrink Mixture-of-Experts checkpoints without training.
///
/// Reads a Hugging Face folder, measures on a few calibration samples which experts and neurons matter, and writes a
/// smaller checkpoint. Data goes to stdout, progress and notes to stderr.
///
/// Exit codes: 0 done, 1 failed, 2 usage, 3 environment (no GPU, no driver), 4 verification found a
/// difference, 130 and 143 stopped by Ctrl-C and SIGTERM.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 110,
    after_help = "First steps:\n  tenp-run demo\n  tenp-run prune MODEL --data calibration.jsonl --keep 0.6 -o OUT"
)]
pub(crate) struct Cli {
    /// Threads to use; all cores by default. Results do not depend on it.
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) threads: Option<u16>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say what a checkpoint is: family, layers, experts, parameters, bytes.
    #[command(after_help = "Example:\n  tenp-run inspect ./DeepSeek-V2-Lite --json")]
    Inspect(Inspect),
    /// Run calibration text through the model and collect every statistic in one pass.
    #[command(
        after_help = "Example:\n  tenp-run calibrate ./DeepSeek-V2-Lite --data math=math.jsonl --data code=code.jsonl -o stats.safetensors\n\nThe same command goes on where an earlier one was stopped."
    )]
    Calibrate(Calibrate),
    /// Merge or show statistics files.
    #[command(
        subcommand,
        after_help = "Examples:\n  tenp-run stats merge a.safetensors b.safetensors -o all.safetensors\n  tenp-run stats show all.safetensors"
    )]
    Stats(Stats),
    /// Decide which experts and neurons stay. Takes seconds and reads no weights, unless --data is given to measure on.
    #[command(
        after_help = "Examples:\n  tenp-run plan ./DeepSeek-V2-Lite --stats stats.safetensors --method tenp --keep 0.6 -o plan.json\n  tenp-run plan ./DeepSeek-V2-Lite --stats stats.safetensors --method dern --experts 48 -o plan.json"
    )]
    Plan(PlanCommand),
    /// Write the checkpoint that a plan describes.
    #[command(
        after_help = "Examples:\n  tenp-run apply ./DeepSeek-V2-Lite --plan plan.json -o ./DeepSeek-V2-Lite-60\n  tenp-run apply ./DeepSeek-V2-Lite --plan plan.json --recover least-squares --data calibration.jsonl -o ./DeepSeek-V2-Lite-60\n\nThe same command goes on where an earlier one was stopped."
    )]
    Apply(Apply),
    /// Calibrate, plan and apply in one go.
    #[command(
        after_help = "Examples:\n  tenp-run prune ./DeepSeek-V2-Lite --data calibration.jsonl --keep 0.6 -o ./DeepSeek-V2-Lite-60\n  tenp-run prune ./DeepSeek-V2-Lite --data calibration.jsonl --method dern --experts 48 -o ./DeepSeek-V2-Lite-48\n\nThe same command goes on where an earlier one was stopped."
    )]
    Prune(Prune),
    /// Check that a pruned checkpoint holds exactly what its plan makes of the original; exit code 4 where it does not.
    #[command(
        after_help = "Example:\n  tenp-run verify ./DeepSeek-V2-Lite-60 --against ./DeepSeek-V2-Lite"
    )]
    Verify(Verify),
    /// Measure a model: multiple choice, perplexity, distance from a reference model.
    #[command(
        after_help = "Example:\n  tenp-run eval ./DeepSeek-V2-Lite-60 --reference ./DeepSeek-V2-Lite --tasks tasks/ --text held-out.jsonl"
    )]
    Eval(Eval),
    /// Write the logits of given token ids.
    #[command(
        after_help = "Example:\n  tenp-run logits ./model --input ids.safetensors --output logits.safetensors"
    )]
    Logits(Logits),
    /// Continue a prompt.
    #[command(
        after_help = "Example:\n  tenp-run generate ./model --prompt \"The town of Kibuko\" --max-tokens 20"
    )]
    Generate(Generate),
    /// Compare methods at several budgets: accuracy, perplexity, distance from the full model; tables, plots, a page.
    #[command(
        after_help = "Example:\n  tenp-run compare ./DeepSeek-V2-Lite --data math=math.jsonl code=code.jsonl --tasks tasks/ \\\n    --methods tenp,enp,tenp:neuron-score=energy,reap,random-neurons --keep 0.75,0.6,0.45 --seeds 3 -o comparison\n\nThe same command goes on where an earlier one was stopped."
    )]
    Compare(Compare),
    /// The whole story on the bundled checkpoint, in under a minute.
    #[command(after_help = "Example:\n  tenp-run demo")]
    Demo(Demo),
    /// Say what this machine has for the work, and what is missing.
    #[command(after_help = "Example:\n  tenp-run doctor --folder /data")]
    Doctor(Doctor),
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Folder of the checkpoint.
    pub(crate) model: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Folder whose disk is measured; a file of 512 MB is written there and removed.
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    pub(crate) folder: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Calibrate {
    /// Folder of the checkpoint.
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    #[command(flatten)]
    pub(crate) answers: AnswersArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Run only the I-th of N shares of every domain's samples; `stats merge` makes one of the N files. For several GPUs or
    /// machines.
    #[arg(long, value_name = "I/N")]
    pub(crate) shard: Option<ShareArg>,
    /// Statistics file to write.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Begin again, instead of going on with what an unfinished run left beside the file, or leaving the finished file of
    /// the same run as it is.
    #[arg(long)]
    pub(crate) restart: bool,
    /// Only say what it would take: sizes, memory, passes, time.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print what --dry-run says as JSON.
    #[arg(long, requires = "dry_run")]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) hidden: HiddenArgs,
    #[command(flatten)]
    pub(crate) keep: KeepArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Stats {
    /// Add up statistics files of the same checkpoint.
    #[command(
        after_help = "Example:\n  tenp-run stats merge a.safetensors b.safetensors -o all.safetensors"
    )]
    Merge {
        /// Statistics files.
        #[arg(required = true, num_args = 2..)]
        files: Vec<PathBuf>,
        /// Statistics file to write.
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Say what is in a statistics file.
    #[command(after_help = "Example:\n  tenp-run stats show stats.safetensors --json")]
    Show {
        /// Statistics file.
        file: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Clone, Debug, Args)]
pub(crate) struct PlanArgs {
    /// What decides: tenp, enp; experts dropped by frequency, gating, ean, reap, man, msan, easy-ep, random-experts;
    /// experts dropped and merged into the others by dern; tenp with what goes merged into what stays: tenp+dern; or
    /// random-neurons.
    #[arg(long, default_value = "tenp")]
    pub(crate) method: Method,
    /// Share of the routed-expert neurons to keep, above 0 and at most 1. Needed by every allocation but file:PATH.
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub(crate) keep: Option<f64>,
    /// Experts to keep in every layer instead of a share, for methods that drop experts; or one count for each MoE layer
    /// in depth order, such as 8,8,6 (the output then runs in tenp-run only).
    #[arg(
        long,
        value_name = "COUNT[,COUNT…]",
        conflicts_with = "keep",
        value_delimiter = ','
    )]
    pub(crate) experts: Option<Vec<usize>>,
    /// Share of the experts that stay whole [default: 5/9 of the square of --keep]; or `search`: this and the slope by
    /// trying some on a held-out quarter of the calibration text (`plan` needs --data).
    #[arg(long, value_name = "SHARE|search", allow_negative_numbers = true)]
    pub(crate) alpha: Option<AlphaArg>,
    /// How much wider deeper layers are: 0 the same everywhere, 1 a full triangle, negative inverted [default: 1/3].
    #[arg(long, value_name = "SLOPE", allow_negative_numbers = true)]
    pub(crate) slope: Option<f64>,
    /// Widths are multiples of this [default: the largest of 32, 16, 8, … that divides the width, at most a twelfth].
    #[arg(long, value_name = "Q")]
    pub(crate) width_multiple: Option<usize>,
    /// Budget over layers and experts: trapezoid, uniform, global, sensitivity (the least error of the experts' outputs,
    /// measured on the calibration text; `plan` needs --data), or file:PATH: JSON [[width, …], …], a list per MoE
    /// layer, or a config.json or plan output that has them.
    #[arg(long, value_name = "ALLOCATION")]
    pub(crate) allocation: Option<String>,
    /// Expert importance: direction, frequency, gating, ean, reap, man, msan, easy-ep, gating-share, random.
    #[arg(long, value_name = "SCORE")]
    pub(crate) expert_score: Option<ExpertScore>,
    /// Neuron importance: contribution, contribution-abs, activation-norm, energy, wifv, weight-norm, random.
    #[arg(long, value_name = "SCORE")]
    pub(crate) neuron_score: Option<NeuronScore>,
    /// Keep experts with extreme outputs whole.
    #[arg(long)]
    pub(crate) protect_super: bool,
    /// With uniform widths: meet the budget to the neuron, some experts a quantum wider.
    #[arg(long)]
    pub(crate) exact: bool,
    /// What the errors of different layers are relative to: none, residual (the stream behind the layer). For
    /// --allocation sensitivity [default: none].
    #[arg(long, value_name = "SCALE")]
    pub(crate) error_scale: Option<ErrorScale>,
    /// Divide scores by their norm: `layer` (global allocation) or `domains` (each domain's neuron scores).
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(crate) normalise: Vec<Normalise>,
    /// Weight of a domain, 1 by default. May repeat.
    #[arg(long, value_name = "DOMAIN=WEIGHT", value_parser = domain_weight)]
    pub(crate) domain_weight: Vec<(String, f64)>,
    /// Seed of random scores, and of --init random.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) dern: DernArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Normalise {
    /// Scores by their layer's norm.
    Layer,
    /// Each domain's neuron scores by their norm.
    Domains,
}

fn domain_weight(text: &str) -> Result<(String, f64), String> {
    let (domain, weight) = text.split_once('=').ok_or("expected DOMAIN=WEIGHT")?;
    let weight = weight
        .parse()
        .map_err(|_| format!("`{weight}` is not a number"))?;
    Ok((domain.to_owned(), weight))
}

#[derive(Debug, Args)]
pub(crate) struct PlanCommand {
    /// Folder of the checkpoint.
    pub(crate) model: PathBuf,
    /// Statistics file of this checkpoint.
    #[arg(long, value_name = "FILE")]
    pub(crate) stats: PathBuf,
    /// Plan although some shares of the calibration (`calibrate --shard`) are not in the file.
    #[arg(long)]
    pub(crate) partial_stats: bool,
    #[command(flatten)]
    pub(crate) plan: PlanArgs,
    /// Calibration text, for what is measured while planning (--allocation sensitivity, --alpha search): the kinds of files that calibrate
    /// takes. May repeat.
    #[arg(long, num_args = 1.., value_name = "[DOMAIN=]FILE")]
    pub(crate) data: Vec<Data>,
    /// Samples per domain, the first ones.
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) samples: u32,
    /// Tokens per sample; longer ones are cut [default: 2048, or the model's positions if those are fewer].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) seq_len: Option<u32>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Plan to write.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Print the accounting as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How narrowed experts are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormArg {
    /// True shapes; runs in tenp-run.
    #[default]
    Ragged,
    /// Zeros up to the old width; loads everywhere, saves nothing.
    Padded,
    /// One width for all experts; loads everywhere. Needs a plan with one width (--method enp).
    Uniform,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct OutputArgs {
    /// Folder to write.
    #[arg(short, long, value_name = "FOLDER")]
    pub(crate) output: PathBuf,
    /// How narrowed experts are written.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) form: FormArg,
    /// Largest shard, such as 5GB or 500MB.
    #[arg(long, default_value = "5GB", value_parser = size, value_name = "SIZE")]
    pub(crate) shard_size: u64,
    /// Write the weights of an fp8 model in bf16. Otherwise every tensor keeps its type.
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<DtypeArg>,
    /// What becomes of the layers for multi-token prediction, which no text is calibrated on (default: prune).
    #[arg(long, value_enum)]
    pub(crate) mtp: Option<MtpArg>,
    /// Replace an output folder that is not empty.
    #[arg(long)]
    pub(crate) force: bool,
    /// Discard what an unfinished run left beside the output, instead of going on with it.
    #[arg(long)]
    pub(crate) restart: bool,
}

fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let factor = match text[digits..].trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1.0,
        "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KIB" => 1024.0,
        "MIB" => 1024.0 * 1024.0,
        "GIB" => 1024.0 * 1024.0 * 1024.0,
        other => return Err(format!("unknown unit `{other}`; use B, KB, MB or GB")),
    };
    let value: f64 = text[..digits]
        .parse()
        .map_err(|_| format!("`{text}` is not a size such as 5GB"))?;
    let bytes = value * factor;
    if bytes >= 1.0 {
        Ok(bytes as u64)
    } else {
        Err(format!("`{text}` is less than a byte"))
    }
}

#[derive(Debug, Args)]
pub(crate) struct Apply {
    /// Folder of the checkpoint.
    pub(crate) model: PathBuf,
    /// Plan of this checkpoint.
    #[arg(long, value_name = "FILE")]
    pub(crate) plan: PathBuf,
    #[command(flatten)]
    pub(crate) recover: RecoverArgs,
    /// Calibration text for --recover: the kinds of files that calibrate takes. May repeat.
    #[arg(long, num_args = 1.., value_name = "[DOMAIN=]FILE")]
    pub(crate) data: Vec<Data>,
    /// Samples per domain, the first ones.
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) samples: u32,
    /// Tokens per sample; longer ones are cut [default: 2048, or the model's positions if those are fewer].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) seq_len: Option<u32>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) hidden: HiddenArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(flatten)]
    pub(crate) keep: KeepArgs,
    /// Only say what it would take: sizes, memory, passes, time.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print the outcome as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Prune {
    /// Folder of the checkpoint.
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    #[command(flatten)]
    pub(crate) answers: AnswersArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) plan: PlanArgs,
    #[command(flatten)]
    pub(crate) recover: RecoverArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Groups of calibration samples per domain, from which the report tells how much the plan depends on the samples; 1:
    /// none [default: as many as cost no time, at most 8].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) folds: Option<u32>,
    /// Keep the statistics here, to plan other budgets without calibrating again.
    #[arg(long, value_name = "FILE")]
    pub(crate) save_stats: Option<PathBuf>,
    /// Only say what it would take: sizes, memory, passes, time.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) hidden: HiddenArgs,
    #[command(flatten)]
    pub(crate) keep: KeepArgs,
    /// Print the outcome as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Eval {
    /// Folder of the checkpoint.
    pub(crate) model: PathBuf,
    /// Compare with this checkpoint on the same tokens.
    #[arg(long, value_name = "MODEL")]
    pub(crate) reference: Option<PathBuf>,
    /// Multiple-choice questions: .jsonl with `prompt`, `choices`, `answer`, or folders of such files.
    #[arg(long, num_args = 1.., value_name = "FILE|FOLDER")]
    pub(crate) tasks: Vec<PathBuf>,
    /// Texts for the perplexity: the kinds of files that calibrate takes.
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub(crate) text: Vec<PathBuf>,
    /// Tokens per text sample; longer ones are cut [default: 2048, or the model's positions if those are fewer].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) seq_len: Option<u32>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Compare {
    /// Folder of the checkpoint.
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// Multiple-choice tasks: .jsonl files, or folders of them. May repeat.
    #[arg(long, num_args = 1.., value_name = "FILE|DIR")]
    pub(crate) tasks: Vec<PathBuf>,
    /// Texts for perplexity. May repeat.
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub(crate) text: Vec<PathBuf>,
    /// Methods of `plan --method`; options of `plan` and of recovery behind colons, such as tenp:neuron-score=energy or
    /// enp:recover=least-squares.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "METHODS",
        default_value = "tenp,enp,reap,frequency,random-neurons,random-experts"
    )]
    pub(crate) methods: Vec<String>,
    /// Shares of the routed-expert neurons to keep.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "SHARES",
        default_value = "0.9,0.75,0.6,0.45,0.3"
    )]
    pub(crate) keep: Vec<f64>,
    /// Calibration draws: other samples, and other seeds of random scores.
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) seeds: u32,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Folder for results; one that was begun with the same inputs is gone on with.
    #[arg(short, long, value_name = "FOLDER")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) keep_work: KeepArgs,
    /// Only say what it would take: memory, passes, disk, time; of the whole comparison, whatever is done of it.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print all results, or what --dry-run says, as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
