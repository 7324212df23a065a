#!/usr/bin/env bash
# Fuzzes every reader for SECONDS each (docs/faults.md). Needs a nightly Rust and cargo-fuzz. New inputs and findings go
# below fuzz/target; the committed corpus stays as it is.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"

seconds=${1:?"usage: scripts/fuzz.sh SECONDS [READER...]"}
shift
readers=("$@")
[ ${#readers[@]} -gt 0 ] || readers=(index header config plan statistics folder)
# Names of mapped files are leaked on purpose (mapped.rs), which is no finding.
export ASAN_OPTIONS=detect_leaks=0:${ASAN_OPTIONS:-}
for reader in "${readers[@]}"; do
  mkdir -p "target/corpus/$reader" "target/findings/$reader"
  cargo +nightly fuzz run --fuzz-dir . "$reader" "target/corpus/$reader" "corpus/$reader" -- \
    -dict=words.dict -max_len=16384 -timeout=10 -print_final_stats=1 \
    -artifact_prefix="target/findings/$reader/" -max_total_time="$seconds"
done
