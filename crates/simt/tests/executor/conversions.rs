//! Number formats, against the `half` crate and the definition of E4M3.

use half::bf16;
use simt::{Buffer, launch};

#[repr(C)]
#[derive(Clone, Copy)]
struct ConvertParams {
    floats: *const f32,
    halves: *const u16,
    bytes: *const u8,
    bf16_of_float: *mut u16,
    packed: *mut u32,
    float_of_bf16: *mut f32,
    unpacked: *mut f32,
    float_of_e4m3: *mut f32,
    count: i32,
    padding: i32,
}

/// OCP 8-bit floating point, E4M3: sign, 4 bits of exponent with bias 7, 3 bits of fraction.
fn e4m3(bits: u8) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 3 & 15), f64::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f64::NAN,
        (0, _) => fraction / 8.0 * 2f64.powi(-6),
        _ => (1.0 + fraction / 8.0) * 2f64.powi(exponent - 7),
    };
    if bits & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

#[test]
fn all_values_of_bf16_and_e4m3() {
    // Below, at and above the middle between two values of bf16, and both ends.
    let tails = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
    let count = 65536 * tails.len();
    let bits: Vec<u32> = (0..=u16::MAX)
        .flat_map(|high| tails.map(|tail| u32::from(high) << 16 | tail))
        .collect();
    let floats = Buffer::input("floats", &bits);
    let halves: Vec<u16> = (0..count).map(|i| i as u16).collect();
    let halves = Buffer::input("halves", &halves);
    let bytes: Vec<u8> = (0..count).map(|i| i as u8).collect();
    let bytes = Buffer::input("bytes", &bytes);
    let bf16_of_float = Buffer::output("bf16_of_float", count);
    let packed = Buffer::output("packed", count);
    let float_of_bf16 = Buffer::output("float_of_bf16", count);
    let unpacked = Buffer::output("unpacked", 2 * count);
    let float_of_e4m3 = Buffer::output("float_of_e4m3", count);
    let params = ConvertParams {
        floats: floats.ptr().cast(),
        halves: halves.ptr(),
        bytes: bytes.ptr(),
        bf16_of_float: bf16_of_float.mut_ptr(),
        packed: packed.mut_ptr(),
        float_of_bf16: float_of_bf16.mut_ptr(),
        unpacked: unpacked.mut_ptr(),
        float_of_e4m3: float_of_e4m3.mut_ptr(),
        count: count as i32,
        padding: 0,
    };
    launch(
        "test_conversions",
        [count as u32 / 256, 1, 1],
        [256, 1, 1],
        0,
        &params,
    )
    .unwrap();

    let packed = packed.written().unwrap();
    let unpacked = unpacked.written().unwrap();
    for (i, got) in bf16_of_float.written().unwrap().into_iter().enumerate() {
        let value = f32::from_bits(bits[i]);
        if value.is_nan() {
            assert_eq!(got, 0x7fff, "{:#x}", bits[i]);
            continue;
        }
        assert_eq!(got, bf16::from_f32(value).to_bits(), "{value}");
        assert_eq!(packed[i] & 0xffff, u32::from(got));
        assert_eq!(packed[i] >> 16, u32::from(got ^ 0x8000));
        assert!(same(unpacked[2 * i], bf16::from_bits(got).to_f32()));
        assert!(same(unpacked[2 * i + 1], -unpacked[2 * i]));
    }
    for (i, got) in float_of_bf16.written().unwrap().into_iter().enumerate() {
        assert!(same(got, bf16::from_bits(i as u16).to_f32()));
    }
    for (i, got) in float_of_e4m3.written().unwrap().into_iter().enumerate() {
        assert!(same(got, e4m3(i as u8) as f32), "{:#x}: {got}", i as u8);
    }
    assert_eq!(e4m3(0x7e), 448.0);
    assert_eq!(e4m3(0x01), 2f64.powi(-9));
}
