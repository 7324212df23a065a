//! Attention of ragged sequences with shared prefixes, against the definition in f64.

use half::bf16;
use tenp_kernels::cpu::attention::AttentionShape;
use tenp_kernels::device::attention::{
    Attention, Pitches, SplitScratch, Splits, attention_decode, attention_prefill,
};
use tenp_kernels::device::{Backend, Memory as _};

use super::{On, Size, assert_close, bf16_values, rng, sampled};

/// One sequence: length of the shared prefix it uses, queries, own keys.
pub type Span = (usize, usize, usize);

/// A batch of sequences; the prefix lies in the first rows, then every sequence's own, with a row of NaN behind each.
pub struct Sequences {
    shape: AttentionShape,
    spans: Vec<Span>,
    key_rows: Vec<i32>,
    num_key_rows: usize,
    pub queries: Vec<bf16>,
    pub keys: Vec<bf16>,
    pub values: Vec<bf16>,
}

pub const fn shape(
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
        scale: 0.15,
        window,
    }
}

impl Sequences {
    pub fn new(seed: u64, shape: AttentionShape, spans: &[Span]) -> Self {
        let dense = Pitches::dense(&shape);
        let mut end = spans.iter().map(|s| s.0).max().unwrap_or(0) + 1;
        let mut dead = vec![end - 1];
        let mut key_rows = Vec::new();
        for &(_, _, own) in spans {
            key_rows.push(end as i32);
            end += own + 1;
            dead.push(end - 1);
        }
        let tokens: usize = spans.iter().map(|s| s.1).sum();
        let mut rng = rng(seed);
        let mut random = |rows: usize, cols: usize| bf16_values(&mut rng, rows * cols, 1.7);
        let queries = random(tokens, dense.q);
        let (mut keys, mut values) = (random(end, dense.k), random(end, dense.v));
        for row in dead {
            keys[row * dense.k..(row + 1) * dense.k].fill(bf16::NAN);
            values[row * dense.v..(row + 1) * dense.v].fill(bf16::NAN);
        }
        Self {
            shape,
            spans: spans.to_vec(),
            key_rows,
            num_key_rows: end,
            queries,
            keys,
            values,
        }
    }

    fn tokens(&self) -> usize {
        self.spans.iter().map(|s| s.1).sum()
    }

    /// With the keys split over blocks where there are splits, which is for one query a sequence.
    pub fn run<B: Backend>(&self, on: On<'_, B>, splits: Option<Splits>) -> Vec<bf16> {
        let shape = &self.shape;
        let mut offsets = vec![0];
        for span in &self.spans {
            offsets.push(offsets[offsets.len() - 1] + span.1 as i32);
        }
        let ints = |of: &dyn Fn(&Span) -> usize| -> B::Buffer<i32> {
            on.input(&self.spans.iter().map(|s| of(s) as i32).collect::<Vec<_>>())
        };
        let (queries, keys) = (on.input(&self.queries), on.input(&self.keys));
        let (values, offsets) = (on.input(&self.values), on.input(&offsets));
        let (key_rows, key_lens) = (on.input(&self.key_rows), ints(&|s| s.2));
        let (prefix_rows, prefix_lens) = (ints(&|_| 0), ints(&|s| s.0));
        let pitches = Pitches::dense(shape);
        let mut out = on.output::<bf16>(self.tokens() * pitches.out);
        let has_prefix = self.spans.iter().any(|s| s.0 > 0);
        let args = Attention {
            shape,
            queries: queries.view(),
            keys: keys.view(),
            values: values.view(),
            out: out.view_mut(),
            query_offsets: offsets.view(),
            prefix: has_prefix.then(|| (prefix_rows.view(), prefix_lens.view())),
            key_rows: key_rows.view(),
            key_lens: key_lens.view(),
            num_sequences: self.spans.len(),
            num_tokens: self.tokens(),
            num_key_rows: self.num_key_rows,
            pitches,
        };
        if let Some(splits) = splits {
            let parts = splits.scratch_len(shape, self.spans.len());
            let (mut largest, mut sums) = (on.output::<f32>(parts), on.output::<f32>(parts));
            let mut parts = on.output::<f32>(parts * shape.v_dim);
            let scratch = SplitScratch {
                largest: largest.view_mut(),
                sums: sums.view_mut(),
                out: parts.view_mut(),
            };
            // SAFETY: the tables above are right, and every span has one query.
            on.go_all(unsafe { attention_decode(args, scratch, splits) });
        } else {
            // SAFETY: the tables above are right.
            on.go(unsafe { attention_prefill(args) });
        }
        on.get(out.view())
    }

