//! Wrapper of `moe_accumulate.cu`: running sums of the neurons, from the sums of a product's tiles.

use super::call::Call;
use super::check::to_i32;
use super::geometry::{Launch, Product};
use super::moe_schedule::ExpertTables;
use super::view::{DeviceSlice, DeviceSliceMut};
use crate::KernelError;
use crate::params::{
    TENP_NUM_ACTIVATION_SUMS, TENP_NUM_CONTRIBUTION_SUMS, TENP_SUM_GATED_PEAK,
    TenpAccumulatePartialsParams,
};

/// Adds what the tiles of `product` left, tile by tile in order; gated peaks keep the maximum.
#[derive(Debug)]
pub struct AccumulatePartials<'a> {
    /// The product that made the partials: gate and up with statistics, or contribution.
    pub product: Product,
    /// The experts.
    pub experts: ExpertTables<'a>,
    /// `[num_sums(product), stride]`.
    pub partials: DeviceSlice<'a, f32>,
    /// `[experts + 1]` of the product's schedule.
    pub offsets: DeviceSlice<'a, i64>,
    /// Elements of one sum's partials.
    pub stride: usize,
    /// `[experts + 1]`.
    pub group_offsets: DeviceSlice<'a, i32>,
    /// `[num_sums(product), S]`, added to.
    pub sums: DeviceSliceMut<'a, f64>,
}

/// Number of sums that `product` makes of each neuron, and the mask of those that are maxima.
fn sums_of(product: Product) -> Option<(u32, u32)> {
    if product == Product::gate_up_stats(product.tile) {
        Some((TENP_NUM_ACTIVATION_SUMS, 1 << TENP_SUM_GATED_PEAK))
    } else if product == Product::contribution(product.tile) {
        Some((TENP_NUM_CONTRIBUTION_SUMS, 0))
    } else {
        None
    }
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths that do not fit, or a product that makes no sums.
pub fn accumulate_partials(mut args: AccumulatePartials<'_>) -> Result<Call<'_>, KernelError> {
    let (num_sums, maximum_mask) = sums_of(args.product).ok_or_else(|| KernelError::Invalid {
        what: "partial sums",
        why: format!("{} makes none", args.product.entry),
    })?;
    let layout = args.experts.layout;
    let (experts, neurons) = (layout.num_experts(), layout.total());
    let params = TenpAccumulatePartialsParams {
        partials: args
            .partials
            .checked("partial sums", num_sums as usize * args.stride, 4)?,
        partial_offsets: args.offsets.checked("partial offsets", experts + 1, 8)?,
        group_offsets: args
            .group_offsets
            .checked("group offsets", experts + 1, 4)?,
        neuron_offsets: args.experts.pointers()?.0,
        sums: args
            .sums
            .checked("sums of neurons", num_sums as usize * neurons, 8)?,
        partial_stride: args.stride as i64,
        num_experts: to_i32("experts", experts)?,
        token_tile: args.product.tile.rows() as i32,
        num_sums: num_sums as i32,
        maximum_mask,
    };
    Ok(Call::new(
        "tenp_accumulate_partials",
        launch(neurons, num_sums, experts),
        &params,
    ))
}

fn launch(neurons: usize, num_sums: u32, experts: usize) -> Launch {
    Launch {
        grid: [neurons.div_ceil(256) as u32, num_sums, 1],
        threads: 256,
        shared_bytes: 4 * (experts as u32 + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::super::PaddedLayout;
    use super::super::geometry::Tile;
    use super::*;
    use crate::RaggedLayout;

    #[test]
    fn arguments_are_checked() {
        let layout = PaddedLayout::new(&RaggedLayout::new(vec![16, 3]).unwrap()).unwrap();
        // SAFETY: nothing is read or written through the views.
        let ints = unsafe { DeviceSlice::<i32>::from_raw(0x1000, 3) };
        let call = |product, partials, sums| {
            accumulate_partials(AccumulatePartials {
                product,
                experts: ExpertTables {
                    layout: &layout,
                    neuron_offsets: ints,
                    widths: ints,
                },
                // SAFETY: as above.
                partials: unsafe { DeviceSlice::from_raw(0x2000, partials) },
                // SAFETY: as above.
                offsets: unsafe { DeviceSlice::from_raw(0x3000, 3) },
                stride: 64,
                group_offsets: ints,
                // SAFETY: as above.
                sums: unsafe { DeviceSliceMut::from_raw(0x4000, sums) },
            })
            .is_ok()
        };
        let (stats, contribution) = (
            Product::gate_up_stats(Tile::N64),
            Product::contribution(Tile::N64),
        );
        assert!(call(stats, 5 * 64, 5 * 32));
        assert!(!call(stats, 5 * 64 - 1, 5 * 32));
        assert!(!call(stats, 5 * 64, 5 * 32 - 1));
        assert!(call(contribution, 2 * 64, 2 * 32));
        assert!(!call(Product::down(Tile::N64), 5 * 64, 5 * 32));
    }

    #[test]
    fn sums_are_those_of_the_product() {
        assert_eq!(
            sums_of(Product::gate_up_stats(Tile::N64)),
            Some((5, 0b00100))
        );
        assert_eq!(sums_of(Product::contribution(Tile::N128)), Some((2, 0)));
        assert_eq!(sums_of(Product::gate_up(Tile::N64)), None);
        assert_eq!(sums_of(Product::down(Tile::N128)), None);
    }

    #[test]
    fn a_thread_per_neuron_and_sum() {
        let launch_of_five = Launch {
            grid: [3, 5, 1],
            threads: 256,
            shared_bytes: 36,
        };
        assert_eq!(launch(528, 5, 8), launch_of_five);
        assert!(launch(0, 5, 8).is_empty());
    }
}
