//! A batch of sequences for the attention kernels, and the definition in f64.

use half::bf16;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use simt::{Buffer, Schedule};
use tenp_kernels::cpu::attention::AttentionShape;
use tenp_kernels::device::attention::{
    Attention, Pitches, SplitScratch, Splits, attention_decode, attention_prefill,
};

use super::{read, run, write};

/// One sequence.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// Number of the prefix, and its length.
    pub prefix: Option<(usize, usize)>,
    pub queries: usize,
    /// Keys behind the prefix.
    pub own: usize,
}

/// Scores of unit spread, so that the softmax is neither flat nor a choice.
pub fn shape(
    num_heads: usize,
    num_kv_heads: usize,
    qk_dim: usize,
    v_dim: usize,
    window: Option<usize>,
) -> AttentionShape {
    AttentionShape {
        num_heads,
        num_kv_heads,
        qk_dim,
        v_dim,
        scale: 1.5 / (qk_dim as f32).sqrt(),
        window,
    }
}

/// Queries, keys, values and where they lie. Rows of keys that belong to no sequence are NaN.
pub struct Batch {
    shape: AttentionShape,
    spans: Vec<Span>,
    pad: usize,
    num_key_rows: usize,
    prefix_rows: Vec<i32>,
    key_rows: Vec<i32>,
    pub queries: Vec<bf16>,
    pub keys: Vec<bf16>,
    pub values: Vec<bf16>,
}

fn random(rng: &mut ChaCha8Rng, rows: &[bool], pitch: usize, cols: usize) -> Vec<bf16> {
    let mut values = Vec::with_capacity(rows.len() * pitch);
    for &live in rows {
        for c in 0..pitch {
            let value = bf16::from_f32(rng.random_range(-1.7..1.7));
            values.push(if live && c < cols { value } else { bf16::NAN });
        }
    }
    values
}

impl Batch {
    /// `pad` elements lie between the rows.
    pub fn new(seed: u64, shape: AttentionShape, spans: &[Span], pad: usize) -> Self {
        // Prefixes first, sequences last to first, dead rows between all.
        let mut live = vec![false];
        let mut place = |len: usize| {
            let first = live.len();
            live.extend(vec![true; len]);
            live.push(false);
            first as i32
        };
        let prefixes: Vec<i32> = (0..2)
            .map(|i| {
                let of = |s: &Span| s.prefix.filter(|p| p.0 == i).map(|p| p.1);
                place(spans.iter().filter_map(of).max().unwrap_or(0))
            })
            .collect();
        let mut key_rows: Vec<i32> = spans.iter().rev().map(|s| place(s.own)).collect();
        key_rows.reverse();
        let prefix_rows = spans
            .iter()
            .map(|s| s.prefix.map_or(0, |p| prefixes[p.0]))
            .collect();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let tokens: usize = spans.iter().map(|s| s.queries).sum();
        let dense = Pitches::dense(&shape);
        Self {
            queries: random(&mut rng, &vec![true; tokens], dense.q + pad, dense.q),
            keys: random(&mut rng, &live, dense.k + pad, dense.k),
            values: random(&mut rng, &live, dense.v + pad, dense.v),
            num_key_rows: live.len(),
            shape,
            spans: spans.to_vec(),
            pad,
            prefix_rows,
            key_rows,
        }
    }

    /// First own row of a sequence.
    pub fn own_row(&self, sequence: usize) -> usize {
        self.key_rows[sequence] as usize
    }

    fn tokens(&self) -> usize {
        self.spans.iter().map(|s| s.queries).sum()
    }

