#!/usr/bin/env bash
# Prunes every golden checkpoint into the forms that stock loaders take and
# compares `tenp-run logits` with the transformers library on each output.
#
#     check_forms.sh TENP_RUN_BINARY [GOLDEN_DIR]
#
# padded: --method tenp --keep 0.6    uniform: --method enp --keep 0.6
# fewer:  --method reap --keep 0.75 (experts dropped, full widths)
# dern:   --method dern --keep 0.75 --threshold 0 (experts dropped and merged)
#
# Environment: PYTHON (default python3; needs torch, transformers, safetensors),
# TOLERANCE (default 1e-4), KEEP_OUTPUT=DIR (keep the outputs and logs there).
# Exit code: 0 when every row is ok or a refusal that was expected, else 1.
set -u

if [ $# -lt 1 ] || [ "$1" = "-h" ] || [ "$1" = "--help" ]; then
    sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
run=$(command -v "$1") || { echo "no such program: $1" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
golden=${2:-$here/../golden}
python=${PYTHON:-python3}
tolerance=${TOLERANCE:-1e-4}

if [ -n "${KEEP_OUTPUT:-}" ]; then
    work=$KEEP_OUTPUT
    mkdir -p "$work"
    if [ -n "$(ls -A "$work")" ]; then
        echo "$work is not empty" >&2
        exit 2
    fi
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi

failed=0

row() { printf '| %-18s | %-7s | %-18s | %10s | %s\n' "$1" "$2" "$3" "$4" "$5"; }

# Runs a step with its output in the log; on failure shows the log's last line.
step() {
    local log=$1
    shift
    echo "+ $*" >>"$log"
    "$@" >>"$log" 2>&1
}

# check FAMILY FORM METHOD KEEP EXPECTED(ok|refused) [OPTION...]
check() {
    local family=$1 form=$2 method=$3 keep=$4 expected=$5
    shift 5
    local model=$golden/$family ids=$golden/$family/golden.safetensors
    local at=$work/$family-$form
    local log=$at.log how="$method --keep $keep" apply_form=$form error
    case $form in fewer | dern) apply_form=uniform ;; esac
    step "$log" "$run" plan "$model" --stats "$work/$family.stats.safetensors" --method "$method" --keep "$keep" "$@" -o "$at.plan.json"
    case $?:$expected in
        0:ok) ;;
        0:refused)
            failed=1
            row "$family" "$form" "$how" - "FAIL: a plan was made where none is possible"
            return
            ;;
        *:refused)
            row "$family" "$form" "$how" - "refused, as expected: $(grep -v '^+' "$log" | head -n 1)"
            return
            ;;
        *)
            failed=1
            row "$family" "$form" "$how" - "FAIL plan: $(tail -n 1 "$log")"
            return
            ;;
    esac
    if ! step "$log" "$run" apply "$model" --plan "$at.plan.json" -o "$at" --form "$apply_form"; then
        failed=1
        row "$family" "$form" "$how" - "FAIL apply: $(tail -n 1 "$log")"
        return
    fi
    if ! step "$log" "$run" logits "$at" --input "$ids" --output "$at.logits.safetensors"; then
        failed=1
        row "$family" "$form" "$how" - "FAIL logits: $(tail -n 1 "$log")"
        return
    fi
    if error=$("$python" "$here/compare_logits.py" "$at" --ids "$ids" --ours "$at.logits.safetensors" --tolerance "$tolerance" --quiet 2>>"$log"); then
        row "$family" "$form" "$how" "$error" ok
    else
        failed=1
        row "$family" "$form" "$how" "${error:--}" "FAIL: $(tail -n 1 "$log")"
    fi
}

row family form method error result
echo '|--------------------|---------|--------------------|-----------:|---'
for folder in "$golden"/*/; do
    family=$(basename "$folder")
    [ -e "$folder/golden.safetensors" ] || continue
    if ! step "$work/$family.log" "$run" calibrate "$folder" --data "$folder/golden.safetensors" -o "$work/$family.stats.safetensors"; then
        failed=1
        row "$family" - calibrate - "FAIL: $(tail -n 1 "$work/$family.log")"
        continue
    fi
    check "$family" padded tenp 0.6 ok
    check "$family" uniform enp 0.6 ok
    # Four groups of two experts: the same count in every group would leave one in
    # each (top-3 out of two kept groups, or a top-2 group score, out of reach).
    case $family in
        deepseek_v2_group | deepseek_v3) droppable=refused ;;
        *) droppable=ok ;;
    esac
    check "$family" fewer reap 0.75 "$droppable"
    check "$family" dern dern 0.75 "$droppable" --threshold 0
done
exit $failed
