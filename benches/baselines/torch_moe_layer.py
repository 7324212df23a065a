#!/usr/bin/env python3
"""One MoE layer of DeepSeek-V2-Lite's shape in plain PyTorch, as a speed baseline.

H 2048, I 1408, 64 experts, top-6, 4096 tokens by default: routed experts only,
forward only, as a loop over experts (index_select, three linears, silu · up,
index_add of the weighted output). Two spellings of the loop, of which the faster
counts: three linears, or gate and up as one linear. For comparison, one dense
matrix product with exactly the same number of floating-point operations. Routing comes from a
seeded softmax router on random x, so it is close to uniform.

    torch_moe_layer.py [--dtype bf16|f32] [--threads 2]

Prints JSON: median and fastest seconds of --repeat runs after a warm-up, and GFLOP/s
of the median.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F


def route(x, router, top_k):
    """Per expert: the ids of its tokens and their weights."""
    score = F.linear(x.float(), router).softmax(-1)
    weight, chosen = score.topk(top_k, dim=-1)
    plan = []
    for expert in range(router.shape[0]):
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        plan.append((token, weight[token, slot, None].to(x.dtype)))
    return plan


def three_linears(x, plan, gate_up, down):
    width = down.shape[2]
    out = torch.zeros_like(x)
    for expert, (token, weight) in enumerate(plan):
        if token.numel():
            mine = x.index_select(0, token)
            h = F.silu(F.linear(mine, gate_up[expert, :width])) * F.linear(mine, gate_up[expert, width:])
            out.index_add_(0, token, F.linear(h, down[expert]) * weight)
    return out


def gate_up_fused(x, plan, gate_up, down):
    out = torch.zeros_like(x)
    for expert, (token, weight) in enumerate(plan):
        if token.numel():
            gate, up = F.linear(x.index_select(0, token), gate_up[expert]).chunk(2, dim=-1)
            out.index_add_(0, token, F.linear(F.silu(gate) * up, down[expert]) * weight)
    return out


def seconds_of(work, repeat):
    """Median and fastest of the runs after a warm-up."""
    work()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), min(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1408)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[args.dtype]

    def random(*shape, scale):
        return torch.empty(*shape, dtype=dtype).uniform_(-scale, scale)

    x = torch.randn(args.tokens, args.hidden).to(dtype)
    router = 0.02 * torch.randn(args.experts, args.hidden)
    gate_up = random(args.experts, 2 * args.width, args.hidden, scale=0.035)
    down = random(args.experts, args.hidden, args.width, scale=0.035)
    flop = 2 * args.tokens * args.top_k * 3 * args.hidden * args.width

    def measured(work):
        seconds, fastest = seconds_of(work, args.repeat)
        return {"seconds": round(seconds, 4), "fastest_seconds": round(fastest, 4), "gflops": round(flop / seconds / 1e9, 1)}

    with torch.no_grad():
        plan = route(x, router, args.top_k)
        counts = [token.numel() for token, _ in plan]
        loops = {
            "three_linears": measured(lambda: three_linears(x, plan, gate_up, down)),
            "gate_up_fused": measured(lambda: gate_up_fused(x, plan, gate_up, down)),
        }
        routing, _ = seconds_of(lambda: route(x, router, args.top_k), args.repeat)
        del gate_up, down
        rows = torch.randn(args.tokens * args.top_k, args.hidden).to(dtype)
        dense_weight = random(3 * args.width, args.hidden, scale=0.035)
        dense = measured(lambda: F.linear(rows, dense_weight))

    best = min(loops, key=lambda name: loops[name]["seconds"])
    print(json.dumps({
        "shape": {k: getattr(args, k) for k in ("hidden", "width", "experts", "top_k", "tokens")},
        "dtype": args.dtype,
        "threads": args.threads,
        "torch": torch.__version__.split("+")[0],
        "tokens_per_expert": {"min": min(counts), "max": max(counts)},
        "gflop": round(flop / 1e9, 1),
        "routing_seconds": round(routing, 4),
        "loops": loops,
        "best": {"loop": best, **loops[best]},
        "dense_same_flop": dense,
    }, indent=2))


if __name__ == "__main__":
    main()
