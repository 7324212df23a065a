#!/usr/bin/env bash
# Puts a complete CUDA compiler, its disassemblers and libclang into .cuda/ from pinned Python wheels: no root, no CUDA
# installation. build.rs finds it there by itself. Running it again does nothing unless a pin changed.
set -euo pipefail
cd "$(dirname "$0")/.."

root=.cuda
# One toolkit release. The disassemblers have no wheel of that release; newer ones read its output.
pins=(
  nvidia-cuda-nvcc==13.0.88
  nvidia-cuda-crt==13.0.88
  nvidia-nvvm==13.0.88
  nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85
  nvidia-cuda-cuobjdump==13.2.86
  nvidia-cuda-nvdisasm==13.2.86
  libclang==18.1.1
)
wanted=$(printf '%s\n' "${pins[@]}")

find_nvcc() { find "$root"/lib*/python*/site-packages/nvidia/cu13/bin -name nvcc 2>/dev/null | head -n 1; }

if [[ -f $root/pins && $(<"$root/pins") == "$wanted" ]] && nvcc=$(find_nvcc) && [[ -n $nvcc ]]; then
  echo "install-nvcc: already there: $nvcc"
  exit 0
fi

command -v python3 >/dev/null || { echo "install-nvcc: python3 is needed to fetch the wheels" >&2; exit 3; }
rm -rf "$root"
if python3 -m venv "$root" 2>/dev/null; then
  "$root/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile "${pins[@]}"
else
  # Some distributions ship venv apart from python3; pip alone is enough.
  rm -rf "$root"
  python3 -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
    --target "$root/lib/python3/site-packages" "${pins[@]}"
fi
nvcc=$(find_nvcc)
[[ -n $nvcc ]] || { echo "install-nvcc: the wheels hold no nvcc under $root" >&2; exit 1; }
# Wheels do not always keep the executable bit.
chmod +x "$(dirname "$nvcc")"/* "$(dirname "$nvcc")"/../nvvm/bin/* 2>/dev/null || true
printf '%s\n' "$wanted" > "$root/pins"
echo "install-nvcc: $("$nvcc" --version | tail -n 1) in $nvcc"
