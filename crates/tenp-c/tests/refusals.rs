//! What a caller gets wrong is said, with what was expected and what was given, and nothing is written.

use std::ffi::CStr;
use std::ptr::{null, null_mut};

use tenp::status::{
    TENP_ERROR_INVALID, TENP_ERROR_NULL, TENP_ERROR_RANGE, TENP_ERROR_SIZE, TENP_OK,
};
use tenp::types::{TENP_COMPUTE_F32, TENP_DTYPE_F8_E4M3, TENP_DTYPE_F32};
use tenp::{
    tenp_batch, tenp_compute, tenp_expert, tenp_last_error, tenp_matrix, tenp_moe, tenp_moe_create,
    tenp_moe_destroy, tenp_moe_forward_cpu, tenp_moe_packed_bytes, tenp_moe_workspace_bytes,
    tenp_status, tenp_version,
};

fn assert_failed(got: tenp_status, status: tenp_status, words: &str) {
    // SAFETY: the text of this thread, which nothing changes meanwhile.
    let text = unsafe { CStr::from_ptr(tenp_last_error()) }.to_string_lossy();
    assert_eq!(got, status, "{text}");
    assert_eq!(text, words);
}

/// A layer of one expert of 2 neurons over `hidden` features.
struct Layer(*mut tenp_moe);

impl Layer {
    fn new(hidden: usize) -> Self {
        let mut moe = null_mut();
        let widths = [2usize];
        // SAFETY: all pointers lead to live locals of the sizes that are said.
        let made = unsafe { tenp_moe_create(widths.as_ptr(), 1, hidden, &raw mut moe) };
        assert_eq!(made, TENP_OK);
        Self(moe)
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        // SAFETY: made by `tenp_moe_create`, given back once.
        assert_eq!(unsafe { tenp_moe_destroy(self.0) }, TENP_OK);
    }
}

#[test]
fn layers_that_cannot_be() {
    let widths = [2usize];
    let mut moe = null_mut();
    // SAFETY: the pointers are null or lead to live locals of the sizes that are said.
    unsafe {
        let null_widths = tenp_moe_create(null(), 1, 4, &raw mut moe);
        assert_failed(null_widths, TENP_ERROR_NULL, "widths: the pointer is null");
        let nowhere = tenp_moe_create(widths.as_ptr(), 1, 4, null_mut());
        assert_failed(nowhere, TENP_ERROR_NULL, "moe: the pointer is null");
        let flat = tenp_moe_create(widths.as_ptr(), 1, 0, &raw mut moe);
        let words = "hidden: expected 1 to 2147483647, got 0";
        assert_failed(flat, TENP_ERROR_INVALID, words);
        let empty = tenp_moe_create(null(), 0, 4, &raw mut moe);
        let words = "num_experts: expected 1 to 2147483647, got 0";
        assert_failed(empty, TENP_ERROR_INVALID, words);
        assert!(moe.is_null());
        assert_eq!(tenp_moe_destroy(null_mut()), TENP_OK);
        let (mut major, mut minor) = (7, 7);
        let version = tenp_version(&raw mut major, &raw mut minor, null_mut());
        assert_failed(version, TENP_ERROR_NULL, "patch: the pointer is null");
        assert_eq!((major, minor), (7, 7));
    }
}

const HIDDEN: usize = 4;

static VALUES: [f32; 2 * HIDDEN] = [0.5; 2 * HIDDEN];
static X: [f32; HIDDEN] = [1.0; HIDDEN];
static WEIGHTS: [f32; 2] = [1.0; 2];
static IDS: [i32; 2] = [0, -1];

fn matrix() -> tenp_matrix {
    tenp_matrix {
        data: VALUES.as_ptr().cast(),
        bytes: size_of_val(&VALUES),
        scales: null(),
        scale_bytes: 0,
        dtype: TENP_DTYPE_F32,
    }
}

fn expert() -> tenp_expert {
    tenp_expert {
        gate: matrix(),
        up: matrix(),
        down: matrix(),
    }
}

/// One token, one expert, and one slot without.
fn batch() -> tenp_batch {
    tenp_batch {
        x: X.as_ptr(),
        x_len: HIDDEN,
        expert_ids: IDS.as_ptr(),
        expert_ids_len: 2,
        weights: WEIGHTS.as_ptr(),
        weights_len: 2,
        num_tokens: 1,
        top_k: 2,
    }
}

fn forward(
    experts: &[tenp_expert],
    batch: &tenp_batch,
    compute: tenp_compute,
    out: &mut [f32],
) -> tenp_status {
    let layer = Layer::new(HIDDEN);
    // SAFETY: the pointers are null or lead to live memory of the sizes that are said.
    unsafe {
        tenp_moe_forward_cpu(
            layer.0,
            compute,
            experts.as_ptr(),
            experts.len(),
            batch,
            out.as_mut_ptr(),
            out.len(),
        )
    }
}

