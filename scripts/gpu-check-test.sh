#!/usr/bin/env bash
# Runs scripts/gpu-check.sh on pretended binaries: without a GPU, with everything good, with a failing test.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pre=$work/pre
mkdir -p "$pre/repo/demo/calibration" "$pre/repo/demo/text" "$pre/peers" "$work/bin"
cp scripts/gpu-report.py scripts/gpu_*.py "$pre/"
echo '{}' > "$pre/repo/demo/config.json"
touch "$pre/repo/demo/calibration/a.jsonl" "$pre/repo/demo/text/a.jsonl"
echo pretended > "$pre/revision"
cp tests/peers/made_up/* "$work/"

# What each is called with goes to a file, so that the options can be looked at.
cat > "$pre/gpu-tests" <<'END'
#!/usr/bin/env bash
echo "$TENP_REPO ${TENP_REQUIRE_GPU:-} ${TENP_CHECK_SIZE:-} ${TENP_REPEATS:-} ${TENP_GPU_POISON:-} $*" >> "$PRETENDED/calls"
case $(<"$PRETENDED/mode") in
  none) echo "skipped: the_gpu_is_described: no GPU: there is no driver" >&2 ;;
  bad) [[ $* == *the_gpu_is_described* ]] || { echo "test norms ... FAILED"; exit 101; } ;;
esac
echo "test result: ok. 37 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s"
END
cat > "$pre/gpu-bench" <<'END'
#!/usr/bin/env bash
[[ -z ${TENP_GPU_CASE:-} ]] || { echo "profiled $TENP_GPU_CASE" >> "$PRETENDED/calls"; exit; }
echo "gpu-bench $TENP_GPU_BENCH_JSON" >> "$PRETENDED/calls"
cp "$PRETENDED/gpu_moe.json" "$TENP_GPU_BENCH_JSON"
END
cat > "$pre/peers/bench.py" <<'END'
import os, pathlib, sys
print("peers", *sys.argv[1:], file=open(os.environ["PRETENDED"] + "/calls", "a"))
if pathlib.Path(os.environ["PRETENDED"], "mode").read_text().strip() == "bare":
    print("left out: every peer: No module named 'torch'", file=sys.stderr)
    line = '{"kind": "left_out", "peer": "every peer", "why": "nothing is there"}'
else:
    line = pathlib.Path(os.environ["PRETENDED"], "gpu_peers.jsonl").read_text()
pathlib.Path(sys.argv[1]).write_text(line)
END
cat > "$pre/tenp-run" <<'END'
#!/usr/bin/env bash
echo "tenp-run $*" >> "$PRETENDED/calls"
while (($#)); do
  case $1 in
    calibrate) statistics=1 ;;
    plan) plan=1 ;;
    -o) out=$2 ;;
  esac
  shift
done
if [[ -n ${statistics:-} ]]; then
  # One table of one number.
  header='{"a/layers.1/energy":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}'
  printf "\\x$(printf %02x ${#header})\0\0\0\0\0\0\0%s\0\0\0\0\0\0\360\077" "$header" > "$out"
elif [[ -n ${plan:-} ]]; then
  echo '{"layers": [{"layer": 1, "experts": [{"id": 0, "width": 4}]}]}' > "$out"
fi
END
cat > "$work/bin/compute-sanitizer" <<'END'
#!/usr/bin/env bash
[[ $1 == --tool ]] || exit 1
while [[ $1 != */gpu-tests ]]; do shift; done
"$@" && echo "========= ERROR SUMMARY: 0 errors"
END
chmod +x "$pre"/gpu-* "$pre/tenp-run" "$work/bin/compute-sanitizer"
export PRETENDED=$work PATH=$work/bin:$PATH

fail() { echo "gpu-check-test: $1" >&2; cat "$work/said" >&2; exit 1; }
check() { # MODE STATUS ARGUMENTS…
  local mode=$1 want=$2 got=0
  shift 2
  echo "$mode" > "$work/mode"
  : > "$work/calls"
  scripts/gpu-check.sh "$@" > "$work/said" 2>&1 || got=$?
  ((got == want)) || fail "$mode: exit code $got, expected $want"
}

check none 3 "$pre" "$work/none"
grep -q 'gpu-check: no GPU: there is no driver' "$work/said" || fail "it does not say that there is no GPU"
[[ ! -e $work/none/report.json ]] || fail "a report without a GPU"

