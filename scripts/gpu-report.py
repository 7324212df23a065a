#!/usr/bin/env python3
"""Makes one report of what scripts/gpu-check.sh left.

  gpu-report.py report FOLDER      writes FOLDER/report.json and FOLDER/report.md; exit code 1 if anything failed
  gpu-report.py compare CPU CUDA   compares CPU.safetensors and CPU.json with CUDA's; exit code 1 if they differ too much
  gpu-report.py bench FILE         prints the tables of the benches' JSON
  gpu-report.py loss FOLDER        prints the case of our largest loss, or where there is none that furthest from its floor
  gpu-report.py --self-test        shows on made-up results that failures are seen and tables are right
"""

import array
import json
import math
import os
import re
import struct
import sys
import tempfile

import gpu_peers
import gpu_large
import gpu_profile
from gpu_peers import table

# The GPU's statistics may be this far from the CPU's at bf16, and so many of its kept neurons must be the same.
MOST_ERROR = 1e-2
LEAST_AGREEMENT = 0.99
KINDS = {"F64": "d", "F32": "f", "I64": "q"}


def read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def tensors(path):
    """The tensors of a safetensors file, by name."""
    with open(path, "rb") as file:
        data = file.read()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    made = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            values = array.array(KINDS[entry["dtype"]])
            values.frombytes(data[8 + size + begin : 8 + size + end])
            made[name] = values
    return made


def statistic_errors(want, got):
    """By statistic, over all domains and layers: |got - want| / |want| in the Euclidean norm."""
    if set(want) != set(got):
        raise ValueError(f"tables of one side only: {sorted(set(want) ^ set(got))[:5]}")
    sums = {}
    for name, values in want.items():
        if len(values) != len(got[name]):
            raise ValueError(f"{name}: {len(got[name])} numbers, expected {len(values)}")
        off, size = sums.get(name.split("/")[-1], (0.0, 0.0))
        off += math.fsum((a - b) ** 2 for a, b in zip(got[name], values))
        size += math.fsum(b**2 for b in values)
        sums[name.split("/")[-1]] = (off, size)
    # A table of zeros must be zeros on both sides.
    return {
        name: math.sqrt(off / size) if size else (0.0 if off == 0 else math.inf)
        for name, (off, size) in sorted(sums.items())
    }


def kept(plan):
    """The (layer, expert, neuron) triples that a plan keeps, with the widths of whole experts written out."""
    triples = set()
    for layer in plan["layers"]:
        for expert in layer["experts"]:
            neurons = expert.get("neurons", range(expert["width"]))
            triples.update((layer["layer"], expert["id"], n) for n in neurons)
    return triples


def agreement(want, got):
    """Share of the neurons kept by one plan that the other keeps too."""
    want, got = kept(want), kept(got)
    return len(want & got) / max(len(want), len(got), 1)


def compare(cpu, cuda):
    made = {
        "errors": statistic_errors(tensors(cpu + ".safetensors"), tensors(cuda + ".safetensors")),
        "kept_agreement": agreement(json.loads(read(cpu + ".json")), json.loads(read(cuda + ".json"))),
    }
    # NaN compares with nothing, so the question is whether all is well.
    made["good"] = (
        all(error <= MOST_ERROR for error in made["errors"].values())
        and made["kept_agreement"] >= LEAST_AGREEMENT
    )
    return made


def pairs(path):
    lines = read(path).splitlines() if os.path.exists(path) else []
    return [line.split("\t") for line in lines]


