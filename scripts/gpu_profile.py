"""What Nsight Compute says of the kernels of one case, for scripts/gpu-report.py: why they take the time they take.

`gpu-check.sh … profile` writes profile.csv (`ncu --page raw --csv`): a line of names, one of units, one a launch.
"""

import csv
import re

# By the beginnings of their names: which of them there are depends on the GPU.
TENSOR = ("sm__pipe_tensor_cycles_active.avg.pct_of_peak", "sm__inst_executed_pipe_tensor")
COLUMNS = {"of the tensor pipe": TENSOR, "of DRAM": ("dram__throughput.avg.pct_of_peak",),
           "of L2": ("lts__throughput.avg.pct_of_peak",)}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")


def number(text):
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def largest(launch, beginnings):
    """The largest value of the columns that begin so; None where there is none."""
    values = [number(text) for name, text in launch.items() if name.startswith(beginnings)]
    return max((v for v in values if v is not None), default=None)


def launches(path):
    """Every launch by the names of its columns."""
    with open(path, encoding="utf-8", newline="") as file:
        # What ncu says besides begins with ==.
        lines = list(csv.reader(line for line in file if not line.startswith("==")))
    header = next((i for i, line in enumerate(lines) if "Kernel Name" in line), None)
    if header is None:
        return []
    found = [dict(zip(lines[header], line)) for line in lines[header + 1 :]]
    return [launch for launch in found if launch.get("Kernel Name")]


def rows(path):
    """The cells of `HEADER` for every launch."""
    made = []
    for launch in launches(path):
        # In nanoseconds with --print-units base.
        time = number(launch.get("gpu__time_duration.sum", ""))
        stalls = [(number(text), match[1]) for name, text in launch.items() if (match := STALL.fullmatch(name))]
        stalls = sorted((s for s in stalls if s[0] is not None and s[1] != "selected"), reverse=True)[:3]
        shares = [largest(launch, beginnings) for beginnings in COLUMNS.values()]
        made.append([launch["Kernel Name"].split("(")[0], launch.get("Grid Size", ""),
                     "" if time is None else f"{time / 1e3:.1f}",
                     *("" if share is None else f"{share:.0f} %" for share in shares),
                     ", ".join(f"{reason.replace('_', ' ')} {value:.1f}" for value, reason in stalls)])
    return made


HEADER = ["kernel", "grid", "µs", *COLUMNS, "warps that wait, by reason"]
