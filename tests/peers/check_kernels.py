#!/usr/bin/env python3
"""The peers' layers on the CPU, against f64: Triton's interpreter runs the kernels, a stand-in plays DeepGEMM.

Run by hand, with PyTorch, Triton and NumPy: `tests/peers/check_kernels.py`. In f16, because the interpreter multiplies bf16
as if its bits were whole numbers; the kernels take their type from their operands. What it cannot show is speed.
Triton 3.6's interpreter needs NumPy before 2.4.
"""

import json
import os
import sys
import tempfile
import types
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benches/baselines/peers"))

import torch

import bench
import cases
import clock
import layers

CPU = torch.device("cpu")
AWKWARD = [[72, 0, 1, 17, 64, 65], [8, 8, 8, 8, 8, 8], [33, 63, 64, 0, 0, 127], [0, 0, 0, 0, 0, 5]]
TINY = cases.Shape("tiny", 40, 72, 6, 2)


class Clock:
    """Runs everything once; its seconds are made up."""

    def __init__(self):
        self.ran = 0

    def seconds(self, work, sets, budget=0.2, samples=10):
        for set_ in range(sets):
            work(set_)
            self.ran += 1
        return 1e-3 * self.ran, "stream"

    def wait(self):
        pass


def deep_gemm_stand_in(alignment):
    """A library of its layout: rows of group -1 are not written, and a group may begin at a multiple only."""
    library = types.ModuleType("deep_gemm")

    def product(a, b, d, groups):
        assert a.shape[0] == len(groups) and len(groups) % alignment == 0
        for first in range(0, len(groups), alignment):
            assert len(set(groups[first : first + alignment].tolist()) - {-1}) <= 1, "two groups in a block"
        for row, group in enumerate(groups.tolist()):
            d[row] = a[row] @ b[group].T if group >= 0 else float("nan")

    library.m_grouped_bf16_gemm_nt_contiguous = product
    library.get_mk_alignment_for_contiguous_layout = lambda: alignment
    return library


def problem_of(widths, tokens, routing):
    shape = cases.Shape("tiny", TINY.hidden, max(widths), len(widths), TINY.top_k)
    case = cases.Case(shape, tokens, "full", routing)
    kept = cases.widths_of
    cases.widths_of = lambda *_: widths
    try:
        return bench.problem_of(case, 2, CPU, torch.float16)
    finally:
        cases.widths_of = kept


def peers_of(problem):
    weights = layers.padded_weights(problem)
    small, other = layers.Config(16, 32, 32, 4, 3), layers.Config(32, 16, 16, 4, 3)
    sys.modules["deep_gemm"] = deep_gemm_stand_in(8)
    yield layers.TorchGrouped(problem, weights)
    yield layers.DeepGemm(problem, weights)
    for config in (small, other):
        yield layers.TritonFused(problem, weights, config)
        yield layers.TritonGrouped(problem, config)
    mixed = layers.TritonGrouped(problem)
    mixed.use(small, other)
    yield mixed


def check_layers():
    errors = {}
    for widths in AWKWARD:
        for tokens, routing in [(1, "uniform"), (9, "zipf"), (33, "many empty")]:
            problem = problem_of(widths, tokens, routing)
            for peer in peers_of(problem):
                error = bench.error_of(peer)
                assert error < 2e-3, (peer.name, widths, tokens, routing, str(peer.config), error)
                errors[peer.name] = max(errors.get(peer.name, 0.0), error)
    for name, error in errors.items():
        print(f"{name}: {error:.1e}")


def check_faults():
    """Wrong layers are seen: a neuron too few, rows of another expert, a token that nobody writes."""
    def narrower(peer):
        peer.widths[0] -= 1

    def shifted(peer):
        peer.neurons[1] += 1

    def unwritten(peer):
        combine = peer.combine
        peer.combine = lambda: (combine(), peer.out[-1].fill_(float("nan")))

    for fault in (narrower, shifted, unwritten):
        peer = layers.TritonGrouped(problem_of([24, 40, 16, 17, 64, 65], 40, "uniform"), layers.Config(16, 32, 32, 4, 3))
        fault(peer)
        assert not bench.error_of(peer) <= bench.MOST_ERROR, fault.__name__


def check_tuning():
    problem = problem_of([72, 0, 1, 17, 64, 65], 9, "zipf")
    names = [str(c) for c in layers.configs_for(problem.rows_per_group())]
    assert len(names) >= 3 and layers.configs_for(5000)[-1] == layers.CONFIGS[-1]
    # The quickest by a clock that likes one configuration must win; what the GPU has no room for is passed over.
    liked = layers.CONFIGS[1]
    for peer in (layers.TritonGrouped(problem), layers.TritonFused(problem, layers.padded_weights(problem))):
        def seconds_of(_, peer=peer):
            if peer.config[0] == layers.CONFIGS[0]:
                raise layers.triton.runtime.errors.OutOfResources(2, 1, "shared memory")
            return 1.0 if peer.config[0] == liked else 2.0
        peer.tune(seconds_of)
        assert peer.config == (liked, liked), peer.config
        assert bench.error_of(peer) < 2e-3


