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
    want = {"experts": (1, 0), "products": (1, 0), "stretch": (0, 0), "middle": (1, 0), "padded": (1, 1), "rate": (1, 1),
            "copy": (0, 0), "row": (1, 1), "share": (1, 1)}
    assert found == {gpu_peers.TARGETS[target]: counts for target, counts in want.items()}, found
    assert f"| {gpu_peers.TARGETS['stretch']} | 0 | no figure |  |" in text
    assert f"| {gpu_peers.TARGETS['padded']} | 1 | 1 | 1.84 to 1.84 |" in text, text
    # Slower runs of ours meet less.
    for file in ("gpu_moe.json", "gpu_moe_again.json"):
        bench = json.loads((folder / file).read_text())
        for row in bench["rows"]:
            row["p50_us"] *= 4
            for rate in ("useful_tflops", "gb_per_s"):
                row[rate] /= 4
        (folder / file).write_text(json.dumps(bench))
    found = {t["target"]: t["met"] for t in report_of(folder)[0]["targets"]}
    assert found[gpu_peers.TARGETS["row"]] == found[gpu_peers.TARGETS["padded"]] == 0, found
    assert found[gpu_peers.TARGETS["share"]] == 1, "a share does not depend on how fast both are"


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
    assert made["ratios"] == [] and "ran on another made-up GPU, so nothing is compared" in text
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
    for check in [check_ratios, check_targets, check_plots, check_what_is_missing]:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder))
    print("passed: the report of the peers")
