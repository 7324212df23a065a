//! Wrapper of `moe_schedule.cu`: the tiles of the grouped products, from the rows that experts got.

use super::PaddedLayout;
use super::call::Call;
use super::check::to_i32;
use super::geometry::{Launch, Product};
use super::view::{DeviceSlice, DeviceSliceMut, optional_mut};
use crate::KernelError;
use crate::params::{TENP_MAX_SCHEDULES, TenpMoeScheduleParams, TenpScheduleSpec};

/// The experts of a layer, on both sides.
#[derive(Clone, Copy, Debug)]
pub struct ExpertTables<'a> {
    /// What the two tables hold.
    pub layout: &'a PaddedLayout,
    /// `[experts + 1]`, [`PaddedLayout::neuron_offsets`].
    pub neuron_offsets: DeviceSlice<'a, i32>,
    /// `[experts]`, [`PaddedLayout::widths`].
    pub widths: DeviceSlice<'a, i32>,
}

impl ExpertTables<'_> {
    pub(super) fn pointers(&self) -> Result<(*const i32, *const i32), KernelError> {
        let experts = self.layout.num_experts();
        Ok((
            self.neuron_offsets
                .checked("neuron offsets", experts + 1, 4)?,
            self.widths.checked("expert widths", experts, 4)?,
        ))
    }
}

/// Where one product's schedule goes.
#[derive(Debug)]
pub struct ScheduleOut<'a> {
    /// The product it is for.
    pub product: Product,
    /// Outputs of every expert, for the down product; `None`: its neurons.
    pub outputs: Option<usize>,
    /// `[experts]`: experts, those with the most neurons first.
    pub order: DeviceSliceMut<'a, i32>,
    /// `[experts + 1]`.
    pub tile_offsets: DeviceSliceMut<'a, i32>,
    /// `[experts + 1]`, for products that leave partial sums.
    pub partial_offsets: Option<DeviceSliceMut<'a, i64>>,
}

/// A schedule to run a product by.
#[derive(Clone, Copy, Debug)]
pub struct Schedule<'a> {
    /// `[experts]`.
    pub order: DeviceSlice<'a, i32>,
    /// `[experts + 1]`.
    pub tile_offsets: DeviceSlice<'a, i32>,
}

impl Schedule<'_> {
    pub(super) fn pointers(&self, experts: usize) -> Result<(*const i32, *const i32), KernelError> {
        Ok((
            self.order.checked("schedule order", experts, 4)?,
            self.tile_offsets
                .checked("schedule tiles", experts + 1, 4)?,
        ))
    }
}

/// Makes up to [`TENP_MAX_SCHEDULES`] schedules in one launch.
///
/// # Errors
/// Lengths that do not fit, or too many schedules.
pub fn moe_schedule<'a>(
    experts: &ExpertTables<'a>,
    group_offsets: DeviceSlice<'a, i32>,
    mut schedules: Vec<ScheduleOut<'a>>,
) -> Result<Call<'a>, KernelError> {
    const NONE: TenpScheduleSpec = TenpScheduleSpec {
        order: std::ptr::null_mut(),
        tile_offsets: std::ptr::null_mut(),
        partial_offsets: std::ptr::null_mut(),
        token_tile: 1,
        weight_tile: 1,
        outputs: 0,
        padding: 0,
    };
    let count = experts.layout.num_experts();
    let mut specs = [NONE; TENP_MAX_SCHEDULES as usize];
    if schedules.len() > specs.len() {
        return Err(KernelError::Invalid {
            what: "schedules",
            why: format!("{} in one launch, at most {}", schedules.len(), specs.len()),
        });
    }
    for (spec, s) in specs.iter_mut().zip(&mut schedules) {
        *spec = TenpScheduleSpec {
            order: s.order.checked("schedule order", count, 4)?,
            tile_offsets: s.tile_offsets.checked("schedule tiles", count + 1, 4)?,
            partial_offsets: optional_mut(
                s.partial_offsets.as_mut(),
                "partial offsets",
                count + 1,
                8,
            )?,
            token_tile: s.product.tile.rows() as i32,
            weight_tile: to_i32("weight tile", s.product.weight_tile)?,
            outputs: to_i32("outputs of an expert", s.outputs.unwrap_or(0))?,
            padding: 0,
        };
    }
    let params = TenpMoeScheduleParams {
        group_offsets: group_offsets.checked("group offsets", count + 1, 4)?,
        neuron_offsets: experts.pointers()?.0,
        specs,
        num_experts: to_i32("experts", count)?,
        num_specs: schedules.len() as i32,
    };
    Ok(Call::new(
        "tenp_moe_schedule",
        launch(schedules.len(), count),
        &params,
    ))
}

fn launch(schedules: usize, experts: usize) -> Launch {
    Launch::line(schedules as u32, 256, 16 * experts as u32 + 8 * 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_per_schedule() {
        assert_eq!(launch(3, 64), Launch::line(3, 256, 1280));
    }
}
