//! Checks and geometry of the attention wrappers.

use super::*;

/// Never read through.
fn view<'a, T: bytemuck::Pod>(len: usize) -> DeviceSlice<'a, T> {
    // SAFETY: see above.
    unsafe { DeviceSlice::from_raw(0x1000, len) }
}

/// Never written through.
fn target<'a, T: bytemuck::Pod>(len: usize) -> DeviceSliceMut<'a, T> {
    // SAFETY: see above.
    unsafe { DeviceSliceMut::from_raw(0x2000, len) }
}

const SHAPE: AttentionShape = AttentionShape {
    num_heads: 4,
    num_kv_heads: 2,
    qk_dim: 24,
    v_dim: 16,
    scale: 0.2,
    window: None,
};

/// 300 queries of 3 sequences over 500 rows.
fn args(shape: &AttentionShape) -> Attention<'_> {
    let pitches = Pitches::dense(shape);
    Attention {
        shape,
        queries: view(300 * pitches.q),
        keys: view(500 * pitches.k),
        values: view(500 * pitches.v),
        out: target(300 * pitches.out),
        query_offsets: view(4),
        prefix: None,
        key_rows: view(3),
        key_lens: view(3),
        num_sequences: 3,
        num_tokens: 300,
        num_key_rows: 500,
        pitches,
    }
}

fn prefill(args: Attention<'_>) -> Result<(&'static str, Launch), KernelError> {
    // SAFETY: nothing is launched.
    unsafe { attention_prefill(args) }.map(|call| (call.entry(), call.launch()))
}

#[test]
fn heads_take_the_smallest_entry_that_holds_them() {
    for (qk, v, size) in [
        (16, 24, Some(HeadSize::D64)),
        (64, 64, Some(HeadSize::D64)),
        (64, 80, Some(HeadSize::D128)),
        (96, 96, Some(HeadSize::D128)),
        (192, 128, Some(HeadSize::D192)),
        (192, 136, Some(HeadSize::D256)),
        (256, 256, Some(HeadSize::D256)),
        (264, 64, None),
        (64, 264, None),
    ] {
        assert_eq!(HeadSize::choose(qk, v), size, "{qk} {v}");
    }
    for size in [
        HeadSize::D64,
        HeadSize::D128,
        HeadSize::D192,
        HeadSize::D256,
    ] {
        // What a block may have on the smallest of the supported chips (8.6, 8.9).
        assert!(size.prefill().2 <= 99 * 1024 && size.decode().2 <= 99 * 1024);
    }
}

#[test]
fn every_sequence_may_have_a_tile_more() {
    assert_eq!(
        prefill(args(&SHAPE)),
        Ok((
            "tenp_attention_prefill_64",
            Launch::line(4 * (2 + 3), 128, 49_168)
        ))
    );
    let none = Attention {
        num_sequences: 0,
        num_tokens: 0,
        ..args(&SHAPE)
    };
    assert!(prefill(none).unwrap().1.is_empty());
}

#[test]
fn misfits_are_refused() {
    let wrong_shapes = [
        AttentionShape {
            num_kv_heads: 3,
            ..SHAPE
        },
        AttentionShape {
            num_kv_heads: 0,
            ..SHAPE
        },
        AttentionShape {
            qk_dim: 20,
            ..SHAPE
        },
        AttentionShape {
            v_dim: 264,
            ..SHAPE
        },
        AttentionShape {
            scale: 0.0,
            ..SHAPE
        },
        AttentionShape {
            scale: f32::NAN,
            ..SHAPE
        },
        AttentionShape {
            window: Some(0),
            ..SHAPE
        },
    ];
    for shape in &wrong_shapes {
        assert!(
            matches!(prefill(args(shape)), Err(KernelError::Invalid { .. })),
            "{shape:?}"
        );
    }
    for wrong in [
        Attention {
            queries: view(300 * 96 - 1),
            ..args(&SHAPE)
        },
        Attention {
            num_key_rows: 501,
            ..args(&SHAPE)
        },
        Attention {
            out: target(300 * 64 - 1),
            ..args(&SHAPE)
        },
        Attention {
            query_offsets: view(3),
            ..args(&SHAPE)
        },
        Attention {
            prefix: Some((view(3), view(2))),
            ..args(&SHAPE)
        },
        Attention {
            key_lens: view(2),
            ..args(&SHAPE)
        },
    ] {
        assert!(matches!(prefill(wrong), Err(KernelError::Length { .. })));
    }
    for (q, k) in [(88, 48), (100, 48), (96, 52)] {
        let pitches = Pitches {
            q,
            k,
            ..Pitches::dense(&SHAPE)
        };
        let wrong = Attention {
            pitches,
            ..args(&SHAPE)
        };
        assert!(matches!(prefill(wrong), Err(KernelError::Invalid { .. })));
    }
}

#[test]
fn keys_are_split_until_the_gpu_is_full() {
    let shape = AttentionShape {
        num_heads: 32,
        num_kv_heads: 4,
        ..SHAPE
    };
    let choose = |sequences, keys| Splits::choose(&shape, sequences, keys, 132);
    assert_eq!(
        choose(1, 100),
        Splits {
            count: 1,
            keys: 128
        }
    );
    assert_eq!(choose(1, 0), Splits { count: 1, keys: 64 });
    assert_eq!(
        choose(1, 8192),
        Splits {
            count: 32,
            keys: 256
        }
    );
    assert_eq!(
        choose(64, 8192),
        Splits {
            count: 2,
            keys: 4096
        }
    );
    assert_eq!(choose(256, 8192).count, 1);
    let windowed = AttentionShape {
        window: Some(300),
        ..shape
    };
    assert_eq!(Splits::choose(&windowed, 1, 8192, 132).count, 1);
    for keys in 0..3000 {
        let splits = choose(3, keys);
        assert!(splits.count * splits.keys >= keys && splits.keys % 64 == 0);
    }
}

#[test]
fn decode_needs_one_query_each_and_room_for_the_parts() {
    let one_each = || Attention {
        num_tokens: 3,
        ..args(&SHAPE)
    };
    let decode = |args: Attention<'static>, room: usize, count: usize| {
        let scratch = SplitScratch {
            largest: target(room),
            sums: target(room),
            out: target(room * 16),
        };
        // SAFETY: nothing is launched.
        unsafe { attention_decode(args, scratch, Splits { count, keys: 64 }) }.map(|calls| {
            calls
                .iter()
                .map(|c| (c.entry(), c.launch()))
                .collect::<Vec<_>>()
        })
    };
    let first = "tenp_attention_decode_64";
    assert_eq!(
        decode(one_each(), 0, 1),
        Ok(vec![(first, Launch::line(6, 128, 34_816))])
    );
    assert_eq!(
        decode(one_each(), 24, 2),
        Ok(vec![
            (first, Launch::line(12, 128, 34_816)),
            ("tenp_attention_merge", Launch::line(2, 256, 0)),
        ])
    );
    assert!(decode(one_each(), 23, 2).is_err());
    assert!(decode(one_each(), 24, 0).is_err());
    assert!(decode(args(&SHAPE), 24, 2).is_err());
}
