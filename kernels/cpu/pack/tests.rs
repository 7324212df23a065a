// Coordinates are clearer than nested iterators here.
#![allow(clippy::needless_range_loop)]

use half::{bf16, f16};

use super::*;
use crate::cpu::tile::TILE_COLS;
use crate::matrix::Dtype;

fn value(i: usize) -> f32 {
    ((i * 2_654_435_761) % 4001) as f32 / 1000.0 - 2.0
}

fn packed_value(
    packing: Packing,
    packed: &[u32],
    pitch: usize,
    inner: usize,
    column: usize,
) -> f32 {
    match packing {
        Packing::F32 | Packing::Rounded => f32::from_bits(packed[inner * pitch + column]),
        Packing::Pairs => {
            let pair = packed[inner / 2 * pitch + column];
            f32::from_bits(if inner.is_multiple_of(2) {
                pair << 16
            } else {
                pair & 0xffff_0000
            })
        }
    }
}

fn packings() -> Vec<Packing> {
    let mut all = vec![Packing::F32, Packing::Rounded];
    if crate::cpu::isa().has_pairs() {
        all.push(Packing::Pairs);
    }
    all
}

fn expect(packing: Packing, v: f32) -> f32 {
    if packing == Packing::F32 {
        v
    } else {
        bf16::from_f32(v).to_f32()
    }
}

#[test]
fn bf16_rounding_is_halfs() {
    for i in 0..200_000u32 {
        let x = f32::from_bits(i.wrapping_mul(0x9e37_79b9));
        let (got, want) = (
            f32::from_bits(bf16_bits(x) << 16),
            bf16::from_f32(x).to_f32(),
        );
        assert!(
            got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()),
            "{x}: {got} {want}"
        );
    }
}

#[test]
fn rows_come_out_where_the_tile_reads_them() {
    for packing in packings() {
        for n in [1usize, 3, 13, 14] {
            for inner in [1usize, 2, 15, 16, 17, 33, 130] {
                let data: Vec<f32> = (0..n * inner).map(value).collect();
                let rows: Vec<&[f32]> = data.chunks(inner).collect();
                let mut out = vec![0xdead_beef; packing.steps(inner) * n];
                pack_rows(packing, &rows, &mut out);
                for r in 0..n {
                    for i in 0..inner {
                        assert_eq!(
                            packed_value(packing, &out, n, i, r),
                            expect(packing, rows[r][i])
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn weight_blocks_of_every_dtype_match_their_source() {
    for packing in packings() {
        for (rows, inner) in [
            (1usize, 1usize),
            (20, 17),
            (32, 16),
            (40, 33),
            (33, 64),
            (35, 47),
            (140, 300),
            (33, 557),
        ] {
            let data: Vec<f32> = (0..rows * inner)
                .map(|i| f16::from_f32(value(i)).to_f32())
                .collect();
            let b16: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
            let h16: Vec<u8> = data
                .iter()
                .flat_map(|&v| f16::from_f32(v).to_le_bytes())
                .collect();
            let codes: Vec<u8> = (0..rows * inner)
                .map(|i| (i * 89 % 253) as u8)
                .filter(|code| code & 0x7f != 0x7f)
                .chain(std::iter::repeat(3))
                .take(rows * inner)
                .collect();
            let scales: Vec<u8> = (0..rows.div_ceil(128) * inner.div_ceil(128))
                .flat_map(|i| (0.37 + i as f32).to_le_bytes())
                .collect();
            let views = [
                MatrixView::from_f32(rows, inner, &data).unwrap(),
                MatrixView::from_bf16(rows, inner, &b16).unwrap(),
                MatrixView::new(Dtype::F16, rows, inner, &h16).unwrap(),
                MatrixView::from_fp8(rows, inner, &codes, &scales).unwrap(),
            ];
            for view in views {
                let all = view.to_f32();
                for first in (0..rows).step_by(TILE_COLS) {
                    let mut out = vec![0xdead_beef; packing.steps(inner) * TILE_COLS];
                    BlockRows::plain(&view, first).pack(packing, &mut out);
                    for c in 0..TILE_COLS {
                        for i in 0..inner {
                            let want = if first + c < rows {
                                expect(packing, all[(first + c) * inner + i])
                            } else {
                                0.0
                            };
                            assert_eq!(packed_value(packing, &out, TILE_COLS, i, c), want);
                        }
                    }
                }
                for first in (0..inner).step_by(TILE_COLS) {
                    let mut out = vec![0xdead_beef; packing.steps(rows) * TILE_COLS];
                    pack_columns(packing, &view, first, &mut out);
                    for c in 0..TILE_COLS {
                        for i in 0..rows {
                            let want = if first + c < inner {
                                expect(packing, all[i * inner + first + c])
                            } else {
                                0.0
                            };
                            assert_eq!(packed_value(packing, &out, TILE_COLS, i, c), want);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn every_block_of_an_fp8_matrix_has_its_own_scale() {
    let (rows, cols) = (130, 257);
    // 0x38 is 1.
    let codes = vec![0x38u8; rows * cols];
    let scales: Vec<u8> = (0..6)
        .flat_map(|i| (1.5 + i as f32).to_le_bytes())
        .collect();
    let view = MatrixView::from_fp8(rows, cols, &codes, &scales).unwrap();
    for (i, value) in view.to_f32().into_iter().enumerate() {
        let block = i / cols / 128 * 3 + i % cols / 128;
        assert_eq!(value, 1.5 + block as f32);
    }
    let mut rounded = vec![bf16::ZERO; cols];
    view.round_row(129, &mut rounded).unwrap();
    assert_eq!(rounded[256].to_f32(), 6.5);
    assert!(MatrixView::from_fp8(rows, cols, &codes[1..], &scales).is_err());
    assert!(MatrixView::from_fp8(rows, cols, &codes, &scales[4..]).is_err());
    assert!(MatrixView::new(Dtype::F8E4m3, rows, cols, &codes).is_err());
}
