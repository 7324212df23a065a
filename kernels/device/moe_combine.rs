//! Wrapper of `moe_combine.cu`: the weighted sum of a token's expert outputs, and what is added to it.

use half::bf16;

use super::call::Call;
use super::check::{check_multiple, to_i32};
use super::geometry::Launch;
use super::moe_schedule::ExpertTables;
use super::view::{DeviceSlice, DeviceSliceMut, InOut, optional, optional_mut};
use crate::KernelError;
use crate::params::TenpMoeCombineParams;

/// `[rows, H]` the experts' outputs y.
#[derive(Clone, Copy, Debug)]
pub enum ExpertOutputs<'a> {
    /// As they were summed.
    F32(DeviceSlice<'a, f32>),
    /// Rounded.
    Bf16(DeviceSlice<'a, bf16>),
}

impl ExpertOutputs<'_> {
    /// The pointers of both forms, one of them null.
    pub(super) fn pointers(&self, len: usize) -> Result<(*const f32, *const u16), KernelError> {
        const WHAT: &str = "expert outputs";
        match self {
            Self::F32(y) => Ok((y.checked(WHAT, len, 16)?, std::ptr::null())),
            Self::Bf16(y) => Ok((std::ptr::null(), y.checked(WHAT, len, 16)?)),
        }
    }
}

/// The slots of a batch, as [`super::moe_group`] was given them and left them.
#[derive(Clone, Copy, Debug)]
pub struct Slots<'a> {
    /// `[T, k]`; −1 for a slot that is routed nowhere.
    pub row_of_slot: DeviceSlice<'a, i32>,
    /// `[T, k]`.
    pub expert_ids: DeviceSlice<'a, i32>,
    /// `[T, k]`.
    pub weights: DeviceSlice<'a, f32>,
    /// Tokens T.
    pub num_tokens: usize,
    /// Experts of a token, k.
    pub top_k: usize,
}

/// Pointers to `row_of_slot`, `expert_ids`, `weights`.
type SlotPointers = (*const i32, *const i32, *const f32);

impl Slots<'_> {
    /// Rows that the slots have.
    #[must_use]
    pub const fn num_rows(&self) -> usize {
        self.num_tokens * self.top_k
    }

    pub(super) fn pointers(&self) -> Result<SlotPointers, KernelError> {
        if self.top_k == 0 {
            return Err(KernelError::Invalid {
                what: "experts of a token",
                why: "there must be one at least".into(),
            });
        }
        let slots = self.num_rows();
        to_i32("slots", slots)?;
        Ok((
            self.row_of_slot.checked("rows of slots", slots, 4)?,
            self.expert_ids.checked("expert ids", slots, 4)?,
            self.weights.checked("routing weights", slots, 4)?,
        ))
    }
}

/// `[T, H]` what a shared expert adds.
#[derive(Clone, Copy, Debug)]
pub struct SharedOutput<'a> {
    /// `[T, H]`.
    pub output: DeviceSlice<'a, f32>,
    /// `[T]`: the output is multiplied by their sigmoid.
    pub logits: Option<DeviceSlice<'a, f32>>,
}

