#!/usr/bin/env bash
# Compares kernels/params.rs with kernels/cuda/include/params.h; with --write regenerates it.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z ${LIBCLANG_PATH:-} ]]; then
  scripts/install-nvcc.sh >&2
  LIBCLANG_PATH=$(dirname "$(find .cuda/lib*/python*/site-packages/clang/native -name 'libclang.*' | head -n 1)")
  LIBCLANG_PATH=$(realpath "$LIBCLANG_PATH")
  export LIBCLANG_PATH
fi
case ${1:-} in
  --write) export TENP_WRITE_BINDINGS=1 ;;
  '') ;;
  *) echo "usage: scripts/bindings.sh [--write]" >&2; exit 2 ;;
esac
TENP_REQUIRE_LIBCLANG=1 cargo test --quiet --package tenp-kernels --features bindings --test bindings