def finding(name, log):
    """What a step's log says in a few words."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
    results = re.findall(r"test result: (.*?); finished", log)
    failed = re.findall(r"^test (\S+) \.\.\. FAILED", log, re.MULTILINE)
    parts = results[-1:] + summaries[-1:] + ([f"failed: {', '.join(failed)}"] if failed else [])
    parts += re.findall(r"^left out: .*", log, re.MULTILINE)
    return "; ".join(parts)


def gather(folder):
    steps = []
    for name, status, seconds in pairs(os.path.join(folder, "steps.tsv")):
        log = os.path.join(folder, name + ".log")
        text = read(log) if os.path.exists(log) else ""
        steps.append({
            "name": name,
            "exit_code": int(status),
            "seconds": int(seconds),
            "good": int(status) == 0,
            "finding": finding(name, text),
        })
        # Tests that say they were skipped prove nothing here.
        if re.search(r"^skipped: ", text, re.MULTILINE):
            steps[-1].update(good=False, finding=steps[-1]["finding"] + "; tests were skipped")
        if name == "tests" and not re.search(r"test result: ok\. [1-9]", text):
            steps[-1].update(good=False)
    report = {
        "format": "tenp-gpu-report",
        "version": 1,
        "environment": dict(p for p in pairs(os.path.join(folder, "environment.tsv")) if len(p) == 2),
        "steps": steps,
        "good": bool(steps) and all(step["good"] for step in steps),
    }
    for key, file in [("bench", "gpu_moe.json"), ("tiles", "gpu_tiles.json"), ("comparison", "compare.log")]:
        path = os.path.join(folder, file)
        try:
            report[key] = json.loads(read(path)) if os.path.exists(path) else None
        except json.JSONDecodeError:
            report[key] = None
    report["peers"] = gpu_peers.gather(folder, report["bench"])
    large = os.path.join(folder, "large.json")
    if os.path.exists(large):
        report["large"] = json.loads(read(large))
    profile = os.path.join(folder, "profile.csv")
    if os.path.exists(profile):
        report["profile"] = {"case": read(os.path.join(folder, "profile.case")).strip(), "rows": gpu_profile.rows(profile)}
    for place in ["cpu", "cuda"]:
        path = os.path.join(folder, f"generate-{place}.log")
        if os.path.exists(path):
            report.setdefault("continuations", {})[place] = read(path).strip().splitlines()[-1:]
    return report


RATES = ["floor, µs", "p50, µs", "floor / p50", "TFLOP/s", "GB/s", "of cuBLAS", "of copy"]


def rates(row):
    """The cells of `RATES`."""
    percent = lambda share: f"{100 * row[share]:.0f} %"
    products = [f"{row['useful_tflops']:.1f}", percent("share_of_flops_ceiling")] if row["useful_tflops"] else ["", ""]
    return [f"{row['floor_us']:.1f} ({row['bound']})", f"{row['p50_us']:.1f}", percent("share_of_floor"), products[0],
            f"{row['gb_per_s']:.0f}", products[1], percent("share_of_bytes_ceiling")]


def bench_tables(bench):
    ceilings = bench["ceilings"]
    text = [
        f"Ceilings in this run: cuBLAS bf16 8192³ {ceilings['cublas_8192_tflops']:.0f} TFLOP/s, "
        f"device copy {ceilings['copy_gb_per_s']:.0f} GB/s (read and written).",
        "",
        "p50 of the GPU's own times, inputs random, buffer sets rotating. Useful FLOPs: real widths. The baselines read "
        "gathered tokens and leave SwiGLU out; above 1.00 × we are faster. A graph holds all sets in turn. y is the same "
        "memory each time: where it fits into the second cache level, `direction` reads it there.",
    ]
    shapes = list(dict.fromkeys(row["shape"] for row in bench["rows"]))
    for shape in shapes:
        rows = []
        for row in (r for r in bench["rows"] if r["shape"] == shape):
            ratio = lambda key: f"{row[key]:.2f} ×" if key in row else ""
            rows.append([str(row["tokens"]), row["widths"], row["routing"], row["what"],
                         gpu_peers.LAUNCHED[row["launched"]], *rates(row), ratio("times_cublas_grouped"),
                         ratio("times_cublas_loop")])
        header = ["T", "widths", "routing", "what", "launched", *RATES, "vs cuBLAS grouped", "vs cuBLAS loop"]
        text += ["", f"### {shape}", "", table(header, rows, numeric_from=5)]
    if bench["segments"]:
        rows = [[row["shape"], str(row["segments"]), str(row["against"]), *rates(row)] for row in bench["segments"]]
        text += ["", "### Segment similarity", "", "The neurons of one expert against those of three quarters of the experts.",
                 "", table(["shape", "segments", "against", *RATES], rows, numeric_from=1)]
    pruning = pruning_rows(bench["rows"])
    if pruning:
        text += ["", "### What pruning saves", "",
                 "Time of pruned experts over time of whole ones, beside the share of FLOPs.", "",
                 table(["shape", "T", "widths", "FLOPs", "time"], pruning, numeric_from=3)]
    if bench.get("left_out"):
        text += ["", "Left out:", ""]
        text += [f"- {c['shape']}, {c['tokens']} tokens, {c['widths']}, {c['routing']}: {c['why']}"
                 for c in bench["left_out"]]
    return "\n".join(text)


def largest_loss(folder):
    """The name of a case, as gpu_moe takes it; None without figures."""
    path = os.path.join(folder, "gpu_moe.json")
    made = gpu_peers.gather(folder, json.loads(read(path)) if os.path.exists(path) else None)
    if made is None or not made["ours"]:
        return None
    lost = [r for r in made["ratios"] if r["ratio"] < 1]
    # Launches of a few microseconds are far from any floor, and say nothing of a kernel.
    long = [r for r in made["ours"] if r["what"] in ("experts", "layer") and r["floor_us"] >= 50]
    worst = min(lost or long or made["ours"], key=lambda r: r["ratio"] if lost else r["share_of_floor"])
    return f"{worst['shape']}/{worst['tokens']} tokens/{worst['widths']}/{worst['routing']}"


def tile_table(rows):
    """The fastest tile and the chosen one, by shape and rows an expert."""
    cases = {}
    for row in rows:
        cases.setdefault((row["shape"], row["rows_per_expert"]), []).append(row)
    made = []
    for (shape, count), of_case in cases.items():
        best = min(of_case, key=lambda row: row["p50_us"])
        chosen = min((row for row in of_case if row["chosen"]), key=lambda row: row["p50_us"], default=None)
        made.append([shape, str(count), best["what"], f"{best['p50_us']:.1f}", f"{100 * best['share_of_floor']:.0f} %",
                     chosen["what"] if chosen else "", f"{chosen['p50_us'] / best['p50_us']:.2f} ×" if chosen else ""])
    return "\n".join(["Experts of full width; the fastest of all tiles, and how much slower the one is that the program takes.",
                      "", table(["shape", "rows an expert", "fastest", "µs", "floor / p50", "chosen", "its time"], made,
                                numeric_from=3)])


def pruning_rows(rows):
    """Each pruned case beside the same one with whole experts."""
    case = lambda row: (row["shape"], row["tokens"], row["routing"], row["what"])
    rows = [r for r in rows if r["launched"] == "stream"]
    whole = {case(r): r for r in rows if r["widths"] == "full" and r["what"] == "experts"}
    made = []
    for row in rows:
        full = whole.get(case(row))
        if full and row is not full:
            flops = row["useful_tflops"] * row["p50_us"] / (full["useful_tflops"] * full["p50_us"])
            made.append([row["shape"], str(row["tokens"]), row["widths"], f"{100 * flops:.1f} %",
                         f"{100 * row['p50_us'] / full['p50_us']:.1f} %"])
    return made


def markdown(report):
    text = ["# GPU report", "", "Everything is good." if report["good"] else "**Something failed.**", "",
            "## Environment", ""]
    text += [f"- {name}: {value}" for name, value in report["environment"].items()]
    rows = [[s["name"], "good" if s["good"] else f"**failed** ({s['exit_code']})", str(s["seconds"]),
             s["finding"].replace("|", "\\|")] for s in report["steps"]]
    text += ["", "## Checks", "", table(["step", "", "s", "it says"], rows, numeric_from=4)]
    if report.get("comparison"):
        found = report["comparison"]
        text += ["", "## The demo model: CUDA against the CPU at bf16", "",
                 f"Kept neurons that agree at `--keep 0.6`: {100 * found['kept_agreement']:.2f} %.", "",
                 table(["statistic", "relative error"],
                       [[name, f"{error:.2e}"] for name, error in found["errors"].items()], numeric_from=1)]
    if report.get("bench"):
        text += ["", "## Benches", "", bench_tables(report["bench"])]
    if report.get("tiles"):
        text += ["", "## Tiles", "", tile_table(report["tiles"]["tiles"])]
    text += ["", gpu_peers.markdown(report["peers"])]
    if report.get("large"):
        text += ["", "## Large checkpoints", "",
                 "The floor is the slower of the disk and half the GPU's bf16 ceiling; kernels run while weights are read.", "",
                 table(gpu_large.HEADER, [gpu_large.cells(row) for row in report["large"]], numeric_from=1)]
    if report.get("profile"):
        text += ["", "## Profile", "", f"Kernels of {report['profile']['case']}, under Nsight Compute, caches empty.", "",
                 table(gpu_profile.HEADER, report["profile"]["rows"], numeric_from=2)]
    return "\n".join(text) + "\n"


def write_report(folder):
    report = gather(folder)
    with open(os.path.join(folder, "report.json"), "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
        file.write("\n")
    with open(os.path.join(folder, "report.md"), "w", encoding="utf-8") as file:
        file.write(markdown(report))
    bad = [step["name"] for step in report["steps"] if not step["good"]]
    print(f"wrote {folder}/report.json and report.md; " + (f"failed: {', '.join(bad)}" if bad else "all good"))
    return report


def write_tensors(path, values):
    header, data = {"__metadata__": {}}, b""
    for name, numbers in values.items():
        bytes_ = array.array("d", numbers).tobytes()
        header[name] = {"dtype": "F64", "shape": [len(numbers)], "data_offsets": [len(data), len(data) + len(bytes_)]}
        data += bytes_
    header = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + data)


def made_up_bench():
    row = {"shape": "Tiny", "tokens": 8, "widths": "full", "routing": "uniform", "what": "experts",
           "launched": "stream", "floor_us": 10.0, "bound": "bytes", "p50_us": 20.0, "useful_tflops": 100.0,
           "gb_per_s": 1000.0, "share_of_flops_ceiling": 0.125,
           "share_of_bytes_ceiling": 0.25, "share_of_floor": 0.5, "times_cublas_grouped": 1.5, "times_cublas_loop": 0.75}
    half = {**row, "widths": "ragged 50 %", "p50_us": 12.0, "useful_tflops": 250 / 3}
    layer = {k: v for k, v in row.items() if not k.startswith("times")} | {"what": "layer"}
    graph = layer | {"launched": "graph", "p50_us": 16.0}
    direction = layer | {"what": "direction", "useful_tflops": 0.0, "share_of_flops_ceiling": 0.0}
    segments = {k: v for k, v in layer.items() if k not in ("tokens", "widths", "routing")}
    segments |= {"what": "segment similarity", "segments": 32, "against": 192}
    left_out = [{"shape": "Tiny", "tokens": 9, "widths": "full", "routing": "zipf", "why": "out of GPU memory"}]
    shapes = [{"name": "Tiny", "hidden": 64, "width": 32, "experts": 8, "top_k": 2}]
    return {"l2_bytes": 1000, "shapes": shapes, "ceilings": {"cublas_8192_tflops": 800.0, "copy_gb_per_s": 4000.0},
            "rows": [row, half, layer, graph, direction], "segments": [segments], "left_out": left_out}


def test_bench():
    text = bench_tables(made_up_bench())
    figures = "10.0 (bytes) | 20.0 | 50 % | 100.0 | 1000 | 12 % | 25 % | 1.50 × | 0.75 ×"
    assert f"| 8 | full | uniform | experts | one by one | {figures} |" in text, text
    assert "| layer | one by one | 10.0 (bytes) | 20.0 |" in text and "| layer | as a graph | 10.0 (bytes) | 16.0 |" in text
    assert "| direction | one by one | 10.0 (bytes) | 20.0 | 50 % |  | 1000 |  | 25 % |  |  |" in text, text
    assert "| Tiny | 32 | 192 | 10.0 (bytes) | 20.0 | 50 % | 100.0 | 1000 | 12 % | 25 % |" in text, text
    assert "| Tiny | 8 | ragged 50 % | 50.0 % | 60.0 % |" in text, text
    assert "- Tiny, 9 tokens, full, zipf: out of GPU memory" in text, text
    # Every row of a table has the columns of its header.
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_compare(folder):
    a, b = os.path.join(folder, "a"), os.path.join(folder, "b")
    plan = {"layers": [{"layer": 1, "experts": [{"id": 0, "width": 3}, {"id": 1, "width": 2, "neurons": [0, 5]}]}]}
    other = {"layers": [{"layer": 1, "experts": [{"id": 0, "width": 3}, {"id": 1, "width": 2, "neurons": [0, 4]}]}]}
    values = {"one/layers.1/energy": [3.0, 4.0], "two/layers.1/energy": [0.0, 0.0], "one/layers.1/peak": [0.0]}
    off = {**values, "one/layers.1/energy": [3.0, 4.2]}
    for path, numbers, chosen in [(a, values, plan), (b, off, other)]:
        write_tensors(path + ".safetensors", numbers)
        with open(path + ".json", "w", encoding="utf-8") as file:
            json.dump(chosen, file)
    assert compare(a, a) == {"errors": {"energy": 0.0, "peak": 0.0}, "kept_agreement": 1.0, "good": True}
    found = compare(a, b)
    assert abs(found["errors"]["energy"] - 0.04) < 1e-12 and not found["good"], found
    assert found["kept_agreement"] == 0.8, found
    write_tensors(b + ".safetensors", {**values, "one/layers.1/energy": [math.nan, 4.0]})
    assert not compare(a, b)["good"]
    write_tensors(b + ".safetensors", {**values, "one/layers.1/peak": [1.0]})
    assert compare(a, b)["errors"]["peak"] == math.inf
    write_tensors(b + ".safetensors", {"one/layers.1/energy": [3.0, 4.0]})
    try:
        compare(a, b)
        raise AssertionError("a missing table was not seen")
    except ValueError as error:
        assert "one side only" in str(error)


def fill(folder, steps):
    with open(os.path.join(folder, "steps.tsv"), "w", encoding="utf-8") as file:
        file.writelines(f"{name}\t{status}\t7\n" for name, status, _ in steps)
    for name, _, log in steps:
        with open(os.path.join(folder, name + ".log"), "w", encoding="utf-8") as file:
            file.write(log)
    with open(os.path.join(folder, "environment.tsv"), "w", encoding="utf-8") as file:
        file.write("GPU\tan invented one\nrevision\tabc\n")


def test_report(folder):
    ok = "test result: ok. 37 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 9.00s\n"
    found = {"errors": {"energy": 0.001}, "kept_agreement": 0.995, "good": True}
    good = [("tests", 0, ok), ("memcheck", 0, ok + "========= ERROR SUMMARY: 0 errors\n"),
            ("racecheck", 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"),
            ("compare", 0, json.dumps(found))]
    with open(os.path.join(folder, "gpu_moe.json"), "w", encoding="utf-8") as file:
        json.dump(made_up_bench(), file)
    tile = {"shape": "Tiny", "rows_per_expert": 64, "share_of_floor": 0.5}
    tiles = [tile | {"what": "N64 gathering", "p50_us": 30.0, "chosen": True},
             tile | {"what": "W64 gathering", "p50_us": 20.0, "chosen": False}]
    with open(os.path.join(folder, "gpu_tiles.json"), "w", encoding="utf-8") as file:
        json.dump({"tiles": tiles}, file)
    fill(folder, good)
    report, text = write_report(folder), read(os.path.join(folder, "report.md"))
    assert report["good"] and "Everything is good." in text and "an invented one" in text, text
    assert "| energy | 1.00e-03 |" in text and "99.50 %" in text and "### Tiny" in text, text
    assert "| W64 gathering | 20.0 | 50 % | N64 gathering | 1.50 × |" in text, text
    assert "ERROR SUMMARY: 0 errors" in text and "RACECHECK SUMMARY: 0 hazards" in text, text
    failed = "test norms ... FAILED\ntest result: FAILED. 36 passed; 1 failed; 0 ignored; finished in 1s\n"
    for bad in [("tests", 101, failed), ("memcheck", 99, "========= ERROR SUMMARY: 2 errors\n"),
                ("tests", 0, "skipped: norms: no GPU: none\n" + ok), ("tests", 0, ""),
                ("tests", 0, ok.replace("37", "0")), ("bench", 124, "ended after 5 s\n")]:
        fill(folder, [bad if step[0] == bad[0] else step for step in good] + ([bad] if bad[0] == "bench" else []))
        report, text = write_report(folder), read(os.path.join(folder, "report.md"))
        assert not report["good"] and "**Something failed.**" in text and "**failed**" in text, (bad, text)
    fill(folder, [])
    assert not write_report(folder)["good"], "nothing was run"


def self_test():
    gpu_large.self_test()
    test_bench()
    for test in [test_compare, test_report]:
        with tempfile.TemporaryDirectory() as folder:
            test(folder)
    print("self-test passed")


def main(arguments):
    match arguments:
        case ["--self-test"]:
            self_test()
        case ["report", folder]:
            return 0 if write_report(folder)["good"] else 1
        case ["compare", cpu, cuda]:
            found = compare(cpu, cuda)
            print(json.dumps(found, indent=1))
            return 0 if found["good"] else 1
        case ["loss", folder]:
            case = largest_loss(folder)
            if case is None:
                print(f"no figures in {folder}: run the step bench, or name a case with TENP_GPU_CASE", file=sys.stderr)
                return 1
            print(case)
        case ["bench", file]:
            print(bench_tables(json.loads(read(file))))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
