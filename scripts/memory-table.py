#!/usr/bin/env python3
"""Runs commands of tenp-run, first with --dry-run and then in earnest, and prints what was said of memory and time and what came.

    scripts/memory-table.py target/release/tenp-run < commands

A line of the standard input is a command without the program's name; {out} in it is a folder that is removed after each line.
Memory is the largest RssAnon of /proc/PID/status, looked at every 2 ms.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time


def measured(command):
    """Peak anonymous bytes and seconds of a command."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak, started = 0, time.monotonic()
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
                lines = [line for line in status if line.startswith("RssAnon")]
            peak = max([peak] + [1024 * int(line.split()[1]) for line in lines])
        except (FileNotFoundError, ProcessLookupError):
            pass
        time.sleep(0.002)
    if process.returncode:
        sys.exit(f"{shlex.join(command)}: {process.stderr.read().decode()}")
    return peak, time.monotonic() - started


def main():
    program = sys.argv[1]
    print("| command | said, MB | measured, MB | measured / said | said, s | took, s |", flush=True)
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    for line in sys.stdin:
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        with tempfile.TemporaryDirectory(dir=".") as folder:
            command = [program] + shlex.split(line.replace("{out}", f"{folder}/out"))
            dry = subprocess.run(command + ["--dry-run", "--json"], capture_output=True, check=True)
            said = json.loads(dry.stdout)
            peak, seconds = measured(command)
        memory = said["memory_bytes"]
        row = f"{memory / 1e6:.1f} | {peak / 1e6:.1f} | {peak / memory:.2f} | {said['seconds']:.1f} | {seconds:.1f}"
        print(f"| `{line}` | {row} |", flush=True)


if __name__ == "__main__":
    main()
