#!/usr/bin/env bash
# The kernels' crate as crates.io would get it: builds, is under 2 MB, and, with --test, passes the tests it ships.
set -euo pipefail
cd "$(dirname "$0")/.."
limit=2000000
target=${CARGO_TARGET_DIR:-target}
started=$(mktemp)
folder=$(mktemp -d)
trap 'rm -rf "$started" "$folder"' EXIT

cargo publish --dry-run --package tenp-kernels --allow-dirty
crate=$(find "$target/package" -name 'tenp-kernels-*.crate' -newer "$started" | head -n 1)
bytes=$(wc -c < "$crate")
printf '%s: %d of %d bytes\n' "$crate" "$bytes" "$limit"
if [ "$bytes" -ge "$limit" ]; then
  echo "too large: see \`include\` in Cargo.toml" >&2
  exit 1
fi
if [ "${1:-}" = --test ]; then
  # Away from the workspace, which would claim it.
  tar -xzf "$crate" -C "$folder"
  cargo test --manifest-path "$folder"/tenp-kernels-*/Cargo.toml --target-dir "$target" --locked
fi
