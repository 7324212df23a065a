//! Mistakes planted into the kernels' own sources, which the executor has to find (`tests/planted.rs`).

use std::fs;
use std::path::{Path, PathBuf};

/// One mistake: in the copy of a kernel named `planted_{name}_{entry}`, `right` is replaced by `wrong`.
pub(crate) struct Planted {
    pub(crate) name: &'static str,
    kernel: &'static str,
    /// Occurs once in the kernel's source with `hopper.cuh` in it.
    right: &'static str,
    wrong: &'static str,
}

const fn planted(
    name: &'static str,
    kernel: &'static str,
    right: &'static str,
    wrong: &'static str,
) -> Planted {
    Planted {
        name,
        kernel,
        right,
        wrong,
    }
}

pub(crate) const PLANTED: [Planted; 11] = [
    // A wait that leaves one group of products too many: its stage is given back while they are under way.
    planted(
        "early_release",
        "moe_gate_up_sm90",
        "wgmma_wait<1>();",
        "wgmma_wait<2>();",
    ),
    // Four warps' word for eight.
    planted(
        "half_the_arrivals",
        "moe_gate_up_sm90",
        "mbarrier_init(empty(s), CONSUMER_WARPS);",
        "mbarrier_init(empty(s), CONSUMER_WARPS / 2);",
    ),
    // Rows past an expert's end are the next expert's.
    planted(
        "straddling",
        "moe_gate_up_sm90",
        "if (row < rows && 8 * chunk < columns) {",
        "if (8 * chunk < columns) {",
    ),
    // Gathered rows come by ordinary copies, which wgmma does not see by itself.
    planted(
        "no_proxy_fence",
        "moe_gate_up_sm90",
        "            fence_proxy_async();\n            mbarrier_arrive(stages.full",
        "            mbarrier_arrive(stages.full",
    ),
    // The room of the last tile filled again while others still write that tile out.
    planted(
        "epilogue_reused",
        "moe_gate_up_sm90",
        "        tenp::half_barrier(place.half);\n        tenp::stage_transposed",
        "        tenp::stage_transposed",
    ),
    // A barrier of the whole block where only the consumers come.
    planted(
        "block_barrier_in_epilogue",
        "moe_gate_up_sm90",
        "pairs);\n        tenp::half_barrier(place.half);",
        "pairs);\n        __syncthreads();",
    ),
    // The first round of empty stages waited for as if it had been filled.
    planted(
        "empty_parity",
        "moe_gate_up_sm90",
        "tenp::mbarrier_wait(stages.empty(ring.stage), ring.parity ^ 1);",
        "tenp::mbarrier_wait(stages.empty(ring.stage), ring.parity);",
    ),
    // More stages begun before the first is announced than there are.
    planted(
        "gather_too_far_ahead",
        "moe_gate_up_sm90",
        "LAG = S::STAGES > 3 ? 2 : 1,",
        "LAG = S::STAGES,",
    ),
    // Steps of a transposed operand as if it were not.
    planted(
        "transposed_step",
        "moe_down_sm90",
        "TRANSPOSED ? 16 * 128 >> 4 : 32 >> 4;",
        "32 >> 4;",
    ),
    // One lane speaks for its warp before the others have read.
    planted(
        "no_syncwarp",
        "moe_contribution_sm90",
        "        __syncwarp();\n        tenp::release_stage(stages.extra(1));",
        "        tenp::release_stage(stages.extra(1));",
    ),
    // Rows behind an expert's last taken for its own.
    planted(
        "foreign_rows_counted",
        "moe_contribution_sm90",
        "inverse[i] = t.first_row + i < t.end_row ? p.row_inverse[t.first_row + i] : 0.0f;",
        "inverse[i] = t.first_row + i < p.group_offsets[p.num_experts] ? p.row_inverse[t.first_row + i] : 0.0f;",
    ),
];

impl Planted {
    /// Writes the copy, with the entries for 64 rows only, and returns its path.
    pub(crate) fn write(&self, product: &Path, out: &Path) -> Result<PathBuf, String> {
        let read = |path: PathBuf| {
            fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
        };
        let header = read(product.join("include/hopper.cuh"))?.replace("#pragma once\n", "");
        let source = read(product.join(format!("{}.cu", self.kernel)))?
            .replace("#include \"hopper.cuh\"\n", &header);
        if source.matches(self.right).count() != 1 {
            return Err(format!(
                "planted mistake {:?}: its place occurs {} times in {}.cu, not once; build/planted.rs has to follow",
                self.name,
                source.matches(self.right).count(),
                self.kernel
            ));
        }
        let text: Vec<String> = source
            .replace(self.right, self.wrong)
            .lines()
            .filter(|line| {
                !line.starts_with("TENP_") || !line.ends_with(')') || line.ends_with("(64)")
            })
            .map(|line| {
                line.replace(
                    "TENP_KERNEL_MAPS(tenp_",
                    &format!("TENP_KERNEL_MAPS(planted_{}_tenp_", self.name),
                )
            })
            .collect();
        let path = out.join(format!("{}.cu", self.name));
        let text = text.join("\n") + "\n";
        if fs::read_to_string(&path).is_ok_and(|old| old == text) {
            return Ok(path);
        }
        fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(path)
    }
}
