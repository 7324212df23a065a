"""Our figures beside those of benches/baselines/peers: ratios, wins, losses, targets. For scripts/gpu-report.py.

A ratio is the peer's time over ours, so above 1.00 × we are faster. Ours ran before and after the peers, and the mean of
both counts. Where the two sides did not count the same FLOPs and bytes there is no ratio.
"""

import json
import os
import statistics

import gpu_plots

# What a peer's figure is held against: `products` leaves SwiGLU out, as the cuBLAS baselines do.
OURS_OF = {"experts": "experts", "products": "experts", "layer": "layer"}
RAGGED = ("ragged 75 %", "ragged 50 %")
TORCH = "torch._grouped_mm"
# Of the design; rows are those of an expert.
TARGETS = {
    "experts": f"equal widths, ≥ 1024 rows: ≥ 1.00 × {TORCH}",
    "products": f"the same, without its SwiGLU: ≥ 1.00 × {TORCH}",
    "stretch": "equal widths, ≥ 1024 rows, a stretch: ≥ 0.95 × DeepGEMM",
    "middle": "full widths, 128 to 256 rows: ≥ 1.20 × the best peer, or 90 % of the floor",
    "padded": f"ragged: ≥ 1.33 × {TORCH}, padded",
    "rate": "ragged, bound by FLOPs: ≥ 0.93 of the rate at full widths",
    "copy": "full widths, 8 to 64 rows: ≥ 0.90 of copy bandwidth",
    "row": f"full widths, one token: ≥ 3.00 × {TORCH}",
    "share": "pruned over whole, in time: ≤ 1.05 × the kept share of FLOPs",
}


