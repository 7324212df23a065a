//! Wrappers of `segment_match.cu` and `segment_best.cu`: which neurons of packed experts are most alike
//! (`docs/methods.md` section 5).

use std::ops::Range;

use half::bf16;

use super::call::Call;
use super::check::{check_multiple, to_i32};
use super::geometry::Launch;
use super::packed::NEURON_PAD;
use super::tensor_map::TensorMap;
use super::view::{DeviceSlice, DeviceSliceMut, optional, optional_mut};
use crate::KernelError;
use crate::cpu::segments::Similarity;
pub use crate::params::TenpSegmentItem as SegmentItem;
use crate::params::{TENP_SEGMENT_ROWS, TenpSegmentBestParams, TenpSegmentMatchParams};

// SAFETY: integers only, whose zeros are values, and no padding: its size is asserted beside its definition.
unsafe impl bytemuck::Zeroable for SegmentItem {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for SegmentItem {}

/// Packed experts whose neurons are compared.
#[derive(Clone, Copy, Debug)]
pub struct SegmentTable<'a> {
    /// `[2S, H]`.
    pub gate_up: DeviceSlice<'a, bf16>,
    /// `[S, H]`.
    pub down_t: DeviceSlice<'a, bf16>,
    /// `[4, S]` of [`super::segment_norms`].
    pub inverse: DeviceSlice<'a, f32>,
    /// Padded neurons S.
    pub num_neurons: usize,
}

impl SegmentTable<'_> {
    pub(super) fn pointers(
        &self,
        hidden: usize,
    ) -> Result<(*const u16, *const u16, *const f32), KernelError> {
        let neurons = self.num_neurons;
        check_multiple("hidden size", hidden, 8)?;
        check_multiple("padded neurons", neurons, NEURON_PAD)?;
        to_i32("rows of GU", 2 * neurons)?;
        Ok((
            self.gate_up
                .checked("gate and up weights", 2 * neurons * hidden, 16)?,
            self.down_t.checked("down weights", neurons * hidden, 16)?,
            self.inverse
                .checked("inverse norms of neurons", 4 * neurons, 4)?,
        ))
    }
}

/// Rows of one table against columns of another.
#[derive(Debug)]
pub struct SegmentMatch<'a> {
    /// Where the rows come from.
    pub rows: SegmentTable<'a>,
    /// `[num_rows]` neurons of `rows`.
    pub row_ids: DeviceSlice<'a, i32>,
    /// Where the columns come from.
    pub columns: SegmentTable<'a>,
    /// What is compared: a block each. No two may write to the same place.
    pub items: &'a [SegmentItem],
    /// The same on the GPU.
    pub items_on_device: DeviceSlice<'a, SegmentItem>,
    /// Largest value; −∞ where no column compares.
    pub best_value: DeviceSliceMut<'a, f32>,
    /// Its column, counted from the item's first, ties to the lowest; −1 where no column compares.
    pub best_id: DeviceSliceMut<'a, i32>,
    /// 1 where the best match is the row with up and down negated.
    pub best_flip: Option<DeviceSliceMut<'a, i32>>,
    /// Number of rows.
    pub num_rows: usize,
    /// Hidden size H, a multiple of 8.
    pub hidden: usize,
    /// With the products of sm_90: [`super::Runner::has_wgmma`].
    pub wgmma: bool,
}

/// The items that compare all of `num_rows` rows with each group of columns: results are `[groups, num_rows]`.
///
/// # Errors
/// Numbers past what a kernel can count.
pub fn items_of(num_rows: usize, groups: &[Range<usize>]) -> Result<Vec<SegmentItem>, KernelError> {
    let step = TENP_SEGMENT_ROWS as usize;
    let mut items = Vec::with_capacity(groups.len() * num_rows.div_ceil(step));
    for (g, columns) in groups.iter().enumerate() {
        for first in (0..num_rows).step_by(step) {
            items.push(SegmentItem {
                out_begin: (g * num_rows + first) as i64,
                row_begin: to_i32("rows of segments", first)?,
                row_end: to_i32("rows of segments", (first + step).min(num_rows))?,
                col_begin: to_i32("columns of segments", columns.start)?,
                col_end: to_i32("columns of segments", columns.end)?,
            });
        }
    }
    Ok(items)
}

