#!/usr/bin/env python3
"""MoE layers of other libraries on the GPU, on the cases of benches/gpu_moe.rs, as lines of JSON.

    bench.py OUT.jsonl

Peers: torch._grouped_mm, a Triton fused MoE, DeepGEMM if it can be imported, a Triton grouped product with a width per
group. Kernels of one width get ragged experts padded to the widest; experts without neurons are left out for all. Every
peer's layer is compared with f64 before anything is timed. The first peer is timed again at the end of each case: how far
it is from its first time is the drift. TENP_GPU_BENCH chooses the cases: `short` (the default), `full`, or the
beginning of a shape's name. Needs PyTorch, Triton and a GPU; says so and ends without them.

Exit codes: 0 all was measured or is named as left out, 1 a peer's result was wrong or our Triton kernels failed, 2 usage.
"""

import functools
import json
import math
import os
import sys

import cases

MIN_SETS = 3
# bf16 rounds h and y: relative errors of a few thousandths. One wrong row of the sample would be several hundredths.
MOST_ERROR = 1e-2
SAMPLED_TOKENS = 256


class Lines:
    """The file that everything goes to as it comes."""

    def __init__(self, path):
        self.file = open(path, "w", encoding="utf-8")

    def add(self, kind, **values):
        self.file.write(json.dumps({"kind": kind, **values}) + "\n")
        self.file.flush()


def sets_of(shape, l2_bytes):
    """As many sets of weights as our own bench rotates."""
    return max(MIN_SETS, math.ceil(3 * l2_bytes / (6 * shape.experts * shape.width * shape.hidden)))


def problem_of(case, sets, device, dtype):
    """Random tensors of a case."""
    import layers
    import torch

    shape, widths = case.shape, cases.widths_of(case.widths, case.shape)
    ids = cases.routed(case.routing, shape, case.tokens)
    generator = torch.Generator(device).manual_seed(5)
    scale = math.sqrt(3.0 / shape.hidden)
    noise = lambda rows, scale: torch.empty(rows, shape.hidden, dtype=dtype, device=device).uniform_(
        -scale, scale, generator=generator)
    weights = torch.empty(len(ids), device=device).uniform_(0.05, 0.2, generator=generator)
    gate, up, down_t = ([noise(sum(widths), scale) for _ in range(sets)] for _ in range(3))
    x = [noise(case.tokens, math.sqrt(3.0)) for _ in range(sets)]
    ids = torch.tensor(ids, dtype=torch.int32, device=device)
    return layers.Problem(shape.hidden, shape.top_k, widths, ids, weights, x, gate, up, down_t)


def error_of(peer):
    """The largest relative error of the first and the last set's outputs; infinite where one was not written."""
    import layers
    import torch

    problem, worst = peer.problem, 0.0
    tokens = torch.randperm(problem.tokens, device=problem.device)[:SAMPLED_TOKENS]
    for set_ in {0, problem.sets - 1}:
        peer.poison()
        peer.layer(set_)
        want = layers.reference(problem, set_, tokens)
        off, size = (peer.out[tokens].double() - want).norm().item(), want.norm().item()
        error = off / size if size else (0.0 if off == 0 else math.inf)
        worst = max(worst, error if peer.out.isfinite().all().item() else math.inf)
    return worst


def peers_of(problem, weights):
    """Name, whether it is our own code, and what makes it."""
    import layers

    padded = ", padded" if len({problem.widths[e] for e in problem.live}) > 1 else ""
    makers = [(cls, cls.name + padded, own, lambda cls=cls: cls(problem, weights()))
              for cls, own in [(layers.TorchGrouped, False), (layers.TritonFused, True), (layers.DeepGemm, False)]]
    makers.append((layers.TritonGrouped, layers.TritonGrouped.name, True, lambda: layers.TritonGrouped(problem)))
    return makers


def measure(peer, clock):
    """Seconds of everything that is compared, by its name in the report."""
    sets = peer.problem.sets
    peer.group()
    peer.gather(0)
    works = {"experts": peer.experts, "layer": peer.layer}
    if peer.has_products:
        works["products"] = peer.products
    return {what: clock.seconds(work, sets) for what, work in works.items()}


