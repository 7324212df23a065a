//! Wrapper of `router.cu`: [`RouterSpec::route`] on the GPU.

use super::call::Call;
use super::check::to_i32;
use super::geometry::Launch;
use super::view::{DeviceSlice, DeviceSliceMut, optional};
use crate::KernelError;
use crate::cpu::router::RouterSpec;
use crate::params::TenpRouterParams;

/// Chooses the experts of every token.
#[derive(Debug)]
pub struct Router<'a> {
    /// What is done. Its bias must lie on the GPU too, in `correction_bias`.
    pub spec: &'a RouterSpec,
    /// `[tokens, experts]`.
    pub logits: DeviceSlice<'a, f32>,
    /// `[experts]`, where the spec has one.
    pub correction_bias: Option<DeviceSlice<'a, f32>>,
    /// `[tokens, top_k]`, best first, ties to the lower id.
    pub expert_ids: DeviceSliceMut<'a, i32>,
    /// `[tokens, top_k]`.
    pub weights: DeviceSliceMut<'a, f32>,
    /// Number of tokens.
    pub num_tokens: usize,
}

/// What a block may have without asking for more.
const SHARED_BYTES: usize = 48 * 1024;

/// A warp per token, as many to a block as the scores leave room for.
fn launch(spec: &RouterSpec, num_tokens: usize) -> Launch {
    let groups = spec.groups.map_or(0, |g| g.num_groups);
    let per_warp = 4 * (2 * spec.num_experts + spec.top_k + groups);
    let warps = (SHARED_BYTES / per_warp.max(1)).clamp(1, 8);
    Launch::line(
        num_tokens.div_ceil(warps) as u32,
        32 * warps as u32,
        (warps * per_warp) as u32,
    )
}

/// Checks the arguments and makes the call.
///
/// # Errors
/// As [`RouterSpec::check`]; a bias on one side only; more experts than shared memory holds; lengths that do not fit.
pub fn router(mut args: Router<'_>) -> Result<Call<'_>, KernelError> {
    let spec = args.spec;
    spec.check()?;
    let invalid = |why: String| KernelError::Invalid {
        what: "router",
        why,
    };
    if spec.correction_bias.is_some() != args.correction_bias.is_some() {
        return Err(invalid("its bias is on one side only, host or GPU".into()));
    }
    let launch = launch(spec, args.num_tokens);
    if launch.shared_bytes as usize > SHARED_BYTES {
        return Err(invalid(format!(
            "the scores of {} experts do not fit a block",
            spec.num_experts
        )));
    }
    let chosen = args.num_tokens * spec.top_k;
    let params = TenpRouterParams {
        logits: args
            .logits
            .checked("router logits", args.num_tokens * spec.num_experts, 4)?,
        correction_bias: optional(
            args.correction_bias.as_ref(),
            "router correction bias",
            spec.num_experts,
            4,
        )?,
        expert_ids: args.expert_ids.checked("expert ids", chosen, 4)?,
        weights: args.weights.checked("routing weights", chosen, 4)?,
        num_tokens: to_i32("tokens", args.num_tokens)?,
        num_experts: to_i32("experts", spec.num_experts)?,
        top_k: to_i32("experts of a token", spec.top_k)?,
        num_groups: to_i32("groups", spec.groups.map_or(0, |g| g.num_groups))?,
        top_groups: to_i32("groups in play", spec.groups.map_or(0, |g| g.top_groups))?,
        top_two_sum: i32::from(spec.groups.is_some_and(|g| g.top_two_sum)),
        sigmoid: i32::from(spec.sigmoid),
        normalise: i32::from(spec.normalise),
        scaling: spec.scaling,
        padding: 0,
    };
    Ok(Call::new("tenp_router", launch, &params))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::router::GroupLimit;

    fn spec(num_experts: usize, top_k: usize) -> RouterSpec {
        RouterSpec {
            num_experts,
            top_k,
            sigmoid: true,
            correction_bias: None,
            groups: None,
            normalise: true,
            scaling: 1.0,
        }
    }

    fn call(spec: &RouterSpec, logits: usize, bias: bool) -> Result<(), KernelError> {
        // SAFETY: nothing is ever read or written through the views.
        let (read, ids, weights, bias) = unsafe {
            (
                DeviceSlice::from_raw(0x1000, logits),
                DeviceSliceMut::from_raw(0x2000, 1 << 20),
                DeviceSliceMut::from_raw(0x3000, 1 << 20),
                bias.then(|| DeviceSlice::from_raw(0x4000, spec.num_experts)),
            )
        };
        router(Router {
            spec,
            logits: read,
            correction_bias: bias,
            expert_ids: ids,
            weights,
            num_tokens: 3,
        })
        .map(drop)
    }

    #[test]
    fn many_experts_leave_room_for_fewer_tokens() {
        assert_eq!(launch(&spec(128, 8), 9), Launch::line(2, 256, 8 * 4 * 264));
        let mut wide = spec(1024, 8);
        wide.groups = Some(GroupLimit {
            num_groups: 8,
            top_groups: 4,
            top_two_sum: true,
        });
        assert_eq!(launch(&wide, 11), Launch::line(3, 160, 5 * 4 * (2048 + 16)));
        assert!(launch(&spec(128, 8), 0).is_empty());
    }

    #[test]
    fn misfits_are_refused() {
        assert_eq!(call(&spec(8, 2), 24, false), Ok(()));
        assert!(matches!(
            call(&spec(8, 2), 23, false),
            Err(KernelError::Length {
                what: "router logits",
                expected: 24,
                got: 23
            })
        ));
        for (spec, bias) in [
            (spec(8, 9), false),
            (spec(8, 2), true),
            (spec(1 << 13, 2), false),
        ] {
            assert!(matches!(
                call(&spec, 1 << 20, bias),
                Err(KernelError::Invalid { what: "router", .. })
            ));
        }
        let mut biased = spec(8, 2);
        biased.correction_bias = Some(vec![0.0; 8]);
        assert!(call(&biased, 24, false).is_err());
        assert_eq!(call(&biased, 24, true), Ok(()));
    }
}
