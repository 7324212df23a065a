//! What pruning does to the trained demo model at 60 %: which methods keep more of it than which.

mod support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::json;
use support::fixtures::{DOMAINS, calibrate_demo, demo, demo_file, read_json};
use support::json::{number, widths};
use support::{Scratch, tenp};
use tenp_checkpoint::{Checkpoint, Statistics};
use tenp_prune::score::expert_scores;
use tenp_prune::{Calibration, ExpertScore, rank_correlation};

/// Expert dropping by a score; random dropping comes with seeds.
const DROPPING: [&str; 7] = [
    "frequency",
    "gating",
    "ean",
    "reap",
    "man",
    "msan",
    "easy-ep",
];

/// Least squares as it is by default, and what it is compared with.
const RECOVERIES: [&str; 4] = [
    "--recover least-squares",
    "--recover least-squares --recover-gates ungated",
    "--recover least-squares --recover-inputs original",
    "--recover rescale",
];

/// Answer NLL of TENP, over all answer tokens of the tasks.
const TENP_NLL: f64 = 0.285;

/// What a pruned model scores on the tasks.
#[derive(Clone, Copy, Debug)]
struct Score {
    /// Mean over the four tasks.
    accuracy: f64,
    /// Over the answer tokens of all tasks together.
    nll: f64,
}

struct Bench {
    scratch: Scratch,
    stats: PathBuf,
    /// The four tasks in one file, so that `eval` itself pools their answer tokens.
    all: PathBuf,
    /// TENP's widths.
    widths: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let scratch = Scratch::new();
        let stats = scratch.join("stats.safetensors");
        calibrate_demo(128, &stats);
        let all = scratch.join("all.jsonl");
        let tasks = DOMAINS.map(|d| std::fs::read_to_string(demo_file("tasks", d)).unwrap());
        std::fs::write(&all, tasks.concat()).unwrap();
        let plan = scratch.join("tenp.json");
        tenp(
            "plan {} --stats {} --keep 0.6 -o {}",
            &[&demo(), &stats, &plan],
        )
        .ok();
        let file = scratch.join("widths.json");
        std::fs::write(&file, json!(widths(&read_json(&plan))).to_string()).unwrap();
        Self {
            scratch,
            stats,
            all,
            widths: file,
        }
    }

    fn score(&self, options: &str) -> Score {
        self.recovered(options, "")
    }

    /// With recovery on the text that the statistics are of.
    fn recovered(&self, options: &str, recover: &str) -> Score {
        let name = options.replace(['/', ' '], "_");
        let name = &name[name.len().saturating_sub(60)..];
        let (plan, out) = (self.scratch.join("plan.json"), self.scratch.join(name));
        let line = format!("plan {{}} --stats {{}} {options} -o {{}}");
        tenp(&line, &[&demo(), &self.stats, &plan]).ok();
        if recover.is_empty() {
            tenp("apply {} --plan {} -o {}", &[&demo(), &plan, &out]).ok();
        } else {
            let [arith, code, facts, lists] = DOMAINS.map(|d| demo_file("calibration", d));
            let line = format!(
                "apply {{}} --plan {{}} {recover} --data arith={{}} code={{}} facts={{}} lists={{}} -o {{}}"
            );
            let paths: [&Path; 7] = [&demo(), &plan, &arith, &code, &facts, &lists, &out];
            tenp(&line, &paths).ok();
        }
        let score = self.evaluate(&out);
        std::fs::remove_dir_all(&out).unwrap();
        score
    }

    /// Every task has as many questions as the others: the mean of their accuracies is that of all questions.
    fn evaluate(&self, model: &Path) -> Score {
        let run = tenp("eval {} --tasks {} --json", &[model, &self.all]).ok();
        let all = &run.json()["tasks"]["all"];
        run.check(all["n"] == 1000, "four times 250 questions");
        Score {
            accuracy: number(&all["accuracy"]),
            nll: number(&all["nll"]),
        }
    }
}

