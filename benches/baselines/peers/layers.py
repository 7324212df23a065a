"""The peers: one MoE layer each, from routed tokens to their combined outputs, in steps that can be timed alone.

| step | what it does |
|---|---|
| `group` | sorts the slots by expert |
| `gather(set)` | copies tokens into that order, where the products cannot |
| `experts(set)` | gate and up products, SwiGLU, down product |
| `products(set)` | the two products alone, where SwiGLU is a launch of its own |
| `combine` | the weighted sum of every token's outputs |
"""

import importlib
from dataclasses import dataclass

import torch
import triton

import fused
import glue
import grouped


@dataclass(frozen=True)
class Config:
    """How a Triton product is cut: tokens × outputs × depth, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def __str__(self):
        return f"{self.m}x{self.n}x{self.k}, {self.warps} warps, {self.stages} stages"


# All fit into a Hopper block's shared memory, also with two weight tiles in a stage.
CONFIGS = [
    Config(16, 32, 256, 4, 4), Config(16, 64, 128, 4, 4), Config(16, 128, 64, 4, 5), Config(32, 64, 128, 4, 4),
    Config(32, 128, 64, 4, 4), Config(64, 64, 64, 4, 4), Config(64, 128, 64, 4, 4), Config(128, 64, 64, 8, 4),
    Config(128, 128, 64, 8, 3), Config(128, 128, 32, 8, 4),
]


def configs_for(rows_per_group):
    """Those worth trying: blocks of tokens from a quarter of a group's rows to twice as many."""
    most = max(16, triton.next_power_of_2(int(rows_per_group)) * 2)
    return [c for c in CONFIGS if min(64, most // 8) <= c.m <= most]


@dataclass
class Problem:
    """A case's tensors. Weights are at real widths, one entry per set, one tensor per expert: views of flat memory."""

    hidden: int
    top_k: int
    widths: list
    ids: torch.Tensor
    slot_weights: torch.Tensor
    x: list
    gate: list
    up: list
    down_t: list

    def __post_init__(self):
        self.device = self.ids.device
        self.experts = len(self.widths)
        self.tokens = self.x[0].shape[0]
        self.slots = self.ids.numel()
        self.sets = len(self.x)
        self.live = [e for e, width in enumerate(self.widths) if width > 0]
        self.firsts = [sum(self.widths[:e]) for e in range(self.experts)]
        group = {e: g for g, e in enumerate(self.live)}
        self.group_of_expert = self.ints([group.get(e, -1) for e in range(self.experts)])

    def ints(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def empty(self, *shape):
        return torch.empty(shape, dtype=self.x[0].dtype, device=self.device)

    def rows_per_group(self):
        return self.slots / max(1, min(len(self.live), self.slots))

    def slice(self, tensors, set_, expert):
        first = self.firsts[expert]
        return tensors[set_][first : first + self.widths[expert]]


def reference(problem, set_, tokens):
    """The layer's outputs of some tokens in f64, as a loop over experts."""
    out = torch.zeros(len(tokens), problem.hidden, dtype=torch.float64, device=problem.device)
    ids = problem.ids.view(-1, problem.top_k)[tokens]
    weights = problem.slot_weights.view(-1, problem.top_k)[tokens].double()
    x = problem.x[set_][tokens].double()
    for expert in problem.live:
        place, slot = (ids == expert).nonzero(as_tuple=True)
        if len(place):
            gate, up, down_t = (problem.slice(part, set_, expert).double()
                                for part in (problem.gate, problem.up, problem.down_t))
            h = torch.nn.functional.silu(x[place] @ gate.T) * (x[place] @ up.T)
            out.index_add_(0, place, (h @ down_t) * weights[place, slot, None])
    return out


def padded_weights(problem, multiple=8):
    """Experts that have neurons as [E, 2W, H] and [E, H, W], W the widest: what kernels of one width need."""
    width = -(-max(problem.widths) // multiple) * multiple
    gate_up, down = [], []
    for set_ in range(problem.sets):
        both = problem.empty(len(problem.live), 2 * width, problem.hidden).zero_()
        back = problem.empty(len(problem.live), problem.hidden, width).zero_()
        for group, expert in enumerate(problem.live):
            own = problem.widths[expert]
            both[group, :own] = problem.slice(problem.gate, set_, expert)
            both[group, width : width + own] = problem.slice(problem.up, set_, expert)
            back[group, :, :own] = problem.slice(problem.down_t, set_, expert).T
        gate_up.append(both)
        down.append(back)
    return gate_up, down, width


class Peer:
    """What all have in common."""

    name = ""
    align = 1
    gathers = False
    has_products = False

    def __init__(self, problem):
        self.problem, self.config = problem, None
        self.regroup(self.align)
        self.out = problem.empty(problem.tokens, problem.hidden)

    def regroup(self, align):
        problem = self.problem
        self.groups = glue.Groups(problem.ids, problem.group_of_expert, len(problem.live), problem.top_k, align)

    def group(self):
        self.groups.run()

    def gather(self, set_):
        pass

    def combine(self):
        self.groups.combine(self.y, self.problem.slot_weights, self.out)

    def layer(self, set_):
        self.group()
        self.gather(set_)
        self.experts(set_)
        self.combine()

    def poison(self):
        """So that what is not written, or read where nothing was written, is seen."""
        for buffer in self.buffers():
            buffer.fill_(float("nan"))

    def buffers(self):
        return [self.out]

    def tune(self, seconds_of):
        """Chooses among configurations, where there are any, by the seconds of each."""


class Gathering(Peer):
    """Products of a library between our launches: tokens gathered before, SwiGLU between."""

    gathers = True
    has_products = True

    def __init__(self, problem, weights):
        super().__init__(problem)
        self.gate_up, self.down, self.width = weights
        self.gathered = problem.empty(self.groups.capacity, problem.hidden)
        self.h = problem.empty(self.groups.capacity, self.width)
        # Rows that nobody fills are still rows of a product.
        for buffer in (self.gathered, self.h):
            buffer.uniform_(-1, 1)

    def gather(self, set_):
        self.groups.gather(self.problem.x[set_], self.gathered)

    def experts(self, set_):
        both = self.product(self.gathered, self.gate_up[set_], "both")
        self.groups.swiglu(both, self.h)
        self.y = self.product(self.h, self.down[set_], "y")

    def products(self, set_):
        self.product(self.gathered, self.gate_up[set_], "both")
        self.y = self.product(self.h, self.down[set_], "y")


class TorchGrouped(Gathering):
    """torch._grouped_mm."""

    name = "torch._grouped_mm"

    def product(self, a, weights, _):
        return torch._grouped_mm(a, weights.transpose(1, 2), offs=self.groups.ends)


class DeepGemm(Gathering):
    """DeepGEMM's grouped product over contiguous rows: groups aligned to its blocks."""

    name = "DeepGEMM"

    def __init__(self, problem, weights):
        self.library = deep_gemm()
        self.align = alignment(self.library)
        super().__init__(problem, weights)
        rows = self.groups.capacity
        self.outputs = {"both": problem.empty(rows, 2 * self.width), "y": problem.empty(rows, problem.hidden)}

    def product(self, a, weights, which):
        out = self.outputs[which]
        self.library.m_grouped_bf16_gemm_nt_contiguous(a, weights, out, self.groups.group_of_row)
        return out


def deep_gemm():
    """The library, or an ImportError that says what is missing."""
    library = importlib.import_module("deep_gemm")
    if not hasattr(library, "m_grouped_bf16_gemm_nt_contiguous"):
        raise ImportError("deep_gemm has no m_grouped_bf16_gemm_nt_contiguous: too old")
    return library


def alignment(library):
    """Rows that a group's beginning must be a multiple of; the name has changed over the versions."""
    for name in ("get_mk_alignment_for_contiguous_layout", "get_m_alignment_for_contiguous_layout"):
        if hasattr(library, name):
            return getattr(library, name)()
    return 128


class TritonFused(Peer):
    """A fused MoE of the usual shape, at one width."""

    name = "Triton fused MoE"

    def __init__(self, problem, weights, config=None):
        self.gate_up, self.down, self.width = weights
        super().__init__(problem)
        self.use(config or configs_for(problem.rows_per_group())[0])

    def use(self, up, down=None):
        self.config = (up, down or up)
        self.regroup(up.m)
        # The old ones go before new ones come: they are gigabytes.
        self.h = self.y = None
        self.h = self.problem.empty(self.groups.capacity, self.width)
        self.y = self.problem.empty(self.groups.capacity, self.problem.hidden)

    def buffers(self):
        return [self.h, self.y, self.out]

    def run_gate_up(self, set_):
        fused.gate_up(self.groups, self.problem.x[set_], self.gate_up[set_], self.h, self.config[0])

    def run_down(self, set_):
        fused.down(self.groups, self.h, self.down[set_], self.y, self.config[1])

    def experts(self, set_):
        self.run_gate_up(set_)
        self.run_down(set_)

    def tune(self, seconds_of):
        """Both launches share their blocks of tokens, so the best pair of each block size is compared."""
        found = []
        for m in sorted({c.m for c in configs_for(self.problem.rows_per_group())}):
            pair, total = [], 0.0
            for launch in (self.run_gate_up, self.run_down):
                seconds, config = fastest(self, [c for c in CONFIGS if c.m == m], launch, seconds_of)
                pair.append(config)
                total += seconds
            found.append((total, pair))
        self.use(*min(found, key=lambda f: f[0])[1])


def fastest(peer, configs, launch, seconds_of):
    """The seconds and the name of the best; one that needs more than the GPU has is passed over."""
    found = []
    for config in configs:
        peer.use(config)
        peer.group()
        try:
            # The down product's time must be that of real numbers.
            peer.experts(0)
            found.append((seconds_of(launch), config))
        except triton.runtime.errors.OutOfResources:
            continue
    if not found:
        raise RuntimeError(f"none of {', '.join(map(str, configs))} runs on this GPU")
    return min(found, key=lambda f: f[0])


class TritonGrouped(Peer):
    """Our own Triton kernels with a width per group."""

    name = "Triton grouped, a width per group"

    def __init__(self, problem, config=None):
        super().__init__(problem)
        widths = [problem.widths[e] for e in problem.live]
        self.widths = problem.ints(widths)
        self.step = 8 if all(w % 8 == 0 for w in widths) else 1
        self.neurons = problem.ints([problem.firsts[e] for e in problem.live])
        self.tile_ends = [problem.ints([0] * len(widths)) for _ in range(2)]
        self.h = problem.empty(problem.slots, max(widths))
        self.y = problem.empty(problem.slots, problem.hidden)
        # Small tiles leave room for two programs on a multiprocessor.
        self.programs = 2 * multiprocessors(problem.device)
        self.use(config or configs_for(problem.rows_per_group())[0])

    def use(self, up, down=None):
        self.config = (up, down or up)

    def buffers(self):
        return [self.h, self.y, self.out]

    def tiles(self):
        grouped.tiles(self.groups, self.widths, *self.tile_ends, self.problem.hidden, *self.config)

    def run_gate_up(self, set_):
        problem = self.problem
        grouped.gate_up(self.programs, self.groups, problem.x[set_], problem.gate[set_], problem.up[set_], self.h,
                        self.widths, self.step, self.neurons, self.tile_ends[0], self.config[0])

    def run_down(self, set_):
        grouped.down(self.programs, self.groups, self.h, self.problem.down_t[set_], self.y, self.widths, self.step,
                     self.neurons, self.tile_ends[1], self.config[1])

    def experts(self, set_):
        self.tiles()
        self.run_gate_up(set_)
        self.run_down(set_)

    def tune(self, seconds_of):
        chosen = []
        for launch in (self.run_gate_up, self.run_down):
            def with_tiles(set_, launch=launch):
                self.tiles()
                launch(set_)
            configs = configs_for(self.problem.rows_per_group())
            chosen.append(fastest(self, configs, with_tiles, seconds_of)[1])
        self.use(*chosen)


def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
