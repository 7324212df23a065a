//! Gram matrices of the experts' down projections, for contributions that need no y: G = `W_downᵀ · W_down` per expert, so
//! that ⟨w_j, y⟩ = (G h)_j. In bf16 alone the rounding of G's diagonal would be in every token's term alike, so G is kept as a
//! sum of two bf16 numbers. When that is worth its while: [`MoeWork::gram_wins`](crate::cost::MoeWork::gram_wins).

use half::bf16;

use super::backend::{Backend, Memory};
use super::call::Call;
use super::check::{check_multiple, to_i32};
use super::dense::DenseShape;
use super::geometry::Launch;
use super::packed::{NEURON_PAD, PaddedLayout};
use super::view::{DeviceSlice, DeviceSliceMut};
use crate::KernelError;
use crate::params::TenpGramSplitParams;

/// An expert's G in f32 into its place in two parts.
#[derive(Debug)]
pub struct GramSplit<'a> {
    /// `[width, width]`.
    pub gram: DeviceSlice<'a, f32>,
    /// `[2 · num_neurons, pitch]`: rows `first_row..` get the nearest bf16, rows `num_neurons + first_row..` what is missing.
    pub out: DeviceSliceMut<'a, bf16>,
    /// Padded neurons of the expert.
    pub width: usize,
    /// Elements from one row of `out` to the next, a multiple of 8.
    pub pitch: usize,
    /// The expert's first padded neuron.
    pub first_row: usize,
    /// Padded neurons of all experts.
    pub num_neurons: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Sizes that do not fit together.
pub fn gram_split(mut args: GramSplit<'_>) -> Result<Call<'_>, KernelError> {
    check_multiple("padded width", args.width, NEURON_PAD)?;
    check_multiple("pitch of Gram matrices", args.pitch, 8)?;
    if args.width > args.pitch || args.first_row + args.width > args.num_neurons {
        return Err(KernelError::Invalid {
            what: "Gram matrix",
            why: format!(
                "{} neurons from {} on do not fit into {} rows of {}",
                args.width, args.first_row, args.num_neurons, args.pitch
            ),
        });
    }
    let (square, room) = (args.width * args.width, 2 * args.num_neurons * args.pitch);
    let params = TenpGramSplitParams {
        in_: args.gram.checked("Gram matrix", square, 16)?,
        out: args.out.checked("Gram matrices", room, 16)?,
        width: to_i32("padded width", args.width)?,
        pitch: to_i32("pitch of Gram matrices", args.pitch)?,
        first_row: to_i32("first neuron", args.first_row)?,
        num_neurons: to_i32("padded neurons", args.num_neurons)?,
    };
    let launch = Launch::row_per_block(args.width, args.width / 8);
    Ok(Call::new("tenp_gram_split", launch, &params))
}

/// Bytes that [`gram_matrices`] takes: for what it returns, and for one matrix in f32 while it works.
#[must_use]
pub fn gram_bytes(layout: &PaddedLayout) -> usize {
    let parts = 2 * layout.total() * layout.hidden_pitch();
    parts * size_of::<bf16>() + widest(layout).pow(2) * size_of::<f32>()
}

fn widest(layout: &PaddedLayout) -> usize {
    let widths = (0..layout.num_experts()).map(|e| layout.range(e).len());
    widths.max().unwrap_or(0)
}

/// Both parts of every expert's G, `[2S, hidden_pitch]`: all nearest bf16 numbers, then all remainders. Row `j` of an expert has
/// as many elements as the expert has padded neurons; what is behind them is left alone. `down_t` is `DT`, `[S, H]`.
///
/// # Errors
/// Not enough memory; the backend's own words.
pub fn gram_matrices<B: Backend>(
    backend: &B,
    layout: &PaddedLayout,
    down_t: DeviceSlice<'_, bf16>,
    hidden: usize,
) -> Result<B::Buffer<bf16>, KernelError> {
    let (neurons, pitch, widest) = (layout.total(), layout.hidden_pitch(), widest(layout));
    let mut parts = backend.alloc::<bf16>("Gram matrices", 2 * neurons * pitch)?;
    let mut whole = backend.alloc::<f32>("Gram matrix", widest * widest)?;
    for expert in 0..layout.num_experts() {
        let range = layout.range(expert);
        let width = range.len();
        if width == 0 {
            continue;
        }
        let rows = down_t.slice(range.start * hidden..range.end * hidden)?;
        let out = whole.view_mut().slice(0..width * width)?;
        backend.dense(&DenseShape::new(width, hidden, width), rows, rows, out)?;
        backend.run(&gram_split(GramSplit {
            gram: whole.view(),
            out: parts.view_mut(),
            width,
            pitch,
            first_row: range.start,
            num_neurons: neurons,
        })?)?;
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_has_to_fit_into_its_place() {
        let call = |width, pitch, first_row, room| {
            // SAFETY: nothing is ever read or written through the views.
            let (gram, out) = unsafe {
                (
                    DeviceSlice::from_raw(0x1000, 48 * 48),
                    DeviceSliceMut::from_raw(0x8000, room),
                )
            };
            gram_split(GramSplit {
                gram,
                out,
                width,
                pitch,
                first_row,
                num_neurons: 80,
            })
            .map(|call| call.launch())
        };
        assert_eq!(call(48, 64, 32, 2 * 80 * 64), Ok(Launch::line(48, 32, 0)));
        assert!(call(48, 64, 32, 2 * 80 * 64 - 1).is_err());
        assert!(call(48, 64, 33, 2 * 80 * 64).is_err());
        assert!(call(48, 40, 0, 2 * 80 * 64).is_err());
        assert!(call(40, 64, 0, 2 * 80 * 64).is_err());
        assert!(call(48, 60, 0, 2 * 80 * 64).is_err());
        assert!(call(64, 64, 0, 2 * 80 * 64).is_err());
    }
}
