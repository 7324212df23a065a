"""What is measured: the shapes, widths and routings of benches/gpu/cases.rs, number for number.

Our own bench draws widths and routings with rand's ChaCha8 (`seed_from_u64`, `random_range` of f64); the same draws are
made here, so both sides do the same work. The report checks it: it compares the FLOPs and bytes that either side counted.
FLOPs, bytes and floors are those of kernels/cost.rs. Needs nothing but Python.
"""

import bisect
import functools
import itertools
from dataclasses import dataclass

MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Shape:
    """A MoE layer's sizes."""

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int


# The last has a quarter of its model's experts, as in our own bench.
SHAPES = [
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Shape("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
    Shape("Qwen2-57B-A14B", 3584, 2560, 64, 8),
    Shape("DeepSeek-V3, 64 experts", 7168, 2048, 64, 8),
]
WIDTHS = ["full", "uniform 75 %", "ragged 75 %", "ragged 50 %", "one whole expert", "some zero"]
ROUTINGS = ["uniform", "zipf", "many empty"]
TOKENS = [1, 8, 64, 512, 2048, 8192, 65_536]


def chacha_block(key, counter, double_rounds):
    """The 16 words of a block (Bernstein, ChaCha, a variant of Salsa20), with a 64-bit counter and stream 0."""
    begin = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *key, counter & MASK, counter >> 32, 0, 0]
    x = begin.copy()
    for _ in range(double_rounds):
        for a, b, c, d in QUARTERS:
            p, q, r, s = x[a], x[b], x[c], x[d]
            p = (p + q) & MASK
            s ^= p
            s = (s << 16 | s >> 16) & MASK
            r = (r + s) & MASK
            q ^= r
            q = (q << 12 | q >> 20) & MASK
            p = (p + q) & MASK
            s ^= p
            s = (s << 8 | s >> 24) & MASK
            r = (r + s) & MASK
            q ^= r
            x[a], x[b], x[c], x[d] = p, (q << 7 | q >> 25) & MASK, r, s
    return [(after + before) & MASK for after, before in zip(x, begin)]


QUARTERS = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
            (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]


def key_of(seed):
    """A key of 8 words from a small number, as rand_core 0.10 makes it: PCG32's outputs."""
    words = []
    for _ in range(8):
        seed = (seed * 0x5851F42D4C957F2D + 0xA17654E46FBE17F3) % 2**64
        shifted, turn = ((seed >> 18 ^ seed) >> 27) & MASK, seed >> 59
        words.append((shifted >> turn | shifted << (32 - turn)) & MASK)
    return words


def uniforms(seed):
    """rand 0.10's ChaCha8 numbers in [0, 1), of 52 bits each."""
    key = key_of(seed)
    for counter in itertools.count():
        block = chacha_block(key, counter, 4)
        for low, high in zip(block[::2], block[1::2]):
            yield ((high << 32 | low) >> 12) / 2**52


def ragged(shape, share):
    """Whole for one expert in six, the others up to a quarter around what meets the mean, in steps of 8."""
    full, count = shape.width, shape.experts
    numbers, whole = uniforms(7), -(-count // 6)
    rest = (share * float(full * count) - float(full * whole)) / float(count - whole)
    widths = []
    for e in range(count):
        swing = next(numbers) * 0.25 * rest
        eighths = (rest + (swing if e % 2 == 0 else -swing)) / 8.0
        # Rust rounds halves away from zero.
        rounded = int(eighths) + (eighths - int(eighths) >= 0.5)
        widths.append(min(max(max(rounded, 0) * 8, 8), full))
    for w in range(whole):
        widths[w * count // whole] = full
    return widths


def widths_of(name, shape):
    """The width of every expert."""
    full, count = shape.width, shape.experts
    match name:
        case "full":
            return [full] * count
        case "uniform 75 %":
            return [full * 3 // 4] * count
        case "ragged 75 %":
            return ragged(shape, 0.75)
        case "ragged 50 %":
            return ragged(shape, 0.5)
        case "one whole expert":
            return [full if e == count // 2 else full // 4 for e in range(count)]
        case "some zero":
            return [0 if e % 4 == 3 else full for e in range(count)]
    raise ValueError(f"no widths are called {name}")


@functools.cache
def draws(experts, top_k, routing):
    """The draws of a routing and the ids they gave so far: fewer tokens have the first of the same ids."""
    count = max(experts // 4, top_k) if routing == "many empty" else experts
    weight = (lambda rank: 1.0 / (rank + 1.0)) if routing == "zipf" else (lambda _: 1.0)
    return uniforms(11), list(itertools.accumulate(map(weight, range(count)))), []


def routed(routing, shape, tokens):
    """`tokens · top_k` ids: different experts of every token."""
    if routing not in ROUTINGS:
        raise ValueError(f"no routing is called {routing}")
    numbers, cumulative, ids = draws(shape.experts, shape.top_k, routing)
    total, last = cumulative[-1], len(cumulative) - 1
    while len(ids) < tokens * shape.top_k:
        first = len(ids)
        while len(ids) < first + shape.top_k:
            rank = min(bisect.bisect_right(cumulative, next(numbers) * total), last)
            # Popular experts are spread over the layer.
            expert = (rank * 37 + 5) % shape.experts
            if expert not in ids[first:]:
                ids.append(expert)
    return ids[: tokens * shape.top_k]


@dataclass(frozen=True)
class Case:
    """One row of the report."""

    shape: Shape
    tokens: int
    widths: str
    routing: str

    def names(self):
        """What a row of the report is found by."""
        return {"shape": self.shape.name, "tokens": self.tokens, "widths": self.widths, "routing": self.routing}


def cases(shape, selection):
    """`short`: what fits into a few minutes; `full`: every combination. Sorted as our own bench's."""
    if selection == "full":
        return [Case(shape, t, w, r) for t in TOKENS for w in WIDTHS for r in ROUTINGS]
    made = []
    for tokens in TOKENS:
        some = WIDTHS[:4] if tokens in (64, 8192) else WIDTHS[:1]
        made += [Case(shape, tokens, widths, "uniform") for widths in some]
    made += [Case(shape, 8192, widths, "uniform") for widths in WIDTHS[4:]]
    made += [Case(shape, 512, "ragged 75 %", routing) for routing in ROUTINGS[1:]]
    return made


def selected(selection):
    """All cases of `short`, of `full`, or of the shapes whose name begins so."""
    shapes = [s for s in SHAPES if selection in ("short", "full") or s.name.startswith(selection)]
    return [case for shape in shapes for case in cases(shape, selection)]


def cost(shape, tokens, widths, ids):
    """Useful FLOPs and least bytes of a forward pass: `MoeWork::forward_flops` and `forward_bytes`."""
    rows = [0] * shape.experts
    for expert in ids:
        rows[expert] += 1
    pairs = sum(r * w for r, w in zip(rows, widths))
    neurons = sum(w for r, w in zip(rows, widths) if r > 0)
    return 6.0 * pairs * shape.hidden, (6.0 * neurons + 4.0 * tokens) * shape.hidden


def floor(flops, bytes_, ceilings):
    """Seconds that nobody can beat, and why."""
    arithmetic, memory = flops / ceilings["flops"], bytes_ / ceilings["bytes"]
    return (arithmetic, "flops") if arithmetic > memory else (memory, "bytes")