/// Where the sum of everything goes.
#[derive(Debug)]
pub enum CombineInto<'a> {
    /// Only m is wanted.
    Nothing,
    /// `[T, H]` m and the shared output.
    Fresh(DeviceSliceMut<'a, f32>),
    /// `[T, H]` the same added to the residual stream, apart or in its place.
    Residual(InOut<'a, f32>),
}

/// m = Σ g y over a token's slots, in slot order; then residual + (m + gate · shared).
#[derive(Debug)]
pub struct MoeCombine<'a> {
    /// The experts.
    pub experts: ExpertTables<'a>,
    /// `[rows, H]`.
    pub y: ExpertOutputs<'a>,
    /// The slots.
    pub slots: Slots<'a>,
    /// Added to m.
    pub shared: Option<SharedOutput<'a>>,
    /// `[T, H]`: m.
    pub combined: Option<DeviceSliceMut<'a, f32>>,
    /// Where the sum goes.
    pub into: CombineInto<'a>,
    /// Hidden size H, a multiple of 8.
    pub hidden: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths that do not fit, no expert per token, or nothing to write.
pub fn moe_combine(mut args: MoeCombine<'_>) -> Result<Call<'_>, KernelError> {
    check_multiple("hidden size", args.hidden, 8)?;
    let (y_f32, y_bf16) = args.y.pointers(args.slots.num_rows() * args.hidden)?;
    let (row_of_slot, expert_ids, slot_weights) = args.slots.pointers()?;
    let tokens = args.slots.num_tokens;
    let len = tokens * args.hidden;
    let (residual, out): (*const f32, *mut f32) = match &mut args.into {
        CombineInto::Nothing => (std::ptr::null(), std::ptr::null_mut()),
        CombineInto::Fresh(out) => (std::ptr::null(), out.checked("combined output", len, 16)?),
        CombineInto::Residual(both) => both.checked("residual stream", (len, len), 16)?,
    };
    if out.is_null() && args.combined.is_none() && len > 0 {
        return Err(KernelError::Invalid {
            what: "combined output",
            why: "neither it nor its sum with anything is wanted".into(),
        });
    }
    let shared = args.shared.as_ref();
    let params = TenpMoeCombineParams {
        y_f32,
        y_bf16,
        row_of_slot,
        expert_ids,
        slot_weights,
        widths: args.experts.pointers()?.1,
        shared: optional(shared.map(|s| &s.output), "shared output", len, 16)?,
        shared_logits: optional(
            shared.and_then(|s| s.logits.as_ref()),
            "shared logits",
            tokens,
            4,
        )?,
        residual,
        combined: optional_mut(args.combined.as_mut(), "combined output", len, 16)?,
        out,
        num_tokens: to_i32("tokens", tokens)?,
        top_k: to_i32("experts of a token", args.slots.top_k)?,
        hidden: to_i32("hidden size", args.hidden)?,
        padding: 0,
    };
    Ok(Call::new(
        "tenp_moe_combine",
        launch(tokens, args.hidden),
        &params,
    ))
}

fn launch(tokens: usize, hidden: usize) -> Launch {
    Launch {
        grid: [tokens as u32, hidden.div_ceil(2048) as u32, 1],
        threads: 256,
        shared_bytes: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::PaddedLayout;
    use super::*;
    use crate::RaggedLayout;

    #[test]
    fn eight_elements_a_thread() {
        let grid = |tokens, hidden| launch(tokens, hidden).grid;
        assert_eq!(grid(70_000, 2048), [70_000, 1, 1]);
        assert_eq!(grid(1, 7168), [1, 4, 1]);
        assert!(launch(0, 2048).is_empty());
    }

    #[test]
    fn arguments_are_checked() {
        let layout = PaddedLayout::new(&RaggedLayout::new(vec![16]).unwrap()).unwrap();
        // SAFETY: nothing is read or written through the views.
        let ints = unsafe { DeviceSlice::<i32>::from_raw(0x1000, 6) };
        // SAFETY: as above.
        let floats = |len| unsafe { DeviceSlice::<f32>::from_raw(0x2000, len) };
        // SAFETY: as above.
        let room = || unsafe { DeviceSliceMut::<f32>::from_raw(0x4000, 24) };
        let args = |top_k, hidden, y_len| MoeCombine {
            experts: ExpertTables {
                layout: &layout,
                neuron_offsets: ints,
                widths: ints,
            },
            y: ExpertOutputs::F32(floats(y_len)),
            slots: Slots {
                row_of_slot: ints,
                expert_ids: ints,
                weights: floats(6),
                num_tokens: 3,
                top_k,
            },
            shared: None,
            combined: Some(room()),
            into: CombineInto::Nothing,
            hidden,
        };
        assert!(moe_combine(args(2, 8, 48)).is_ok());
        assert!(moe_combine(args(2, 8, 47)).is_err());
        assert!(moe_combine(args(2, 12, 72)).is_err());
        assert!(moe_combine(args(2, 16, 96)).is_err());
        assert!(moe_combine(args(0, 8, 48)).is_err());
        let mut nothing = args(2, 8, 48);
        nothing.combined = None;
        assert!(matches!(
            moe_combine(nothing),
            Err(KernelError::Invalid { .. })
        ));
        let mut short = args(2, 8, 48);
        short.into = CombineInto::Residual(InOut::Apart(floats(23), Some(room())));
        assert!(moe_combine(short).is_err());
    }
}
