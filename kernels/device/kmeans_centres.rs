//! Wrapper of `kmeans_centres.cu`: the centres of weighted spherical k-means moved to their members.

use half::bf16;

use super::call::Call;
use super::check::to_i32;
use super::geometry::Launch;
use super::packed::NEURON_PAD;
use super::segment_match::SegmentTable;
use super::view::{DeviceSlice, DeviceSliceMut, optional};
use crate::KernelError;
use crate::params::TenpKmeansCentresParams;

/// [`crate::cpu::segments::update_centres`] on packed experts.
#[derive(Debug)]
pub struct KmeansCentres<'a> {
    /// Where the segments come from.
    pub segments: SegmentTable<'a>,
    /// `[num_segments]` neurons of `segments`.
    pub segment_ids: DeviceSlice<'a, i32>,
    /// `[num_segments]` +1 or −1: up and down parts are multiplied by it.
    pub signs: Option<DeviceSlice<'a, f32>>,
    /// `[num_segments]`, 0 or more.
    pub weights: DeviceSlice<'a, f32>,
    /// `[num_centres + 1]`: where the members of each centre begin in `member_ids`.
    pub member_offsets: DeviceSlice<'a, i32>,
    /// `[num_segments]` indices into `segment_ids`.
    pub member_ids: DeviceSlice<'a, i32>,
    /// [`scratch_len`].
    pub scratch: DeviceSliceMut<'a, f32>,
    /// `[2 C, H]`, C the centres rounded up to a multiple of [`NEURON_PAD`].
    pub centre_gate_up: DeviceSliceMut<'a, bf16>,
    /// `[C, H]`.
    pub centre_down_t: DeviceSliceMut<'a, bf16>,
    /// `[num_centres]`: members that counted; with none the centre is left alone.
    pub num_weighted: DeviceSliceMut<'a, i32>,
    /// Number of segments.
    pub num_segments: usize,
    /// Number of centres.
    pub num_centres: usize,
    /// Hidden size H, a multiple of 8.
    pub hidden: usize,
}

/// Length of the scratch.
#[must_use]
pub const fn scratch_len(num_centres: usize, hidden: usize) -> usize {
    3 * num_centres * hidden
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths that do not fit.
///
/// # Safety
/// Segment ids are below the table's `num_neurons`, member ids below `num_segments`, and member offsets go up from 0 or
/// more to `num_segments` at most.
pub unsafe fn kmeans_centres(mut args: KmeansCentres<'_>) -> Result<Call<'_>, KernelError> {
    let (n, centres, hidden) = (args.num_segments, args.num_centres, args.hidden);
    let padded = centres.next_multiple_of(NEURON_PAD);
    let (gate_up, down_t, inverse) = args.segments.pointers(hidden)?;
    to_i32("segments", n)?;
    let params = TenpKmeansCentresParams {
        gate_up,
        down_t,
        inverse,
        segment_ids: args.segment_ids.checked("segments", n, 4)?,
        signs: optional(args.signs.as_ref(), "signs of segments", n, 4)?,
        weights: args.weights.checked("weights of segments", n, 4)?,
        group_offsets: args
            .member_offsets
            .checked("offsets of members", centres + 1, 4)?,
        member_ids: args.member_ids.checked("members of clusters", n, 4)?,
        scratch: args
            .scratch
            .checked("scratch of centres", scratch_len(centres, hidden), 4)?,
        centre_gate_up: args.centre_gate_up.checked(
            "gate and up of centres",
            2 * padded * hidden,
            16,
        )?,
        centre_down_t: args
            .centre_down_t
            .checked("down of centres", padded * hidden, 16)?,
        num_weighted: args.num_weighted.checked("counts of members", centres, 4)?,
        stride: args.segments.num_neurons as i64,
        num_centres: to_i32("centres", centres)?,
        hidden: to_i32("hidden size", hidden)?,
    };
    Ok(Call::new("tenp_kmeans_centres", launch(centres), &params))
}

fn launch(centres: usize) -> Launch {
    Launch::line(centres as u32, 256, 128)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_per_centre() {
        assert_eq!(launch(1408), Launch::line(1408, 256, 128));
        assert!(launch(0).is_empty());
    }

    #[test]
    fn arguments_are_checked() {
        // SAFETY: nothing is read or written through the views.
        let weights = |len| unsafe { DeviceSlice::<bf16>::from_raw(0x1000, len) };
        // SAFETY: as above.
        let room = |len| unsafe { DeviceSliceMut::<bf16>::from_raw(0x4000, len) };
        // SAFETY: as above.
        let floats = |len| unsafe { DeviceSlice::<f32>::from_raw(0x8000, len) };
        // SAFETY: as above.
        let ints = |len| unsafe { DeviceSlice::<i32>::from_raw(0x9000, len) };
        let call = |scratch, centres: usize, segments| {
            let args = KmeansCentres {
                segments: SegmentTable {
                    gate_up: weights(2 * 32 * 8),
                    down_t: weights(32 * 8),
                    inverse: floats(4 * 32),
                    num_neurons: 32,
                },
                segment_ids: ints(20),
                signs: None,
                weights: floats(20),
                member_offsets: ints(18),
                member_ids: ints(20),
                // SAFETY: as above.
                scratch: unsafe { DeviceSliceMut::from_raw(0xa000, scratch) },
                centre_gate_up: room(2 * centres * 8),
                centre_down_t: room(centres * 8),
                // SAFETY: as above.
                num_weighted: unsafe { DeviceSliceMut::from_raw(0xb000, 17) },
                num_segments: segments,
                num_centres: 17,
                hidden: 8,
            };
            // SAFETY: the call is never run.
            unsafe { kmeans_centres(args) }.is_ok()
        };
        assert!(call(3 * 17 * 8, 32, 20));
        assert!(!call(3 * 17 * 8 - 1, 32, 20));
        assert!(!call(3 * 17 * 8, 17, 20));
        assert!(!call(3 * 17 * 8, 32, 21));
    }
}
