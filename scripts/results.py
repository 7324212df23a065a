#!/usr/bin/env python3
"""Runs the experiments of docs/results.md on the demo model and prints their tables. Goes on where it was stopped.

    cargo build --release -p tenp-run
    scripts/results.py target/release/tenp-run OUT [--alike MODEL [MODEL2]]

OUT gets a folder of `tenp-run compare` for each experiment; the models are what tests/compat/upcycle.py makes.
"""

import argparse
import json
import math
import subprocess
from pathlib import Path

DOMAINS = ["arith", "code", "facts", "lists"]
KEEPS = [0.9, 0.75, 0.6, 0.45, 0.3]
LS = ":recover=least-squares"
RECOMMENDED = "tenp:allocation=global:neuron-score=wifv:width-multiple=1" + LS
MAIN = [
    "tenp", "tenp" + LS, "tenp+dern", "tenp:neuron-score=energy",
    "tenp:allocation=global:neuron-score=energy", "tenp:allocation=global:neuron-score=energy" + LS,
    "tenp:allocation=global:neuron-score=wifv", "tenp:allocation=global:neuron-score=wifv" + LS, RECOMMENDED,
    "tenp:allocation=sensitivity",
    "tenp:allocation=sensitivity" + LS, "tenp:allocation=sensitivity:neuron-score=energy",
    "tenp:allocation=sensitivity:neuron-score=energy" + LS, "enp:exact", "enp:exact:neuron-score=energy",
    "reap", "frequency", "dern", "random-neurons:exact", "random-experts",
]  # fmt: skip
SAMPLED = ["tenp", RECOMMENDED, "enp:exact", "reap", "random-neurons:exact"]
ALPHAS = [f"tenp:alpha={a}" for a in (0, 0.1, 0.2, 0.3, 0.4, 0.6)]
SLOPES = [f"tenp:slope={s}" for s in ("-0.333333", "0", "1")]
RECOVERIES = ["tenp", "tenp" + LS, "tenp" + LS + ":recover-gates=ungated", "tenp" + LS + ":recover-inputs=original"]
DROPPED = "reap:expert-score=gating-share"
THRESHOLDS = [f"dern:threshold={t}" for t in (0, 0.2, 0.4, 0.6, 0.8, 0.9)]
ALIKE = [
    DROPPED, *THRESHOLDS, "dern:init=random", "dern:threshold=0.6:init=random", "dern:sign-canonical", "dern:router=keep",
    "dern:threshold=0.6:router=keep",
]  # fmt: skip


class Runner:
    def __init__(self, program, out):
        self.program, self.out = program, out

    def cells(self, name, methods, keeps, model="demo", domains=DOMAINS, samples=128):
        """Runs one comparison and returns its cells by (method, keep)."""
        folder = self.out / name
        files = [f"demo/calibration/{d}.jsonl" for d in domains]
        line = [self.program, "compare", model, "--data", *map("=".join, zip(domains, files))]
        line += ["--samples", str(samples), "--tasks", "demo/tasks", "--text"]
        line += [f"demo/text/{d}.jsonl" for d in DOMAINS]
        line += ["--keep", ",".join(map(str, keeps)), "--seeds", "3", "--device", "cpu"]
        line += ["--methods", ",".join(methods), "-o", str(folder)]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        results = json.loads((folder / "results.json").read_text())
        cells = {}
        for cell in results["cells"]:
            key = (cell["key"]["method"], cell["key"]["keep"])
            cells.setdefault(key, []).append(cell)
        return results["full"], cells


def nll(figures, only=None):
    tasks = [t for name, t in figures["tasks"] if only in (None, name)]
    tokens = sum(t["answer_tokens"] for t in tasks)
    return sum(t["nll"] * t["answer_tokens"] for t in tasks) / tokens


def accuracy(figures):
    return sum(t["accuracy"] for _, t in figures["tasks"]) / len(figures["tasks"])


FIGURES = {
    "KL": lambda c: c["kl"],
    "answer NLL": lambda c: nll(c["figures"]),
    "accuracy": lambda c: accuracy(c["figures"]),
    "routing shift": lambda c: sum(s := [l["routing_shift"] for l in c["layers"] if l["routing_shift"] is not None])
    / max(len(s), 1),
    "A": lambda c: c["accounting"]["A"],
    "E": lambda c: c["accounting"]["E"],
}


