"""What the benches are to reach, and how far figures are from it. For scripts/gpu-report.py.

Uniform routing; rows are those of an expert. A target without a case has no figure.
"""

RAGGED = ("ragged 75 %", "ragged 50 %")
EQUAL = ("full", "uniform 75 %")
TORCH = "torch._grouped_mm"
CUBLAS = {"cuBLAS loop": "cublas_loop_us", "cuBLAS grouped": "cublas_grouped_us"}
# Those of `BESIDE_PEERS` need figures of other libraries, the others only our own bench.
TARGETS = {
    "experts": f"equal widths, ≥ 1024 rows: ≥ 1.00 × {TORCH}",
    "products": f"the same, without its SwiGLU: ≥ 1.00 × {TORCH}",
    "stretch": "equal widths, ≥ 1024 rows, a stretch: ≥ 0.95 × DeepGEMM",
    "dense": "equal widths, ≥ 1024 rows, a stretch: ≥ 0.85 of the rate of cuBLAS at 8192³",
    "middle": "full widths, 128 to 256 rows: ≥ 1.20 × the best peer, or 90 % of the floor",
    "padded": f"ragged: ≥ 1.33 × {TORCH}, padded",
    "cublas": "ragged: faster than a loop over cuBLAS, and than its grouped products",
    "rate": "ragged, bound by FLOPs: ≥ 0.93 of the rate at full widths",
    "copy": "full widths, 8 to 64 rows: ≥ 0.90 of copy bandwidth",
    "row": f"full widths, one token: ≥ 3.00 × {TORCH}",
    "contribution": "contributions, bound by FLOPs: ≥ 600 TFLOP/s",
    "scored": "a layer with all scores, bound by FLOPs: ≤ 1.50 × the time of the plain layer",
    "cosine": "directions, past twice the second cache level: ≥ 0.90 of copy bandwidth, or < 5 % of the layer's time",
    "share": "pruned over whole, in time: ≤ 1.05 × the kept share of FLOPs",
}
BESIDE_PEERS = ("experts", "products", "stretch", "middle", "padded", "row")


def base(peer):
    return peer.removesuffix(", padded")


def case_of(row):
    return row["shape"], row["tokens"], row["widths"], row["routing"]


def rows_per_expert(row, shapes):
    shape = shapes[row["shape"]]
    return row["tokens"] * shape["top_k"] / shape["experts"]


def beside_peers(ratios, shapes):
    """Target, value and whether it is met, of each case that a peer ran too."""
    for r in (r for r in ratios if r["routing"] == "uniform" and r["what"] != "layer"):
        peer, ratio, widths = base(r["peer"]), r["ratio"], r["widths"]
        many = rows_per_expert(r, shapes) >= 1024 and widths in EQUAL
        if peer == TORCH and many:
            yield r["what"], ratio, ratio >= 1.0
        if r["what"] == "products":
            continue
        if peer == "DeepGEMM" and many:
            yield "stretch", ratio, ratio >= 0.95
        if peer == TORCH and widths in RAGGED:
            yield "padded", ratio, ratio >= 1 / 0.75
        if peer == TORCH and widths == "full" and r["tokens"] == 1:
            yield "row", ratio, ratio >= 3.0


def best_of_peers(own, case, ratios):
    """The fastest peer's time over ours in a case; None without one."""
    times = [r["peer_us"] for r in ratios if case_of(r) == case and r["what"] == "experts"]
    return min(times) / own["p50_us"] if times else None


def of_experts(case, ours, ratios, shapes):
    """The same, of the experts alone."""
    own, whole = ours[case, "experts"], ours.get(((case[0], case[1], "full", case[3]), "experts"))
    rows, widths = rows_per_expert(own, shapes), case[2]
    best = best_of_peers(own, case, ratios)
    if widths == "full" and 128 <= rows <= 256 and best is not None:
        yield "middle", best, best >= 1.2 or own["share_of_floor"] >= 0.9
    if widths == "full" and 8 <= rows <= 64:
        yield "copy", own["share_of_bytes_ceiling"], own["share_of_bytes_ceiling"] >= 0.9
    if widths in EQUAL and rows >= 1024:
        yield "dense", own["share_of_flops_ceiling"], own["share_of_flops_ceiling"] >= 0.85
    cublas = [r["ratio"] for r in ratios if case_of(r) == case and r["peer"] in CUBLAS]
    if widths in RAGGED and cublas:
        yield "cublas", min(cublas), min(cublas) > 1.0
    if widths in RAGGED and whole and own["bound"] == whole["bound"] == "flops":
        share = own["useful_tflops"] / whole["useful_tflops"]
        yield "rate", share, share >= 0.93
    if whole and widths in ("uniform 75 %", *RAGGED):
        over = own["p50_us"] / whole["p50_us"] / (own["flops"] / whole["flops"])
        yield "share", over, over <= 1.05


def of_scores(case, what, ours, l2_bytes):
    """The same, of one kind of scoring."""
    own, layer = ours[case, what], ours.get((case, "layer"))
    if what == "contribution" and own["bound"] == "flops":
        yield "contribution", own["useful_tflops"], own["useful_tflops"] >= 600
    if what == "scored layer" and own["bound"] == "flops" and layer:
        over = own["p50_us"] / layer["p50_us"]
        yield "scored", over, over <= 1.5
    if what == "direction":
        # What fits into the second cache level says nothing of the memory.
        share = own["share_of_bytes_ceiling"]
        hidden = layer is not None and own["p50_us"] < 0.05 * layer["p50_us"]
        if own["bytes"] >= 2 * l2_bytes:
            yield "cosine", share, share >= 0.9 or hidden


def of_ours(ours, ratios, shapes, l2_bytes):
    for case, what in ours:
        if case[3] != "uniform" or case[0] not in shapes:
            continue
        if what == "experts":
            yield from of_experts(case, ours, ratios, shapes)
        else:
            yield from of_scores(case, what, ours, l2_bytes)


def targets(ours, ratios, shapes, l2_bytes):
    """Every target with its cases, how many meet it, and from where to where their values go."""
    found = {target: [] for target in TARGETS}
    for target, value, met in [*beside_peers(ratios, shapes), *of_ours(ours, ratios, shapes, l2_bytes)]:
        found[target].append((value, met))
    made = []
    for target, values in found.items():
        made.append({"target": TARGETS[target], "needs_peers": target in BESIDE_PEERS, "cases": len(values),
                     "met": sum(met for _, met in values)})
        if values:
            made[-1].update({"from": min(v for v, _ in values), "to": max(v for v, _ in values)})
    return made