    /// Weights and results are rounded to bf16; the rest is f32's. At most `samples` queries of a sequence.
    pub fn check(&self, got: &[bf16], samples: usize) {
        let (shape, dense) = (&self.shape, Pitches::dense(&self.shape));
        let mut first = 0;
        for (s, &(prefix, queries, own)) in self.spans.iter().enumerate() {
            let own_row = self.key_rows[s] as usize;
            let rows: Vec<usize> = (0..prefix).chain(own_row..own_row + own).collect();
            for i in sampled(queries, samples) {
                let end = (rows.len() + i + 1).saturating_sub(queries);
                let start = shape.window.map_or(0, |w| end.saturating_sub(w));
                for head in sampled(shape.num_heads, 5) {
                    let query = &self.queries[(first + i) * dense.q + head * shape.qk_dim..];
                    let want = self.one_query(query, &rows[start..end], head);
                    let got = &got[(first + i) * dense.out + head * shape.v_dim..];
                    for (d, (got, (want, size))) in got.iter().zip(want).enumerate() {
                        let tolerance = 1.15 / 256.0 * size + want.abs() / 256.0;
                        assert_close(got.to_f64(), want, tolerance, || {
                            format!("{shape:?}, sequence {s}, query {i}, head {head}, element {d}")
                        });
                    }
                }
            }
            first += queries;
        }
    }

    /// Every element of a head's result, and its sum of absolute terms. Zeros without keys.
    fn one_query(&self, query: &[bf16], rows: &[usize], head: usize) -> Vec<(f64, f64)> {
        let (shape, dense) = (&self.shape, Pitches::dense(&self.shape));
        let kv_head = head / (shape.num_heads / shape.num_kv_heads);
        let scores: Vec<f64> = rows
            .iter()
            .map(|row| {
                let key = &self.keys[row * dense.k + kv_head * shape.qk_dim..][..shape.qk_dim];
                let terms = key.iter().zip(query).map(|(k, q)| k.to_f64() * q.to_f64());
                terms.sum::<f64>() * f64::from(shape.scale)
            })
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut out = vec![(0.0, 0.0); shape.v_dim];
        for (row, weight) in rows.iter().zip(weights) {
            let value = &self.values[row * dense.v + kv_head * shape.v_dim..];
            for ((sum, size), v) in out.iter_mut().zip(value) {
                *sum += weight / total * v.to_f64();
                *size += (weight / total * v.to_f64()).abs();
            }
        }
        out
    }
}

/// GQA, MLA's head sizes, windows, every compiled head size.
fn shapes(size: Size) -> Vec<AttentionShape> {
    match size {
        Size::Small => vec![
            shape(4, 2, 16, 24, None),
            shape(1, 1, 128, 128, Some(64)),
            shape(2, 2, 192, 128, None),
            shape(2, 1, 256, 256, Some(9)),
        ],
        Size::Real => vec![
            shape(32, 4, 128, 128, None),
            shape(16, 16, 192, 128, None),
            shape(28, 4, 128, 128, Some(1000)),
            shape(16, 2, 64, 64, None),
            shape(8, 1, 256, 256, None),
        ],
    }
}

pub fn prefill_of_ragged_sequences<B: Backend>(on: On<'_, B>, size: Size) {
    let spans: &[Span] = match size {
        Size::Small => &[
            (0, 5, 5),
            (0, 1, 1),
            (0, 129, 129),
            (0, 17, 70),
            (0, 0, 3),
            (40, 33, 33),
            (40, 20, 25),
            (0, 9, 4),
        ],
        Size::Real => &[
            (0, 2048, 2048),
            (500, 700, 700),
            (500, 1, 1),
            (0, 64, 4000),
            (0, 127, 127),
        ],
    };
    for (i, shape) in shapes(size).into_iter().enumerate() {
        let sequences = Sequences::new(i as u64, shape, spans);
        sequences.check(&sequences.run(on, None), 40);
    }
}

pub fn decode_with_and_without_splits<B: Backend>(on: On<'_, B>, size: Size) {
    let spans: &[Span] = match size {
        Size::Small => &[
            (0, 1, 1),
            (0, 1, 63),
            (0, 1, 65),
            (0, 1, 200),
            (40, 1, 30),
            (40, 1, 0),
        ],
        Size::Real => &[
            (0, 1, 8000),
            (0, 1, 129),
            (3000, 1, 1),
            (3000, 1, 500),
            (0, 1, 1),
        ],
    };
    let most = spans.iter().map(|s| s.0 + s.2).max().unwrap_or(0);
    for (i, shape) in shapes(size).into_iter().enumerate() {
        let chosen = Splits::choose(&shape, spans.len(), most, on.backend.multiprocessors());
        let sequences = Sequences::new(10 + i as u64, shape, spans);
        for splits in [
            chosen,
            Splits { count: 1, keys: 64 },
            Splits { count: 3, keys: 64 },
        ] {
            sequences.check(&sequences.run(on, Some(splits)), 1);
        }
    }
}