class PretendedCuda:
    """As much of torch.cuda as the clock uses; a launch takes a second, replays of a graph a tenth for all of it."""

    OutOfMemoryError = torch.cuda.OutOfMemoryError

    def __init__(self, refuse=None):
        self.now, self.refuse, self.capturing, self.stream = 0.0, refuse, False, "own"
        self.CUDAGraph, self.Event, self.graph = lambda: self, lambda enable_timing: PretendedEvent(self), lambda _: self

    def launch(self):
        if self.capturing and self.refuse:
            raise self.refuse
        self.now += 0.0 if self.capturing else 1.0

    def replay(self):
        self.now += 0.1

    def __enter__(self):
        self.capturing, self.stream = True, "capture"

    def __exit__(self, kind, *_):
        self.capturing = False
        self.stream = self.stream if kind else "own"

    def current_stream(self, _):
        return self.stream

    def set_stream(self, stream):
        self.stream = stream

    def synchronize(self, _):
        pass


class PretendedEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = self.cuda.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def check_clock():
    """Seconds of one run, by graph where it can be; nothing of a failed capture stays behind."""
    kept, sets = clock.torch.cuda, []
    try:
        for refuse, seconds, launched in [(None, 0.1 / 4, "graph"), (RuntimeError("cannot be captured"), 1.0, "stream")]:
            cuda = clock.torch.cuda = PretendedCuda(refuse)
            found = clock.GpuClock(CPU).seconds(lambda set_: (sets.append(set_), cuda.launch()), 4)
            assert abs(found[0] - seconds) < 1e-9 and found[1] == launched, found
            assert cuda.stream == "own" and set(sets) == {0, 1, 2, 3}
        clock.torch.cuda = PretendedCuda(torch.cuda.OutOfMemoryError("too much"))
        try:
            clock.GpuClock(CPU).seconds(lambda _: clock.torch.cuda.launch(), 4)
            raise AssertionError("out of memory was taken for work that cannot be captured")
        except kept.OutOfMemoryError:
            pass
    finally:
        clock.torch.cuda = kept


def check_bench():
    """The whole of a case, to its lines."""
    sys.modules["deep_gemm"] = None
    with tempfile.TemporaryDirectory() as folder:
        lines = bench.Lines(Path(folder, "peers.jsonl"))
        run = bench.Bench(lines, Clock(), CPU, torch.float16, {"flops": 1e12, "bytes": 1e11}, 1000)
        run.case(cases.Case(TINY, 9, "some zero", "zipf"))
        run.case(cases.Case(TINY, 1, "ragged 50 %", "uniform"))
        made = [json.loads(line) for line in Path(folder, "peers.jsonl").read_text().splitlines()]
    assert run.failures == 0, made
    rows = [line for line in made if line["kind"] == "row"]
    seen = {(r["widths"], r["peer"], r["what"]) for r in rows}
    assert ("some zero", "torch._grouped_mm", "products") in seen, seen
    assert ("ragged 50 %", "torch._grouped_mm, padded", "layer") in seen, seen
    assert ("ragged 50 %", "Triton grouped, a width per group", "experts") in seen, seen
    assert len(rows) == 2 * (3 + 2 + 2) and all(r["error"] < 2e-3 and r["p50_us"] > 0 for r in rows)
    drift = [line for line in made if line["kind"] == "drift"]
    assert len(drift) == 6 and all(d["peer"].startswith("torch") and d["drift"] > 0 for d in drift), drift
    left_out = [line for line in made if line["kind"] == "left_out"]
    assert [l["peer"] for l in left_out] == ["DeepGEMM", "DeepGEMM, padded"], left_out
    check_failures(run)


def check_failures(run):
    """A wrong peer is named, not timed; so is one that needs too much memory, then or at the end of the case."""
    def told(name, stand_in):
        kept = getattr(bench, name)
        setattr(bench, name, stand_in(kept))
        run.failures = 0
        with tempfile.TemporaryDirectory() as folder:
            run.lines = bench.Lines(Path(folder, "peers.jsonl"))
            run.case(cases.Case(TINY, 1, "full", "uniform"))
            made = [json.loads(line) for line in Path(folder, "peers.jsonl").read_text().splitlines()]
        setattr(bench, name, kept)
        return run.failures, [(l["kind"], l["peer"], l.get("why")) for l in made if l["kind"] != "row"]

    def limited(measure, most):
        measured = []

        def stand_in(peer, clock):
            measured.append(peer)
            if len(measured) > most:
                raise torch.cuda.OutOfMemoryError("too much")
            return measure(peer, clock)
        return stand_in

    failures, lines = told("error_of", lambda _: lambda peer: float("nan"))
    assert failures == 3 and [kind for kind, *_ in lines] == ["wrong", "wrong", "left_out", "wrong"], lines
    failures, lines = told("measure", lambda measure: limited(measure, 3))
    assert failures == 0 and ("left_out", "torch._grouped_mm, again", "out of GPU memory") in lines, lines
    failures, lines = told("measure", lambda measure: limited(measure, 0))
    assert failures == 0 and [why for *_, why in lines].count("out of GPU memory") == 3, lines


if __name__ == "__main__":
    torch.manual_seed(1)
    for check in [check_clock, check_faults, check_tuning, check_bench, check_layers]:
        check()
        print(f"{check.__name__}: passed")
