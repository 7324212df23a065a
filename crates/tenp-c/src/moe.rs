//! Layers: made from widths, given back; their weights packed for a GPU.

use std::ffi::c_void;

use half::bf16;
use tenp_kernels::RaggedLayout;
use tenp_kernels::device::RaggedMoe;

use crate::memory::{elements_mut, get, slice, write};
use crate::status::{Failure, TENP_ERROR_INVALID, TENP_ERROR_SIZE, status, tenp_status};
use crate::types::{experts_of, tenp_expert, tenp_moe};

impl tenp_moe {
    pub(crate) fn on_device(&self) -> Result<&RaggedMoe, Failure> {
        self.device.as_ref().map_err(|error| error.clone().into())
    }

    /// Rows of a batch on a GPU, which counts them in i32, and whose workspace has to fit in memory.
    pub(crate) fn rows_on_device(&self, num_tokens: usize, top_k: usize) -> Result<usize, Failure> {
        let moe = self.on_device()?;
        let row_bytes = 2 * moe.layout().hidden_pitch() as u128 + 4 * self.hidden as u128 + 64;
        let rows = num_tokens as u128 * top_k as u128;
        if rows <= i32::MAX as u128 && rows * row_bytes <= isize::MAX as u128 {
            return Ok(rows as usize);
        }
        Err(Failure::new(
            TENP_ERROR_SIZE,
            format!("batch: {num_tokens} tokens of {top_k} experts are more than a GPU takes"),
        ))
    }
}

/// A layer of experts with `widths[i]` neurons each over `hidden` features.
///
/// # Safety
/// `widths` leads to `num_experts` numbers, `moe` to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tenp_moe_create(
    widths: *const usize,
    num_experts: usize,
    hidden: usize,
    moe: *mut *mut tenp_moe,
) -> tenp_status {
    status(|| {
        // SAFETY: the caller's promise.
        let widths = unsafe { slice("widths", widths, num_experts) }?;
        for (what, got, most) in [
            ("num_experts", num_experts, i32::MAX as usize),
            ("hidden", hidden, i32::MAX as usize),
        ] {
            if got == 0 || got > most {
                return Err(Failure::new(
                    TENP_ERROR_INVALID,
                    format!("{what}: expected 1 to {most}, got {got}"),
                ));
            }
        }
        // Before the box, or a null pointer here would leak it.
        // SAFETY: the caller's promise.
        unsafe { write([("moe", moe, std::ptr::null_mut())]) }?;
        let made = Box::new(tenp_moe {
            layout: RaggedLayout::new(widths.to_vec())?,
            hidden,
            device: RaggedMoe::new(widths, hidden),
        });
        // SAFETY: as above.
        unsafe { write([("moe", moe, Box::into_raw(made))]) }
    })
}

/// Gives a layer back; null is nothing.
///
/// # Safety
/// The layer comes from [`tenp_moe_create`], is not in use, and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tenp_moe_destroy(moe: *mut tenp_moe) -> tenp_status {
    status(|| {
        if !moe.is_null() {
            // SAFETY: made by `Box::into_raw`, and given back once, by the caller's promise.
            drop(unsafe { Box::from_raw(moe) });
        }
        Ok(())
    })
}

/// Bytes of the three arrays that a GPU needs of a layer.
///
/// # Safety
/// `moe` is a live layer, the other pointers lead to room for a number each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tenp_moe_packed_bytes(
    moe: *const tenp_moe,
    gate_up_bytes: *mut usize,
    down_bytes: *mut usize,
    tables_bytes: *mut usize,
) -> tenp_status {
    status(|| {
        // SAFETY: the caller's promise.
        let moe = unsafe { get("moe", moe) }?.on_device()?;
        let [gate_up, down] = moe.weight_lens().map(|len| len * size_of::<bf16>());
        let results = [
            ("gate_up_bytes", gate_up_bytes, gate_up),
            ("down_bytes", down_bytes, down),
            ("tables_bytes", tables_bytes, size_of_val(&moe.tables()[..])),
        ];
        // SAFETY: the caller's promise.
        unsafe { write(results) }
    })
}

/// Packs the experts' weights for a GPU, in the CPU's memory.
///
/// # Safety
/// `moe` is a live layer; all pointers, those of the experts too, lead to as much memory as is said, and what is
/// written overlaps nothing else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tenp_moe_pack(
    moe: *const tenp_moe,
    experts: *const tenp_expert,
    num_experts: usize,
    gate_up: *mut c_void,
    gate_up_bytes: usize,
    down: *mut c_void,
    down_bytes: usize,
    tables: *mut c_void,
    tables_bytes: usize,
) -> tenp_status {
    status(|| {
        // SAFETY: the caller's promise.
        let (moe, experts, gate_up, down, tables_out) = unsafe {
            let moe = get("moe", moe)?;
            (
                moe,
                experts_of(moe, experts, num_experts)?,
                elements_mut::<bf16>("gate_up", gate_up, gate_up_bytes)?,
                elements_mut::<bf16>("down", down, down_bytes)?,
                elements_mut::<i32>("tables", tables, tables_bytes)?,
            )
        };
        let moe = moe.on_device()?;
        let tables = moe.tables();
        if tables_out.len() != tables.len() {
            return Err(Failure::new(
                TENP_ERROR_SIZE,
                format!(
                    "tables: expected {} bytes, got {tables_bytes}",
                    size_of_val(&tables[..])
                ),
            ));
        }
        moe.pack(&experts, gate_up, down)?;
        tables_out.copy_from_slice(&tables);
        Ok(())
    })
}

/// Bytes of GPU memory that a forward pass needs for itself.
///
/// # Safety
/// `moe` is a live layer, `bytes` leads to room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tenp_moe_workspace_bytes(
    moe: *const tenp_moe,
    num_tokens: usize,
    top_k: usize,
    bytes: *mut usize,
) -> tenp_status {
    status(|| {
        // SAFETY: the caller's promise.
        let moe = unsafe { get("moe", moe) }?;
        moe.rows_on_device(num_tokens, top_k)?;
        let needed = moe.on_device()?.workspace_bytes(num_tokens, top_k);
        // SAFETY: the caller's promise.
        unsafe { write([("bytes", bytes, needed)]) }
    })
}
