//! Causal attention, for whole sequences and for the next tokens after a cache; grouped key/value heads, value heads of
//! another size (MLA), optional sliding window. Always f32.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::disjoint::Disjoint;
use super::elementwise::softmax;
use super::pack::{BlockRows, Packing, pack_rows, pack_step};
use super::tile::{TILE_COLS, TILE_ROWS, Tile, copy_row, multiply};
use crate::error::check_len;
use crate::matrix::Row;
use crate::{Dtype, KernelError};

/// Head counts and sizes of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides the query heads.
    pub num_kv_heads: usize,
    /// Size of a query or key head.
    pub qk_dim: usize,
    /// Size of a value head.
    pub v_dim: usize,
    /// Factor on the scores before the softmax.
    pub scale: f32,
    /// A query sees itself and at most `window − 1` tokens before it.
    pub window: Option<usize>,
}

/// One sequence of a batch.
#[derive(Clone, Debug)]
pub struct Sequence<'a> {
    /// Its rows among the batch's queries; the last query stands at the last key.
    pub queries: Range<usize>,
    /// `[keys, num_kv_heads · qk_dim]`.
    pub keys: &'a [f32],
    /// `[keys, num_kv_heads · v_dim]`.
    pub values: &'a [f32],
}

/// Attention of every sequence: `queries` is `[tokens, num_heads · qk_dim]`, `out` `[tokens, num_heads · v_dim]`.
///
/// # Errors
/// [`KernelError::Length`] or [`KernelError::Invalid`] for lengths and head counts that do not fit together.
pub fn attention(
    shape: &AttentionShape,
    sequences: &[Sequence<'_>],
    queries: &[f32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    check(shape, sequences, queries, out)?;
    let out = Disjoint::new(out);
    let tasks = sequences.len() * shape.num_heads;
    (0..tasks).into_par_iter().for_each(|task| {
        let (sequence, head) = (&sequences[task / shape.num_heads], task % shape.num_heads);
        SCRATCH.with(|cell| {
            let mut scratch = cell.take();
            one_head(shape, sequence, head, queries, &out, &mut scratch);
            cell.replace(scratch);
        });
    });
    Ok(())
}

/// Bytes of a thread's keys, values and scores for a sequence of `keys` keys; they stay with the thread.
#[must_use]
pub fn thread_bytes(shape: &AttentionShape, keys: usize) -> usize {
    let padded = keys.next_multiple_of(TILE_COLS) * shape.qk_dim;
    let values = keys * shape.v_dim.next_multiple_of(TILE_COLS);
    // Queries, scores, and the scores packed, of a panel.
    let panel = TILE_ROWS * (shape.qk_dim + 2 * keys);
    size_of::<f32>() * (padded + values + panel)
}

fn check(
    shape: &AttentionShape,
    sequences: &[Sequence<'_>],
    queries: &[f32],
    out: &[f32],
) -> Result<(), KernelError> {
    if shape.num_kv_heads == 0 || !shape.num_heads.is_multiple_of(shape.num_kv_heads) {
        return Err(KernelError::Invalid {
            what: "attention heads",
            why: format!(
                "{} query heads over {} key/value heads",
                shape.num_heads, shape.num_kv_heads
            ),
        });
    }
    let mut next = 0;
    for sequence in sequences {
        if sequence.queries.start != next || sequence.queries.end < next {
            return Err(KernelError::Invalid {
                what: "attention sequences",
                why: format!("rows {:?} do not follow row {next}", sequence.queries),
            });
        }
        next = sequence.queries.end;
        let keys = sequence.keys.len() / (shape.num_kv_heads * shape.qk_dim).max(1);
        check_len(
            "attention keys",
            keys * shape.num_kv_heads * shape.qk_dim,
            sequence.keys.len(),
        )?;
        check_len(
            "attention values",
            keys * shape.num_kv_heads * shape.v_dim,
            sequence.values.len(),
        )?;
        if keys < sequence.queries.len() {
            return Err(KernelError::Invalid {
                what: "attention sequences",
                why: format!("{} queries but only {keys} keys", sequence.queries.len()),
            });
        }
    }
    check_len(
        "attention queries",
        next * shape.num_heads * shape.qk_dim,
        queries.len(),
    )?;
    check_len(
        "attention output",
        next * shape.num_heads * shape.v_dim,
        out.len(),
    )
}

#[derive(Default)]
struct Scratch {
    keys: Vec<u32>,
    values: Vec<u32>,
    queries: Vec<u32>,
    scores: Vec<f32>,
    weights: Vec<u32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

/// One head of a token in `[tokens, heads · dim]`.
fn head_row(from: &[f32], token: usize, heads: usize, head: usize, dim: usize) -> &[f32] {
    &from[(token * heads + head) * dim..][..dim]
}

fn one_head(
    shape: &AttentionShape,
    sequence: &Sequence<'_>,
    head: usize,
    queries: &[f32],
    out: &Disjoint<'_, f32>,
    s: &mut Scratch,
) {
    let (dim, v_dim) = (shape.qk_dim, shape.v_dim);
    let kv_head = head / (shape.num_heads / shape.num_kv_heads);
    let num_keys = sequence.keys.len() / (shape.num_kv_heads * dim);
    let offset = num_keys - sequence.queries.len();
    let heads = shape.num_kv_heads;
    let key_blocks = num_keys.div_ceil(TILE_COLS);
    s.keys.resize(key_blocks * dim * TILE_COLS, 0);
    for (b, block) in s.keys.chunks_exact_mut(dim * TILE_COLS).enumerate() {
        let columns = std::array::from_fn(|c| match b * TILE_COLS + c {
            key if key < num_keys => Row::of(head_row(sequence.keys, key, heads, kv_head, dim)),
            _ => Row::EMPTY,
        });
        BlockRows {
            columns,
            dtype: Dtype::F32,
            inner: dim,
        }
        .pack(Packing::F32, block);
    }
    let value_block = num_keys * TILE_COLS;
    s.values.resize(v_dim.div_ceil(TILE_COLS) * value_block, 0);
    for (b, block) in s.values.chunks_exact_mut(value_block).enumerate() {
        for (key, step) in block.as_chunks_mut::<TILE_COLS>().0.iter_mut().enumerate() {
            let value = head_row(sequence.values, key, heads, kv_head, v_dim);
            pack_step(&value[b * TILE_COLS..], step);
        }
    }

    let mut tile = Tile::new();
    for first in sequence.queries.clone().step_by(TILE_ROWS) {
        let rows = (sequence.queries.end - first).min(TILE_ROWS);
        let position = offset + first - sequence.queries.start;
        let seen = position + rows;
        // Keys before every row's window are skipped; a whole block at a time, so that each row's sums keep their order.
        let skipped =
            shape.window.map_or(0, |w| (position + 1).saturating_sub(w)) / TILE_COLS * TILE_COLS;
        let query_rows: [&[f32]; TILE_ROWS] = std::array::from_fn(|r| {
            let row = first + r.min(rows - 1);
            &queries[(row * shape.num_heads + head) * dim..][..dim]
        });
        s.queries.resize(dim * rows, 0);
        pack_rows(Packing::F32, &query_rows[..rows], &mut s.queries);
        s.scores.resize(rows * seen, 0.0);
        for block in skipped / TILE_COLS..seen.div_ceil(TILE_COLS) {
            let packed = &s.keys[block * dim * TILE_COLS..(block + 1) * dim * TILE_COLS];
            multiply(Packing::F32, &s.queries, rows, packed, &mut tile);
            let keys = block * TILE_COLS..((block + 1) * TILE_COLS).min(seen);
            for (row, scores) in tile.0[..rows].iter().zip(s.scores.chunks_exact_mut(seen)) {
                for (to, &score) in scores[keys.clone()].iter_mut().zip(row) {
                    *to = score * shape.scale;
                }
            }
        }
        for (r, scores) in s.scores.chunks_exact_mut(seen).enumerate() {
            let end = position + r + 1;
            let start = shape.window.map_or(0, |w| end.saturating_sub(w));
            softmax(&mut scores[start..end]);
            scores[..start].fill(0.0);
            scores[end..].fill(0.0);
        }
        let steps = seen - skipped;
        let weight_rows: [&[f32]; TILE_ROWS] =
            std::array::from_fn(|r| &s.scores[r.min(rows - 1) * seen + skipped..][..steps]);
        s.weights.resize(steps * rows, 0);
        pack_rows(Packing::F32, &weight_rows[..rows], &mut s.weights);
        for (b, block) in s.values.chunks_exact(value_block).enumerate() {
            multiply(
                Packing::F32,
                &s.weights,
                rows,
                &block[skipped * TILE_COLS..seen * TILE_COLS],
                &mut tile,
            );
            let columns = (v_dim - b * TILE_COLS).min(TILE_COLS);
            for (r, row) in tile.0[..rows].iter().enumerate() {
                let start = ((first + r) * shape.num_heads + head) * v_dim + b * TILE_COLS;
                // SAFETY: rows are this sequence's and columns this head's alone.
                copy_row(row, unsafe { out.range(start..start + columns) });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(i: usize) -> f32 {
        ((i * 2_654_435_761) % 2003) as f32 / 500.0 - 2.0
    }

    /// The definition, in f64.
    fn reference(shape: &AttentionShape, sequences: &[Sequence<'_>], queries: &[f32]) -> Vec<f64> {
        let mut out = Vec::new();
        for s in sequences {
            let keys = s.keys.len() / (shape.num_kv_heads * shape.qk_dim);
            let offset = keys - s.queries.len();
            for (i, row) in s.queries.clone().enumerate() {
                for head in 0..shape.num_heads {
                    let kv = head * shape.num_kv_heads / shape.num_heads;
                    let position = offset + i;
                    let start = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
                    let weights: Vec<f64> = (start..=position)
                        .map(|k| {
                            (0..shape.qk_dim)
                                .map(|d| {
                                    f64::from(
                                        queries[(row * shape.num_heads + head) * shape.qk_dim + d],
                                    ) * f64::from(
                                        s.keys[(k * shape.num_kv_heads + kv) * shape.qk_dim + d],
                                    )
                                })
                                .sum::<f64>()
                                * f64::from(shape.scale)
                        })
                        .map(f64::exp)
                        .collect();
                    let total: f64 = weights.iter().sum();
                    for d in 0..shape.v_dim {
                        let sum: f64 = weights
                            .iter()
                            .enumerate()
                            .map(|(k, w)| {
                                w * f64::from(
                                    s.values
                                        [((start + k) * shape.num_kv_heads + kv) * shape.v_dim + d],
                                )
                            })
                            .sum();
                        out.push(sum / total);
                    }
                }
            }
        }
        out
    }

    #[test]
    fn matches_the_definition_for_ragged_batches_windows_and_caches() {
        for (heads, kv_heads, dim, v_dim, window) in [
            (4, 4, 24, 16, None),
            (4, 2, 16, 16, None),
            (2, 1, 33, 40, Some(5)),
            (1, 1, 8, 70, Some(40)),
        ] {
            let shape = AttentionShape {
                num_heads: heads,
                num_kv_heads: kv_heads,
                qk_dim: dim,
                v_dim,
                scale: 0.05,
                window,
            };
            // (queries, keys): a prompt, a single token, a decode step after a cache, a chunk after a cache, a long one.
            let spans = [(5usize, 5usize), (1, 1), (1, 50), (17, 40), (100, 100)];
            let keys: Vec<Vec<f32>> = spans
                .iter()
                .map(|s| (0..s.1 * kv_heads * dim).map(|i| value(i + s.1)).collect())
                .collect();
            let values: Vec<Vec<f32>> = spans
                .iter()
                .map(|s| {
                    (0..s.1 * kv_heads * v_dim)
                        .map(|i| value(i + 7 * s.1))
                        .collect()
                })
                .collect();
            let mut start = 0;
            let sequences: Vec<Sequence<'_>> = spans
                .iter()
                .enumerate()
                .map(|(i, s)| {
                    start += s.0;
                    Sequence {
                        queries: start - s.0..start,
                        keys: &keys[i],
                        values: &values[i],
                    }
                })
                .collect();
            let queries: Vec<f32> = (0..start * heads * dim).map(value).collect();
            let mut out = vec![f32::NAN; start * heads * v_dim];
            attention(&shape, &sequences, &queries, &mut out).unwrap();
            for (i, (got, want)) in out
                .iter()
                .zip(reference(&shape, &sequences, &queries))
                .enumerate()
            {
                assert!(
                    (f64::from(*got) - want).abs() < 1e-4,
                    "{heads} {dim} {window:?} element {i}: {got} {want}"
                );
            }
        }
    }

    #[test]
    fn a_thread_keeps_what_is_said() {
        let shape = AttentionShape {
            num_heads: 1,
            num_kv_heads: 1,
            qk_dim: 12,
            v_dim: 9,
            scale: 1.0,
            window: None,
        };
        let keys = 3 * TILE_ROWS;
        let (k, v) = (vec![0.5; keys * 12], vec![0.5; keys * 9]);
        let sequence = Sequence {
            queries: 0..keys,
            keys: &k,
            values: &v,
        };
        let mut out = vec![0.0; keys * 9];
        let mut s = Scratch::default();
        one_head(&shape, &sequence, 0, &k, &Disjoint::new(&mut out), &mut s);
        let held = [
            s.keys.len(),
            s.values.len(),
            s.queries.len(),
            s.scores.len(),
            s.weights.len(),
        ];
        assert_eq!(4 * held.iter().sum::<usize>(), thread_bytes(&shape, keys));
    }

    #[test]
    fn a_token_after_a_cache_has_the_bits_of_the_whole_sequence() {
        let shape = AttentionShape {
            num_heads: 2,
            num_kv_heads: 1,
            qk_dim: 12,
            v_dim: 9,
            scale: 0.3,
            window: None,
        };
        let n = 45;
        let keys: Vec<f32> = (0..n * 12).map(value).collect();
        let values: Vec<f32> = (0..n * 9).map(|i| value(i + 3)).collect();
        let queries: Vec<f32> = (0..n * 24).map(|i| value(i + 5)).collect();
        let mut whole = vec![0.0; n * 18];
        let all = Sequence {
            queries: 0..n,
            keys: &keys,
            values: &values,
        };
        attention(&shape, &[all], &queries, &mut whole).unwrap();
        for t in [0usize, 13, 14, 31, 44] {
            let one = Sequence {
                queries: 0..1,
                keys: &keys[..(t + 1) * 12],
                values: &values[..(t + 1) * 9],
            };
            let mut out = vec![0.0; 18];
            attention(&shape, &[one], &queries[t * 24..(t + 1) * 24], &mut out).unwrap();
            assert_eq!(out, whole[t * 18..(t + 1) * 18], "token {t}");
        }
    }

    #[test]
    fn misfits_are_refused() {
        let shape = AttentionShape {
            num_heads: 3,
            num_kv_heads: 2,
            qk_dim: 4,
            v_dim: 4,
            scale: 1.0,
            window: None,
        };
        assert!(attention(&shape, &[], &[], &mut []).is_err());
        let shape = AttentionShape {
            num_heads: 2,
            num_kv_heads: 2,
            ..shape
        };
        let short = Sequence {
            queries: 0..2,
            keys: &[0.0; 8],
            values: &[0.0; 8],
        };
        assert!(attention(&shape, &[short], &[0.0; 16], &mut [0.0; 16]).is_err());
    }
}
