#!/usr/bin/env bash
# Checks everything that needs a GPU, with what scripts/gpu-build.sh built: needs a driver, python3 and, for the
# sanitizers, compute-sanitizer; no cargo.
#
#   gpu-check.sh PREBUILT OUT [STEP…]
#
# Steps: tests memcheck racecheck synccheck initcheck bench peers program; all of these without any. Three more: tiles times
# every tile of the grouped products, what the choice of tiles is made from; profile runs Nsight Compute (ncu), where it
# is, over one case's kernels, a minute or two; large makes checkpoints of DeepSeek's shapes (up to 60 GB beside OUT) and
# times calibrate and prune (gpu_large.py). Writes OUT/report.json and OUT/report.md; logs are beside them. Steps of
# several runs add up in one OUT. Exit codes: 0 all good, 1 something failed (the report says what; a missing
# compute-sanitizer is a failure), 2 usage, 3 no GPU or no python3.
#
# peers measures other libraries between two runs of our own bench. It needs PyTorch and Triton, and DeepGEMM for
# DeepGEMM; what is missing is named in the report and is no failure. matplotlib draws its plots.
#
# TENP_REPO           the repository, where gpu-build.sh --bare left its models out
# TENP_STEP_SECONDS   limit of a step, 1500 without it
# TENP_GPU_BENCH      what is timed, `short` without it (benches/gpu_moe.rs)
# TENP_GPU_CASE       what profile looks at, `Qwen3-30B-A3B/8192 tokens/full/uniform`; without it our largest loss in OUT
# TENP_GPU_KERNELS    the kernels it looks at, as a regular expression; without it the products and the directions
set -uo pipefail