def read_lines(path):
    """The peers' lines by kind; None where there is no file. A run that was stopped can leave half a line."""
    if not os.path.exists(path):
        return None
    kinds = {"row": [], "drift": [], "left_out": [], "wrong": [], "failed": [], "run": []}
    with open(path, encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            kinds[line.pop("kind")].append(line)
    return kinds


def case_of(row):
    return row["shape"], row["tokens"], row["widths"], row["routing"]


def base(peer):
    return peer.removesuffix(", padded")


def mean_of_runs(bench, again):
    """Our rows by case and kind, with the mean of both times; `runs` has each."""
    runs = {}
    for made in (bench, again):
        for row in (made or {}).get("rows", []):
            runs.setdefault((case_of(row), row["what"]), []).append(row)
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
    return rows


def same_work(a, b):
    return all(abs(a[of] - b[of]) <= 1e-6 * max(a[of], b[of]) for of in ("flops", "bytes"))


def compare(ours, peers):
    """Every peer's row beside ours, and the cases in which the two sides did not do the same."""
    ratios, unlike = [], []
    for row in peers["row"]:
        own = ours.get((case_of(row), OURS_OF[row["what"]]))
        if own is None:
            continue
        case = {name: row[name] for name in ("shape", "tokens", "widths", "routing", "what", "peer")}
        if same_work(own, row):
            ratios.append({**case, "ours_us": own["p50_us"], "peer_us": row["p50_us"],
                           "ratio": row["p50_us"] / own["p50_us"]})
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


def rows_per_expert(row, shapes):
    shape = shapes[row["shape"]]
    return row["tokens"] * shape["top_k"] / shape["experts"]


def target_values(ours, ratios, shapes):
    """Per target the value of each case, with whether it is met. Uniform routing."""
    found = {target: [] for target in TARGETS}

    def add(target, value, met):
        found[target].append((value, met))

    for r in (r for r in ratios if r["routing"] == "uniform" and r["what"] != "layer"):
        ratio, widths, many = r["ratio"], r["widths"], rows_per_expert(r, shapes) >= 1024
        if base(r["peer"]) == TORCH and many and widths in ("full", "uniform 75 %"):
            add(r["what"], ratio, ratio >= 1.0)
        if r["what"] == "products":
            continue
        if base(r["peer"]) == "DeepGEMM" and many and widths in ("full", "uniform 75 %"):
            add("stretch", ratio, ratio >= 0.95)
        if base(r["peer"]) == TORCH and widths in RAGGED:
            add("padded", ratio, ratio >= 1 / 0.75)
        if base(r["peer"]) == TORCH and widths == "full" and r["tokens"] == 1:
            add("row", ratio, ratio >= 3.0)
    for (case, what), own in ours.items():
        if what == "experts" and case[3] == "uniform" and case[0] in shapes:
            rows, full = rows_per_expert(own, shapes), ours.get(((case[0], case[1], "full", case[3]), what))
            times = [r["peer_us"] for r in ratios if case_of(r) == case and r["what"] == what]
            if case[2] == "full" and 128 <= rows <= 256 and times:
                best = min(times) / own["p50_us"]
                add("middle", best, best >= 1.2 or own["share_of_floor"] >= 0.9)
            if case[2] == "full" and 8 <= rows <= 64:
                add("copy", own["share_of_bytes_ceiling"], own["share_of_bytes_ceiling"] >= 0.9)
            if case[2] in RAGGED and full and own["bound"] == full["bound"] == "flops":
                share = own["useful_tflops"] / full["useful_tflops"]
                add("rate", share, share >= 0.93)
            if full and case[2] in ("uniform 75 %", *RAGGED):
                over = own["p50_us"] / full["p50_us"] / (own["flops"] / full["flops"])
                add("share", over, over <= 1.05)
    return found


def targets(ours, ratios, shapes):
    made = []
    for target, values in target_values(ours, ratios, shapes).items():
        made.append({"target": TARGETS[target], "cases": len(values), "met": sum(met for _, met in values)})
        if values:
            made[-1].update({"from": min(v for v, _ in values), "to": max(v for v, _ in values)})
    return made


def spread(pairs):
    """The median and the largest difference of two runs of the same, in per cent."""
    off = [100 * abs(b / a - 1) for a, b in pairs]
    return f"median {statistics.median(off):.1f} %, at most {max(off):.1f} %" if off else "not measured"


def gather(folder, bench):
    """What the report has of the peers; None where they have not run."""
    lines = read_lines(os.path.join(folder, "gpu_peers.jsonl"))
    if lines is None:
        return None
    path = os.path.join(folder, "gpu_moe_again.json")
    try:
        with open(path, encoding="utf-8") as file:
            again = json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        again = None
    run = lines["run"][0] if lines["run"] else None
    made = {"run": run, **{kind: lines[kind] for kind in ("row", "drift", "left_out", "wrong", "failed")}}
    ours = mean_of_runs(bench, again)
    if bench and run and bench.get("gpu") != run["gpu"]:
        ours = {}
        made["other_gpu"] = bench.get("gpu")
    ratios, made["unlike"] = compare(ours, lines)
    made.update(ratios=ratios, summary=summary(ratios), ours=list(ours.values()), again=again is not None)
    if run:
        shapes = {shape["name"]: shape for shape in run["shapes"]}
        made["targets"] = targets(ours, ratios, shapes)
        made["plots"], made["no_plots"] = gpu_plots.draw(os.path.join(folder, "plots"), list(ours.values()),
                                                         lines["row"], shapes, run["ceilings"])
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
        rows.append([str(case[1]), f"{load:.0f}" if load >= 10 else f"{load:.2g}", case[2], case[3], what, f"{own['p50_us']:.1f}" if own else "", *cells])
    return table(["T", "rows an expert", "widths", "routing", "what", "ours, µs", *(f"{p}, µs" for p in peers)], rows, 5)


def losses(made):
    lost = sorted((r for r in made["ratios"] if r["ratio"] < 1), key=lambda r: r["ratio"])
    if not lost:
        return "We are slower in no case." if made["ratios"] else "Nothing to compare."
    rows = [[r["shape"], str(r["tokens"]), r["widths"], r["routing"], r["what"], r["peer"], f"{r['ours_us']:.1f}",
             f"{r['peer_us']:.1f}", times(r["ratio"])] for r in lost]
    return table(["shape", "T", "widths", "routing", "what", "peer", "ours, µs", "theirs, µs", ""], rows, 6)


def named(entries, words):
    """What could not be measured, once each with the number of cases."""
    counted = {}
    for entry in entries:
        key = (entry["peer"], words(entry))
        counted.setdefault(key, []).append(", ".join(str(entry[n]) for n in ("shape", "tokens", "widths") if n in entry))
    return [f"- {peer}: {why}" + (f" ({cases[0]}" + (f" and {len(cases) - 1} more)" if len(cases) > 1 else ")")
                                  if cases[0] else "") for (peer, why), cases in counted.items()]


def how(made):
    run = made["run"]
    ceilings = run["ceilings"]
    plain = sorted({r["peer"] for r in made["row"] if r["launched"] != "graph"})
    both = [(o["runs"][0], o["runs"][1]) for o in made["ours"] if len(o["runs"]) == 2]
    text = [f"On {run['gpu']}, PyTorch {run['torch']}, Triton {run['triton']}. Ceilings as PyTorch reached them: 8192³ in bf16 "
            f"{ceilings['cublas_8192_tflops']:.0f} TFLOP/s, copy {ceilings['copy_gb_per_s']:.0f} GB/s. Peers run as CUDA graphs"
            f"{', but for ' + ', '.join(plain) if plain else ''}; ours are launched one by one. `experts`: gate and up, SwiGLU, down, of grouped tokens; `products`: the same "
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
        rows = [[s["peer"], s["what"], str(s["cases"]), str(s["faster"]), str(s["slower"]), times(s["median"]),
                 times(s["worst"])] for s in made["summary"]]
        text += [*how(made), "", "### Wins and losses", "",
                 table(["peer", "what", "cases", "faster", "slower", "median", "worst"], rows, 2), "", losses(made), "",
                 "### Targets", ""]
        rows = [[t["target"], str(t["cases"]), str(t["met"]) if t["cases"] else "no figure",
                 f"{t['from']:.2f} to {t['to']:.2f}" if t["cases"] else ""] for t in made["targets"]]
        text += [table(["target", "cases", "met", "values"], rows, 1)]
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
