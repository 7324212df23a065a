#!/usr/bin/env python3
"""The report puts our figures and the peers' side by side: on tests/peers/made_up, which is made-up test data.

Needs nothing but Python; with matplotlib the plots are looked at too.
"""

import importlib.util
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
MADE_UP = REPO / "tests/peers/made_up"
sys.path.insert(0, str(REPO / "scripts"))

import gpu_peers
from gpu_targets import TARGETS


def report_of(folder):
    """What the report says of the peers in a folder."""
    bench = folder / "gpu_moe.json"
    bench = json.loads(bench.read_text()) if bench.exists() else None
    made = gpu_peers.gather(folder, bench)
    return made, gpu_peers.markdown(made)


def copied(folder, *left_out):
    for file in MADE_UP.iterdir():
        if file.name not in left_out:
            shutil.copy(file, folder)
    return Path(folder)


def check_ratios(folder):
    made, text = report_of(copied(folder))
    found = {(r["tokens"], r["widths"], r["what"], r["peer"]): r for r in made["ratios"]}
    # Ours is the mean of 400 and 408.
    one = found[8192, "full", "experts", "torch._grouped_mm"]
    assert abs(one["ours_us"] - 404) < 1e-9 and abs(one["ratio"] - 380 / 404) < 1e-12, one
    # A peer without SwiGLU is held against our experts with it, a layer against our layer.
    assert abs(found[8192, "full", "products", "torch._grouped_mm"]["ratio"] - 375 / 404) < 1e-12
    assert abs(found[512, "full", "layer", "torch._grouped_mm"]["ratio"] - 60 / 50.5) < 1e-12
    assert (8192, "ragged 50 %", "experts", "torch._grouped_mm, padded") in found
    # The row with other FLOPs has no ratio and is named; half a line is no row.
    assert (1, "full", "layer", "Triton grouped, a width per group") not in found and len(made["unlike"]) == 1
    assert "did not count the same work" in text and len(made["row"]) == 25
    lost = [r for r in made["ratios"] if r["ratio"] < 1]
    section = text.split("### Wins and losses")[1].split("### Targets")[0]
    assert section.count("| Made-up |") == len(lost) > 3, section
    by_peer = {(s["peer"], s["what"]): s for s in made["summary"]}
    torch = by_peer["torch._grouped_mm", "experts"]
    assert (torch["cases"], torch["faster"], torch["slower"]) == (4, 3, 1), torch
    assert f"| torch._grouped_mm | experts | 4 | 3 | 1 | {1.3613861386:.2f} × | **0.94 ×** |" in text, text
    assert "median 2.0 %, at most 2.0 %" in text and "at most 2.0 %" in text.split("again at its end")[1], text
    assert "- DeepGEMM: No module named 'deep_gemm' (Made-up, 1, full and 4 more)" in text
    assert "- torch._grouped_mm: out of GPU memory (Made-up, 65536, full)" in text
    assert "| 8192 | 2048 | full | uniform | experts | 404.0 | 380.0 (**0.94 ×**) | 600.0 (1.49 ×) |" in text, text
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def check_targets(folder):
    made, text = report_of(copied(folder))
    found = {t["target"]: (t["cases"], t["met"]) for t in made["targets"]}
    want = {"experts": (1, 0), "products": (1, 0), "stretch": (0, 0), "dense": (1, 0), "middle": (1, 0),
            "padded": (1, 1), "cublas": (1, 1), "rate": (1, 1), "copy": (0, 0), "row": (1, 1), "contribution": (1, 0),
            "scored": (1, 1), "cosine": (1, 0), "share": (1, 1)}
    assert found == {TARGETS[target]: counts for target, counts in want.items()}, found
    assert f"| {TARGETS['stretch']} | 0 | no figure |  |" in text
    assert f"| {TARGETS['padded']} | 1 | 1 | 1.84 to 1.84 |" in text, text
    # Slower runs of ours meet less.
    changed(folder, lambda row: slower(row, 8))
    found = {t["target"]: t["met"] for t in report_of(folder)[0]["targets"]}
    assert found[TARGETS["row"]] == found[TARGETS["padded"]] == found[TARGETS["cublas"]] == 0, found
    assert found[TARGETS["share"]] == found[TARGETS["scored"]] == 1, "a share does not depend on how fast both are"


def slower(row, times):
    row["p50_us"] *= times
    for rate in ("useful_tflops", "gb_per_s", "share_of_flops_ceiling", "share_of_bytes_ceiling", "share_of_floor"):
        row[rate] /= times


def changed(folder, change):
    for file in ("gpu_moe.json", "gpu_moe_again.json"):
        bench = json.loads((folder / file).read_text())
        for row in bench["rows"]:
            change(row)
        (folder / file).write_text(json.dumps(bench))


def check_targets_of_scores(folder):
    def met(change):
        changed(copied(folder), change)
        return {t["target"]: (t["met"], t["from"]) for t in report_of(folder)[0]["targets"] if t["cases"]}

    def of(what, change):
        return lambda row: change(row) if row["what"] == what else None

    # The mean of both runs is 600.0 and 599.9.
    for rate, count in [(606.01, 1), (605.9, 0)]:
        assert met(of("contribution", lambda row: row.update(useful_tflops=rate)))[TARGETS["contribution"]][0] == count
    assert met(of("scored layer", lambda row: slower(row, 1.1)))[TARGETS["scored"]] == (0, 1.54)
    # Directions meet theirs by the rate, or by what they take of the layer.
    share = met(of("direction", lambda row: slower(row, 0.8)))[TARGETS["cosine"]]
    assert share[0] == 1 and abs(share[1] - 0.990099) < 1e-6, share
    assert met(of("layer", lambda row: slower(row, 3)))[TARGETS["cosine"]][0] == 1
    bench = json.loads((folder / "gpu_moe.json").read_text())
    (folder / "gpu_moe.json").write_text(json.dumps({**bench, "l2_bytes": 10**12}))
    targets = {t["target"]: t["cases"] for t in report_of(folder)[0]["targets"]}
    assert targets[TARGETS["cosine"]] == 0, "a rate of the cache"
    assert met(of("contribution", lambda row: row.update(bound="bytes"))).get(TARGETS["contribution"]) is None


