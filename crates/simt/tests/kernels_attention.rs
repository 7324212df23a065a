//! `tenp_attention_prefill_*`, `tenp_attention_decode_*` and `tenp_attention_merge` against the definition in f64.

mod around;

use around::batch::{Batch, Span, shape};
use half::bf16;
use simt::Schedule;
use tenp_kernels::cpu::attention::AttentionShape;
use tenp_kernels::device::attention::Splits;

/// Shared prefix (its number and how much of it), queries, own keys.
const fn span(prefix: Option<(usize, usize)>, queries: usize, own: usize) -> Span {
    Span {
        prefix,
        queries,
        own,
    }
}

/// A prompt, one token, a prompt over two tiles, a chunk behind a cache, nothing, one token behind a cache, two that share
/// a prefix.
fn ragged() -> Vec<Span> {
    vec![
        span(None, 5, 5),
        span(None, 1, 1),
        span(None, 150, 150),
        span(None, 17, 70),
        span(None, 0, 3),
        span(None, 1, 66),
        span(Some((0, 40)), 33, 33),
        span(Some((0, 40)), 20, 25),
        span(Some((1, 7)), 3, 3),
    ]
}

#[test]
fn prefill_of_ragged_sequences() {
    for (i, (heads, kv_heads, qk, v, window)) in [
        (4, 2, 16, 24, None),
        (2, 2, 64, 64, Some(9)),
        (2, 1, 80, 80, None),
        (1, 1, 128, 128, Some(64)),
        (2, 2, 192, 128, None),
        (1, 1, 192, 128, Some(40)),
        (2, 1, 256, 256, None),
        (1, 1, 136, 200, Some(1)),
    ]
    .into_iter()
    .enumerate()
    {
        let batch = Batch::new(
            i as u64,
            shape(heads, kv_heads, qk, v, window),
            &ragged(),
            8 * (i % 2),
        );
        batch.check(&batch.prefill(Schedule::UNLIKE[i % 4]));
    }
}

#[test]
fn tiles_around_their_boundaries() {
    for (i, (qk, v)) in [(24, 16), (96, 96), (176, 128), (256, 8)]
        .into_iter()
        .enumerate()
    {
        let spans: Vec<Span> = [63, 64, 65, 127, 128, 129]
            .into_iter()
            .map(|n| span(None, n, n))
            .collect();
        let batch = Batch::new(40 + i as u64, shape(1, 1, qk, v, None), &spans, 0);
        batch.check(&batch.prefill(Schedule::UNLIKE[(i + 1) % 4]));
    }
    for spans in [
        vec![],
        vec![span(None, 0, 0)],
        vec![span(None, 0, 9), span(None, 0, 0)],
    ] {
        let batch = Batch::new(50, shape(2, 1, 16, 16, None), &spans, 0);
        batch.check(&batch.prefill(Schedule::Forward));
    }
}

#[test]
fn queries_without_a_key_get_zeros() {
    // More queries than keys: the first ones stand before the first key.
    let batch = Batch::new(
        60,
        shape(2, 1, 16, 16, None),
        &[span(None, 9, 4), span(None, 2, 0)],
        0,
    );
    let out = batch.prefill(Schedule::Reversed);
    batch.check(&out);
    assert!(out[..5 * 32].iter().all(|v| v.to_f32() == 0.0));
    let batch = Batch::new(
        61,
        shape(2, 1, 16, 16, None),
        &[span(None, 1, 0), span(None, 1, 1)],
        0,
    );
    for count in [1, 2] {
        batch.check(&batch.decode(Splits { count, keys: 64 }, Schedule::Reversed));
    }
}

/// One query per sequence, behind caches of awkward lengths.
fn next_tokens() -> Vec<Span> {
    let mut spans: Vec<Span> = [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 200]
        .into_iter()
        .map(|n| span(None, 1, n))
        .collect();
    spans.extend([
        span(Some((0, 40)), 1, 30),
        span(Some((0, 40)), 1, 1),
        span(Some((1, 7)), 1, 100),
    ]);
    spans
}