(($# >= 2)) || { sed -n '2,22s/^# \{0,1\}//p' "$0" >&2; exit 2; }
prebuilt=$(cd "$1" 2>/dev/null && pwd) || { echo "gpu-check: no folder $1" >&2; exit 2; }
mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
shift 2
steps=("$@")
((${#steps[@]})) || steps=(tests memcheck racecheck synccheck initcheck bench peers program)
limit=${TENP_STEP_SECONDS:-1500}

for file in gpu-tests gpu-bench tenp-run gpu-report.py gpu_large.py gpu_peers.py gpu_plots.py gpu_targets.py gpu_profile.py peers/bench.py revision; do
  [[ -e $prebuilt/$file ]] || { echo "gpu-check: no $prebuilt/$file; scripts/gpu-build.sh makes it" >&2; exit 2; }
done
command -v python3 >/dev/null || { echo "gpu-check: python3 is needed for the report" >&2; exit 3; }

export TENP_REPO=${TENP_REPO:-$prebuilt/repo}
[[ -e $TENP_REPO/demo/config.json ]] || { echo "gpu-check: no demo model in $TENP_REPO" >&2; exit 2; }
[[ -d /usr/local/cuda/bin ]] && PATH=$PATH:/usr/local/cuda/bin
# cuBLAS, where the loader does not know it.
for folder in /usr/local/cuda/lib64 /usr/local/cuda/targets/*/lib; do
  [[ -d $folder ]] && export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
done

described=$("$prebuilt/gpu-tests" --exact the_gpu_is_described --nocapture 2>&1)
status=$?
if reason=$(grep -o 'no GPU: .*' <<<"$described"); then
  echo "gpu-check: $reason" >&2
  exit 3
elif ((status)); then
  printf '%s\n' "$described" >&2
  echo "gpu-check: there is a GPU, but it does not open" >&2
  exit 1
fi
export TENP_REQUIRE_GPU=1

# Drops the lines of steps whose results do not count any more.
forget() { # NAME…
  local name
  for name in "$@"; do
    if [[ -f $out/steps.tsv ]]; then
      grep -v "^$name	" "$out/steps.tsv" > "$out/steps.tmp"
      mv "$out/steps.tmp" "$out/steps.tsv"
    fi
  done
}

# Runs one thing and records how it went: a line of steps.tsv, all it printed in a log.
record() { # NAME COMMAND…
  local name=$1 started status
  shift
  started=$(date +%s)
  printf '== %s\n' "$name"
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  ((status == 124)) && echo "ended after $limit s" >> "$out/$name.log"
  # A step that is run again replaces its line.
  forget "$name"
  printf '%s\t%s\t%s\n' "$name" "$status" "$(($(date +%s) - started))" >> "$out/steps.tsv"
  ((status == 0)) || { echo "   exit code $status; the end of $name.log:"; tail -n 15 "$out/$name.log"; }
  return "$status"
}

# The allocation that must fail is no finding. Small sizes and two repeats: every access is watched, which is slow.
sanitize() { # TOOL TEST-ARGUMENTS…
  local tool=$1
  shift
  TENP_CHECK_SIZE=small TENP_REPEATS=2 record "$tool" compute-sanitizer --tool "$tool" --error-exitcode 99 \
    --report-api-errors no "$prebuilt/gpu-tests" --test-threads=1 \
    --skip out_of_memory_says_what_was_wanted --skip times_are_those_of_the_work "$@"
}

bench() { # STEP FILE
  # A bench that ends early leaves no figures of an earlier one.
  rm -f "$out/$2"
  CRITERION_HOME=$out/criterion TENP_GPU_BENCH_JSON=$out/$2 record "$1" env -u TENP_GPU_CASE \
    bash -c '"$0" --bench && [[ -s $TENP_GPU_BENCH_JSON ]]' "$prebuilt/gpu-bench"
}

# Ours, the peers, ours again, all in this call: figures of different times are not compared.
benched=
first_bench() {
  forget peers bench-again
  rm -rf "$out/gpu_peers.jsonl" "$out/gpu_moe_again.json" "$out/plots"
  bench bench gpu_moe.json
  benched=1
}

peers() {
  [[ -n $benched ]] || first_bench
  record peers python3 "$prebuilt/peers/bench.py" "$out/gpu_peers.jsonl"
  if grep -q '"kind": "row"' "$out/gpu_peers.jsonl"; then
    bench bench-again gpu_moe_again.json
  fi
}

profile() {
  local case=${TENP_GPU_CASE:-} kernels=${TENP_GPU_KERNELS:-tenp_moe_(gate_up|down|contribution|direction)} section
  local sections=()
  rm -f "$out/profile.csv" "$out/profile.case"
  if ! command -v ncu >/dev/null; then
    record profile echo "left out: profile: no ncu (Nsight Compute) on this machine"
    return
  fi
  if [[ -z $case ]]; then
    record profile python3 "$prebuilt/gpu-report.py" loss "$out" || return
    case=$(<"$out/profile.log")
  fi
  for section in SpeedOfLight ComputeWorkloadAnalysis MemoryWorkloadAnalysis WarpStateStats; do
    sections+=(--section "$section")
  done
  # The clocks stay as they are.
  TENP_GPU_CASE=$case record profile ncu --force-overwrite -o "$out/profile" --clock-control none \
    --kernel-name "regex:$kernels" --launch-count 12 "${sections[@]}" "$prebuilt/gpu-bench" --bench || return
  ncu --import "$out/profile.ncu-rep" --page raw --csv --print-units base > "$out/profile.csv" 2>> "$out/profile.log"
  printf '%s\n' "$case" > "$out/profile.case"
}

program() {
  local run=$prebuilt/tenp-run demo=$TENP_REPO/demo here=$out/program place
  local data=("$demo"/calibration/*.jsonl)
  rm -rf "$here"
  mkdir -p "$here"
  for place in "cpu --compute bf16" cuda; do
    local name=${place%% *}
    # shellcheck disable=SC2086 # words of the option
    record "calibrate-$name" "$run" calibrate "$demo" --data "${data[@]}" --samples 512 --device $place \
      -o "$here/$name.safetensors"
    record "plan-$name" "$run" plan "$demo" --stats "$here/$name.safetensors" --keep 0.6 -o "$here/$name.json"
    # shellcheck disable=SC2086
    record "eval-$name" "$run" eval "$demo" --tasks "$demo/tasks" --text "$demo"/text/*.jsonl --device $place --json
    # shellcheck disable=SC2086
    record "generate-$name" "$run" generate "$demo" --prompt "2 * 7 =" --max-tokens 20 --device $place
  done
  record prune-cuda "$run" prune "$demo" --data "${data[@]}" --keep 0.6 --device cuda -o "$here/pruned"
  record eval-pruned-cuda "$run" eval "$here/pruned" --tasks "$demo/tasks" --device cuda --json
  record compare python3 "$prebuilt/gpu-report.py" compare "$here/cpu" "$here/cuda"
}

large() {
  local here=$out/large
  rm -rf "$here" "$out/large.json"
  record large python3 "$prebuilt/gpu_large.py" "$prebuilt" "$here" "$out/large.json"
  rm -rf "$here"
}

for step in "${steps[@]}"; do
  case $step in
    tests) record tests "$prebuilt/gpu-tests" --test-threads=4 ;;
    memcheck | synccheck) sanitize "$step" ;;
    # The model's passes launch the same kernels; hazards of all of them take too long to track.
    racecheck) sanitize "$step" --skip calibration --skip continuations --skip branches --skip logits ;;
    initcheck) TENP_GPU_POISON=0 sanitize "$step" ;;
    bench) first_bench ;;
    peers) peers ;;
    tiles) TENP_GPU_BENCH=tiles bench tiles gpu_tiles.json ;;
    profile) profile ;;
    program) program ;;
    large) large ;;
    *) echo "gpu-check: no step $step" >&2; exit 2 ;;
  esac
done

query() { nvidia-smi --id=0 --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -n 1; }
{
  printf 'GPU\t%s\n' "$(query name)"
  printf 'GPU memory\t%s\n' "$(query memory.total)"
  printf 'driver\t%s\n' "$(query driver_version)"
  printf 'CUDA of the driver\t%s\n' "$(nvidia-smi 2>/dev/null | grep -o 'CUDA Version: [0-9.]*' | cut -d' ' -f3)"
  printf 'compute-sanitizer\t%s\n' "$(compute-sanitizer --version 2>/dev/null | grep -io 'version.*' | head -n 1)"
  printf 'CPU\t%s\n' "$(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2- | sed 's/^ *//')"
  printf 'cores\t%s\n' "$(nproc)"
  printf 'memory\t%s GiB\n' "$(($(awk '/MemTotal/ { print $2 }' /proc/meminfo) >> 20))"
  printf 'date\t%s\n' "$(date -u +%Y-%m-%d)"
  printf 'revision\t%s\n' "$(<"$prebuilt/revision")"
} > "$out/environment.tsv"
python3 "$prebuilt/gpu-report.py" report "$out"
