#!/usr/bin/env python3
"""The peers' Triton kernels compile for Hopper, with a GPU or without: tensor cores, 16-byte copies, enough shared memory.

Run by hand, with PyTorch and Triton: `tests/peers/check_compiled.py`. So that a Triton peer is not slow for a reason that
its own machine code tells.
"""

import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benches/baselines/peers"))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fused
import glue
import grouped
import layers

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 232_448
NUMBERS = {"x", "gate", "up", "down", "down_t", "gate_up", "h", "y", "out"}
# Counts and widths of the bench; the others may be anything.
MULTIPLES_OF_16 = {"hidden", "width", "pitch"}
WHOLE = {"groups", "hidden", "pitch", "width", "blocks", "slots", "top_k", "align", "up_m", "up_n", "down_m", "down_n"}


def compiled(kernel, constants, scalars=(), **options):
    names, signature, attributes = kernel.arg_names, {}, {}
    # The pointer `blocks` of one kernel is a number elsewhere.
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in WHOLE and name not in scalars:
            signature[name] = "i32"
        else:
            signature[name] = "*bf16" if name in NUMBERS else "*fp32" if name == "slot_weights" else "*i32"
        if signature[name].startswith("*") or name in MULTIPLES_OF_16:
            attributes[(place,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, values, attributes), target=HOPPER, options=options)


def check_products():
    for config in layers.CONFIGS:
        cut = {"M": config.m, "N": config.n, "K": config.k}
        ragged, near = {"STEPS": 8, "STEP": 8, **cut}, {"NEAR": 8, "WHOLE_K": True, **cut}
        for kernel, constants in [(grouped.gate_up_kernel, {**ragged, "WHOLE_K": True}), (grouped.down_kernel, ragged),
                                  (fused.gate_up_kernel, near), (fused.down_kernel, near)]:
            made = compiled(kernel, constants, num_warps=config.warps, num_stages=config.stages)
            name, code = f"{kernel.fn.__module__}.{kernel.__name__} {config}", made.asm["ptx"]
            assert made.metadata.shared <= SHARED_MEMORY, f"{name}: {made.metadata.shared} bytes of shared memory"
            assert "wgmma.mma_async" in code if config.m >= 64 else "mma.sync" in code, f"{name}: no tensor cores"
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x[0-9a-f]+),", code)
            wide = sum(int(size, 16) == 16 for size in copies)
            assert wide and all(int(size, 16) >= 4 for size in copies), f"{name}: narrow copies {set(copies)}"
            assert re.search(r"st\.global\.v[24]\.", code), f"{name}: no wide stores"
            assert not re.search(r"st\.global\.[bu]16", code), f"{name}: narrow stores"
            assert not re.search(r"\.local", code), f"{name}: local memory"
    print(f"{len(layers.CONFIGS)} configurations of four kernels: passed")


def check_glue():
    for kernel, constants, scalars in [
        (glue.count_kernel, {"BLOCK": 256}, ()), (glue.offsets_kernel, {"GROUPS": 128}, {"blocks"}),
        (glue.scatter_kernel, {"BLOCK": 256}, ()), (glue.gather_kernel, {"BLOCK": 1024}, ()),
        (glue.swiglu_kernel, {"BLOCK": 1024}, ()), (glue.combine_kernel, {"TOP_K": 8, "BLOCK": 1024}, ()),
        (grouped.tiles_kernel, {"GROUPS": 128}, ())]:
        compiled(kernel, constants, scalars)
    print("kernels around the products: passed")


if __name__ == "__main__":
    check_products()
    check_glue()
