"""Our figures beside those of benches/baselines/peers: ratios, wins, losses, targets. For scripts/gpu-report.py.

A ratio is the peer's time over ours, so above 1.00 × we are faster. Ours ran before and after the peers, and the mean of
both counts. Where the two sides did not count the same FLOPs and bytes there is no ratio.
"""

import json
import os
import statistics

import gpu_plots
import gpu_targets
from gpu_targets import base, case_of, rows_per_expert

# What a peer's figure is held against: `products` leaves SwiGLU out, as the cuBLAS baselines do.
OURS_OF = {"experts": "experts", "products": "experts", "layer": "layer"}
LAUNCHED = {"graph": "as a graph", "stream": "one by one"}
KINDS = ("row", "drift", "left_out", "wrong", "failed", "run")


def read_lines(path):
    """The peers' lines by kind; None where there is no file. A run that was stopped can leave half a line."""
    if not os.path.exists(path):
        return None
    kinds = {kind: [] for kind in KINDS}
    with open(path, encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            kinds[line.pop("kind")].append(line)
    return kinds


def mean_of_runs(bench, again):
    """Our rows by case, kind and way of launching, with the mean of both times; `runs` has each."""
    runs = {}
    for made in (bench, again):
        for row in (made or {}).get("rows", []):
            runs.setdefault((case_of(row), row["what"], row["launched"]), []).append(row)
    rows = {}
    for key, of in runs.items():
        first, microseconds = of[0], [row["p50_us"] for row in of]
        mean = statistics.mean(microseconds)
        scale = first["p50_us"] / mean
        flops = first["useful_tflops"] * first["p50_us"] * 1e6
        rows[key] = {**first, "p50_us": mean, "runs": microseconds, "flops": flops,
                     "bytes": first["gb_per_s"] * first["p50_us"] * 1e3}
        for rate in ("useful_tflops", "gb_per_s", "share_of_flops_ceiling", "share_of_bytes_ceiling", "share_of_floor"):
            rows[key][rate] = first[rate] * scale
        for time in gpu_targets.CUBLAS.values():
            if time in first:
                rows[key][time] = statistics.mean(row[time] for row in of)
    return rows


def preferred(ours):
    """One row a case and kind: the graph where there is one."""
    made = {}
    for (case, what, launched), row in ours.items():
        if launched == "graph" or (case, what) not in made:
            made[case, what] = row
    return made


def same_work(a, b):
    return all(abs(a[of] - b[of]) <= 1e-6 * max(a[of], b[of]) for of in ("flops", "bytes"))


def beside(own, named, peer_us):
    return {**named, "launched": own["launched"], "ours_us": own["p50_us"], "peer_us": peer_us,
            "ratio": peer_us / own["p50_us"]}


def compare_cublas(ours):
    """The cuBLAS baselines of our own bench beside our experts, where they were timed in the same way."""
    ratios = []
    for (case, _, _), own in ours.items():
        named = dict(zip(("shape", "tokens", "widths", "routing"), case))
        ratios += [beside(own, {**named, "what": "products", "peer": peer}, own[time])
                   for peer, time in gpu_targets.CUBLAS.items() if time in own]
    return ratios


def compare(ours, peers):
    """Every peer's row beside ours, launched alike where ours was timed both ways, and the cases in which the two sides
    did not do the same."""
    ratios, unlike = [], []
    for row in peers["row"]:
        key = case_of(row), OURS_OF[row["what"]]
        own = ours.get((*key, row["launched"]), ours.get((*key, "stream")))
        if own is None:
            continue
        case = {name: row[name] for name in ("shape", "tokens", "widths", "routing", "what", "peer")}
        if same_work(own, row):
            ratios.append(beside(own, case, row["p50_us"]))
        else:
            unlike.append(case)
    return ratios, unlike


def summary(ratios):
    """Per peer and kind: cases, won, lost, the median and the worst ratio."""
    groups = {}
    for entry in ratios:
        groups.setdefault((entry["peer"], entry["what"]), []).append(entry["ratio"])
    return [{"peer": peer, "what": what, "cases": len(of), "faster": sum(r >= 1 for r in of),
             "slower": sum(r < 1 for r in of), "median": statistics.median(of), "worst": min(of)}
            for (peer, what), of in sorted(groups.items())]


def spread(pairs):
    """The median and the largest difference of two runs of the same, in per cent."""
    off = [100 * abs(b / a - 1) for a, b in pairs]
    return f"median {statistics.median(off):.1f} %, at most {max(off):.1f} %" if off else "not measured"


def read_run(folder, file):
    """A run of our bench; None where it is not there or not whole."""
    try:
        with open(os.path.join(folder, file), encoding="utf-8") as opened:
            return json.load(opened)
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def gather(folder, bench):
    """What the report has of wins, losses and targets; None where neither ours nor the peers have run."""
    lines = read_lines(os.path.join(folder, "gpu_peers.jsonl"))
    if lines is None and bench is None:
        return None
    lines = lines or {kind: [] for kind in KINDS}
    again = read_run(folder, "gpu_moe_again.json")
    run = lines["run"][0] if lines["run"] else None
    made = {"run": run, **{kind: lines[kind] for kind in ("row", "drift", "left_out", "wrong", "failed")}}
    every = beside_peers = mean_of_runs(bench, again)
    shapes = {shape["name"]: shape for of in (bench, run) if of for shape in of["shapes"]}
    if bench and run and bench["gpu"] != run["gpu"]:
        beside_peers = {}
        made["other_gpu"] = bench["gpu"]
    ratios, made["unlike"] = compare(beside_peers, lines)
    ratios += compare_cublas(every)
    ours = list(preferred(beside_peers).values())
    made.update(ratios=ratios, summary=summary(ratios), ours=ours, again=again is not None,
                targets=gpu_targets.targets(preferred(every), ratios, shapes, bench["l2_bytes"] if bench else 0))
    if run:
        made["plots"], made["no_plots"] = gpu_plots.draw(os.path.join(folder, "plots"), ours, lines["row"], shapes,
                                                         run["ceilings"])
    return made


def times(ratio):
    return f"{ratio:.2f} ×" if ratio >= 1 else f"**{ratio:.2f} ×**"


def table(header, rows, numeric_from=0):
    rule = ["---" if i < numeric_from else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def shape_table(name, made):
    """One row a case and kind: our time, and each peer's ratio; their times where we have none."""
    peers = list(dict.fromkeys(base(r["peer"]) for r in made["row"]))
    shape = next(s for s in made["run"]["shapes"] if s["name"] == name)
    ours = {(case_of(r), r["what"]): r for r in made["ours"]}
    ratios = {(case_of(r), r["what"], base(r["peer"])): r["ratio"] for r in made["ratios"]}
    theirs = {(case_of(r), r["what"], base(r["peer"])): r for r in made["row"] if r["shape"] == name}
    rows = []
    for case, what in dict.fromkeys(key[:2] for key in theirs):
        own = ours.get((case, OURS_OF[what]))
        cells = []
        for peer in peers:
            row, ratio = theirs.get((case, what, peer)), ratios.get((case, what, peer))
            cells.append("" if row is None else f"{row['p50_us']:.1f}" + (f" ({times(ratio)})" if ratio else ""))
        load = rows_per_expert({"tokens": case[1], "shape": name}, {name: shape})
        rows.append([str(case[1]), f"{load:.0f}" if load >= 10 else f"{load:.2g}", case[2], case[3], what,
                     f"{own['p50_us']:.1f}" if own else "", *cells])
    return table(["T", "rows an expert", "widths", "routing", "what", "ours, µs", *(f"{p}, µs" for p in peers)], rows, 5)


def losses(made):
    lost = sorted((r for r in made["ratios"] if r["ratio"] < 1), key=lambda r: r["ratio"])
    if not lost:
        return "We are slower in no case." if made["ratios"] else "Nothing to compare."
    rows = [[r["shape"], str(r["tokens"]), r["widths"], r["routing"], r["what"], LAUNCHED[r["launched"]], r["peer"],
             f"{r['ours_us']:.1f}", f"{r['peer_us']:.1f}", times(r["ratio"])] for r in lost]
    return table(["shape", "T", "widths", "routing", "what", "ours launched", "peer", "ours, µs", "theirs, µs", ""], rows, 7)


def wins_and_losses(made):
    rows = [[s["peer"], s["what"], str(s["cases"]), str(s["faster"]), str(s["slower"]), times(s["median"]),
             times(s["worst"])] for s in made["summary"]]
    return ["### Wins and losses", "", table(["peer", "what", "cases", "faster", "slower", "median", "worst"], rows, 2),
            "", losses(made), ""]


def target_table(targets):
    """Every target; those without a case are plainly empty."""
    rows = [[t["target"], str(t["cases"]), str(t["met"]) if t["cases"] else "no figure",
             f"{t['from']:.2f} to {t['to']:.2f}" if t["cases"] else ""] for t in targets]
    return table(["target", "cases", "met", "values"], rows, 1)


def named(entries, words):
    """What could not be measured, once each with the number of cases."""
    counted = {}
    for entry in entries:
        key = (entry["peer"], words(entry))
        counted.setdefault(key, []).append(", ".join(str(entry[n]) for n in ("shape", "tokens", "widths") if n in entry))
    return [f"- {peer}: {why}" + (f" ({cases[0]}" + (f" and {len(cases) - 1} more)" if len(cases) > 1 else ")")
                                  if cases[0] else "") for (peer, why), cases in counted.items()]


def ours_launched(ours):
    """How ours run beside the peers' graphs."""
    graphs = [row["tokens"] for row in ours if row["launched"] == "graph"]
    return f"too at T ≤ {max(graphs)}, past that they are launched one by one" if graphs else "are launched one by one"


def how(made):
    run = made["run"]
    ceilings = run["ceilings"]
    plain = sorted({r["peer"] for r in made["row"] if r["launched"] != "graph"})
    both = [(o["runs"][0], o["runs"][1]) for o in made["ours"] if len(o["runs"]) == 2]
    text = [f"On {run['gpu']}, PyTorch {run['torch']}, Triton {run['triton']}. Ceilings as PyTorch reached them: 8192³ in bf16 "
            f"{ceilings['cublas_8192_tflops']:.0f} TFLOP/s, copy {ceilings['copy_gb_per_s']:.0f} GB/s. Peers run as CUDA graphs"
            f"{', but for ' + ', '.join(plain) if plain else ''}; ours {ours_launched(made['ours'])}. `experts`: gate and "
            "up, SwiGLU, down, of grouped tokens; `products`: the same "
            "without SwiGLU, beside our experts with it; `layer`: from routed to combined tokens. Kernels of one width "
            "have ragged experts padded to the widest. **Bold**: we are slower.", "",
            f"Two runs of ours, before and after: {spread(both)}. The first peer of a case and again at its end: "
            f"{spread((d['first_us'], d['again_us']) for d in made['drift'])}."]
    if "other_gpu" in made:
        text += ["", f"**Ours ran on {made['other_gpu']}, so nothing is compared.**"]
    elif not made["ours"]:
        text += ["", "**There is no figure of ours.**"]
    return text


def markdown(made):
    """The section of the report."""
    text = ["## Beside other libraries", ""]
    if made is None or not made["row"]:
        text += ["No peer was measured: there is no figure."]
    else:
        text += how(made)
    if made:
        text += ["", *(wins_and_losses(made) if made["ratios"] or made["row"] else []), "### Targets", "",
                 target_table(made["targets"])]
    if made and made["row"]:
        for shape in dict.fromkeys(r["shape"] for r in made["row"]):
            text += ["", f"### {shape} beside other libraries", "", shape_table(shape, made)]
        text += ["", "### Rates against tokens per expert", ""]
        text += [f"![{name}](plots/{file})\n" for name, file in made["plots"]] or [f"No plots: {made['no_plots']}."]
    if made:
        notes = named(made["wrong"], lambda e: f"**wrong**, relative error {e['error']}")
        notes += named(made["failed"], lambda e: f"**failed**: {e['why']}") + named(made["left_out"], lambda e: e["why"])
        notes += named(made["unlike"], lambda _: "**the two sides did not count the same work**")
        text += ["", "Not measured, or not compared:", "", *notes] if notes else []
    return "\n".join(text)
