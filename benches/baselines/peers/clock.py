"""Times by the GPU's own clock, as benches/gpu_moe.rs takes them: the median of samples of many runs each."""

import statistics

import torch

SAMPLES = 10
FEWEST_SAMPLES = 5
SECONDS = 0.2


class GpuClock:
    """Work goes through the sets in turn, as one CUDA graph where it can be captured: no launch is waited for."""

    def __init__(self, device):
        self.device = device

    def seconds(self, work, sets, budget=SECONDS, samples=SAMPLES):
        """Median seconds of one run, and how it was launched."""
        for set_ in range(sets):
            work(set_)
        graph = self.captured(work, sets)
        if graph is None:
            run = lambda: [work(set_) for set_ in range(sets)]
        else:
            run = graph.replay
        run()
        once = max(self.timed(run, 1), 1e-7)
        samples = max(min(samples, FEWEST_SAMPLES), min(samples, int(4 * budget / once)))
        repeats = max(1, round(budget / samples / once))
        times = [self.timed(run, repeats) / (repeats * sets) for _ in range(samples)]
        return statistics.median(times), "stream" if graph is None else "graph"

    def wait(self):
        torch.cuda.synchronize(self.device)

    def captured(self, work, sets):
        self.wait()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph):
                for set_ in range(sets):
                    work(set_)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            # Work that waits for the GPU cannot be captured; and PyTorch then leaves the capture's stream the current one.
            torch.cuda.set_stream(stream)
            self.wait()
            return None
        return graph

    def timed(self, run, repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3


def ceilings(clock, device):
    """A product of 8192³ in bf16 and a copy of 2 GiB, as our own bench measures them: FLOP/s and byte/s."""
    size, copied = 8192, 2 << 30
    inputs = [torch.empty(size, size, dtype=torch.bfloat16, device=device).uniform_(-1, 1) for _ in range(4)]
    out = torch.empty(size, size, dtype=torch.bfloat16, device=device)
    product, _ = clock.seconds(lambda s: torch.mm(inputs[s], inputs[s + 1].T, out=out), 3)
    del inputs, out
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))
    copy, _ = clock.seconds(lambda _: target.copy_(source), 1)
    return {"flops": 2.0 * size**3 / product, "bytes": 2.0 * copied / copy}
