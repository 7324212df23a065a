#!/usr/bin/env python3
"""Checks the machine code of every kernel: no local memory, tensor-core instructions where they belong, few registers,
and nothing that the compiler warned of.

  scripts/sass-gate.py              builds with the feature `cuda` and checks what was built
  scripts/sass-gate.py FILE...      checks these fatbins, each with the compiler's log beside it
  scripts/sass-gate.py --self-test  shows that planted faults are found: a spill, a missing instruction, serialised wgmma
"""

import fnmatch
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Kernel, most registers a thread, instructions that must be there. The first line that fits counts; a kernel that fits
# none is an error, so that a new one is thought about. 128 registers let two blocks of 256 threads share a
# multiprocessor, 64 four; 1024 threads leave 64.
TABLE = [
    # 384 threads and one block a multiprocessor: 168 each at launch, which setmaxnreg then moves to those that multiply.
    ("tenp_moe_*_gather_w*", 168, ["HGMMA", "UTMALDG", "LDGSTS", "SYNCS"]),
    ("tenp_moe_*_w*", 168, ["HGMMA", "UTMALDG", "SYNCS"]),
    ("tenp_moe_*_n16", 128, ["HMMA", "LDGSTS", "LDSM"]),
    ("tenp_moe_*_n64", 128, ["HMMA", "LDGSTS", "LDSM"]),
    ("tenp_moe_*_n128", 128, ["HMMA", "LDGSTS", "LDSM"]),
    ("tenp_moe_*_r2", 128, []),
    # Four rows' loads in flight and m beside them: five blocks of 128 threads to a multiprocessor, 80 KiB under way.
    ("tenp_moe_direction", 96, []),
    ("tenp_attention_prefill*", 255, ["HMMA", "LDGSTS", "LDSM"]),
    # Shared memory leaves room for two to four blocks of 128 threads (two of 64 for _256), which these do not lower.
    ("tenp_attention_decode_64", 128, ["HMMA", "LDGSTS", "LDSM"]),
    ("tenp_attention_decode_256", 255, ["HMMA", "LDGSTS", "LDSM"]),
    ("tenp_attention_decode_*", 168, ["HMMA", "LDGSTS", "LDSM"]),
    ("tenp_segment_*_w", 168, ["HGMMA", "UTMALDG", "LDGSTS", "SYNCS"]),
    ("tenp_attention_decode*", 128, []),
    ("tenp_segment_similarity", 128, ["HMMA", "LDGSTS", "LDSM"]),
    ("tenp_segment_assign", 128, ["HMMA", "LDGSTS", "LDSM"]),
    ("tenp_*", 64, []),
]
ARCHITECTURES = ["sm_90a", "sm_80"]
# Loads and stores of local memory: spills, or arrays indexed at run time.
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")
# A warning, or a numbered note of ptxas: that it lets wgmma run one after another (C7510 and its neighbours), put a wait
# in between (C7517), ignored setmaxnreg (C7508). One costs nothing: a further wgmma.fence, where a branch separates ours
# from the products.
REMARK = re.compile(r"warning|\(C(?!7519)\d+\)", re.IGNORECASE)


def toolkit():
    """The folder with cuobjdump and nvdisasm."""
    places = glob.glob(os.path.join(ROOT, ".cuda/lib*/python*/site-packages/nvidia/cu13/bin"))
    places += [os.path.join(os.environ.get(v, ""), "bin") for v in ("CUDA_HOME", "CUDA_PATH")]
    found = shutil.which("cuobjdump")
    places += [os.path.dirname(found)] if found else []
    for place in places:
        if os.path.exists(os.path.join(place, "cuobjdump")):
            return place
    sys.exit("sass-gate: no cuobjdump; scripts/install-nvcc.sh brings it")


def run(*command):
    env = dict(os.environ, PATH=toolkit() + os.pathsep + os.environ.get("PATH", ""))
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"sass-gate: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def built_fatbins():
    """Builds the crate and finds the folder its build script wrote to."""
    lines = run("cargo", "build", "--package", "tenp-kernels", "--features", "cuda", "--message-format", "json")
    for line in lines.splitlines():
        message = json.loads(line)
        if message["reason"] == "build-script-executed" and "tenp-kernels" in message["package_id"]:
            return sorted(glob.glob(os.path.join(message["out_dir"], "*.fatbin")))
    sys.exit("sass-gate: cargo named no output folder of tenp-kernels")


def resources(fatbin):
    """(architecture, kernel) -> registers, stack bytes."""
    found, arch, kernel = {}, None, None
    for line in run("cuobjdump", "--dump-resource-usage", fatbin).splitlines():
        if match := re.match(r"\s*arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+)", line):
            found[arch, kernel] = (int(match[1]), int(match[2]))
    return found