#[test]
fn decode_with_and_without_splits() {
    for (i, (heads, kv_heads, qk, v, window)) in [
        (4, 2, 16, 24, None),
        (20, 1, 64, 64, None),
        (16, 1, 64, 48, Some(70)),
        (2, 2, 128, 128, None),
        (8, 1, 96, 80, Some(9)),
        (3, 3, 192, 128, None),
        (2, 1, 256, 256, None),
        (17, 1, 200, 256, Some(100)),
    ]
    .into_iter()
    .enumerate()
    {
        let batch = Batch::new(
            100 + i as u64,
            shape(heads, kv_heads, qk, v, window),
            &next_tokens(),
            8 * (i % 2),
        );
        // All in one; as many as needed; parts without keys; a last part that takes what was not expected.
        for (j, (count, keys)) in [(1, 64), (4, 64), (7, 128), (2, 64)]
            .into_iter()
            .enumerate()
        {
            if j < 2 || i < 4 {
                batch.check(&batch.decode(Splits { count, keys }, Schedule::UNLIKE[(i + j) % 4]));
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_the_order_of_threads() {
    for (qk, v) in [(64, 64), (192, 128)] {
        let shape = shape(2, 1, qk, v, None);
        let batch = Batch::new(200, shape, &ragged(), 0);
        let first = batch.prefill(Schedule::Forward);
        let next = Batch::new(201, shape, &next_tokens(), 0);
        let splits = Splits { count: 3, keys: 64 };
        let first_next = next.decode(splits, Schedule::Forward);
        for schedule in &Schedule::UNLIKE[1..] {
            assert!(batch.prefill(*schedule) == first);
            assert!(next.decode(splits, *schedule) == first_next);
        }
    }
}

/// What is damaged, and in which columns of which queries of the one sequence that shows.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Query(usize),
    Key(usize),
    Value(usize, usize),
}

/// The sequence has `past` keys before its first query.
fn damaged(shape: AttentionShape, past: usize, tokens: usize, damage: &[Damage], bits: bf16) {
    let spans = [span(None, tokens, past + tokens), span(None, 20, 20)];
    let clean = Batch::new(300, shape, &spans, 0);
    let want = clean.prefill(Schedule::Forward);
    let mut hurt = Batch::new(300, shape, &spans, 0);
    let (qk, v) = (shape.qk_dim, shape.v_dim);
    let first_key = hurt.own_row(0);
    for damage in damage {
        match *damage {
            Damage::Query(t) => hurt.queries[t * shape.num_heads * qk] = bits,
            Damage::Key(t) => hurt.keys[(first_key + t) * shape.num_kv_heads * qk + 3] = bits,
            Damage::Value(t, d) => hurt.values[(first_key + t) * shape.num_kv_heads * v + d] = bits,
        }
    }
    let got = hurt.prefill(Schedule::Random(8));
    let width = shape.num_heads * v;
    for (i, (&got, &want)) in got.iter().zip(&want).enumerate() {
        let (t, head, d) = (i / width, i % width / v, i % v);
        let kv_head = head / (shape.num_heads / shape.num_kv_heads);
        let position = past + t;
        let sees = |key: usize| {
            t < tokens && key <= position && shape.window.is_none_or(|w| position - key < w)
        };
        let is_hurt = damage.iter().any(|damage| match *damage {
            Damage::Query(at) => t == at && head == 0,
            Damage::Key(at) => sees(at) && kv_head == 0,
            Damage::Value(at, at_d) => sees(at) && kv_head == 0 && d == at_d,
        });
        if is_hurt {
            assert!(
                !got.to_f32().is_finite(),
                "{damage:?}: query {t} head {head} element {d}: {got}"
            );
        } else {
            assert_eq!(
                got.to_bits(),
                want.to_bits(),
                "{damage:?}: query {t} head {head} element {d}"
            );
        }
    }
}

#[test]
fn damage_reaches_only_those_that_see_it() {
    use Damage::{Key, Query, Value};
    for window in [None, Some(20)] {
        for dims in [(64, 64), (128, 128), (192, 128), (256, 256)] {
            let shape = shape(2, 2, dims.0, dims.1, window);
            let some = [Value(40, 5), Value(41, 8), Value(69, 7)];
            damaged(shape, 0, 70, &some, bf16::NAN);
            // A row that the last warp alone looks at.
            damaged(shape, 0, 16, &[Value(15, 3)], bf16::NAN);
        }
        let shape = shape(2, 1, 24, 16, window);
        let some = [Value(0, 1), Value(33, 2), Value(130, 15)];
        damaged(shape, 0, 140, &some, bf16::INFINITY);
        damaged(shape, 0, 140, &[Query(3), Query(129)], bf16::NAN);
        damaged(shape, 0, 140, &[Key(100)], bf16::NAN);
    }
}

/// Which keys are seen, to the key: the first query stands at the end of a step, before it or behind it, and so does the
/// first key of its window.
#[test]
fn seen_is_what_is_before_and_inside_the_window() {
    for past in [61, 62, 63, 64, 94, 95, 96] {
        for window in [
            None,
            Some(30),
            Some(31),
            Some(32),
            Some(33),
            Some(63),
            Some(64),
            Some(65),
        ] {
            let low = window.map_or(0, |w| (past + 1usize).saturating_sub(w));
            let edges = [past + 1, past, low, low.saturating_sub(1)];
            let damage: Vec<Damage> = edges
                .into_iter()
                .enumerate()
                .map(|(d, key)| Damage::Value(key, d))
                .collect();
            damaged(shape(1, 1, 16, 8, window), past, 3, &damage, bf16::NAN);
            damaged(shape(1, 1, 72, 8, window), past, 3, &damage, bf16::NAN);
        }
    }
}

#[test]
fn damage_in_a_decoded_sequence_stays_in_its_heads() {
    let shape = shape(6, 2, 24, 16, None);
    let spans = [span(None, 1, 90), span(None, 1, 90), span(None, 1, 17)];
    let clean = Batch::new(400, shape, &spans, 0);
    let mut hurt = Batch::new(400, shape, &spans, 0);
    // The second sequence's second key/value head; a query head of the third.
    let row = hurt.own_row(1) + 70;
    hurt.keys[row * 48 + 24] = bf16::NAN;
    hurt.queries[2 * 144 + 24] = bf16::INFINITY;
    for count in [1, 3] {
        let splits = Splits { count, keys: 64 };
        let want = clean.decode(splits, Schedule::Forward);
        let got = hurt.decode(splits, Schedule::Random(6));
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let (sequence, head) = (i / 96, i % 96 / 16);
            if (sequence == 1 && head >= 3) || (sequence == 2 && head == 1) {
                assert!(got.is_nan(), "sequence {sequence} head {head}: {got}");
            } else {
                assert_eq!(
                    got.to_bits(),
                    want.to_bits(),
                    "sequence {sequence} head {head}"
                );
            }
        }
    }
}
