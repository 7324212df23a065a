//! Element types, and widening to f32.

use half::{bf16, f16};
use safetensors::tensor::Dtype as Stored;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Dtype {
    /// 64-bit float.
    F64,
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
    /// fp8 with 4 exponent bits: a weight together with its blocks' scales, [`crate::Matrix`].
    F8E4M3,
    /// fp8 with 5 exponent bits.
    F8E5M2,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 16-bit integer.
    I16,
    /// Signed byte.
    I8,
    /// Unsigned 64-bit integer.
    U64,
    /// Unsigned 32-bit integer.
    U32,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned byte.
    U8,
    /// Boolean, one byte.
    Bool,
}

impl Dtype {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// Whether an element of this type is a weight by itself (`F32`, `F16`, `BF16`).
    pub fn is_weight(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// The type as safetensors headers spell it.
    pub fn to_safetensors(self) -> Stored {
        match self {
            Self::F64 => Stored::F64,
            Self::F32 => Stored::F32,
            Self::F16 => Stored::F16,
            Self::BF16 => Stored::BF16,
            Self::F8E4M3 => Stored::F8_E4M3,
            Self::F8E5M2 => Stored::F8_E5M2,
            Self::I64 => Stored::I64,
            Self::I32 => Stored::I32,
            Self::I16 => Stored::I16,
            Self::I8 => Stored::I8,
            Self::U64 => Stored::U64,
            Self::U32 => Stored::U32,
            Self::U16 => Stored::U16,
            Self::U8 => Stored::U8,
            Self::Bool => Stored::BOOL,
        }
    }

    /// The type a safetensors header names; `None` for types no supported checkpoint uses.
    pub fn from_safetensors(stored: Stored) -> Option<Self> {
        Some(match stored {
            Stored::F64 => Self::F64,
            Stored::F32 => Self::F32,
            Stored::F16 => Self::F16,
            Stored::BF16 => Self::BF16,
            Stored::F8_E4M3 => Self::F8E4M3,
            Stored::F8_E5M2 => Self::F8E5M2,
            Stored::I64 => Self::I64,
            Stored::I32 => Self::I32,
            Stored::I16 => Self::I16,
            Stored::I8 => Self::I8,
            Stored::U64 => Self::U64,
            Stored::U32 => Self::U32,
            Stored::U16 => Self::U16,
            Stored::U8 => Self::U8,
            Stored::BOOL => Self::Bool,
            _ => return None,
        })
    }

    /// Widens little-endian weights, at any alignment, into `out`.
    ///
    /// Converts `min(bytes.len() / size, out.len())` elements. Returns false, touching nothing, when the type is not a
    /// weight type ([`Self::is_weight`]).
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) -> bool {
        match self {
            Self::F32 => {
                for (value, chunk) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*chunk);
                }
            }
            Self::BF16 => {
                for (value, chunk) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = bf16::from_le_bytes(*chunk).to_f32();
                }
            }
            Self::F16 => {
                for (value, chunk) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f16::from_le_bytes(*chunk).to_f32();
                }
            }
            _ => return false,
        }
        true
    }

    /// Rounds f32 values to weights of this type, little-endian, to the nearest and ties to even; `None` when the type is
    /// not a weight type. Undoes [`Self::widen`] bit for bit (but for NaN).
    pub fn narrow(self, values: &[f32]) -> Option<Vec<u8>> {
        Some(match self {
            Self::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::BF16 => values
                .iter()
                .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
                .collect(),
            Self::F16 => values
                .iter()
                .flat_map(|v| f16::from_f32(*v).to_le_bytes())
                .collect(),
            _ => return None,
        })
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F8E4M3 => "f8_e4m3",
            Self::F8E5M2 => "f8_e5m2",
            Self::I64 => "i64",
            Self::I32 => "i32",
            Self::I16 => "i16",
            Self::I8 => "i8",
            Self::U64 => "u64",
            Self::U32 => "u32",
            Self::U16 => "u16",
            Self::U8 => "u8",
            Self::Bool => "bool",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_reads_unaligned_bytes() {
        let mut bytes = vec![0_u8];
        for value in [1.0_f32, -2.5, 0.0] {
            bytes.extend_from_slice(&bf16::from_f32(value).to_le_bytes());
        }
        let mut out = [9.0; 3];
        assert!(Dtype::BF16.widen(&bytes[1..], &mut out));
        assert_eq!(out, [1.0, -2.5, 0.0]);
        assert!(!Dtype::F8E4M3.widen(&bytes, &mut out));
    }

    #[test]
    fn narrowing_undoes_widening() {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            let values = [1.0_f32, -2.5, 0.0, -0.0, 1.0 / 3.0, 3e4, f32::INFINITY];
            let bytes = dtype.narrow(&values).unwrap();
            assert_eq!(bytes.len(), values.len() * dtype.size());
            let mut widened = [0.0; 7];
            assert!(dtype.widen(&bytes, &mut widened));
            assert_eq!(dtype.narrow(&widened).unwrap(), bytes);
            assert!((widened[4] - values[4]).abs() < 2e-3);
        }
        assert_eq!(Dtype::I64.narrow(&[1.0]), None);
    }

    #[test]
    fn every_type_survives_the_header() {
        for stored in [
            Stored::F64,
            Stored::F32,
            Stored::F16,
            Stored::BF16,
            Stored::F8_E4M3,
            Stored::F8_E5M2,
            Stored::I64,
            Stored::I32,
            Stored::I16,
            Stored::I8,
            Stored::U64,
            Stored::U32,
            Stored::U16,
            Stored::U8,
            Stored::BOOL,
        ] {
            let dtype = Dtype::from_safetensors(stored).unwrap();
            assert_eq!(dtype.to_safetensors(), stored);
            assert_eq!(dtype.size() * 8, stored.bitsize());
        }
        assert_eq!(Dtype::from_safetensors(Stored::F4), None);
    }
}
