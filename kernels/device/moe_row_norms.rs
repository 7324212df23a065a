//! Wrapper of `moe_row_norms.cu`: norms of the experts' outputs, from the squares that the down product left.

use super::call::Call;
use super::check::to_i32;
use super::geometry::Launch;
use super::moe_schedule::ExpertTables;
use super::view::{DeviceSlice, DeviceSliceMut, optional_mut};
use crate::KernelError;
use crate::params::TenpMoeRowNormsParams;

/// ‖y‖ of every row, and 1 / (‖y‖ + 1e-8). Rows in no group are left alone.
#[derive(Debug)]
pub struct MoeRowNorms<'a> {
    /// The experts.
    pub experts: ExpertTables<'a>,
    /// `[num_partials, num_rows]` of the down product.
    pub square_partials: DeviceSlice<'a, f32>,
    /// `[experts + 1]`.
    pub group_offsets: DeviceSlice<'a, i32>,
    /// `[rows]`; 0 where ‖y‖ is zero or not finite.
    pub row_inverse: DeviceSliceMut<'a, f32>,
    /// `[rows]`; 0 where ‖y‖ is not finite.
    pub row_norms: Option<DeviceSliceMut<'a, f64>>,
    /// `[experts]`, added to: rows whose norm is not finite.
    pub non_finite: DeviceSliceMut<'a, i32>,
    /// Rows at most.
    pub num_rows: usize,
    /// Output tiles: [`super::moe_down::square_partials`].
    pub num_partials: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths that do not fit.
pub fn moe_row_norms(mut args: MoeRowNorms<'_>) -> Result<Call<'_>, KernelError> {
    let (experts, rows) = (args.experts.layout.num_experts(), args.num_rows);
    let squares = args.num_partials * rows;
    let params = TenpMoeRowNormsParams {
        square_partials: args
            .square_partials
            .checked("partial squares", squares, 4)?,
        group_offsets: args
            .group_offsets
            .checked("group offsets", experts + 1, 4)?,
        widths: args.experts.pointers()?.1,
        row_inverse: args.row_inverse.checked("inverse norms", rows, 4)?,
        row_norms: optional_mut(args.row_norms.as_mut(), "norms of rows", rows, 8)?,
        non_finite: args
            .non_finite
            .checked("rows that are not finite", experts, 4)?,
        num_rows: i64::from(to_i32("rows", rows)?),
        num_partials: to_i32("partial squares of a row", args.num_partials)?,
        num_experts: to_i32("experts", experts)?,
    };
    Ok(Call::new(
        "tenp_moe_row_norms",
        launch(rows, experts),
        &params,
    ))
}

fn launch(rows: usize, experts: usize) -> Launch {
    Launch::line(rows.div_ceil(256) as u32, 256, 4 * (experts as u32 + 1))
}

#[cfg(test)]
mod tests {
    use super::super::PaddedLayout;
    use super::*;
    use crate::RaggedLayout;

    #[test]
    fn lengths_are_checked() {
        let layout = PaddedLayout::new(&RaggedLayout::new(vec![16, 3]).unwrap()).unwrap();
        // SAFETY: nothing is read or written through the views.
        let ints = unsafe { DeviceSlice::<i32>::from_raw(0x1000, 3) };
        let call = |squares, inverse, non_finite| {
            moe_row_norms(MoeRowNorms {
                experts: ExpertTables {
                    layout: &layout,
                    neuron_offsets: ints,
                    widths: ints,
                },
                // SAFETY: as above.
                square_partials: unsafe { DeviceSlice::from_raw(0x2000, squares) },
                group_offsets: ints,
                // SAFETY: as above.
                row_inverse: unsafe { DeviceSliceMut::from_raw(0x3000, inverse) },
                row_norms: None,
                // SAFETY: as above.
                non_finite: unsafe { DeviceSliceMut::from_raw(0x4000, non_finite) },
                num_rows: 10,
                num_partials: 4,
            })
            .is_ok()
        };
        assert!(call(40, 10, 2));
        assert!(!call(39, 10, 2));
        assert!(!call(40, 9, 2));
        assert!(!call(40, 10, 1));
    }

    #[test]
    fn a_thread_per_row() {
        assert_eq!(launch(257, 64), Launch::line(2, 256, 260));
        assert!(launch(0, 64).is_empty());
    }
}