def instructions(fatbin):
    """(architecture, kernel) -> lines of machine code."""
    found, arch, kernel = {}, None, None
    for line in run("cuobjdump", "--dump-sass", fatbin).splitlines():
        if match := re.match(r"\s*arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = match[1]
            found[arch, kernel] = []
        elif kernel and re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            found[arch, kernel].append(line)
    return found


def remarks(fatbin):
    """What the compiler remarked of a fatbin, in the log that build.rs leaves beside it."""
    log = os.path.splitext(fatbin)[0] + ".log"
    if not os.path.exists(log):
        return [f"no {os.path.basename(log)} beside it: build it with build.rs, which keeps what nvcc says"]
    with open(log, encoding="utf-8") as file:
        return [line for line in file.read().splitlines() if REMARK.search(line)]


def check(fatbins, architectures):
    """Prints a line per kernel and returns what is wrong."""
    faults, seen = [], set()
    for fatbin in fatbins:
        faults += [f"{os.path.basename(fatbin)}: {line}" for line in remarks(fatbin)]
        used, code = resources(fatbin), instructions(fatbin)
        names = sorted({kernel for _, kernel in used})
        if not names:
            faults.append(f"{os.path.basename(fatbin)} holds no kernel")
        for kernel in names:
            seen.add(kernel)
            row = next((row for row in TABLE if fnmatch.fnmatch(kernel, row[0])), None)
            if row is None:
                faults.append(f"{kernel}: no line in the table of scripts/sass-gate.py")
                continue
            _, most_registers, needed = row
            # Sources named so use instructions of sm_90a and are compiled for it alone.
            only_hopper = os.path.basename(fatbin).endswith("_sm90.fatbin")
            for arch in ["sm_90a"] if only_hopper else architectures:
                if (arch, kernel) not in used:
                    faults.append(f"{kernel}: not compiled for {arch}")
                    continue
                registers, stack = used[arch, kernel]
                lines = code.get((arch, kernel), [])
                local = sum(bool(LOCAL_MEMORY.search(line)) for line in lines)
                missing = [name for name in needed if not any(re.search(rf"\b{name}\b", line) for line in lines)]
                where = f"{kernel} ({arch})"
                if not lines:
                    faults.append(f"{where}: no machine code")
                if local or stack:
                    faults.append(f"{where}: {local} accesses to local memory, {stack} bytes of stack: registers spilled, "
                                  "or an array is indexed at run time")
                if registers > most_registers:
                    faults.append(f"{where}: {registers} registers, at most {most_registers} allowed")
                if missing:
                    faults.append(f"{where}: no {', '.join(missing)} instruction")
                print(f"{where:48} {registers:3} registers {len(lines):6} instructions")
    print(f"sass-gate: {len(seen)} kernels in {len(fatbins)} files")
    return faults


# By the name of the source, and what is to be found in it. Both are compiled as build.rs does.
PLANTED = {
    "planted": r"""
// Keeps more values alive than 32 registers hold.
extern "C" __global__ void __launch_bounds__(1024, 2) tenp_planted_spill(const float *in, float *out) {
    float v[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) v[i] = in[threadIdx.x + 1024 * i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; ++i) out[threadIdx.x + 1024 * i] = v[i] * v[63 - i] + v[(7 * i) % 64];
}
extern "C" __global__ void tenp_moe_planted_n16(const float *in, float *out) { out[threadIdx.x] = 2 * in[threadIdx.x]; }
""",
    # Adds to an accumulator while products into it are under way.
    "planted_sm90": r"""
#include "hopper.cuh"
extern "C" __global__ void __launch_bounds__(128, 1) tenp_moe_planted_w8(float *out) {
    TENP_SHARED(uint8_t, shared);
    float acc[4] = {};
    for (int i = 0; i < 4; ++i) {
        tenp::wgmma_fence();
        tenp::wgmma<8, false>(acc, tenp::descriptor(shared), tenp::descriptor(shared + 16384));
        tenp::wgmma_commit();
        acc[0] += 1.0f;
    }
    tenp::wgmma_wait<0>();
    out[threadIdx.x] = acc[0] + acc[1] + acc[2] + acc[3];
}
""",
}
PLANTED_FAULTS = [
    ("tenp_planted_spill", "local memory"),
    ("tenp_moe_planted_n16", "no HMMA"),
    ("tenp_moe_planted_w8", "wgmma.mma_async instructions are serialized"),
]


def compile_planted(folder, stem, text):
    source, fatbin = os.path.join(folder, f"{stem}.cu"), os.path.join(folder, f"{stem}.fatbin")
    with open(source, "w", encoding="utf-8") as file:
        file.write(text)
    arch = "90a" if stem.endswith("_sm90") else "80"
    nvcc = os.environ.get("TENP_NVCC") or os.path.join(toolkit(), "nvcc")
    command = [nvcc, "--fatbin", "-O3", "-std=c++17", "-I" + os.path.join(ROOT, "kernels/cuda/include"),
               "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-o", fatbin, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"sass-gate: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    with open(os.path.join(folder, f"{stem}.log"), "w", encoding="utf-8") as file:
        file.write(done.stderr)
    return fatbin


def self_test():
    with tempfile.TemporaryDirectory() as folder:
        faults = check([compile_planted(folder, *planted) for planted in PLANTED.items()], ["sm_80"])
    for kernel, word in PLANTED_FAULTS:
        if not any(kernel in fault and word in fault for fault in faults):
            sys.exit(f"sass-gate: the planted fault of {kernel} was not found; found: {faults}")
    print(f"sass-gate: all {len(PLANTED_FAULTS)} planted faults found")


def main():
    if sys.argv[1:] == ["--self-test"]:
        return self_test()
    faults = check(sys.argv[1:] or built_fatbins(), ARCHITECTURES)
    for fault in faults:
        print(f"sass-gate: {fault}", file=sys.stderr)
    return sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
