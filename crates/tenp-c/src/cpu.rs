//! The layer on the CPU: its output, and the sums that pruning goes by.

use std::borrow::Cow;

use tenp_kernels::cpu::direction::{ExpertSums, TokenContext, accumulate_expert_sums};
use tenp_kernels::cpu::moe::{ExpertActivations, ExpertWeights, combine, expert_forward};
use tenp_kernels::cpu::neuron::{NeuronSums, accumulate_neuron_sums};
use tenp_kernels::{Compute, ExpertGroups, MatrixView, RaggedLayout};

use crate::memory::{get, slice, slice_mut};
use crate::status::{Failure, TENP_ERROR_SIZE, status, tenp_status};
use crate::types::{compute_of, experts_of, tenp_batch, tenp_compute, tenp_expert, tenp_moe};

/// What both functions are given, checked.
struct Work<'a> {
    compute: Compute,
    hidden: usize,
    /// The layer's, and behind them one without neurons, which stands for "no expert".
    experts: Vec<ExpertWeights<'a>>,
    widths: Vec<usize>,
    groups: ExpertGroups,
    x: &'a [f32],
}

fn check_len(what: &str, expected: usize, got: usize) -> Result<(), Failure> {
    if expected == got {
        return Ok(());
    }
    Err(Failure::new(
        TENP_ERROR_SIZE,
        format!("{what}: expected {expected} elements, got {got}"),
    ))
}

fn product(what: &str, a: usize, b: usize) -> Result<usize, Failure> {
    a.checked_mul(b).ok_or_else(|| {
        Failure::new(
            TENP_ERROR_SIZE,
            format!("{what}: {a} × {b} elements do not fit in memory"),
        )
    })
}

impl Work<'_> {
    /// # Safety
    /// `moe` is a live layer; the other pointers, those in the structures too, lead to as much memory as is said, which
    /// nothing writes while the result lives.
    unsafe fn new(
        moe: *const tenp_moe,
        compute: tenp_compute,
        (experts, num_experts): (*const tenp_expert, usize),
        batch: *const tenp_batch,
    ) -> Result<Self, Failure> {
        // SAFETY: the caller's promise.
        let (moe, batch) = unsafe { (get("moe", moe)?, get("batch", batch)?) };
        let compute = compute_of(compute)?;
        // SAFETY: the caller's promise.
        let mut experts = unsafe { experts_of(moe, experts, num_experts) }?;
        let slots = product("batch", batch.num_tokens, batch.top_k)?;
        let x_len = product("x", batch.num_tokens, moe.hidden)?;
        check_len("x", x_len, batch.x_len)?;
        check_len("expert_ids", slots, batch.expert_ids_len)?;
        check_len("weights", slots, batch.weights_len)?;
        // SAFETY: the caller's promise.
        let (x, ids, weights) = unsafe {
            (
                slice("x", batch.x, x_len)?,
                slice("expert_ids", batch.expert_ids, slots)?,
                slice("weights", batch.weights, slots)?,
            )
        };
        let (ids, weights) = present(ids, weights, num_experts)?;
        let mut widths = moe.layout.widths().to_vec();
        let none = MatrixView::from_f32(0, moe.hidden, &[])?;
        experts.push(ExpertWeights {
            gate: none,
            up: none,
            down: MatrixView::from_f32(moe.hidden, 0, &[])?,
        });
        widths.push(0);
        Ok(Self {
            compute,
            hidden: moe.hidden,
            groups: ExpertGroups::new(experts.len(), batch.top_k, &ids, &weights)?,
            experts,
            widths,
            x,
        })
    }

    fn forward(&self, activations: &mut ExpertActivations) -> Result<(), Failure> {
        Ok(expert_forward(
            self.compute,
            &self.experts,
            &self.groups,
            self.x,
            activations,
        )?)
    }
}