check good 0 "$pre" "$work/good"
for word in "Everything is good" "| tests | good" "| racecheck | good" "| prune-cuda | good" "revision: pretended" \
  "agree at" "| energy | 0.00e+00 |"; do
  grep -qF "$word" "$work/good/report.md" || fail "the report does not say: $word"
done
grep -q "repo 1 small 2 0 .*--test-threads=1" "$work/calls" || fail "initcheck's options"
grep -q "repo 1    --test-threads=4" "$work/calls" || fail "the tests' options"
grep -q "tenp-run calibrate .* --device cpu --compute bf16 -o" "$work/calls" || fail "the CPU's options"
python3 -c 'import json, sys; assert json.load(open(sys.argv[1]))["good"]' "$work/good/report.json" || fail "report.json"

# Ours, the peers, ours again.
order=$(grep -o '^gpu-bench .*json\|^peers .*jsonl' "$work/calls" | sed 's,/.*/,,')
[[ $order == $'gpu-bench gpu_moe.json\npeers gpu_peers.jsonl\ngpu-bench gpu_moe_again.json' ]] || fail "the order: $order"
for word in "## Beside other libraries" "| bench-again | good" "380.0 (**0.95 ×**)"; do
  grep -qF "$word" "$work/good/report.md" || fail "the report does not say: $word"
done
# A bench of its own makes older figures of the peers another comparison; peers alone runs ours too.
check good 0 "$pre" "$work/good" bench
grep -qF "No peer was measured" "$work/good/report.md" && ! grep -qF "| peers |" "$work/good/report.md" || fail "figures of different runs are compared"
check good 0 "$pre" "$work/good" peers
(($(grep -c '^gpu-bench' "$work/calls") == 2)) || fail "peers without a run of ours before and after"
check bare 0 "$pre" "$work/bare" peers
(($(grep -c '^gpu-bench' "$work/calls") == 1)) || fail "ours again without peers"
grep -qF "left out: every peer: No module named 'torch'" "$work/bare/report.md" || fail "what is missing is not named"

# Without ncu it says so; with it, the kernels of our largest loss, or of the case that is named.
check good 0 "$pre" "$work/good" profile
grep -qF "left out: profile: no ncu" "$work/good/report.md" || fail "the missing profiler is not named"
cat > "$work/bin/ncu" <<'END'
#!/usr/bin/env bash
echo "ncu $*" >> "$PRETENDED/calls"
if [[ $1 == --import ]]; then
  echo '==PROF== a line of its own'
  echo '"ID","Kernel Name","Grid Size","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",'\
'"lts__throughput.avg.pct_of_peak_sustained_elapsed","sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",'\
'"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",'\
'"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"'
  echo '"","","","%","ns","%","%","inst","inst","inst"'
  echo '"0","tenp_moe_down_w128(TenpMoeDownParams)","(132, 1, 1)","41.5","1,234,500","30","n/a","2.25","9","0.5"'
else
  while [[ $1 != */gpu-bench ]]; do shift; done
  "$@"
fi
END
chmod +x "$work/bin/ncu"
check good 0 "$pre" "$work/good" profile
grep -qF "profiled Made-up/8192 tokens/full/uniform" "$work/calls" || fail "not the largest loss"
row='| tenp_moe_down_w128 | (132, 1, 1) | 1234.5 |  | 42 % | 30 % | long scoreboard 2.2, wait 0.5 |'
grep -qF "$row" "$work/good/report.md" || fail "the profile"
TENP_GPU_CASE="Made-up/8 tokens/full/uniform" TENP_GPU_KERNELS=tenp_moe_combine check good 0 "$pre" "$work/alone" profile
grep -q "^ncu .*--kernel-name regex:tenp_moe_combine " "$work/calls" || fail "the named kernels"
grep -qF "Kernels of Made-up/8 tokens/full/uniform" "$work/alone/report.md" || fail "the named case"
rm -r "$work/alone"
check good 1 "$pre" "$work/alone" profile
grep -qF "run the step bench, or name a case" "$work/said" || fail "a profile of nothing"
rm "$work/bin/ncu"

check bad 1 "$pre" "$work/bad" tests
grep -q 'failed: norms' "$work/bad/report.md" || fail "the failing test is not named"
# A step that is run again takes the place of its result.
check good 0 "$pre" "$work/bad" tests
check good 2 "$pre" "$work/good" nonsense
rm "$pre/gpu-bench"
check good 2 "$pre" "$work/good"
check good 2 "$work/nowhere" "$work/good"
echo "gpu-check-test: passed"