/// Checks every item and returns how many results they make.
fn check_items(
    items: &[SegmentItem],
    num_rows: usize,
    num_columns: usize,
) -> Result<usize, KernelError> {
    let mut results = 0;
    for item in items {
        let inside = |begin: i32, end: i32, len: usize| {
            0 <= begin && begin <= end && usize::try_from(end).is_ok_and(|end| end <= len)
        };
        let count = i64::from(item.row_end) - i64::from(item.row_begin);
        if !inside(item.row_begin, item.row_end, num_rows)
            || !inside(item.col_begin, item.col_end, num_columns)
            || count > i64::from(TENP_SEGMENT_ROWS)
            || item.out_begin < 0
        {
            return Err(KernelError::Invalid {
                what: "segment item",
                why: format!("{item:?} of {num_rows} rows and {num_columns} columns"),
            });
        }
        results = results.max(item.out_begin.saturating_add(count));
    }
    Ok(results as usize)
}

impl<'a> SegmentMatch<'a> {
    fn call(
        mut self,
        [entry, wide]: [&'static str; 2],
        row_signs: Option<DeviceSlice<'a, f32>>,
        similarity: Similarity,
    ) -> Result<Call<'a>, KernelError> {
        let results = check_items(self.items, self.num_rows, self.columns.num_neurons)?;
        let (row_gate_up, row_down_t, row_inverse) = self.rows.pointers(self.hidden)?;
        let (col_gate_up, col_down_t, col_inverse) = self.columns.pointers(self.hidden)?;
        let count = self.items.len();
        let params = TenpSegmentMatchParams {
            row_gate_up,
            row_down_t,
            row_inverse,
            row_ids: self.row_ids.checked("rows of segments", self.num_rows, 4)?,
            row_signs: optional(row_signs.as_ref(), "signs of segments", self.num_rows, 4)?,
            col_gate_up,
            col_down_t,
            col_inverse,
            items: self.items_on_device.checked("segment items", count, 8)?,
            best_value: self.best_value.checked("best values", results, 4)?,
            best_id: self.best_id.checked("best columns", results, 4)?,
            best_flip: optional_mut(self.best_flip.as_mut(), "best flips", results, 4)?,
            row_stride: self.rows.num_neurons as i64,
            col_stride: self.columns.num_neurons as i64,
            num_items: to_i32("segment items", count)?,
            hidden: to_i32("hidden size", self.hidden)?,
            lambda_gate: similarity.lambda_gate,
            lambda_up: similarity.lambda_up,
            lambda_down: similarity.lambda_down,
            sign_canonical: i32::from(similarity.sign_canonical),
        };
        if !self.wgmma {
            return Ok(Call::new(entry, launch(count), &params));
        }
        let launch = Launch::line(count as u32, 384, 208_992);
        Ok(Call::new(wide, launch, &params).with_maps(self.column_maps()?))
    }

    /// The columns' gate rows, up rows and down columns, eight by eight.
    fn column_maps(&self) -> Result<[TensorMap; 3], KernelError> {
        let SegmentTable {
            gate_up,
            down_t,
            num_neurons,
            ..
        } = self.columns;
        let shape = [num_neurons / 8, self.hidden];
        Ok([
            TensorMap::in_groups("gate rows", gate_up, shape, (0, 16), 128)?,
            TensorMap::in_groups("up rows", gate_up, shape, (8, 16), 128)?,
            TensorMap::in_groups("down columns", down_t, shape, (0, 8), 128)?,
        ])
    }
}

/// The column with the largest similarity for every row, as [`crate::cpu::segments::best_matches`] finds it.
///
/// # Errors
/// Lengths that do not fit, items outside the tables.
///
/// # Safety
/// Every row id is below the rows' `num_neurons`, and the items on the GPU are those given.
pub unsafe fn segment_similarity(
    args: SegmentMatch<'_>,
    similarity: Similarity,
) -> Result<Call<'_>, KernelError> {
    let entries = ["tenp_segment_similarity", "tenp_segment_similarity_w"];
    args.call(entries, None, similarity)
}

/// The column with the largest cosine of v = [gate; up; w] for every row, as [`crate::cpu::segments::assign`] finds it.
/// `signs` is `[num_rows]`, +1 or −1: the rows' up and down parts are multiplied by it.
///
/// # Errors
/// Lengths that do not fit, items outside the tables.
///
/// # Safety
/// As [`segment_similarity`].
pub unsafe fn segment_assign<'a>(
    args: SegmentMatch<'a>,
    signs: Option<DeviceSlice<'a, f32>>,
) -> Result<Call<'a>, KernelError> {
    let entries = ["tenp_segment_assign", "tenp_segment_assign_w"];
    args.call(entries, signs, Similarity::default())
}

fn launch(items: usize) -> Launch {
    Launch::line(items as u32, 256, 58_112)
}