/// Negative ids become the expert without neurons, with weight 0 whatever theirs was.
fn present<'a>(
    ids: &[i32],
    weights: &'a [f32],
    num_experts: usize,
) -> Result<(Vec<u32>, Cow<'a, [f32]>), Failure> {
    let mut known = Vec::with_capacity(ids.len());
    let mut weights = Cow::Borrowed(weights);
    for (slot, &id) in ids.iter().enumerate() {
        if id >= 0 {
            // The place behind the last is taken.
            if id as usize >= num_experts {
                return Err(tenp_kernels::KernelError::Index {
                    what: "expert id",
                    index: id as usize,
                    len: num_experts,
                }
                .into());
            }
            known.push(id as u32);
        } else {
            known.push(num_experts as u32);
            weights.to_mut()[slot] = 0.0;
        }
    }
    Ok((known, weights))
}

/// The layer's output, on the CPU.
///
/// # Safety
/// `moe` is a live layer; the other pointers, those in the structures too, lead to as much memory as is said; `out`
/// overlaps none of it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tenp_moe_forward_cpu(
    moe: *const tenp_moe,
    compute: tenp_compute,
    experts: *const tenp_expert,
    num_experts: usize,
    batch: *const tenp_batch,
    out: *mut f32,
    out_len: usize,
) -> tenp_status {
    status(|| {
        // SAFETY: the caller's promise.
        let work = unsafe { Work::new(moe, compute, (experts, num_experts), batch) }?;
        check_len("out", work.x.len(), out_len)?;
        // SAFETY: the caller's promise.
        let out = unsafe { slice_mut("out", out, out_len) }?;
        let mut activations = ExpertActivations::default();
        work.forward(&mut activations)?;
        Ok(combine(
            &work.groups,
            activations.outputs(),
            work.hidden,
            out,
        )?)
    })
}

/// Adds a batch to the sums that pruning goes by, on the CPU.
///
/// # Safety
/// As [`tenp_moe_forward_cpu`]; the three arrays of sums overlap neither each other nor anything else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tenp_moe_score_cpu(
    moe: *const tenp_moe,
    compute: tenp_compute,
    experts: *const tenp_expert,
    num_experts: usize,
    batch: *const tenp_batch,
    contribution: *mut f64,
    contribution_len: usize,
    direction: *mut f64,
    direction_len: usize,
    tokens: *mut i64,
    tokens_len: usize,
) -> tenp_status {
    status(|| {
        // SAFETY: the caller's promise.
        let work = unsafe { Work::new(moe, compute, (experts, num_experts), batch) }?;
        let layout = RaggedLayout::new(work.widths.clone())?;
        check_len("contribution", layout.total(), contribution_len)?;
        check_len("direction", num_experts, direction_len)?;
        check_len("tokens", num_experts, tokens_len)?;
        // SAFETY: the caller's promise.
        let (contribution, direction, tokens) = unsafe {
            (
                slice_mut("contribution", contribution, contribution_len)?,
                slice_mut("direction", direction, direction_len)?,
                slice_mut("tokens", tokens, tokens_len)?,
            )
        };
        let mut activations = ExpertActivations::default();
        activations.keep_packed_outputs(true);
        work.forward(&mut activations)?;
        let mut expert_sums = vec![ExpertSums::default(); work.experts.len()];
        let context = TokenContext {
            x: work.x,
            // These two serve a score that is not asked for.
            residual: work.x,
            combined: work.x,
        };
        let outputs = activations.outputs();
        let norms = accumulate_expert_sums(
            &work.groups,
            context,
            outputs,
            work.hidden,
            &mut expert_sums,
        )?;
        let mut sums = NeuronSums::new(layout);
        accumulate_neuron_sums(&work.experts, &work.groups, &activations, &norms, &mut sums)?;
        add(contribution, sums.contribution.iter().copied());
        add(direction, expert_sums.iter().map(|sums| sums.direction));
        add(tokens, expert_sums.iter().map(|sums| sums.tokens));
        Ok(())
    })
}

fn add<T: std::ops::AddAssign>(to: &mut [T], values: impl Iterator<Item = T>) {
    for (to, value) in to.iter_mut().zip(values) {
        *to += value;
    }
}