fn assert_refused(
    expert: tenp_expert,
    batch: &tenp_batch,
    compute: tenp_compute,
    status: tenp_status,
    words: &str,
) {
    let mut out = [9f32; HIDDEN];
    let got = forward(&[expert], batch, compute, &mut out);
    assert_failed(got, status, words);
    assert_eq!(out, [9.0; HIDDEN]);
}

#[test]
fn experts_that_do_not_fit() {
    let check = |expert, compute, status, words: &str| {
        assert_refused(expert, &batch(), compute, status, words);
    };
    let f32s = TENP_COMPUTE_F32;
    check(
        expert(),
        5,
        TENP_ERROR_INVALID,
        "tenp_compute: there is no 5",
    );
    let mut short = expert();
    short.up.bytes = 28;
    let words = "expert 0, up: matrix bytes: expected 32 elements, got 28";
    check(short, f32s, TENP_ERROR_SIZE, words);
    let mut odd = expert();
    odd.down.dtype = 9;
    let words = "expert 0, down: tenp_dtype: there is no 9";
    check(odd, f32s, TENP_ERROR_INVALID, words);
    let mut unscaled = expert();
    (unscaled.gate.bytes, unscaled.gate.dtype) = (8, TENP_DTYPE_F8_E4M3);
    let words = "expert 0, gate: fp8 scale bytes: expected 4 elements, got 0";
    check(unscaled, f32s, TENP_ERROR_SIZE, words);
    let mut scaled = expert();
    (scaled.gate.scales, scaled.gate.scale_bytes) = (VALUES.as_ptr().cast(), 4);
    let words = "expert 0, gate: scales: expected none for F32, got 4 bytes";
    check(scaled, f32s, TENP_ERROR_SIZE, words);
    let two = forward(&[expert(); 2], &batch(), f32s, &mut [0.0; HIDDEN]);
    assert_failed(two, TENP_ERROR_SIZE, "experts: expected 1, got 2");
}

#[test]
fn batches_that_do_not_fit() {
    let check = |spoil: &dyn Fn(&mut tenp_batch), status, words: &str| {
        let mut batch = batch();
        spoil(&mut batch);
        assert_refused(expert(), &batch, TENP_COMPUTE_F32, status, words);
    };
    check(&|b| b.x = null(), TENP_ERROR_NULL, "x: the pointer is null");
    let words = "weights: expected 2 elements, got 1";
    check(&|b| b.weights_len = 1, TENP_ERROR_SIZE, words);
    let words = format!("batch: {} × 2 elements do not fit in memory", usize::MAX);
    check(&|b| b.num_tokens = usize::MAX, TENP_ERROR_SIZE, &words);
    // The place behind the last expert is used inside; a caller cannot name it.
    let past = [0i32, 1];
    let words = "expert id: index 1 is out of range for 1";
    check(&|b| b.expert_ids = past.as_ptr(), TENP_ERROR_RANGE, words);
    let narrow = forward(
        &[expert()],
        &batch(),
        TENP_COMPUTE_F32,
        &mut [0.0; HIDDEN - 1],
    );
    assert_failed(narrow, TENP_ERROR_SIZE, "out: expected 4 elements, got 3");
}

#[test]
fn what_fits_is_computed() {
    let mut out = [9f32; HIDDEN];
    let done = forward(&[expert()], &batch(), TENP_COMPUTE_F32, &mut out);
    assert_eq!(done, TENP_OK);
    // Two neurons of silu(2) · 2, halved.
    let want = 4.0 / (1.0 + (-2f32).exp());
    assert!(
        out.iter().all(|y| (y - want).abs() < 1e-6),
        "{out:?} {want}"
    );
}

#[test]
fn what_only_a_gpu_minds_is_said_by_its_functions_alone() {
    let layer = Layer::new(12);
    let (mut a, mut b, mut c) = (1, 1, 1);
    // SAFETY: all pointers lead to live locals.
    unsafe {
        let packed = tenp_moe_packed_bytes(layer.0, &raw mut a, &raw mut b, &raw mut c);
        let words = "hidden size: 12 is not a multiple of 8";
        assert_failed(packed, TENP_ERROR_INVALID, words);
        let needed = tenp_moe_workspace_bytes(layer.0, 1, 1, &raw mut a);
        assert_failed(needed, TENP_ERROR_INVALID, words);
        let none = tenp_moe_workspace_bytes(null(), 1, 1, &raw mut a);
        assert_failed(none, TENP_ERROR_NULL, "moe: the pointer is null");
    }
    assert_eq!((a, b, c), (1, 1, 1));
}
