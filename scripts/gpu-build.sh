#!/usr/bin/env bash
# Builds what scripts/gpu-check.sh needs on a machine without cargo: the GPU tests, the GPU benches and tenp-run,
# stripped, with the peers' benches and the models and texts they read, in one folder.
#
#   scripts/gpu-build.sh [--bare] [OUT]     OUT: target/gpu without it; replaced if it is such a folder
#
# --bare leaves the models out, for a machine that has the repository.
set -euo pipefail
cd "$(dirname "$0")/.."

bare=
[[ ${1:-} == --bare ]] && { bare=1; shift; }
out=${1:-target/gpu}
if [[ -e $out && ! -f $out/revision ]]; then
  echo "gpu-build: $out is there and is no folder that this script made" >&2
  exit 2
fi

# Prints the executable that cargo says it built for the target of this name and kind.
executable() { # NAME KIND CARGO-ARGUMENTS…
  local name=$1 kind=$2
  shift 2
  cargo "$@" --message-format=json-render-diagnostics | python3 -c '
import json, sys
name, kind = sys.argv[1:]
found = None
for line in sys.stdin:
    message = json.loads(line)
    target = message.get("target", {})
    if target.get("name") == name and kind in target.get("kind", []) and message.get("executable"):
        found = message["executable"]
if found is None:
    sys.exit(f"gpu-build: cargo built no {kind} {name}")
print(found)' "$name" "$kind"
}

tests=$(executable gpu test test --release --no-run -p tenp-model --features cuda --test gpu)
bench=$(executable gpu_moe bench bench --no-run -p tenp-kernels --features cuda --bench gpu_moe)
program=$(executable tenp-run bin build --release -p tenp-run --features cuda)
synthesise=$(executable synthesise example build --release -p tenp-checkpoint --example synthesise)

partial=$out.partial
rm -rf "$partial"
mkdir -p "$partial"
for pair in "$tests gpu-tests" "$bench gpu-bench" "$program tenp-run" "$synthesise synthesise"; do
  read -r from to <<<"$pair"
  strip -o "$partial/$to" "$from"
done
cp scripts/gpu-check.sh scripts/gpu-report.py scripts/gpu_*.py "$partial/"
mkdir "$partial/peers" "$partial/configs"
cp crates/tenp-checkpoint/tests/data/configs/deepseek-v{2-lite,3}.json "$partial/configs/"
cp benches/baselines/peers/*.py "$partial/peers/"
if [[ -z $bare ]]; then
  mkdir -p "$partial/repo/tests"
  cp -r demo "$partial/repo/demo"
  cp -r tests/golden "$partial/repo/tests/golden"
fi
revision=$(git describe --always --abbrev=40 --dirty 2>/dev/null || echo unknown)
printf '%s\n' "$revision" > "$partial/revision"

limit=$((64 << 20))
bytes=$(du -sb "$partial" | cut -f1)
rm -rf "$out"
mv "$partial" "$out"
du -sh "$out"/* | sed 's/^/gpu-build: /'
echo "gpu-build: $((bytes >> 20)) MiB of revision $revision in $out"
if ((bytes >= limit)); then
  echo "gpu-build: that is not below $((limit >> 20)) MiB" >&2
  exit 1
fi