def spread(cells, figure):
    values = [figure(c) for c in cells]
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1) / len(values))
    return mean, error


def shown(cells, figure, digits=4):
    mean, error = spread(cells, figure)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def table(title, header, rows):
    print(f"\n### {title}\n")
    print("| " + " | ".join(header) + " |")
    print("|---" + "|---:" * (len(header) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def by_keep(title, cells, methods, keeps, figure, digits=4):
    rows = []
    for m in methods:
        rows.append([f"`{m}`"] + [shown(cells[m, k], FIGURES[figure], digits) for k in keeps])
    table(title, [figure] + [f"keep {k}" for k in keeps], rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("out", type=Path)
    parser.add_argument("--alike", nargs="*", default=[])
    args = parser.parse_args()
    runner = Runner(args.program, args.out)
    args.out.mkdir(parents=True, exist_ok=True)

    full, cells = runner.cells("main", MAIN, KEEPS)
    main_cells = cells
    print(f"full model: accuracy {accuracy(full):.4f}, answer NLL {nll(full):.4f}")
    for figure, digits in [("KL", 5), ("answer NLL", 4), ("accuracy", 3), ("routing shift", 3), ("A", 3)]:
        by_keep(f"{figure}, 128 samples a domain, three draws", cells, MAIN, KEEPS, figure, digits)
    for k in KEEPS:
        (best, error), name = min((spread(cells[m, k], FIGURES["KL"]), m) for m in MAIN)
        print(f"\nlowest KL at keep {k}: `{name}` {best:.2e} ± {error:.1e}")

    _, cells = runner.cells("recovery", RECOVERIES, [0.6])
    rows = [[f"`{m}`"] + [shown(cells[m, 0.6], FIGURES[f]) for f in ("KL", "answer NLL", "accuracy")] for m in RECOVERIES]
    table("Recovery of tenp, keep 0.6", ["", "KL", "answer NLL", "accuracy"], rows)

    _, cells = runner.cells("alpha", ALPHAS + SLOPES, [0.6])
    rows = [[f"`{m}`"] + [shown(cells[m, 0.6], FIGURES[f]) for f in ("KL", "answer NLL")] for m in ALPHAS + SLOPES]
    table("Share of whole experts and slope, keep 0.6", ["", "KL", "answer NLL"], rows)

    few = runner.cells("samples-8", SAMPLED, [0.6], samples=8)[1]
    rows = []
    for samples, found in [("8", few), ("128", main_cells)]:
        rows.append([samples] + [shown(found[m, 0.6], FIGURES["answer NLL"]) for m in SAMPLED])
    table("Samples a domain, keep 0.6: answer NLL", ["samples"] + SAMPLED, rows)

    for number, model in enumerate(args.alike, 1):
        full, cells = runner.cells("alike" if number == 1 else f"alike-{number}", ALIKE, [0.5], model=model)
        print(f"\nmodel {model} with alike experts: accuracy {accuracy(full):.4f}, answer NLL {nll(full):.4f}")
        for figure, digits in [("KL", 4), ("answer NLL", 4), ("accuracy", 3)]:
            by_keep(f"Alike experts, {model}: {figure}", cells, ALIKE, [0.5], figure, digits)
    if args.alike:
        methods = [DROPPED, "dern:threshold=0.2", "dern", "dern:threshold=0.6", "dern:init=random"]
        _, cells = runner.cells("unlike", methods, [0.5])
        by_keep("Demo model (experts unlike): KL", cells, methods, [0.5], "KL")

    inside = {m: [] for m in SAMPLED}
    outside = {m: [] for m in SAMPLED}
    for domain in DOMAINS:
        _, cells = runner.cells(f"domain-{domain}", SAMPLED, [0.6], domains=[domain])
        for m in SAMPLED:
            for task in DOMAINS:
                value = spread(cells[m, 0.6], lambda c, task=task: nll(c["figures"], task))[0]
                (inside if task == domain else outside)[m].append(value)
    mean = lambda values: f"{sum(values) / len(values):.4f}"
    rows = [[f"`{m}`", mean(inside[m]), mean(outside[m])] for m in SAMPLED]
    table("Calibrated on one domain, keep 0.6: answer NLL, mean over tasks", ["", "that task", "other tasks"], rows)


if __name__ == "__main__":
    main()