def check_cublas_and_graphs(folder):
    made, text = report_of(copied(folder))
    # The loop takes 390 µs at full widths, ours 404; a baseline leaves SwiGLU out.
    line = "| Made-up | 8192 | full | uniform | products | one by one | cuBLAS loop | 404.0 | 390.0 | **0.97 ×** |"
    assert line in text and "| cuBLAS grouped | products | 2 | 2 | 0 |" in text, text
    # One token was timed both ways: a peer's graph is held against ours, 5.05 µs.
    torch = [r for r in made["ratios"] if (r["tokens"], r["what"]) == (1, "experts") and r["peer"] == "torch._grouped_mm"]
    assert [(r["launched"], round(r["ours_us"], 6)) for r in torch] == [("graph", 5.05)], torch
    assert "ours too at T ≤ 1, past that they are launched one by one" in text, text
    lines = (folder / "gpu_peers.jsonl").read_text().replace('"launched": "graph"', '"launched": "stream"')
    (folder / "gpu_peers.jsonl").write_text(lines)
    found = {r["launched"] for r in report_of(folder)[0]["ratios"]}
    assert found == {"stream"}, "a peer without a graph beside our graph"


def check_plots(folder):
    made, text = report_of(copied(folder))
    if importlib.util.find_spec("matplotlib") is None:
        assert made["plots"] == [] and "No plots: matplotlib is not installed." in text
        return
    assert [file for _, file in made["plots"]] == ["made-up-full.svg", "made-up-ragged-50.svg"], made["plots"]
    picture = (folder / "plots/made-up-full.svg").read_text()
    for word in ["ours", "torch._grouped_mm", "Triton grouped", "tokens per expert", "useful TFLOP/s", "GB/s"]:
        assert word in picture, word
    assert "no figure of ours" not in picture and "![Made-up, full](plots/made-up-full.svg)" in text
    before = picture
    report_of(folder)
    assert (folder / "plots/made-up-full.svg").read_text() == before, "the same figures, another picture"


def check_page(_):
    """The page of the figures has every target, in the report's words."""
    page = (REPO / "docs/benchmarks/gpu.md").read_text()
    for target in TARGETS.values():
        assert f"\n| {target} |" in page, target


def check_ours_alone(folder):
    """What is held against cuBLAS and against floors is there, what needs peers is plainly empty."""
    made, text = report_of(copied(folder, "gpu_peers.jsonl"))
    found = {t["target"]: t["cases"] for t in made["targets"]}
    for target, alone in {"rate": 1, "share": 1, "cublas": 1, "cosine": 1, "row": 0, "padded": 0, "middle": 0}.items():
        assert found[TARGETS[target]] == alone, (target, found)
    assert "No peer was measured" in text and f"| {TARGETS['row']} | 0 | no figure |  |" in text, text
    assert {r["peer"] for r in made["ratios"]} == {"cuBLAS loop", "cuBLAS grouped"} and "**0.97 ×**" in text
    # The same without cuBLAS's figures.
    changed(folder, lambda row: [row.pop(key, None) for key in ("cublas_loop_us", "cublas_grouped_us")])
    assert report_of(folder)[0]["ratios"] == [] and "### Targets" in report_of(folder)[1]


def check_what_is_missing(folder):
    made, text = report_of(Path(folder))
    assert made is None and "there is no figure" in text and "|" not in text
    # Peers alone: their times, and it is said that ours are not there.
    made, text = report_of(copied(folder, "gpu_moe.json", "gpu_moe_again.json"))
    assert made["ratios"] == [] and "**There is no figure of ours.**" in text and "Nothing to compare." in text, text
    assert "| experts |  | 380.0 | 600.0 |" in text, text
    if made["plots"]:
        assert "no figure of ours" in (folder / "plots/made-up-full.svg").read_text()
    # Ours of another GPU.
    bench = json.loads((MADE_UP / "gpu_moe.json").read_text())
    (folder / "gpu_moe.json").write_text(json.dumps({**bench, "gpu": "another made-up GPU"}))
    made, text = report_of(folder)
    assert all("cuBLAS" in r["peer"] for r in made["ratios"]), made["ratios"]
    assert "ran on another made-up GPU, so nothing is compared" in text
    # Nobody could run.
    line = {"kind": "left_out", "peer": "every peer", "why": "No module named 'torch'"}
    (folder / "gpu_peers.jsonl").write_text(json.dumps(line) + "\n")
    made, text = report_of(folder)
    assert "No peer was measured" in text and "- every peer: No module named 'torch'" in text, text
    wrong = {"kind": "wrong", "peer": "Triton fused MoE", "error": "0.5", "shape": "Made-up", "tokens": 8, "widths": "full"}
    (folder / "gpu_peers.jsonl").write_text(json.dumps(wrong) + "\n")
    assert "- Triton fused MoE: **wrong**, relative error 0.5 (Made-up, 8, full)" in report_of(folder)[1]


if __name__ == "__main__":
    for file in MADE_UP.iterdir():
        assert "made-up test data: nothing was measured" in file.read_text(), file
    for check in [check_ratios, check_targets, check_targets_of_scores, check_cublas_and_graphs, check_plots,
                  check_page, check_ours_alone, check_what_is_missing]:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder))
    print("passed: the report of the peers")