class Bench:
    """One run."""

    def __init__(self, lines, clock, device, dtype, ceilings, l2_bytes):
        self.lines, self.clock, self.device, self.dtype = lines, clock, device, dtype
        self.ceilings, self.l2_bytes = ceilings, l2_bytes
        self.failures = 0

    def case(self, case):
        import layers

        problem = problem_of(case, sets_of(case.shape, self.l2_bytes), self.device, self.dtype)
        # Made once, by the first that needs them.
        weights = functools.cache(lambda: layers.padded_weights(problem))
        first = None
        for cls, name, own, make in peers_of(problem, weights):
            times = self.peer(case, name, own, make)
            if times and first is None:
                first = (name, make, times)
        if first:
            self.drift(case, *first)

    def peer(self, case, name, own, make):
        """Checks, tunes and times one; None where it could not be measured."""
        import torch

        try:
            peer = make()
            peer.tune(lambda work: self.clock.seconds(work, peer.problem.sets, budget=0.02, samples=3)[0])
            error = error_of(peer)
            if not error <= MOST_ERROR:
                self.failures += 1
                self.lines.add("wrong", **case.names(), peer=name, error=str(error))
                return None
            times = measure(peer, self.clock)
        except torch.cuda.OutOfMemoryError:
            self.out_of_memory(case, name)
        except ImportError as missing:
            self.lines.add("left_out", **case.names(), peer=name, why=str(missing))
        except Exception as failed:
            # After a fault of the GPU nothing can be measured any more: this raises it again.
            self.clock.wait()
            self.failures += own
            words = f"{type(failed).__name__}: {failed}"
            self.lines.add("failed" if own else "left_out", **case.names(), peer=name, why=words[:300])
        else:
            self.rows(case, name, peer, times, error)
            return times
        return None

    def rows(self, case, name, peer, times, error):
        problem = peer.problem
        flops, bytes_ = cases.cost(case.shape, case.tokens, problem.widths, problem.ids.tolist())
        floor, bound = cases.floor(flops, bytes_, self.ceilings)
        for what, (seconds, launched) in times.items():
            self.lines.add(
                "row", **case.names(), peer=name, what=what, p50_us=seconds * 1e6, launched=launched, error=error,
                flops=flops, bytes=bytes_, floor_us=floor * 1e6, bound=bound, share_of_floor=floor / seconds,
                useful_tflops=flops / seconds / 1e12, gb_per_s=bytes_ / seconds / 1e9,
                share_of_flops_ceiling=flops / seconds / self.ceilings["flops"],
                share_of_bytes_ceiling=bytes_ / seconds / self.ceilings["bytes"],
                padded_to=getattr(peer, "width", None), config=[str(c) for c in peer.config or []])

    def out_of_memory(self, case, name):
        import torch

        self.lines.add("left_out", **case.names(), peer=name, why="out of GPU memory")
        torch.cuda.empty_cache()

    def drift(self, case, name, make, times):
        import torch

        try:
            found = measure(make(), self.clock)
        except torch.cuda.OutOfMemoryError:
            self.out_of_memory(case, f"{name}, again")
            return
        for what, (again, _) in found.items():
            first = times[what][0]
            self.lines.add("drift", **case.names(), peer=name, what=what, first_us=first * 1e6, again_us=again * 1e6,
                           drift=again / first - 1.0)


def run(path, selection):
    lines = Lines(path)

    def nothing(why):
        lines.add("left_out", peer="every peer", why=why)
        print(f"left out: every peer: {why}", file=sys.stderr)
        return 0

    try:
        import torch
        import triton
    except ImportError as missing:
        return nothing(str(missing))
    if not torch.cuda.is_available():
        return nothing("PyTorch sees no GPU")
    import clock

    device = torch.device("cuda", 0)
    properties = torch.cuda.get_device_properties(device)
    timer = clock.GpuClock(device)
    ceilings = clock.ceilings(timer, device)
    lines.add("run", format="tenp-gpu-peers", version=1, gpu=properties.name, torch=torch.__version__,
              triton=triton.__version__, cuda=torch.version.cuda, l2_bytes=properties.L2_cache_size,
              multiprocessors=properties.multi_processor_count, selection=selection,
              ceilings={"cublas_8192_tflops": ceilings["flops"] / 1e12, "copy_gb_per_s": ceilings["bytes"] / 1e9},
              shapes=[vars(shape) for shape in cases.SHAPES])
    bench = Bench(lines, timer, device, torch.bfloat16, ceilings, properties.L2_cache_size)
    for case in cases.selected(selection):
        print(*case.names().values(), sep=", ", file=sys.stderr, flush=True)
        bench.case(case)
        torch.cuda.empty_cache()
    return 1 if bench.failures else 0


def main(arguments):
    selection = os.environ.get("TENP_GPU_BENCH", "short")
    if len(arguments) != 1 or arguments[0].startswith("-") or not cases.selected(selection):
        if len(arguments) == 1 and not arguments[0].startswith("-"):
            names = ", ".join(shape.name for shape in cases.SHAPES)
            print(f"TENP_GPU_BENCH={selection}: neither short, full, nor the beginning of {names}", file=sys.stderr)
        else:
            print(__doc__, file=sys.stderr)
        return 2
    return run(arguments[0], selection)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
