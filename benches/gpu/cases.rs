//! What the GPU benches run on: shapes named after models, widths of pruned experts, ways of routing.

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tenp_kernels::cost::{ExpertWork, MoeWork};

/// A MoE layer's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    pub width: usize,
    pub experts: usize,
    pub top_k: usize,
}

/// The last has a quarter of its model's experts: three sets of all of them do not fit beside the activations.
pub const SHAPES: [Shape; 4] = [
    Shape {
        name: "Qwen3-30B-A3B",
        hidden: 2048,
        width: 768,
        experts: 128,
        top_k: 8,
    },
    Shape {
        name: "DeepSeek-V2-Lite",
        hidden: 2048,
        width: 1408,
        experts: 64,
        top_k: 6,
    },
    Shape {
        name: "Qwen2-57B-A14B",
        hidden: 3584,
        width: 2560,
        experts: 64,
        top_k: 8,
    },
    Shape {
        name: "DeepSeek-V3, 64 experts",
        hidden: 7168,
        width: 2048,
        experts: 64,
        top_k: 8,
    },
];

/// How wide the experts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Widths {
    Full,
    Uniform75,
    Ragged75,
    Ragged50,
    OneWhole,
    SomeZero,
}

impl Widths {
    pub const ALL: [Self; 6] = [
        Self::Full,
        Self::Uniform75,
        Self::Ragged75,
        Self::Ragged50,
        Self::OneWhole,
        Self::SomeZero,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Uniform75 => "uniform 75 %",
            Self::Ragged75 => "ragged 75 %",
            Self::Ragged50 => "ragged 50 %",
            Self::OneWhole => "one whole expert",
            Self::SomeZero => "some zero",
        }
    }

    /// The width of every expert. Ragged ones are whole for one expert in six, as TENP leaves them; the others lie up
    /// to a quarter around what meets the mean, in steps of 8.
    pub fn of(self, shape: &Shape) -> Vec<usize> {
        let (full, count) = (shape.width, shape.experts);
        let ragged = |share: f64| {
            let mut rng = ChaCha8Rng::seed_from_u64(7);
            let whole = count.div_ceil(6);
            let rest =
                (share * (full * count) as f64 - (full * whole) as f64) / (count - whole) as f64;
            let mut widths: Vec<usize> = (0..count)
                .map(|e| {
                    // Experts in pairs above and below, so that the mean is met.
                    let swing = rng.random_range(0.0..0.25) * rest;
                    let sign = if e % 2 == 0 { 1.0 } else { -1.0 };
                    ((rest + sign * swing) / 8.0).round() as usize * 8
                })
                .map(|w| w.clamp(8, full))
                .collect();
            // Spread over the layer.
            for w in 0..whole {
                widths[w * count / whole] = full;
            }
            widths
        };
        match self {
            Self::Full => vec![full; count],
            Self::Uniform75 => vec![full * 3 / 4; count],
            Self::Ragged75 => ragged(0.75),
            Self::Ragged50 => ragged(0.5),
            Self::OneWhole => (0..count)
                .map(|e| if e == count / 2 { full } else { full / 4 })
                .collect(),
            Self::SomeZero => (0..count)
                .map(|e| if e % 4 == 3 { 0 } else { full })
                .collect(),
        }
    }
}

/// Which experts the tokens choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    Uniform,
    Zipf,
    ManyEmpty,
}

impl Routing {
    pub const ALL: [Self; 3] = [Self::Uniform, Self::Zipf, Self::ManyEmpty];

    pub fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
            Self::ManyEmpty => "many empty",
        }
    }

    /// `[tokens, top_k]` different experts of every token.
    pub fn ids(self, shape: &Shape, tokens: usize) -> Vec<i32> {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let count = match self {
            Self::ManyEmpty => (shape.experts / 4).max(shape.top_k),
            _ => shape.experts,
        };
        // Popular experts are spread over the layer.
        let place = |rank: usize| (rank * 37 + 5) % shape.experts;
        let mut total = 0.0;
        let cumulative: Vec<f64> = (0..count)
            .map(|rank| {
                total += match self {
                    Self::Zipf => 1.0 / (rank as f64 + 1.0),
                    _ => 1.0,
                };
                total
            })
            .collect();
        let mut ids = Vec::with_capacity(tokens * shape.top_k);
        for _ in 0..tokens {
            let first = ids.len();
            while ids.len() < first + shape.top_k {
                let at = rng.random_range(0.0..total);
                let rank = cumulative.partition_point(|&c| c <= at).min(count - 1);
                let id = place(rank) as i32;
                if !ids[first..].contains(&id) {
                    ids.push(id);
                }
            }
        }
        ids
    }
}

/// One row of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    pub shape: Shape,
    pub tokens: usize,
    pub widths: Widths,
    pub routing: Routing,
}

impl Case {
    /// As `Qwen3-30B-A3B/8192 tokens/full/uniform`.
    pub fn name(&self) -> String {
        format!(
            "{}/{} tokens/{}/{}",
            self.shape.name,
            self.tokens,
            self.widths.name(),
            self.routing.name()
        )
    }

    /// The case of this name, of one of [`SHAPES`].
    pub fn named(name: &str) -> Option<Self> {
        let mut parts = name.split('/');
        let mut part = || parts.next();
        let (shape, tokens, widths, routing) = (part()?, part()?, part()?, part()?);
        Some(Self {
            shape: SHAPES.into_iter().find(|s| s.name == shape)?,
            tokens: tokens.strip_suffix(" tokens")?.parse().ok()?,
            widths: Widths::ALL.into_iter().find(|w| w.name() == widths)?,
            routing: Routing::ALL.into_iter().find(|r| r.name() == routing)?,
        })
        .filter(|case| case.name() == name)
    }

    pub fn work(&self, ids: &[i32]) -> MoeWork {
        let mut experts: Vec<ExpertWork> = self
            .widths
            .of(&self.shape)
            .into_iter()
            .map(|width| ExpertWork { width, rows: 0 })
            .collect();
        for &id in ids {
            experts[id as usize].rows += 1;
        }
        MoeWork {
            hidden: self.shape.hidden,
            tokens: self.tokens,
            experts,
        }
    }
}

/// `short`: what fits into a few minutes; `full`: every combination.
pub fn cases(shape: &Shape, selection: &str) -> Vec<Case> {
    let case = |tokens, widths, routing| Case {
        shape: *shape,
        tokens,
        widths,
        routing,
    };
    let mut cases = Vec::new();
    if selection == "full" {
        for tokens in [1, 8, 64, 512, 2048, 8192, 65_536] {
            for widths in Widths::ALL {
                for routing in Routing::ALL {
                    cases.push(case(tokens, widths, routing));
                }
            }
        }
        return cases;
    }
    for tokens in [1, 8, 64, 512, 2048, 8192, 65_536] {
        cases.push(case(tokens, Widths::Full, Routing::Uniform));
        if matches!(tokens, 64 | 8192) {
            cases.push(case(tokens, Widths::Uniform75, Routing::Uniform));
            cases.push(case(tokens, Widths::Ragged75, Routing::Uniform));
            cases.push(case(tokens, Widths::Ragged50, Routing::Uniform));
        }
    }
    cases.push(case(8192, Widths::OneWhole, Routing::Uniform));
    cases.push(case(8192, Widths::SomeZero, Routing::Uniform));
    cases.push(case(512, Widths::Ragged75, Routing::Zipf));
    cases.push(case(512, Widths::Ragged75, Routing::ManyEmpty));
    cases
}