/// Over the groups of columns, the best of each row's results.
#[derive(Debug)]
pub struct SegmentBest<'a> {
    /// `[num_groups, num_rows]` of [`segment_similarity`].
    pub values: DeviceSlice<'a, f32>,
    /// `[num_groups, num_rows]` of the same.
    pub ids: DeviceSlice<'a, i32>,
    /// `[num_rows]`; −∞ where nothing compares.
    pub best_value: DeviceSliceMut<'a, f32>,
    /// `[num_rows]`, ties to the lowest; −1 where nothing compares.
    pub best_group: DeviceSliceMut<'a, i32>,
    /// `[num_rows]`; −1 where nothing compares.
    pub best_id: DeviceSliceMut<'a, i32>,
    /// Groups of columns.
    pub num_groups: usize,
    /// Rows.
    pub num_rows: usize,
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// Lengths that do not fit.
pub fn segment_best(mut args: SegmentBest<'_>) -> Result<Call<'_>, KernelError> {
    let (rows, all) = (args.num_rows, args.num_groups * args.num_rows);
    let params = TenpSegmentBestParams {
        values: args.values.checked("values of segments", all, 4)?,
        ids: args.ids.checked("columns of segments", all, 4)?,
        best_value: args.best_value.checked("best values", rows, 4)?,
        best_group: args.best_group.checked("best groups", rows, 4)?,
        best_id: args.best_id.checked("best columns", rows, 4)?,
        num_groups: to_i32("groups of segments", args.num_groups)?,
        num_rows: to_i32("rows of segments", rows)?,
    };
    let launch = Launch::line(rows.div_ceil(256) as u32, 256, 0);
    Ok(Call::new("tenp_segment_best", launch, &params))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_cover_every_row_and_group() {
        let items = items_of(130, &[0..5, 16..20]).unwrap();
        assert_eq!(items.len(), 6);
        assert_eq!((items[2].row_begin, items[2].row_end), (128, 130));
        assert_eq!((items[3].col_begin, items[3].col_end), (16, 20));
        assert_eq!(items[4].out_begin, 194);
        assert_eq!(check_items(&items, 130, 32).unwrap(), 260);
        assert!(items_of(0, &[0..5, 5..6]).unwrap().is_empty());
    }

    #[test]
    fn items_outside_the_tables_are_refused() {
        let good = items_of(64, &[0..5, 16..20]).unwrap();
        assert!(check_items(&good, 63, 32).is_err());
        assert!(check_items(&good, 64, 19).is_err());
        let broken: [fn(&mut SegmentItem); 6] = [
            |i| i.out_begin = -1,
            |i| i.row_begin = -1,
            |i| i.row_begin = 65,
            |i| i.row_end = 65,
            |i| i.col_begin = 21,
            |i| i.col_begin = -1,
        ];
        for change in broken {
            let mut items = good.clone();
            change(&mut items[1]);
            assert!(check_items(&items, 128, 32).is_err(), "{items:?}");
        }
    }

    #[test]
    fn arguments_are_checked() {
        // SAFETY: nothing is read or written through the views.
        let weights = |len| unsafe { DeviceSlice::<bf16>::from_raw(0x1000, len) };
        // SAFETY: as above.
        let floats = |len| unsafe { DeviceSlice::<f32>::from_raw(0x8000, len) };
        // SAFETY: as above.
        let ints = |len| unsafe { DeviceSlice::<i32>::from_raw(0x9000, len) };
        let items = items_of(3, &[0..16, 16..20]).unwrap();
        let table = |neurons| SegmentTable {
            gate_up: weights(2 * 32 * 8),
            down_t: weights(32 * 8),
            inverse: floats(4 * 32),
            num_neurons: neurons,
        };
        let call = |neurons, ids, results, hidden, wgmma| {
            let args = SegmentMatch {
                rows: table(neurons),
                row_ids: ints(ids),
                columns: table(32),
                items: &items,
                // SAFETY: as above.
                items_on_device: unsafe { DeviceSlice::from_raw(0xa000, 2) },
                // SAFETY: as above.
                best_value: unsafe { DeviceSliceMut::from_raw(0xb000, results) },
                // SAFETY: as above.
                best_id: unsafe { DeviceSliceMut::from_raw(0xc000, results) },
                best_flip: None,
                num_rows: 3,
                hidden,
                wgmma,
            };
            // SAFETY: the call is never run.
            unsafe { segment_similarity(args, Similarity::default()) }.map(|c| c.launch())
        };
        assert_eq!(
            call(32, 3, 6, 8, false).unwrap(),
            Launch::line(2, 256, 58_112)
        );
        assert_eq!(
            call(32, 3, 6, 8, true).unwrap(),
            Launch::line(2, 384, 208_992)
        );
        assert!(call(33, 3, 6, 8, false).is_err());
        assert!(call(48, 3, 6, 8, false).is_err());
        assert!(call(32, 2, 6, 8, false).is_err());
        assert!(call(32, 3, 5, 8, false).is_err());
        assert!(call(32, 3, 6, 7, false).is_err());
    }
}