    /// Runs what `calls` makes of the arguments; the result without its padding.
    fn run(&self, launch: impl FnOnce(Attention<'_>)) -> Vec<bf16> {
        let dense = Pitches::dense(&self.shape);
        let pitches = Pitches {
            q: dense.q + self.pad,
            k: dense.k + self.pad,
            v: dense.v + self.pad,
            out: dense.out + self.pad,
        };
        let mut offsets = vec![0];
        for span in &self.spans {
            offsets.push(offsets[offsets.len() - 1] + span.queries as i32);
        }
        let prefix_lens: Vec<i32> = self
            .spans
            .iter()
            .map(|s| s.prefix.map_or(0, |p| p.1 as i32))
            .collect();
        let key_lens: Vec<i32> = self.spans.iter().map(|s| s.own as i32).collect();
        let (q, k, v) = (
            Buffer::input("q", &self.queries),
            Buffer::input("k", &self.keys),
            Buffer::input("v", &self.values),
        );
        let (query_offsets, key_rows, key_lens) = (
            Buffer::input("query_offsets", &offsets),
            Buffer::input("key_rows", &self.key_rows),
            Buffer::input("key_lens", &key_lens),
        );
        let (prefix_rows, prefix_lens) = (
            Buffer::input("prefix_rows", &self.prefix_rows),
            Buffer::input("prefix_lens", &prefix_lens),
        );
        let has_prefix = self.spans.iter().any(|s| s.prefix.is_some());
        let out = Buffer::<bf16>::output("out", self.tokens() * pitches.out);
        launch(Attention {
            shape: &self.shape,
            queries: read(&q),
            keys: read(&k),
            values: read(&v),
            out: write(&out),
            query_offsets: read(&query_offsets),
            prefix: has_prefix.then(|| (read(&prefix_rows), read(&prefix_lens))),
            key_rows: read(&key_rows),
            key_lens: read(&key_lens),
            num_sequences: self.spans.len(),
            num_tokens: self.tokens(),
            num_key_rows: self.num_key_rows,
            pitches,
        });
        let padding: Vec<usize> = (0..out.len())
            .filter(|i| i % pitches.out >= dense.out)
            .collect();
        assert_eq!(out.unwritten(), padding);
        let rows = out.to_vec();
        rows.chunks(pitches.out)
            .flat_map(|row| &row[..dense.out])
            .copied()
            .collect()
    }

    pub fn prefill(&self, schedule: Schedule) -> Vec<bf16> {
        self.run(|args| {
            // SAFETY: the tables above are right.
            run(schedule, &unsafe { attention_prefill(args) }.unwrap());
        })
    }

    pub fn decode(&self, splits: Splits, schedule: Schedule) -> Vec<bf16> {
        let parts = splits.scratch_len(&self.shape, self.spans.len());
        let (largest, sums, out) = (
            Buffer::<f32>::output("split_max", parts),
            Buffer::<f32>::output("split_sum", parts),
            Buffer::<f32>::output("split_out", parts * self.shape.v_dim),
        );
        self.run(|args| {
            let scratch = SplitScratch {
                largest: write(&largest),
                sums: write(&sums),
                out: write(&out),
            };
            // SAFETY: the tables above are right, and the spans have one query each.
            let calls = unsafe { attention_decode(args, scratch, splits) }.unwrap();
            for call in &calls {
                run(schedule, call);
            }
        })
    }

    /// Compares with the definition. Weights and results are rounded to bf16; the rest is f32's.
    pub fn check(&self, got: &[bf16]) {
        let (shape, dense) = (&self.shape, Pitches::dense(&self.shape));
        let group = shape.num_heads / shape.num_kv_heads;
        let mut token = 0;
        for (s, span) in self.spans.iter().enumerate() {
            let rows = self.rows_of_keys(s);
            for i in 0..span.queries {
                let end = (rows.len() + i + 1).saturating_sub(span.queries);
                let start = shape.window.map_or(0, |w| end.saturating_sub(w));
                for head in 0..shape.num_heads {
                    let query = &self.queries[token * (dense.q + self.pad) + head * shape.qk_dim..];
                    let want = self.one_query(query, &rows[start..end], head / group);
                    let got = &got[token * dense.out + head * shape.v_dim..][..shape.v_dim];
                    for (d, (got, (want, size))) in got.iter().zip(want).enumerate() {
                        let tolerance = 1.1 / 256.0 * size + want.abs() / 256.0;
                        let got = f64::from(got.to_f32());
                        assert!(
                            (got - want).abs() <= tolerance,
                            "{shape:?} {span:?} query {i} head {head} element {d}: {got}, want {want} ± {tolerance}"
                        );
                    }
                }
                token += 1;
            }
        }
    }

    fn rows_of_keys(&self, sequence: usize) -> Vec<usize> {
        let span = self.spans[sequence];
        let prefix = self.prefix_rows[sequence] as usize;
        let own = self.own_row(sequence);
        let prefix_len = span.prefix.map_or(0, |p| p.1);
        (prefix..prefix + prefix_len)
            .chain(own..own + span.own)
            .collect()
    }

    /// Every element of a head's result, and its sum of absolute terms. Zeros without keys.
    fn one_query(&self, query: &[bf16], rows: &[usize], kv_head: usize) -> Vec<(f64, f64)> {
        let (shape, dense) = (&self.shape, Pitches::dense(&self.shape));
        let number = |v: bf16| f64::from(v.to_f32());
        let scores: Vec<f64> = rows
            .iter()
            .map(|row| {
                let key = &self.keys[row * (dense.k + self.pad) + kv_head * shape.qk_dim..]
                    [..shape.qk_dim];
                let dot: f64 = key
                    .iter()
                    .zip(query)
                    .map(|(&k, &q)| number(k) * number(q))
                    .sum();
                dot * f64::from(shape.scale)
            })
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut out = vec![(0.0, 0.0); shape.v_dim];
        for (row, weight) in rows.iter().zip(weights) {
            let value = &self.values[row * (dense.v + self.pad) + kv_head * shape.v_dim..];
            for ((sum, size), &v) in out.iter_mut().zip(value) {
                *sum += weight / total * number(v);
                *size += (weight / total * number(v)).abs();
            }
        }
        out
    }
}
