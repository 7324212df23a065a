//! Rotary positions, and MLA's keys.

use half::bf16;
use tenp_kernels::cpu::rotary::{RotaryScaling, RotaryTable};
use tenp_kernels::device::mla_keys::{MlaKeys, mla_keys};
use tenp_kernels::device::rotary::{Angles, Rotary, rotary};
use tenp_kernels::device::{Backend, InOut, Memory as _};

use super::rows::num_rows;
use super::{On, Size, assert_close, f32_values, rng};

fn check_rotary<B: Backend>(
    on: On<'_, B>,
    (interleaved, leading): (bool, bool),
    head: (usize, usize),
    tokens: usize,
) {
    let (head_dim, rotary_dim) = head;
    let (heads, positions) = (3, 4 * tokens);
    let scaling = RotaryScaling::Yarn {
        factor: 40.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_max_positions: 16,
        attention_factor: 1.3,
    };
    let table =
        RotaryTable::new(rotary_dim, 1e4, &scaling, interleaved, positions).expect("a valid table");
    let table = if leading {
        table.of_leading_elements()
    } else {
        table
    };
    let x = f32_values(&mut rng(head_dim as u64), tokens * heads * head_dim, 3.0);
    let places: Vec<u32> = (0..tokens).map(|t| (t * 7 % positions) as u32).collect();
    let mut want = x.clone();
    table
        .rotate(&mut want, head_dim, &places)
        .expect("shapes fit");
    let places: Vec<i32> = places.iter().map(|&p| p as i32).collect();
    let (mut there, positions_there) = (on.input(&x), on.input(&places));
    let (cosines, sines) = (on.input(table.cosines()), on.input(table.sines()));
    let mut rounded = on.output::<bf16>(x.len());
    let args = Rotary {
        x: InOut::Over(there.view_mut()),
        angles: Angles {
            cosines: cosines.view(),
            sines: sines.view(),
            positions,
            pairs: table.pairs(),
            interleaved,
            leading,
        },
        positions: positions_there.view(),
        out_rows: None,
        out_bf16: Some(rounded.view_mut()),
        num_tokens: tokens,
        num_heads: heads,
        head_dim,
        x_pitch: heads * head_dim,
        num_out_rows: tokens,
        out_pitch: heads * head_dim,
        clip: None,
    };
    // SAFETY: rows keep their places.
    on.go(unsafe { rotary(args) });
    let (got, rounded) = (on.get(there.view()), on.get(rounded.view()));
    for (i, (&got, &want)) in got.iter().zip(&want).enumerate() {
        assert_close(f64::from(got), f64::from(want), 3e-6, || {
            format!("{head:?} element {i}")
        });
        assert_eq!(
            rounded[i].to_bits(),
            bf16::from_f32(got).to_bits(),
            "{head:?} element {i}"
        );
    }
}

pub fn rotary_and_mla_keys<B: Backend>(on: On<'_, B>, size: Size) {
    let tokens = num_rows(size);
    for interleaved in [false, true] {
        for head in [(64, 64), (128, 128), (192, 64), (24, 8), (7, 2)] {
            check_rotary(on, (interleaved, false), head, tokens);
            check_rotary(on, (interleaved, true), head, tokens);
        }
    }
    check_mla_keys(on, tokens, (128, 64, 128));
    check_mla_keys(on, tokens, (5, 2, 3));
}

fn check_mla_keys<B: Backend>(on: On<'_, B>, tokens: usize, dims: (usize, usize, usize)) {
    let (heads, (nope, rope, v)) = (4, dims);
    let pitch = 512 + rope;
    let mut rng = rng(5);
    let expanded = f32_values(&mut rng, tokens * heads * (nope + v), 2.0);
    let compressed = f32_values(&mut rng, tokens * pitch, 2.0);
    let (expanded_there, compressed_there) = (on.input(&expanded), on.input(&compressed));
    // Tokens go to rows of a cache, last first.
    let places: Vec<i32> = (0..tokens as i32).rev().collect();
    let places_there = on.input(&places);
    let mut keys = on.output::<bf16>(tokens * heads * (nope + rope));
    let mut values = on.output::<bf16>(tokens * heads * v);
    let args = MlaKeys {
        expanded: expanded_there.view(),
        compressed: compressed_there.view(),
        out_rows: Some(places_there.view()),
        keys: keys.view_mut(),
        values: values.view_mut(),
        num_tokens: tokens,
        num_out_rows: tokens,
        num_heads: heads,
        nope_dim: nope,
        rope_dim: rope,
        v_dim: v,
        compressed_pitch: pitch,
    };
    // SAFETY: every row once.
    on.go(unsafe { mla_keys(args) });
    let (keys, values) = (on.get(keys.view()), on.get(values.view()));
    for t in 0..tokens {
        let row = tokens - 1 - t;
        for h in 0..heads {
            let own = &expanded[(t * heads + h) * (nope + v)..][..nope + v];
            let shared = &compressed[(t + 1) * pitch - rope..(t + 1) * pitch];
            let want = own[..nope].iter().chain(shared).map(|&x| bf16::from_f32(x));
            let got = &keys[(row * heads + h) * (nope + rope)..][..nope + rope];
            assert!(want.eq(got.iter().copied()), "key of token {t}, head {h}");
            let want = own[nope..].iter().map(|&x| bf16::from_f32(x));
            let got = &values[(row * heads + h) * v..][..v];
            assert!(want.eq(got.iter().copied()), "value of token {t}, head {h}");
        }
    }
}