/// Every score that the tests compare, taken once.
struct Scores {
    full: Score,
    tenp: Score,
    recovered: Vec<(&'static str, Score)>,
    random_neurons: Vec<Score>,
    dropping: Vec<(&'static str, Score)>,
    random_experts: Vec<Score>,
}

fn scores() -> &'static Scores {
    static SCORES: OnceLock<Scores> = OnceLock::new();
    SCORES.get_or_init(|| {
        let bench = Bench::new();
        let random = format!(
            "--allocation file:{} --neuron-score random --seed",
            bench.widths.display()
        );
        let scores = Scores {
            full: bench.evaluate(&demo()),
            tenp: bench.score("--method tenp --keep 0.6"),
            recovered: RECOVERIES
                .map(|r| (r, bench.recovered("--method tenp --keep 0.6", r)))
                .to_vec(),
            random_neurons: (0..3)
                .map(|s| bench.score(&format!("{random} {s}")))
                .collect(),
            dropping: DROPPING
                .map(|m| (m, bench.score(&format!("--method {m} --keep 0.6"))))
                .to_vec(),
            random_experts: (0..5)
                .map(|s| bench.score(&format!("--method random-experts --keep 0.6 --seed {s}")))
                .collect(),
        };
        report(&scores);
        scores
    })
}

/// Shown with `--nocapture`: the figures behind the orderings.
#[allow(clippy::print_stdout)]
fn report(scores: &Scores) {
    println!("{}", scores.table());
}

impl Scores {
    fn table(&self) -> String {
        let mut text = "mean accuracy, answer NLL\n".to_owned();
        let mut row = |name: &str, score: &Score| {
            writeln!(text, "{name:20} {:.4} {:.4}", score.accuracy, score.nll).unwrap();
        };
        row("full", &self.full);
        row("tenp", &self.tenp);
        self.recovered.iter().for_each(|(r, s)| row(r, s));
        self.random_neurons
            .iter()
            .for_each(|s| row("random neurons", s));
        self.dropping.iter().for_each(|(m, s)| row(m, s));
        self.random_experts
            .iter()
            .for_each(|s| row("random experts", s));
        text
    }

    fn mean_random_experts(&self) -> Score {
        let n = self.random_experts.len() as f64;
        Score {
            accuracy: self.random_experts.iter().map(|s| s.accuracy).sum::<f64>() / n,
            nll: self.random_experts.iter().map(|s| s.nll).sum::<f64>() / n,
        }
    }
}

#[track_caller]
fn assert_above(better: &Score, name: &str, worse: &Score, than: &str) {
    assert!(
        better.accuracy > worse.accuracy && better.nll < worse.nll,
        "{name} {better:?} is not above {than} {worse:?}\n{}",
        scores().table()
    );
}

#[test]
fn tenp_keeps_the_answers() {
    let scores = scores();
    assert!(scores.tenp.nll <= TENP_NLL, "{}", scores.table());
    assert!(scores.tenp.nll > scores.full.nll, "{}", scores.table());
}

#[test]
fn least_squares_closes_half_of_the_gap() {
    let scores = scores();
    let (_, recovered) = scores.recovered[0];
    let gap = scores.tenp.nll - scores.full.nll;
    assert!(
        recovered.nll <= scores.tenp.nll - 0.5 * gap,
        "{}",
        scores.table()
    );
}

#[test]
fn tenp_is_above_random_neurons_at_the_same_widths() {
    for random in &scores().random_neurons {
        assert_above(&scores().tenp, "TENP", random, "random neurons");
    }
}

#[test]
fn tenp_is_above_every_dropping_of_experts() {
    for (method, dropped) in &scores().dropping {
        assert_above(&scores().tenp, "TENP", dropped, method);
    }
    for random in &scores().random_experts {
        assert_above(&scores().tenp, "TENP", random, "random experts");
    }
}

#[test]
fn frequency_and_gating_are_above_the_mean_of_random_droppings() {
    let random = scores().mean_random_experts();
    for (method, dropped) in &scores().dropping[..2] {
        assert_above(dropped, method, &random, "random dropping");
    }
}

#[test]
fn eight_samples_a_domain_rank_experts_as_128_do() {
    let scratch = Scratch::new();
    let scores = |samples: usize| {
        let path = scratch.join(&format!("{samples}.safetensors"));
        calibrate_demo(samples, &path);
        let statistics = Statistics::read(&path).unwrap();
        let demo = Checkpoint::open(&demo()).unwrap();
        let (config, print) = (demo.config(), demo.fingerprint());
        let weights = BTreeMap::new();
        let calibration = Calibration::new(config, print, &statistics, &weights, &[]).unwrap();
        expert_scores(&calibration, ExpertScore::Direction, 0)
    };
    let layers: Vec<f64> = scores(8)
        .iter()
        .zip(scores(128))
        .map(|(few, many)| rank_correlation(few, &many))
        .collect();
    let mean = layers.iter().sum::<f64>() / layers.len() as f64;
    assert!(mean >= 0.95, "mean {mean:.3} of {layers:.3?}");
}
