#!/usr/bin/env bash
# Runs a command and prints its peak anonymous memory (RssAnon of /proc, every 20 ms), peak resident memory and time.
#   scripts/peak-memory.sh tenp-run prune MODEL …
set -u
"$@" &
pid=$!
start=$(date +%s.%N)
anon=0
while kill -0 "$pid" 2>/dev/null; do
  now=$(awk '/^RssAnon/ {print $2}' "/proc/$pid/status" 2>/dev/null)
  [ -n "$now" ] && [ "$now" -gt "$anon" ] && anon=$now
  peak=$(awk '/^VmHWM/ {print $2}' "/proc/$pid/status" 2>/dev/null) && [ -n "$peak" ] && hwm=$peak
  sleep 0.02
done
wait "$pid"
status=$?
awk -v a="$anon" -v h="${hwm:-0}" -v s="$start" -v e="$(date +%s.%N)" \
  'BEGIN {printf "peak anonymous %.3f GB, peak resident with file pages %.2f GB, %.1f s\n", a * 1024 / 1e9, h * 1024 / 1e9, e - s}' >&2
exit $status
